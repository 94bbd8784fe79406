"""Boxes as sets of voxels."""

from __future__ import annotations

import math

from pcrl_nnunet.views.boxes import Box


def contains(outer: Box, inner: Box) -> bool:
    """Tell whether all voxels of one box are in another."""
    return outer.union_bounds(inner) == outer


def intersection(one: Box, other: Box) -> Box | None:
    """Return the voxels in both boxes, or None if the boxes do not overlap."""
    lower, upper = tuple(map(max, one.lower, other.lower)), tuple(map(min, one.upper, other.upper))
    return Box(lower, upper) if all(low < high for low, high in zip(lower, upper, strict=True)) else None


def iou(one: Box, other: Box) -> float:
    """Return the intersection over union of two boxes."""
    shared = intersection(one, other)
    common = math.prod(shared.shape) if shared else 0
    return common / (math.prod(one.shape) + math.prod(other.shape) - common)
