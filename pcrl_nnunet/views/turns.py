"""Turns by 90 and 180 degrees: which ones a plan allows, and crops of a size that they keep.

A half turn keeps any shape. A quarter turn exchanges two axes. It is allowed if the spacings of both axes agree, and it
needs a crop with equal edges there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPACING_TOLERANCE = 1.25  # largest ratio of the spacings of two axes that a quarter turn may exchange


@dataclass(frozen=True)
class Turn:
    """A turn in the plane of two axes, by `quarters` times 90 degrees. With 0 quarters nothing is turned."""

    axes: tuple[int, int]
    quarters: int

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return a turned copy of (C, *size)."""
        first, second = (axis + 1 for axis in self.axes)
        return np.rot90(image, self.quarters, (first, second)).copy()


def planes_of_quarters(spacing: Sequence[float]) -> list[tuple[int, int]]:
    """Return the pairs of axes whose spacings agree, so that a quarter turn may exchange them."""
    pairs = itertools.combinations(range(len(spacing)), 2)
    return [(a, b) for a, b in pairs if max(spacing[a], spacing[b]) <= SPACING_TOLERANCE * min(spacing[a], spacing[b])]


def turns(spacing: Sequence[float], planes: Sequence[tuple[int, int]] | None = None) -> list[Turn]:
    """Return all turns in the planes of two axes, first none: 4 in 2D, 10 in 3D, fewer if spacings differ.

    A plane has turns by 90, 180 and 270 degrees if its spacings agree. Otherwise it has the half turn alone.

    Args:
        spacing: mm for each axis.
        planes: pairs of axes; default: all.
    """
    pairs = list(itertools.combinations(range(len(spacing)), 2)) if planes is None else list(planes)
    quarters = planes_of_quarters(spacing)
    turned = [Turn(axes, k) for axes in pairs for k in ((1, 2, 3) if axes in quarters else (2,))]
    return [Turn(pairs[0], 0), *turned]


def turnable(size: Sequence[int], spacing: Sequence[float], strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return a crop's size with equal edges on all axes that a quarter turn exchanges.

    The common edge is the smallest edge of these axes, rounded down to a multiple of the encoder's total stride on each
    of them, and at least one such multiple.

    Args:
        size: size of the patch, voxels.
        spacing: mm for each axis.
        strides: strides of each encoder stage.
    """
    total = [math.prod(stride[axis] for stride in strides) for axis in range(len(size))]
    edges = list(size)
    for group in _groups(len(size), planes_of_quarters(spacing)):
        multiple = math.lcm(*(total[axis] for axis in group))
        edge = max(1, min(size[axis] for axis in group) // multiple) * multiple
        for axis in group:
            edges[axis] = edge
    return tuple(edges)


def _groups(dim: int, planes: Sequence[tuple[int, int]]) -> list[set[int]]:
    """Return the sets of axes that are exchanged with each other, directly or by way of others."""
    groups: list[set[int]] = []
    for plane in planes:
        joined = [group for group in groups if group & {*plane}]
        groups = [group for group in groups if group not in joined] + [{*plane}.union(*joined)]
    return groups
