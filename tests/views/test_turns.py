"""Turns by 90 and 180 degrees, and the crops that they keep."""

from __future__ import annotations

import numpy as np
import pytest

from pcrl_nnunet.views.turns import Turn, turnable, turns


@pytest.mark.parametrize(
    ("spacing", "number"),
    [
        ((1.0, 1.0), 4),
        ((1.0, 2.0), 2),  # none, and half a turn
        ((1.0, 1.0, 1.0), 10),  # as in Taleb et al.
        ((3.0, 1.0, 1.0), 1 + 3 + 1 + 1),  # quarters in the last plane only
        ((1.0, 2.0, 4.0), 4),
    ],
)
def test_the_number_of_turns_follows_from_the_spacing(spacing: tuple[float, ...], number: int) -> None:
    assert len(turns(spacing)) == number


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.0, 2.0, 4.0)])
def test_turns_are_all_different_and_keep_a_turnable_crop(spacing: tuple[float, ...]) -> None:
    size = turnable((12, 20, 16)[-len(spacing) :], spacing, [(2,) * len(spacing)])
    image = np.random.default_rng(0).normal(size=(2, *size))
    turned = [turn.apply(image) for turn in turns(spacing)]
    assert np.array_equal(turned[0], image)
    assert {array.shape for array in turned} == {image.shape}
    assert len({array.tobytes() for array in turned}) == len(turned)
    assert not any(np.shares_memory(array, image) for array in turned)


def test_a_quarter_turn_moves_a_voxel_as_on_paper() -> None:
    image = np.zeros((1, 3, 3))
    image[0, 0, 1] = 1  # top middle
    assert Turn((0, 1), 1).apply(image)[0, 1, 0] == 1  # counter-clockwise: left middle


@pytest.mark.parametrize(
    ("size", "spacing", "strides", "expected"),
    [
        ((40, 56, 40), (1.0, 1.0, 1.0), [(1, 1, 1), (8, 8, 8)], (40, 40, 40)),
        ((56, 40), (1.0, 1.0), [(8, 8)], (40, 40)),
        ((16, 96, 112), (7.7, 1.25, 1.25), [(4, 32, 32)], (16, 96, 96)),
        ((16, 96, 112), (7.7, 1.25, 3.0), [(4, 32, 16)], (16, 96, 112)),
        ((24, 40), (1.0, 1.2), [(8, 16)], (16, 16)),  # a multiple of both strides
        ((8, 40), (1.0, 1.0), [(8, 16)], (16, 16)),  # at least one multiple
    ],
)
def test_a_crop_gets_equal_edges_where_quarter_turns_exchange_axes(
    size: tuple[int, ...], spacing: tuple[float, ...], strides: list[tuple[int, ...]], expected: tuple[int, ...]
) -> None:
    assert turnable(size, spacing, strides) == expected
