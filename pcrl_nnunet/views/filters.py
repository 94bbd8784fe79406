"""Gaussian smoothing of an image, for blur and anti-aliasing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pcrl_nnunet.views import kernels

TRUNCATE = 3.0  # sd; 0.3 % of the weight lies beyond


def radius(sigma: float) -> int:
    """Return the kernel's radius in voxels."""
    return int(TRUNCATE * sigma + 0.5)


def gaussian(image: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """Smooth an image along its spatial axes, like `scipy.ndimage.gaussian_filter(mode="nearest", truncate=3)`.

    Args:
        image: (C, *spatial) float32.
        sigmas: voxels for each spatial axis; an axis with a kernel of one voxel stays unchanged.

    Returns:
        A new array, or `image` itself.
    """
    return kernels.smooth(image, [_weights(sigma) for sigma in sigmas])


def _weights(sigma: float) -> np.ndarray:
    """Return the weights of the centre and of the voxels on one side."""
    if radius(sigma) == 0:
        return np.ones(1)
    half = np.exp(-0.5 * (np.arange(radius(sigma) + 1) / sigma) ** 2)
    return half / (2 * half.sum() - half[0])
