"""Gaussian smoothing of one image, for the blur and for anti-aliasing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

TRUNCATE = 4.0  # sd; scipy.ndimage's default
SMALL = 2**14  # voxels of all channels


def radius(sigma: float) -> int:
    """Voxels that the kernel reaches to either side."""
    return int(TRUNCATE * sigma + 0.5)


def gaussian(image: torch.Tensor, sigmas: Sequence[float]) -> torch.Tensor:
    """The image smoothed along its spatial axes, as `scipy.ndimage.gaussian_filter(mode="nearest")` does.

    From `SMALL` voxels on a sum of shifted images an axis: on one thread half of scipy's time at 64x64x32 voxels, where
    below it is a multiple. Torch's convolutions take longer, and the bits of a matrix product may depend on how the
    memory is aligned.

    Args:
        image: (C, *spatial) float32.
        sigmas: in voxels, a spatial axis each; an axis whose kernel is a single voxel is left as it is.

    Returns:
        A new tensor, or `image` itself.
    """
    if image.numel() < SMALL:
        return torch.from_numpy(ndimage.gaussian_filter(image.numpy(), (0, *sigmas), mode="nearest", truncate=TRUNCATE))
    for axis, sigma in enumerate(sigmas, start=1):
        reach, length = radius(sigma), image.shape[axis]
        if reach > 0 and length > 1:
            weights = np.exp(-0.5 * (np.arange(reach + 1) / sigma) ** 2)
            weights /= 2 * weights.sum() - weights[0]
            border = [reach if i == axis else -1 for i in range(image.ndim)]
            first, last = image.narrow(axis, 0, 1), image.narrow(axis, length - 1, 1)
            padded = torch.cat([first.expand(border), image, last.expand(border)], axis)
            image = image * float(weights[0])
            for shift, weight in enumerate(weights.tolist()[1:], start=1):
                image.add_(padded.narrow(axis, reach - shift, length), alpha=weight)
                image.add_(padded.narrow(axis, reach + shift, length), alpha=weight)
    return image
