"""Gaussian smoothing of one image, for the blur and for anti-aliasing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pcrl_nnunet.views import kernels

TRUNCATE = 3.0  # sd; beyond them lie 0.3 % of the weight


def radius(sigma: float) -> int:
    """Voxels that the kernel reaches to either side."""
    return int(TRUNCATE * sigma + 0.5)


def gaussian(image: np.ndarray, sigmas: Sequence[float]) -> np.ndarray:
    """The image smoothed along its spatial axes, as `scipy.ndimage.gaussian_filter(mode="nearest", truncate=3)` does.

    Args:
        image: (C, *spatial) float32.
        sigmas: in voxels, a spatial axis each; an axis whose kernel is a single voxel is left as it is.

    Returns:
        A new array, or `image` itself.
    """
    return kernels.smooth(image, [_weights(sigma) for sigma in sigmas])


def _weights(sigma: float) -> np.ndarray:
    """Return the weights of the centre and of the voxels on one side of the centre."""
    if radius(sigma) == 0:
        return np.ones(1)
    half = np.exp(-0.5 * (np.arange(radius(sigma) + 1) / sigma) ** 2)
    return half / (2 * half.sum() - half[0])
