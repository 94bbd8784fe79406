"""A crop of a case: the view of methods without pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pcrl_nnunet.views.background import Background
from pcrl_nnunet.views.boxes import Box, sample_inside
from pcrl_nnunet.views.settings import SpatialAugmentation
from pcrl_nnunet.views.spatial import resample, sample_map
from pcrl_nnunet.views.sub_crop import MAX_TRIES, Volume, least_background, read_region


@dataclass(frozen=True)
class Crop:
    """A crop of an image.

    Attributes:
        view: (C, *size) float32, flipped, rotated and scaled as drawn, with its own memory.
        box: position of the crop, in voxels of the image.
        slice: first spatial index of the image for 2D views of a 3D image; empty otherwise.
        flipped: the axes that are flipped.
    """

    view: np.ndarray
    box: Box
    slice: tuple[int, ...]
    flipped: tuple[int, ...]


def draw_crop(
    volume: Volume,
    size: Sequence[int],
    spacing: Sequence[float],
    augmentation: SpatialAugmentation,
    rng: np.random.Generator,
) -> Crop:
    """Draw a crop of a size at the image's own resolution. Beyond the image its border is repeated.

    If over 85 % of the crop is background, another crop is drawn, up to 4 in all. Then the crop with the least
    background is kept.

    Args:
        volume: (C, *spatial), read by slicing: only the crop and voxels at rotated corners are read.
        size: size of the crop, voxels; 2-tuple for a slice of a 3D image.
        spacing: mm for each axis of the crop.
        augmentation: strengths of flip, rotation and scale.
        rng: the only source of randomness.
    """
    extra = len(volume.shape) - 1 - len(size)
    whole = Box.of_size([0] * len(size), volume.shape[1 + extra :])

    def draws() -> Iterator[tuple[float, Crop]]:
        for _ in range(MAX_TRIES):
            plane = tuple(int(rng.integers(length)) for length in volume.shape[1 : 1 + extra])
            inside = sample_inside(whole, tuple(size), rng)
            # in a smaller image the crop exceeds the border by the same number of voxels on both sides
            missing = [(length - there) // 2 for length, there in zip(size, inside.shape, strict=True)]
            box = Box.of_size([low - m for low, m in zip(inside.lower, missing, strict=True)], size)
            crop = crop_at(volume, box, plane, spacing, augmentation, rng)
            yield Background.of(crop.view).share(crop.view), crop

    return least_background(draws())


def crop_at(
    volume: Volume,
    box: Box,
    plane: tuple[int, ...],
    spacing: Sequence[float],
    augmentation: SpatialAugmentation,
    rng: np.random.Generator,
) -> Crop:
    """Read the crop of a box, flipped, rotated and scaled at random. Beyond the image its border is repeated.

    Args:
        box: the crop, in voxels of the image; it may exceed the image.
        plane: first spatial index of the image for a slice of a 3D image; empty otherwise.
    """
    whole = Box.of_size([0] * box.dim, volume.shape[1 + len(plane) :])
    affine = sample_map(box, box.shape, spacing, augmentation, rng)
    region = affine.footprint().clamp(whole)
    view = resample(read_region(volume, plane, region), affine.shifted(region.lower))
    return Crop(view, box.clamp(whole), plane, affine.flipped)
