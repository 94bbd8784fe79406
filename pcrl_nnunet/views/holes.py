"""Brightness, contrast and holes of views, in 2D and 3D (Zhou et al., "Comparing to Learn", MICCAI 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform

from pcrl_nnunet.settings import number, probability
from pcrl_nnunet.views.pixel import PixelParameters, apply_pixel
from pcrl_nnunet.views.settings import SpatialAugmentation


@dataclass(frozen=True)
class GreyAndHoles(SpatialAugmentation):
    """Strengths of flip, rotation and scale, of brightness and contrast, and of holes.

    Attributes:
        p_grey: probability of a change of brightness and contrast. Source: C2L's code.
        grey: largest change of brightness and contrast: 0.4 is a factor of 0.6 to 1.4. Source: C2L's code.
        p_holes: probability of holes. Source: C2L's code.
        holes: number of holes. Source: C2L's code.
        hole_size: edge of a hole in 2D, as a share of the input. In 3D, a hole has the same share of the voxels.
            Source: C2L's code, 32 of 224 pixels.
    """

    p_grey: float = probability(1.0)
    grey: float = number(0.4, at_least=0, below=1)
    p_holes: float = probability(1.0)
    holes: int = number(3, at_least=0)
    hole_size: float = number(1 / 7, at_least=0, below=1)


def sample_grey_and_holes(size: Sequence[int], augmentation: GreyAndHoles, rng: np.random.Generator) -> PixelParameters:
    """Draw brightness, contrast and holes of a view.

    Args:
        size: size of the view, voxels.
        augmentation: strengths and probabilities.
        rng: the only source of randomness.
    """
    grey = corners = None
    hole: tuple[int, ...] = ()
    if rng.random() < augmentation.p_grey and augmentation.grey > 0:
        brightness, contrast = rng.uniform(1 - augmentation.grey, 1 + augmentation.grey, 2).tolist()
        grey = brightness, contrast
    if rng.random() < augmentation.p_holes and augmentation.holes > 0 and augmentation.hole_size > 0:
        share = augmentation.hole_size ** (2 / len(size))
        hole = tuple(max(1, round(length * share)) for length in size)
        corners = rng.integers(0, np.subtract(size, hole) + 1, (augmentation.holes, len(size)))
    return PixelParameters(grey=grey, holes=corners, hole=hole)


class GreyAndHolesTransform(AbstractTransform):
    """Augment all views of ``target`` (views, C, *size) into ``input``. Reads ``rng``."""

    def __init__(self, augmentation: GreyAndHoles) -> None:
        self.augmentation = augmentation

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        rng = data_dict["rng"]
        data_dict["input"] = np.stack(
            [
                apply_pixel(view, sample_grey_and_holes(view.shape[1:], self.augmentation, rng))
                for view in data_dict["target"]
            ]
        )
        return data_dict
