"""Learning rates and the clipping of gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from pcrl_nnunet.methods.base import ParameterGroup
from pcrl_nnunet.pretraining.optimisation import GRADIENT_CLIP, CosineDecay, clip, optimiser
from pcrl_nnunet.pretraining.settings import PretrainSettings


@dataclass(frozen=True)
class Nothing:
    """Settings of no method."""


def settings(**given) -> PretrainSettings:
    return PretrainSettings("none", Nothing(), 4, epochs=3, iters_per_epoch=5, **given)


def parameter(*gradient: float) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(len(gradient)))
    made.grad = torch.tensor(gradient)
    return made


def rates(made, schedule, steps: int) -> list[list[float]]:
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in made.param_groups])
        made.step()
        schedule.step()
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rates_equal_torchs_cosine_bit_for_bit_and_end_at_zero(optimizer):
    given = settings(optimizer=optimizer, initial_lr=0.03)
    made, schedule = optimiser([ParameterGroup([parameter(1.0)]), ParameterGroup([parameter(1.0)], 0.1)], given)
    plain = torch.optim.SGD([{"params": [parameter(1.0)], "lr": lr} for lr in (0.03, 0.03 * 0.1)])
    expected = rates(plain, CosineAnnealingLR(plain, given.steps), given.steps)
    assert rates(made, schedule, given.steps) == expected
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0, 0], abs=1e-12)


def test_a_group_that_does_not_decay_keeps_its_rate_beside_one_that_does():
    groups = [ParameterGroup([parameter(1.0)]), ParameterGroup([parameter(1.0)], 10.0, decays=False)]
    made, schedule = optimiser(groups, settings(initial_lr=0.03))
    found = rates(made, schedule, 15)
    assert {kept for _, kept in found} == {0.03 * 10.0}
    alone, schedule_alone = optimiser(groups[:1], settings(initial_lr=0.03))
    assert [decayed for decayed, _ in found] == [rate for (rate,) in rates(alone, schedule_alone, 15)]


def test_a_schedule_resumes_from_its_state():
    def made():
        return optimiser([ParameterGroup([parameter(1.0)]), ParameterGroup([parameter(1.0)], decays=False)], settings())

    whole = rates(*made(), 15)
    first, second = made(), made()
    rates(*first, 6)
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    assert isinstance(second[1], CosineDecay)
    assert rates(*second, 9) == whole[6:]


@pytest.mark.parametrize(("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_optimiser_follows_the_settings(name, kind):
    made, _ = optimiser([ParameterGroup([parameter(1.0)])], settings(optimizer=name, weight_decay=0.02, momentum=0.8))
    assert type(made) is kind
    assert made.param_groups[0]["weight_decay"] == 0.02
    if name == "sgd":
        assert made.param_groups[0]["momentum"] == 0.8


def test_gradients_of_groups_without_a_clip_of_their_own_are_clipped_together():
    one, other = parameter(9.0 * 3), parameter(0.0, 12.0 * 3)  # the gradients' norm is 45
    norm = clip([ParameterGroup([one]), ParameterGroup([other])])
    assert norm == pytest.approx(45.0)
    assert torch.cat([one.grad, other.grad]).norm() == pytest.approx(GRADIENT_CLIP, rel=1e-4)
    assert one.grad[0] / other.grad[1] == pytest.approx(9 / 12)


def test_a_group_with_a_clip_of_its_own_is_clipped_alone():
    small, large = parameter(3.0, 4.0), parameter(0.0, 12.0)
    norm = clip([ParameterGroup([small]), ParameterGroup([large], clip=1.0)])
    assert norm == pytest.approx(13.0)
    assert small.grad.tolist() == [3.0, 4.0]
    assert large.grad.norm() == pytest.approx(1.0, rel=1e-4)


def test_the_norm_covers_all_groups_with_clips_of_their_own():
    one, other = parameter(3.0), parameter(4.0)
    assert clip([ParameterGroup([one], clip=1.0), ParameterGroup([other], clip=9.0)]) == pytest.approx(5.0)
    assert [one.grad.item(), other.grad.item()] == pytest.approx([1.0, 4.0], rel=1e-4)


@pytest.mark.parametrize("own", [None, 1.0])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(own):
    norm = clip([ParameterGroup([parameter(1.0)]), ParameterGroup([parameter(float("inf"))], clip=own)])
    assert not torch.isfinite(norm)
