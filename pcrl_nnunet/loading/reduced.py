"""Whole images, reduced to a small grid. C: channels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from pcrl_nnunet.views.sub_crop import Volume


def reduced_image(volume: Volume, size: Sequence[int]) -> np.ndarray:
    """Average an image (C, *spatial) within the cells of a grid, as `adaptive_avg_pool3d` does. Returns (C, *size).

    A cell covers at least one voxel. Where the image is smaller than the grid, several cells have the same voxel. The
    image is read cell by cell along the first axis, so that memory stays small.
    """
    length, cells = volume.shape[1], size[0]
    plane = (size[1], size[2])
    parts = []
    for cell in range(cells):
        part = _slices(volume, cell * length // cells, -(-(cell + 1) * length // cells))
        parts.append(adaptive_avg_pool3d(part, (1, *plane))[:, 0].numpy())
    return np.stack(parts, 1)


def reduced_slices(volume: Volume, size: Sequence[int], number: int) -> np.ndarray:
    """Average evenly spaced slices of an image within the cells of a grid.

    Args:
        volume: (C, Z, *plane).
        size: cells along each axis of the plane.
        number: number of slices; a thin image has the same slice several times.

    Returns:
        (number, C, *size) float32.
    """
    length, plane, parts = volume.shape[1], (size[0], size[1]), []
    for index in ((2 * i + 1) * length // (2 * number) for i in range(number)):
        parts.append(adaptive_avg_pool2d(_slices(volume, index, index + 1)[:, 0], plane).numpy())
    return np.stack(parts)


def _slices(volume: Volume, start: int, stop: int) -> torch.Tensor:
    """Read (C, stop - start, *plane)."""
    index = (slice(None), slice(start, stop), *(slice(0, edge) for edge in volume.shape[2:]))
    return torch.from_numpy(np.array(volume[index], np.float32))
