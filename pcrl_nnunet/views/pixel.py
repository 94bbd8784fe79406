"""Pixel augmentation of a view into a new view: noise, blur, gamma, grey, swap, cutout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgenerators.transforms.abstract_transforms import AbstractTransform

from pcrl_nnunet.views import filters
from pcrl_nnunet.views.settings import Augmentation


@dataclass(frozen=True)
class PixelParameters:
    """The augmentation of one view. None leaves a part out.

    Attributes:
        noise: (C, *size), added.
        blur: sd in voxels of the view, for each axis.
        gamma: exponent on each channel's own range.
        grey: factors of brightness and of contrast.
        swap: (swaps, 2, d), first voxels of the two blocks of each swap.
        block: size of the blocks, in voxels.
        holes: (holes, d), first voxels of the holes.
        hole: size of the holes, in voxels.
    """

    noise: np.ndarray | None = None
    blur: tuple[float, ...] | None = None
    gamma: float | None = None
    grey: tuple[float, float] | None = None
    swap: np.ndarray | None = None
    block: tuple[int, ...] = ()
    holes: np.ndarray | None = None
    hole: tuple[int, ...] = ()


def sample_pixel(
    shape: Sequence[int], zoom: Sequence[float], augmentation: Augmentation, rng: np.random.Generator, whole: bool
) -> PixelParameters:
    """Draw the augmentation of one view. Grey and cutout are for 2D views.

    Args:
        shape: (C, *size) of the view.
        zoom: image voxels for a view voxel along each axis. Blur is given in image voxels, so that it means the same in
            an enlarged view.
        augmentation: strengths and probabilities.
        rng: the only source of randomness.
        whole: True for a global view, in which blocks may be swapped and cut out.
    """
    noise = blur = gamma = grey = corners = holes = None
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
    if len(size) == 2 and rng.random() < augmentation.p_grey and augmentation.grey > 0:
        brightness, contrast = rng.uniform(1 - augmentation.grey, 1 + augmentation.grey, 2).tolist()
        grey = brightness, contrast
    swaps = augmentation.swap_blocks > 0 and augmentation.swap_size > 0
    if whole and rng.random() < augmentation.p_swap and swaps:
        # the same share of the view as in 3D, where a block is swap_size on all three axes
        share = augmentation.swap_size**3 * math.prod(size) / math.prod(block)
        free = np.subtract(size, block)
        corners = rng.integers(0, free + 1, (max(1, round(augmentation.swap_blocks * share)), 2, len(size)))
    hole = tuple(max(1, round(length * augmentation.cutout_size)) for length in size)
    cutout = augmentation.cutout_holes > 0 and augmentation.cutout_size > 0
    if whole and len(size) == 2 and rng.random() < augmentation.p_cutout and cutout:
        holes = rng.integers(0, np.subtract(size, hole) + 1, (augmentation.cutout_holes, 2))
    return PixelParameters(noise, blur, gamma, grey, corners, block, holes, hole)


def apply_pixel(view: np.ndarray, parameters: PixelParameters) -> np.ndarray:
    """Apply noise, blur, gamma, grey, swap and cutout, in this order.

    Noise is drawn for each channel. Blur, gamma and grey have the same strength in all channels. Blocks are swapped and
    cut out in all channels together, so that the channels stay registered. Holes get the channel's mean.

    Args:
        view: (C, *size) float32; unchanged.
        parameters: parameters from `sample_pixel`.

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
    if parameters.grey is not None:
        augmented = _grey(augmented, *parameters.grey)
    if parameters.swap is not None:
        ends = parameters.swap + parameters.block
        for (a, b), (a_end, b_end) in zip(parameters.swap.tolist(), ends.tolist(), strict=True):
            first, second = (slice(None), *map(slice, a, a_end)), (slice(None), *map(slice, b, b_end))
            kept = augmented[first].copy()
            augmented[first] = augmented[second]
            augmented[second] = kept
    if parameters.holes is not None:
        filling = augmented.mean(tuple(range(1, augmented.ndim)), keepdims=True)
        for corner in parameters.holes:
            ends = corner + parameters.hole
            inside = (slice(None), *map(slice, corner.tolist(), ends.tolist()))
            augmented[inside] = filling
    return augmented


def _grey(image: np.ndarray, brightness: float, contrast: float) -> np.ndarray:
    """Scale each channel's distance from its minimum by the brightness, then from its mean by the contrast."""
    axes = tuple(range(1, image.ndim))
    image = (image - image.min(axes, keepdims=True)) * np.float32(brightness) + image.min(axes, keepdims=True)
    mean = image.mean(axes, keepdims=True)
    return (image - mean) * np.float32(contrast) + mean


def _gamma(image: torch.Tensor, exponent: float) -> torch.Tensor:
    """Map each channel's range to 0..1, raise it to the exponent and map it back. A constant channel stays."""
    axes = tuple(range(1, image.ndim))
    low = image.amin(axes, keepdim=True)
    width = image.amax(axes, keepdim=True) - low
    return torch.where(width > 0, ((image - low) / width).pow_(exponent).mul_(width).add_(low), image)


class PixelTransform(AbstractTransform):
    """Augment all views of ``source`` into ``destination``.

    Reads ``source`` (views, C, *size), ``source_zoom`` and ``rng``. ``destination`` may be ``source``; a new array then
    replaces it.
    """

    def __init__(self, augmentation: Augmentation, source: str, destination: str, whole: bool = False) -> None:
        self.augmentation = augmentation
        self.source = source
        self.destination = destination
        self.whole = whole

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        views, zooms, rng = data_dict[self.source], data_dict[f"{self.source}_zoom"], data_dict["rng"]
        data_dict[self.destination] = np.stack(
            [
                apply_pixel(view, sample_pixel(view.shape, zoom, self.augmentation, rng, self.whole))
                for view, zoom in zip(views, zooms, strict=True)
            ]
        )
        return data_dict
