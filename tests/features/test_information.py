"""PCRLv1's information test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pcrl_nnunet.features import information as module
from pcrl_nnunet.features.information import PlaceOfANeighbour, TurnOfACrop, drawn, information, questions
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.plans import PlanFacts

FLAT = PlanFacts("2d", (16, 12), 2, ((1, 1), (2, 2)), (16.0, 12.0), (1.0, 1.0))
SOLID = PlanFacts("3d_fullres", (8, 16, 16), 2, ((1, 1, 1), (1, 2, 2)), (8.0, 16.0, 16.0), (5.0, 1.0, 1.0))


def test_questions_follow_the_plan() -> None:
    turn, place = questions(FLAT)
    assert (tuple(turn.size), len(turn.answers)) == ((12, 12), 4)
    assert (list(place.size), len(place.answers)) == ([8, 6], 8)
    turn, place = questions(SOLID)
    assert len(turn.answers) == 6  # a plane of quarter turns, and half turns in the two others
    assert (list(place.size), len(place.answers)) == ([4, 8, 8], 6)


def test_a_neighbour_touches_its_crop_on_the_side_of_the_answer() -> None:
    rows, columns = np.meshgrid(np.arange(40), np.arange(30), indexing="ij")
    volume = np.stack([rows, columns])[:, None].astype(np.float32)  # two channels: the coordinates
    _, place = questions(FLAT)
    assert isinstance(place, PlaceOfANeighbour)
    for answer, direction in enumerate(place.answers):
        first, second = place.crops(volume, answer, np.random.default_rng(answer))
        moved = second[:, 0, 0] - first[:, 0, 0]
        np.testing.assert_array_equal(moved, [step * n for step, n in zip(direction, place.size, strict=True)])


def test_a_turned_crop_is_a_crop_turned() -> None:
    volume = np.random.default_rng(0).normal(size=(1, 3, 20, 20)).astype(np.float32)
    turn, _ = questions(FLAT)
    assert isinstance(turn, TurnOfACrop)
    plain = drawn(volume, turn.size, np.random.default_rng(5))
    for answer, expected in enumerate(turn.answers):
        (found,) = turn.crops(volume, answer, np.random.default_rng(5))
        np.testing.assert_array_equal(found, np.rot90(plain, expected.quarters, (1, 2)))


class Quadrants(nn.Module):
    """Stands for an encoder that knows all: its last stage is the brightness of the four quadrants."""

    def forward(self, image: Tensor) -> list[Tensor]:
        half = [n // 2 for n in image.shape[2:]]
        top, bottom = image[:, :, : half[0]], image[:, :, half[0] :]
        parts = [top[..., : half[1]], top[..., half[1] :], bottom[..., : half[1]], bottom[..., half[1] :]]
        return [torch.stack([part.mean((1, 2, 3)) for part in parts], 1)[..., None, None]]


class Blind(nn.Module):
    """Stands for an encoder that tells nothing."""

    def forward(self, image: Tensor) -> list[Tensor]:
        return [torch.zeros(len(image), 4, 2, 2)]


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    """Slices that brighten along both axes, unequally."""
    rows, columns = np.meshgrid(np.linspace(0, 3, 40), np.linspace(0, 1, 30), indexing="ij")
    for name in "ab":
        np.save(tmp_path / f"{name}.npy", np.stack([rows + columns] * 4)[None].astype(np.float32))
    return [Case(name, str(tmp_path / f"{name}.npy")) for name in "ab"]


def test_accuracy_is_high_with_information_and_chance_without(
    cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TRAINING", 240)
    monkeypatch.setattr(module, "HELD_OUT", 160)
    seen = list(information(Quadrants(), FLAT, cases[:1], cases[1:], 0, torch.device("cpu")))
    assert [(answer.task, answer.classes, answer.crops) for answer in seen] == [("turn", 4, 160), ("place", 8, 160)]
    assert all(answer.accuracy > 3 / answer.classes for answer in seen)
    blind = list(information(Blind(), FLAT, cases[:1], cases[1:], 0, torch.device("cpu")))
    assert [answer.accuracy for answer in blind] == [1 / 4, 1 / 8]
