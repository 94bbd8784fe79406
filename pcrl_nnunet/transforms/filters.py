"""Gaussian smoothing of one image, for the blur and for anti-aliasing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

TRUNCATE = 4.0  # sd; scipy.ndimage's default


def radius(sigma: float) -> int:
    """Voxels that the kernel reaches to either side."""
    return int(TRUNCATE * sigma + 0.5)


def gaussian(image: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """The image smoothed along its spatial axes, as `scipy.ndimage.gaussian_filter(mode="nearest")` does.

    A product with a banded matrix an axis: three times as fast as scipy at 64x64x32 voxels, on one thread.

    Args:
        image: (C, *spatial) float32.
        sigmas: in voxels, a spatial axis each; an axis whose kernel is a single voxel is left as it is.

    Returns:
        A new tensor, or `image` itself where there is nothing to smooth.
    """
    for axis, sigma in enumerate(sigmas, start=1):
        length = image.shape[axis]
        if radius(sigma) > 0 and length > 1:
            after = math.prod(image.shape[axis + 1 :])
            smoothed = torch.matmul(_matrix(length, sigma), image.reshape(-1, length, after))
            image = smoothed.reshape(image.shape)
    return image


def _matrix(length: int, sigma: float) -> torch.Tensor:
    """(length, length): row i holds the weights of the voxels in smoothed voxel i, the border voxels repeated."""
    reach = radius(sigma)
    taps = np.zeros(length + 2 * reach)
    taps[: 2 * reach + 1] = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps /= taps.sum()
    # (length, length + 2 reach): row i is taps, moved by i voxels; a negative index counts from the end
    rows = taps[np.arange(len(taps)) - np.arange(length)[:, None]]
    matrix = rows[:, reach : reach + length].astype(np.float32)
    matrix[:, 0] += rows[:, :reach].sum(axis=1)
    matrix[:, -1] += rows[:, reach + length :].sum(axis=1)
    return torch.from_numpy(matrix)
