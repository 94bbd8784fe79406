"""Points that both views of a pair show. P: points, d: axes, C: image channels, K: any number of points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform

from pcrl_nnunet.views.spatial import AffineMap
from pcrl_nnunet.views.sub_crop import MAX_TRIES, SubCropTransform

CANDIDATES = 16  # for each point; views with an IoU of 0.3 share about half of their voxels


class PointsTransform(AbstractTransform):
    """Draw a pair of views, and points that both views show.

    Adds ``points`` (2, P, d) float32: the indices of the same P points in the voxels of each view. The points lie
    inside both views and inside the image, everywhere with the same probability. If the overlap shows too few, another
    pair is drawn, up to 4 in all. Then the first view is taken twice: both views show the same part of the image.

    Args:
        pairs: the transform that draws the pair.
        number: P.
    """

    def __init__(self, pairs: SubCropTransform, number: int) -> None:
        self.pairs, self.number = pairs, number

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        rng = data_dict["rng"]
        for _ in range(MAX_TRIES):
            drawn = self.pairs(**data_dict)
            (one, other), shape = drawn["maps"]["target"], drawn["data"].shape[1:]
            positions = common_points(one, other, shape, self.number, rng)
            if len(positions) == self.number:
                break
        else:
            other = one
            boxes = replace(drawn["boxes"], pair=drawn["boxes"].pair[:1] * 2)
            drawn = {**drawn, "maps": {**drawn["maps"], "target": [one, other]}, "boxes": boxes}
            found = [*common_points(one, other, shape, self.number, rng), one.centre]  # the centre is always inside
            positions = np.resize(found, (self.number, len(shape)))
        points = np.stack([affine.indices(positions) for affine in (one, other)])
        return {**drawn, "points": points.astype(np.float32)}


def common_points(
    one: AffineMap, other: AffineMap, shape: Sequence[int], number: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw positions (K, d) in the image that both views show, K up to `number`, uniformly.

    Args:
        one, other: maps from the views to the image.
        shape: spatial shape of the image; the border that is repeated beyond it is no place.
        number: number of points that are wanted. At most 16 times as many are tried.
        rng: the only source of randomness.
    """
    low, high = _ends(one.size)
    positions = one.positions(rng.uniform(low, high, (CANDIDATES * number, len(shape))))
    shown = _inside(positions, shape) & _inside(other.indices(positions), other.size)
    return positions[shown][:number]


def _ends(size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last index of each axis. A single voxel reaches half a voxel to both sides."""
    last = np.subtract(size, 1)
    single = np.where(last == 0, 0.5, 0.0)
    return -single, last + single


def _inside(indices: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Tell which indices (K, d) lie among the voxels of an array: (K,) of bool."""
    low, high = _ends(size)
    return np.all((indices >= low) & (indices <= high), axis=1)
