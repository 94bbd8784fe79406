"""Settings of views and of their augmentation.

Sizes are in voxels of the preprocessed image, axes in nnU-Net's order (the first one has the largest spacing).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.settings import number, probability

Size = tuple[int, ...]
CROP_SIZES = ("global_crop_sizes", "local_crop_sizes")


@dataclass(frozen=True)
class ViewSettings:
    """Views that are drawn by sub-crop. Sizes are 3-tuples or, in 2D, 2-tuples of voxels; the spacing is in mm.

    Attributes:
        global_crop_sizes: sizes of the crops that global views are made of, voxels. Each crop draws one. Source: ours,
            with the ratios of PCRLv2, section 4.1.
        local_crop_sizes: sizes of the crops that local views are made of, voxels. Source: ours, with the ratios of
            PCRLv2, section 4.1.
        global_input_size: size to which global crops are resized, voxels. Source: ours, with the ratios of PCRLv2,
            section 4.1.
        local_input_size: size to which local crops are resized, voxels. Source: ours, with the ratios of PCRLv2,
            section 4.1.
        spacing: spacing of the preprocessed image, mm. Source: nnU-Net's plan.
        num_local: number of local views of a sample. Source: PCRLv2.
        min_iou: least overlap of the two global crops: intersection over union. Source: PCRLv2.
        crops: how crops are drawn: local crops inside the box around the pair, or all crops anywhere and of any shape.
            Source: PCRLv2, Table 3.
    """

    global_crop_sizes: tuple[Size, ...]
    local_crop_sizes: tuple[Size, ...]
    global_input_size: Size
    local_input_size: Size
    spacing: tuple[float, ...]
    num_local: int = number(6, at_least=0)
    min_iou: float = number(0.3, at_least=0, below=1)
    crops: Literal["sub_crop", "multi_crop"] = "sub_crop"  # multi_crop: the paper's alternative, in 2D and Table 3

    def __post_init__(self) -> None:
        dim = len(self.spacing)
        if not all(isinstance(s, (int, float)) and math.isfinite(s) and s > 0 for s in self.spacing):
            raise UserError(f"views.spacing is {self.spacing}; expected a number of mm above 0 for each axis")
        object.__setattr__(self, "spacing", tuple(self.spacing))
        for name in CROP_SIZES:
            given = getattr(self, name)
            if not given or not all(is_size(size, dim) for size in given):
                raise UserError(f"views.{name} is {given}; expected sizes of {dim} positive numbers of voxels each")
            object.__setattr__(self, name, tuple(tuple(size) for size in given))
        for name in ("global_input_size", "local_input_size"):
            given = getattr(self, name)
            if not is_size(given, dim):
                raise UserError(f"views.{name} is {given}; expected {dim} positive numbers of voxels")
            object.__setattr__(self, name, tuple(given))

    @property
    def voxels_per_sample(self) -> int:
        """Number of voxels that the network sees for one sample: two global and all local views."""
        return 2 * math.prod(self.global_input_size) + self.num_local * math.prod(self.local_input_size)


def names_of_large_crops(views: Any, median: Sequence[float]) -> list[str]:
    """Return the names of the crop sizes in a block of settings if one of them exceeds an image, else nothing.

    Args:
        views: the block; any other value has no crop sizes.
        median: size of the image, voxels.
    """
    given = [name for name in CROP_SIZES if isinstance(views, Mapping) and name in views]
    sizes = [size for name in given for size in views[name]]
    large = any(length > limit for size in sizes for length, limit in zip(size, median, strict=False))
    return given if large else []


def is_size(given: Any, dim: int) -> bool:
    """Tell whether a value is a size of `dim` axes."""
    return (
        isinstance(given, (list, tuple))
        and len(given) == dim
        and all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in given)
    )


@dataclass(frozen=True)
class SpatialAugmentation:
    """Strengths of flip, rotation and scale; 0 everywhere is the identity.

    Attributes:
        p_flip: probability of a flip, for each axis. Source: PCRLv2's code, for one axis.
        rotation_degrees: largest angle of the rotation about each axis, in the plane for 2D; degrees. Source:
            PCRLv2's code.
        scale: largest change of the scale of each axis: 0.1 is a factor of 0.9 to 1.1. Source: PCRLv2's code.
    """

    p_flip: float = probability(0.5)
    rotation_degrees: float = number(10.0, at_least=0)
    scale: float = number(0.1, at_least=0, below=1)


@dataclass(frozen=True)
class Augmentation(SpatialAugmentation):
    """Strengths of the views' augmentation, in space and of pixels; 0 everywhere is the identity.

    Attributes:
        p_noise: probability of Gaussian noise. Source: ours; PCRLv2's code has 1.
        noise_sd: largest standard deviation of the noise, of z-scored intensities. Source: PCRLv2's code.
        p_blur: probability of Gaussian blur. Source: PCRLv2's code in 2D; in 3D the code has 1.
        blur_sigma: largest standard deviation of the blur, in voxels of the preprocessed image. Source: PCRLv2's
            code, in 3D.
        p_gamma: probability of a gamma curve. Source: ours; PCRLv2's code has 1.
        gamma: strength of the gamma curve: its exponent lies between exp(-gamma) and exp(gamma). Source: PCRLv2's code.
        p_swap: probability that blocks are swapped, in global views only. Source: ours; PCRLv2's code has 1.
        swap_blocks: number of swaps in 3D. In 2D as many as change the same share of the view. Source: PCRLv2's code.
        swap_size: edge of a block, as a share of the global input. Source: ours. A block has about the share of
            PCRLv2's code, 8x4x4 voxels of 64x64x32.
        p_grey: probability of a change of brightness and contrast, in 2D only. Source: ours; PCRLv2's code has 1.
        grey: largest change of brightness and contrast: 0.4 is a factor of 0.6 to 1.4. Source: PCRLv2's code.
        p_cutout: probability of cutout, in global views in 2D only. Source: ours; PCRLv2's code has 1.
        cutout_holes: number of holes. Source: PCRLv2's code.
        cutout_size: edge of a hole, as a share of the global input. Source: PCRLv2's code, 32 of 224 pixels.
    """

    p_noise: float = probability(0.5)
    noise_sd: float = number(0.25, at_least=0)
    p_blur: float = probability(0.5)
    blur_sigma: float = number(2.0, at_least=0)
    p_gamma: float = probability(0.5)
    gamma: float = number(0.3, at_least=0)
    p_swap: float = probability(0.5)
    swap_blocks: int = number(100, at_least=0)
    swap_size: float = number(0.1, at_least=0, below=1)
    p_grey: float = probability(0.5)
    grey: float = number(0.4, at_least=0, below=1)
    p_cutout: float = probability(0.5)
    cutout_holes: int = number(3, at_least=0)
    cutout_size: float = number(1 / 7, at_least=0, below=1)
