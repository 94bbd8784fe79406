"""Spatial views: flip, affine and resize as one linear map, evaluated once.

Coordinates are voxel indices: voxel i has its centre at i. A map takes an index in the view to an index in the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform

from pcrl_nnunet.views import filters, kernels
from pcrl_nnunet.views.boxes import Box
from pcrl_nnunet.views.settings import SpatialAugmentation

ANTI_ALIAS_FROM = 1.5  # image voxels for a view voxel


@dataclass(frozen=True)
class AffineMap:
    """The map from a view's voxels to the image: `centre + matrix @ (index - (size - 1) / 2)`, in image voxels.

    Attributes:
        matrix: (d, d), image voxels for a view voxel.
        centre: (d,), image index of the view's centre.
        size: size of the view, in voxels.
        zoom: image voxels for a view voxel along each axis of the view, before rotation.
        flipped: the axes that are flipped.
    """

    matrix: np.ndarray
    centre: np.ndarray
    size: tuple[int, ...]
    zoom: tuple[float, ...]
    flipped: tuple[int, ...] = ()

    @property
    def anti_alias(self) -> tuple[float, ...]:
        """Sd in image voxels of the Gaussian before resampling; 0 if the view does not shrink much.

        The sd is (zoom - 1) / 2, as in scikit-image's `resize`. Rotations are small enough to ignore.
        """
        return tuple((z - 1) / 2 if z > ANTI_ALIAS_FROM else 0.0 for z in self.zoom)

    def footprint(self) -> Box:
        """Return the box of voxels that the view and its anti-aliasing read."""
        half = np.abs(self.matrix) @ ((np.array(self.size) - 1) / 2)
        reach = np.array([filters.radius(sigma) for sigma in self.anti_alias])
        lower = np.floor(self.centre - half).astype(int) - reach
        upper = np.floor(self.centre + half).astype(int) + 2 + reach
        return Box(tuple(lower.tolist()), tuple(upper.tolist()))

    def positions(self, indices: np.ndarray) -> np.ndarray:
        """Return the positions (K, d) in the image of indices (K, d) in the view."""
        found: np.ndarray = self.centre + (indices - (np.array(self.size) - 1) / 2) @ self.matrix.T
        return found

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the indices (K, d) in the view of positions (K, d) in the image: the inverse of `positions`."""
        found: np.ndarray = (np.array(self.size) - 1) / 2 + np.linalg.solve(self.matrix, (positions - self.centre).T).T
        return found

    def shifted(self, origin: Sequence[int]) -> AffineMap:
        """Return the same map with image indices counted from `origin`."""
        return replace(self, centre=self.centre - np.array(origin))


def sample_map(
    box: Box,
    size: tuple[int, ...],
    spacing: Sequence[float],
    augmentation: SpatialAugmentation,
    rng: np.random.Generator,
) -> AffineMap:
    """Draw the map from a view of `size` to the crop `box`: resize, then flip, scale and rotate about the centre.

    Angles and scales are uniform. The rotation acts in mm, about each axis (3D) or in the plane (2D).

    Args:
        box: the crop, in voxels of the image.
        size: size of the view, in voxels.
        spacing: spacing of the image, in mm.
        augmentation: strengths; with all 0 the view is the resized crop.
        rng: the only source of randomness.
    """
    dim = len(size)
    flip = np.where(rng.random(dim) < augmentation.p_flip, -1.0, 1.0)
    scale = rng.uniform(1 - augmentation.scale, 1 + augmentation.scale, dim)
    limit = math.radians(augmentation.rotation_degrees)
    angles = rng.uniform(-limit, limit, 1 if dim == 2 else 3)
    zoom = scale * np.array(box.shape) / np.array(size)
    mm = np.array(spacing)
    matrix = (
        rotation(angles.tolist()) * mm / mm[:, None] * (flip * zoom)
    )  # image voxels <- mm <- rotated <- mm <- view voxels
    centre = (np.array(box.lower) + np.array(box.upper) - 1) / 2
    return AffineMap(matrix, centre, size, tuple(zoom.tolist()), tuple(np.flatnonzero(flip < 0).tolist()))


def rotation(angles: Sequence[float]) -> np.ndarray:
    """Return the matrix (2, 2) of one angle, or (3, 3) of three, about axis 0, then 1, then 2. Angles in radians."""
    sin, cos = [math.sin(angle) for angle in angles], [math.cos(angle) for angle in angles]
    if len(angles) == 1:
        return np.array([[cos[0], -sin[0]], [sin[0], cos[0]]])
    (sx, sy, sz), (cx, cy, cz) = sin, cos
    return np.array(
        [
            [cy * cz, sx * sy * cz - cx * sz, cx * sy * cz + sx * sz],
            [cy * sz, sx * sy * sz + cx * cz, cx * sy * sz - sx * cz],
            [-sy, sx * cy, cx * cy],
        ]
    )


def resample(image: np.ndarray, affine: AffineMap) -> np.ndarray:
    """Evaluate a view by linear interpolation. Border voxels repeat outside; a shrinking view is anti-aliased.

    Only the map's footprint is read.

    Args:
        image: (C, *spatial), converted to float32.
        affine: map from the view to `image`.

    Returns:
        (C, *affine.size) float32, never memory of `image`.
    """
    image = np.asarray(image, dtype=np.float32)
    if any(affine.anti_alias):
        region = affine.footprint().clamp(Box.of_size([0] * len(affine.size), image.shape[1:]))
        image, affine = filters.gaussian(image[region.index()], affine.anti_alias), affine.shifted(region.lower)
    first = affine.centre - affine.matrix @ ((np.array(affine.size) - 1) / 2)
    return kernels.interpolate(image, affine.matrix, first, affine.size)


class SpatialViewTransform(AbstractTransform):
    """Resample the views of ``maps`` from ``data``.

    Reads ``data`` (C, *spatial) and ``maps``, a list of `AffineMap` by name, and removes both. Adds an array (number of
    maps, C, *size) float32 under each NAME, and `AffineMap.zoom` and `AffineMap.flipped` of its maps as NAME_zoom and
    NAME_flipped.
    """

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        image = data_dict.pop("data")
        for name, maps in data_dict.pop("maps").items():
            data_dict[name] = np.stack([resample(image, affine) for affine in maps])
            data_dict[f"{name}_zoom"] = [affine.zoom for affine in maps]
            data_dict[f"{name}_flipped"] = [affine.flipped for affine in maps]
        return data_dict
