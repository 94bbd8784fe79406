"""Pixel augmentation: noise, blur, gamma and swap, from a view that stays as it is to a new one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgenerators.transforms.abstract_transforms import AbstractTransform

from pcrl_nnunet.config import Augmentation
from pcrl_nnunet.transforms import filters


@dataclass(frozen=True)
class PixelParameters:
    """What is done to one view; None is nothing.

    Attributes:
        noise: (C, *size), added.
        blur: sd in voxels of the view, an axis each.
        gamma: exponent on each channel's own range.
        swap: (swaps, 2, d), first voxels of the two blocks of each swap.
        block: size of the blocks, in voxels.
    """

    noise: np.ndarray | None = None
    blur: tuple[float, ...] | None = None
    gamma: float | None = None
    swap: np.ndarray | None = None
    block: tuple[int, ...] = ()


def sample_pixel(
    shape: Sequence[int], zoom: Sequence[float], augmentation: Augmentation, rng: np.random.Generator, swap: bool
) -> PixelParameters:
    """Draw the augmentation of one view.

    Args:
        shape: (C, *size) of the view.
        zoom: voxels of the image a voxel of the view, an axis each: blur is given in voxels of the image, so that it
            means the same in a view that was enlarged.
        augmentation: strengths and probabilities.
        rng: the only source of randomness.
        swap: whether blocks may be swapped.
    """
    noise = blur = gamma = corners = None
    size = tuple(shape[1:])
    block = tuple(max(1, round(length * augmentation.swap_size)) for length in size)
    if rng.random() < augmentation.p_noise and augmentation.noise_sd > 0:
        sd = np.float32(rng.uniform(0, augmentation.noise_sd))
        noise = sd * rng.standard_normal(tuple(shape), dtype=np.float32)
    if rng.random() < augmentation.p_blur and augmentation.blur_sigma > 0:
        sigma = rng.uniform(0, augmentation.blur_sigma)
        blur = tuple(sigma / z for z in zoom)
    if rng.random() < augmentation.p_gamma and augmentation.gamma > 0:
        gamma = math.exp(rng.uniform(-augmentation.gamma, augmentation.gamma))
    if swap and rng.random() < augmentation.p_swap and augmentation.swap_blocks > 0:
        # as large a part of the view as in 3D, where a block is swap_size on all three axes
        share = augmentation.swap_size**3 * math.prod(size) / math.prod(block)
        free = np.subtract(size, block)
        corners = rng.integers(0, free + 1, (max(1, round(augmentation.swap_blocks * share)), 2, len(size)))
    return PixelParameters(noise, blur, gamma, corners, block)


def apply_pixel(view: np.ndarray, parameters: PixelParameters) -> np.ndarray:
    """Noise, blur, gamma, swap, in this order.

    Noise is drawn for each channel; blur and gamma act on each channel with the same strength; blocks are swapped in
    all channels together, so that they stay registered.

    Args:
        view: (C, *size) float32; left as it is.
        parameters: as drawn by `sample_pixel`.

    Returns:
        (C, *size) float32, a new array.
    """
    augmented = view.copy()
    if parameters.noise is not None:
        augmented += parameters.noise
    if parameters.blur is not None:
        augmented = filters.gaussian(augmented, parameters.blur)
    if parameters.gamma is not None:
        augmented = _gamma(torch.from_numpy(augmented), parameters.gamma).numpy()
    if parameters.swap is not None:
        ends = parameters.swap + parameters.block
        for (a, b), (a_end, b_end) in zip(parameters.swap.tolist(), ends.tolist(), strict=True):
            first, second = (slice(None), *map(slice, a, a_end)), (slice(None), *map(slice, b, b_end))
            kept = augmented[first].copy()
            augmented[first] = augmented[second]
            augmented[second] = kept
    return augmented


def _gamma(image: torch.Tensor, exponent: float) -> torch.Tensor:
    """Each channel's range is mapped to 0..1, raised to the exponent and mapped back; a constant channel stays."""
    axes = tuple(range(1, image.ndim))
    low = image.amin(axes, keepdim=True)
    width = image.amax(axes, keepdim=True) - low
    return torch.where(width > 0, ((image - low) / width).pow_(exponent).mul_(width).add_(low), image)


class PixelTransform(AbstractTransform):
    """Augment all views of ``source`` into ``destination``.

    Reads ``source`` (views, C, *size), ``source_zoom`` and ``rng``. ``destination`` may be ``source``, which is then
    replaced by a new array.
    """

    def __init__(self, augmentation: Augmentation, source: str, destination: str, swap: bool = False) -> None:
        self.augmentation = augmentation
        self.source = source
        self.destination = destination
        self.swap = swap

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        views, zooms, rng = data_dict[self.source], data_dict[f"{self.source}_zoom"], data_dict["rng"]
        data_dict[self.destination] = np.stack(
            [
                apply_pixel(view, sample_pixel(view.shape, zoom, self.augmentation, rng, self.swap))
                for view, zoom in zip(views, zooms, strict=True)
            ]
        )
        return data_dict
