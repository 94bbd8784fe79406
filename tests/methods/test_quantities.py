"""The watched quantities on tensors with known values, and their alarms."""

import math
import re

import pytest
import torch

from pcrl_nnunet.methods.quantities import (
    COMPARISON_GRACE_STEPS,
    EARLY_STEPS,
    GRACE_STEPS,
    MATCHING,
    RANK,
    RESTORATION,
    RIGHT,
    SPREAD,
    Quantity,
    effective_rank,
    matched_minus_shuffled,
    restoration_error,
    right_over_chance,
    sd_ratio,
)


def test_the_spread_is_1_on_the_sphere_and_0_for_a_constant():
    assert sd_ratio(torch.randn(4000, 64)) == pytest.approx(1.0, abs=0.02)
    assert sd_ratio(torch.ones(100, 64)) == pytest.approx(0.0, abs=1e-6)


def test_effective_rank_counts_the_directions_that_are_used():
    directions = torch.linalg.qr(torch.randn(32, 5)).Q
    assert effective_rank(torch.randn(4000, 5) @ directions.T) == pytest.approx(5, abs=0.1)
    assert effective_rank(torch.randn(4000, 1) @ directions[:, :1].T) == pytest.approx(1, abs=0.01)


def test_the_margin_is_1_for_different_and_0_for_equal_samples():
    v = torch.eye(8)
    assert matched_minus_shuffled(v, v) == pytest.approx(1.0)
    assert matched_minus_shuffled(torch.ones(8, 8), torch.ones(8, 8)) == pytest.approx(0.0, abs=1e-6)


def test_the_mean_of_each_view_and_channel_has_a_restoration_error_of_one():
    target = torch.randn(4, 2, 3, 8, 8) * 3 + 5 * torch.randn(4, 2, 3, 1, 1)
    assert restoration_error(target.mean((3, 4), keepdim=True).expand_as(target), target) == pytest.approx(1.0)
    assert restoration_error(target, target) == 0


HEALTHY = {"restoration_error": 0.5, "margin": 0.3, "spread": 0.9, "rank": 9.0, "right_over_chance": 2.0}


@pytest.mark.parametrize("quantity", [RESTORATION, MATCHING, RIGHT, SPREAD, RANK])
def test_a_healthy_quantity_raises_no_alarm(quantity):
    assert quantity.alarm("level 1", HEALTHY) is None


@pytest.mark.parametrize(
    ("quantity", "changed", "steps", "text"),
    [
        (RESTORATION, {"restoration_error": 1.0}, GRACE_STEPS, r"restoration of level 2 is dead: its error is 1.00 of"),
        (
            RESTORATION,
            {"restoration_error": math.nan},
            GRACE_STEPS,
            r"restoration of level 2 is dead: its error is nan",
        ),
        (
            RESTORATION,
            {"restoration_error": 4.07},
            EARLY_STEPS,
            r"restoration of level 2 is far off: its error is 4.07",
        ),
        (MATCHING, {"margin": 0.01}, COMPARISON_GRACE_STEPS, r"features of level 2 do not tell scans"),
        (MATCHING, {"margin": math.nan}, COMPARISON_GRACE_STEPS, r"features of level 2 do not tell"),
        (RIGHT, {"right_over_chance": 1.0}, COMPARISON_GRACE_STEPS, r"the right answers of level 2 are 1.00 times"),
        (RIGHT, {"right_over_chance": math.nan}, COMPARISON_GRACE_STEPS, r"the right answers of level 2 are nan"),
        (RANK, {"rank": 1.5}, GRACE_STEPS, r"features of level 2 have collapsed: spread 0.90, rank 1.5;"),
        (RANK, {"spread": 0.1}, GRACE_STEPS, r"features of level 2 have collapsed: spread 0.10, rank 9.0;"),
    ],
)
def test_an_alarm_names_the_failure_the_group_and_the_first_step(quantity, changed, steps, text):
    found = quantity.alarm("level 2", {**HEALTHY, **changed})
    assert found is not None
    assert found[0] == steps
    assert re.match(text, found[1])


def test_a_method_may_watch_the_rank_without_the_spread():
    assert RANK.alarm("", {"rank": 9.0}) is None
    _, sentence = RANK.alarm("", {"rank": 1.5})
    assert sentence.startswith("features have collapsed: rank 1.5;")


def test_an_alarm_of_a_method_without_groups_names_none():
    _, sentence = RESTORATION.alarm("", {"restoration_error": 1.0})
    assert sentence.startswith("restoration is dead: its error is 1.00")


def test_right_answers_count_over_the_share_of_guessing():
    logits = torch.tensor([[0.0, 2, 1, 0], [3, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    assert right_over_chance(logits, torch.tensor([1, 0, 0, 3])) == pytest.approx(3 / 4 * 4)


def test_a_quantity_has_no_alarm_by_default():
    assert Quantity("norm", "Norm", "stays", "The norm.").alarm("", {"norm": math.nan}) is None
