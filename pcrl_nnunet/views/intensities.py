"""Strong changes of a view's intensities that keep every structure in its place, in 2D and 3D. C: channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform

from pcrl_nnunet.settings import number, probability
from pcrl_nnunet.views.corruption import change_intensities, robust_ranges
from pcrl_nnunet.views.holes import GreyAndHoles, sample_grey_and_holes
from pcrl_nnunet.views.pixel import apply_pixel, sample_pixel
from pcrl_nnunet.views.settings import Augmentation


@dataclass(frozen=True)
class Intensities(GreyAndHoles):
    """Strengths of flip, rotation and scale, and of changes of intensities.

    Attributes:
        p_grey: probability of a change of brightness and contrast. Source: ours.
        grey: largest change of brightness and contrast: 0.4 is a factor of 0.6 to 1.4. Source: C2L's code.
        p_holes: probability of holes. Source: ours.
        p_noise: probability of Gaussian noise. Source: ours.
        noise_sd: largest standard deviation of the noise, of z-scored intensities. Source: ours.
        p_blur: probability of Gaussian blur. Source: ours.
        blur_sigma: largest standard deviation of the blur, in voxels of the preprocessed image. Source: ours.
        p_gamma: probability of a gamma curve. Source: ours.
        gamma: strength of the gamma curve: its exponent lies between exp(-gamma) and exp(gamma). Source: ours.
        p_curve: probability that intensities follow a Bezier curve. Source: ours.
        p_inverted: probability that the Bezier curve falls. Source: ours.
    """

    p_grey: float = probability(0.5)
    p_holes: float = probability(0.5)
    p_noise: float = probability(0.5)
    noise_sd: float = number(0.5, at_least=0)
    p_blur: float = probability(0.5)
    blur_sigma: float = number(1.0, at_least=0)
    p_gamma: float = probability(0.5)
    gamma: float = number(0.7, at_least=0)
    p_curve: float = probability(0.5)
    p_inverted: float = probability(0.0)

    @property
    def of_pixels(self) -> Augmentation:
        """Noise, blur and gamma as settings of `sample_pixel`, without blocks that change places."""
        own = {name: getattr(self, name) for name in ("p_noise", "noise_sd", "p_blur", "blur_sigma", "gamma")}
        return Augmentation(**own, p_gamma=self.p_gamma, p_swap=0.0, p_grey=0.0, p_cutout=0.0)


def changed(view: np.ndarray, zoom: tuple[float, ...], given: Intensities, rng: np.random.Generator) -> np.ndarray:
    """Change a view by a Bezier curve, noise, blur, gamma, brightness, contrast and holes, each with its probability.

    Args:
        view: (C, *size) float32; unchanged.
        zoom: image voxels for a view voxel along each axis.
        given: probabilities and strengths.
        rng: the only source of randomness.

    Returns:
        (C, *size) float32, a new array.
    """
    if rng.random() < given.p_curve:
        view = change_intensities(view, given.p_inverted, robust_ranges(view), rng)
    pixels = sample_pixel(view.shape, zoom, given.of_pixels, rng, whole=False)
    drawn = sample_grey_and_holes(view.shape[1:], given, rng)
    return apply_pixel(view, replace(pixels, grey=drawn.grey, holes=drawn.holes, hole=drawn.hole))


class IntensitiesTransform(AbstractTransform):
    """Change all views of ``target`` (views, C, *size) into ``input``. Reads ``target_zoom`` and ``rng``."""

    def __init__(self, given: Intensities) -> None:
        self.given = given

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        views = zip(data_dict["target"], data_dict["target_zoom"], strict=True)
        data_dict["input"] = np.stack([changed(view, zoom, self.given, data_dict["rng"]) for view, zoom in views])
        return data_dict
