"""Windows that cover a case, and boxes of a case that may reach beyond its border.

C: image channels, *: space.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pcrl_nnunet.views.sub_crop import Volume


@dataclass(frozen=True)
class Window:
    """A window of the patch size in a case, and the voxels that belong to it alone.

    Windows overlap. Of the overlap of two windows, each owns its own half.

    Attributes:
        lower: first voxel of the window, for each axis of the case; negative where the window is larger than the case.
        own: first and last voxel (exclusive) that the window owns, for each axis of the case.
    """

    lower: tuple[int, ...]
    own: tuple[tuple[int, int], ...]

    @property
    def own_index(self) -> tuple[slice, ...]:
        """Index of the owned voxels in a volume (C, *)."""
        return (slice(None), *(slice(first, last) for first, last in self.own))

    def places(self, dim: int) -> np.ndarray:
        """Return the places (voxels, dim) of the owned voxels within the window, in the order of the volume."""
        axes = [np.arange(first - low, last - low) for low, (first, last) in zip(self.lower, self.own, strict=True)]
        grid = np.meshgrid(*axes, indexing="ij")
        return np.stack([axis.ravel() for axis in grid[len(grid) - dim :]], 1)


def tiling(shape: Sequence[int], patch_size: Sequence[int]) -> Iterator[Window]:
    """Yield the windows that cover a case, as few and as evenly as possible. Each voxel belongs to one window.

    Args:
        shape: shape of the case, without channels. With a patch of two axes, slices along the first axis are windows.
        patch_size: size of the windows, voxels.
    """
    extra = len(shape) - len(patch_size)
    axes: list[list[tuple[int, tuple[int, int]]]] = [[(k, (k, k + 1)) for k in range(n)] for n in shape[:extra]]
    for length, size in zip(shape[extra:], patch_size, strict=True):
        starts = starts_along(length, size)
        middles = [(start + before + size) // 2 for before, start in itertools.pairwise(starts)]
        bounds = itertools.pairwise([0, *middles, length])
        lowers = [start - max(0, size - length) // 2 for start in starts]
        axes.append(list(zip(lowers, bounds, strict=True)))
    for along in itertools.product(*axes):
        yield Window(tuple(low for low, _ in along), tuple(own for _, own in along))


def windows_of(volume: Volume, patch_size: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the images (C, *patch_size) float32 of the windows of `tiling`."""
    for window in tiling(volume.shape[1:], patch_size):
        yield read(volume, window.lower, patch_size)


def read(volume: Volume, lower: Sequence[int], size: Sequence[int]) -> np.ndarray:
    """Read a box (C, *size) float32. Outside the volume its border is repeated.

    Args:
        volume: (C, *), read by slicing.
        lower: first voxel for each axis of the volume.
        size: size of the box; axes that the volume has before them are a single slice.
    """
    shape, extra = volume.shape[1:], len(lower) - len(size)
    edges = (*(1 for _ in range(extra)), *size)
    inside = [(max(0, low), min(low + edge, n)) for low, edge, n in zip(lower, edges, shape, strict=True)]
    index = (slice(None), *(slice(first, last) for first, last in inside))
    box = np.asarray(volume[index], np.float32)
    missing = [(first - low, low + edge - last) for low, edge, (first, last) in zip(lower, edges, inside, strict=True)]
    return np.pad(box.reshape(box.shape[0], *box.shape[1 + extra :]), [(0, 0), *missing[extra:]], mode="edge")


def starts_along(length: int, size: int) -> list[int]:
    """Return the first voxels of the fewest windows that cover an axis, evenly spaced."""
    number = max(1, math.ceil(length / size))
    last = max(0, length - size)
    return [round(last * k / max(1, number - 1)) for k in range(number)]
