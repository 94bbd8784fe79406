"""The log's lines on pseudo-labels."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pcrl_nnunet.semi_supervised.label_facts import LabelFacts
from pcrl_nnunet.semi_supervised.watch import (
    ENOUGH,
    LEARNED,
    PATIENCE,
    Pseudo,
    Watch,
    alarms,
    as_plain,
    as_text,
    not_learned,
)

FACTS = LabelFacts(["liver", "tumour"], [0.1, 0.004], [1.0, 0.6])
CPU = torch.device("cpu")


def test_shares_and_dice_of_label_maps_are_counted_over_the_epoch() -> None:
    rng = np.random.default_rng(0)
    this = Watch(3, False, -1, CPU)
    teacher, student, compared = [], [], []
    for _ in range(3):
        labels = rng.integers(0, 3, (2, 1, 6, 7))  # never the third class
        part = rng.random((2, 1, 6, 7)) > 0.4
        logits = rng.normal(size=(2, 4, 6, 7)).astype(np.float32)
        logits[:, 3] = -9
        this.of_teacher(torch.from_numpy(labels).to(torch.int16))
        this.of_student(torch.from_numpy(logits), torch.from_numpy(np.where(part, labels, -1)).to(torch.int16))
        teacher.append(labels)
        compared.append(labels[part])
        student.append(logits.argmax(1, keepdims=True)[part])
    pseudo = this.finish_epoch(is_ddp=False)
    all_labels, wanted, given = (np.concatenate(x, axis=None) for x in (teacher, compared, student))
    assert pseudo.shares == pytest.approx([(all_labels == n).mean() for n in (1, 2, 3)])
    assert pseudo.patches == 3 * 2
    for number, dice in ((1, pseudo.agreement[0]), (2, pseudo.agreement[1])):
        a, b = wanted == number, given == number
        assert dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert np.isnan(pseudo.agreement[2])
    assert np.isnan(this.finish_epoch(is_ddp=False).shares).all()  # the next epoch has none yet


def test_shares_and_dice_of_regions_are_each_regions_own() -> None:
    rng = np.random.default_rng(0)
    this = Watch(2, True, -1, CPU)
    labels, part = rng.random((2, 2, 5, 5, 5)) > 0.6, rng.random((2, 1, 5, 5, 5)) > 0.4
    logits = rng.normal(size=(2, 2, 5, 5, 5)).astype(np.float32)
    this.of_teacher(torch.from_numpy(labels))
    this.of_student(torch.from_numpy(logits), torch.from_numpy(np.concatenate([labels, ~part], 1)))
    pseudo = this.finish_epoch(is_ddp=False)
    assert pseudo.shares == pytest.approx(labels.mean((0, 2, 3, 4)))
    wanted, given = labels & part, (logits > 0) & part
    dice = 2 * (wanted & given).sum((0, 2, 3, 4)) / (wanted.sum((0, 2, 3, 4)) + given.sum((0, 2, 3, 4)))
    assert pseudo.agreement == pytest.approx(dice)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_regions_without_a_channel_for_ignored_voxels_count_everywhere(dtype: torch.dtype) -> None:
    this = Watch(2, True, -1, CPU)
    labels = torch.zeros(1, 2, 4, 4, dtype=dtype)
    labels[:, 0, :2] = 1
    this.of_student(torch.ones(1, 2, 4, 4), labels)
    assert this.finish_epoch(is_ddp=False).agreement == pytest.approx([2 * 8 / (8 + 16), 0])


def test_a_class_of_the_labelled_cases_counts_as_learned_from_a_dice() -> None:
    facts = LabelFacts(["a", "b", "c", "d"], [0.1, 0.1, 0.1, 0.0], [1.0] * 4)
    assert not_learned([LEARNED, LEARNED - 0.01, 0.0, 0.0], facts) == ["b", "c"]  # no labelled case has d
    assert not_learned([1.0, 1.0, float("nan"), float("nan")], facts) == ["c"]  # never seen so far


def epochs(liver: float = 0.1, tumour: float = 0.004, agreement: tuple[float, float] = (0.9, 0.7)) -> list[Pseudo]:
    return [Pseudo([liver, tumour], list(agreement), ENOUGH)] * PATIENCE


FINE = epochs()[0]
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "background": ({"liver": 0.0, "tumour": 0.0}, r"^ALARM: the teacher finds almost no class .* will unlearn all"),
    "nearly background": ({"liver": 0.004, "tumour": 0.0001}, r"^ALARM: the teacher finds almost no class"),
    "all classes are rare": ({"liver": 0.006, "tumour": 0.00025}, r"^ALARM: the teacher finds almost no class"),
    "nearly only one class": ({"liver": 0.97}, r"^ALARM: the teacher labels 97% of the unlabelled voxels as liver"),
    "mostly one class": ({"liver": 0.6}, r"^ALARM: the teacher labels 60% .* as liver, and labels have 10.00%; train"),
    "lost": (
        {"tumour": 0.0001, "agreement": (0.9, float("nan"))},
        r"^WARNING: the teacher hardly finds tumour .* 0.010% of the voxels, 0.400% in the labelled ones",
    ),
    "frequent": (
        {"tumour": 0.2},
        r"^WARNING: the teacher finds much more of tumour .* 20.00% of the voxels, 0.40% in the labelled ones",
    ),
    "disagreement": (
        {"agreement": (0.9, 0.2)},
        r"^WARNING: student and teacher do not agree about tumour .* Dice is 0.20",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lasting_fault_raises_an_alarm_of_one_sentence(case: str) -> None:
    given, sentence = CASES[case]
    wrong = epochs(**given)
    (found,) = alarms(wrong, FACTS).values()
    assert re.search(sentence, found), found
    assert alarms([FINE, FINE, *wrong], FACTS) == alarms(wrong, FACTS)
    assert not alarms(wrong[1:], FACTS)  # too few epochs to tell
    assert not alarms([FINE, *wrong[1:]], FACTS)
    assert not alarms([*wrong, FINE], FACTS)  # it has passed
    assert not alarms([*wrong[1:], replace(wrong[0], patches=ENOUGH - 1)], FACTS)  # too few patches to tell


@pytest.mark.parametrize(
    "given", [{}, {"liver": 0.3}, {"tumour": 0.001}, {"tumour": 0.07}, {"agreement": (0.35, float("nan"))}]
)
def test_healthy_epochs_raise_no_alarm(given: dict[str, Any]) -> None:
    assert alarms(epochs(**given), FACTS) == {}


def test_a_class_that_the_labelled_cases_do_not_show_is_not_missed() -> None:
    facts = LabelFacts(["liver", "tumour"], [0.1, 0.0], [1.0, 0.0])
    assert alarms(epochs(tumour=0.0, agreement=(0.9, float("nan"))), facts) == {}
    assert alarms(epochs(liver=0.0, tumour=0.0), LabelFacts(["liver", "tumour"], [0.0, 0.0], [0.0, 0.0])) == {}


def test_two_classes_that_go_wrong_have_a_sentence_each() -> None:
    found = alarms(epochs(liver=0.96, tumour=0.0), FACTS)
    assert [sentence.split(":")[0] for sentence in found.values()] == ["ALARM", "WARNING"]


def test_the_line_of_the_log_and_the_checkpoint_have_all_numbers() -> None:
    assert as_text(Pseudo([0.125, 0.001], [0.876, float("nan")]), FACTS) == (
        "Pseudo-labels: liver 12.50% of the voxels (labels 10.00%), Dice of student and teacher 0.88; "
        "tumour 0.10% of the voxels (labels 0.40%), Dice of student and teacher nan"
    )
    (plain,) = as_plain([FINE])
    assert plain == {"shares": [0.1, 0.004], "agreement": [0.9, 0.7], "patches": ENOUGH}
    assert Pseudo(**plain) == FINE
