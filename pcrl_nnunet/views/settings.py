"""Settings of views and of their augmentation.

Sizes are in voxels of the preprocessed image, axes in nnU-Net's order (the first one has the largest spacing).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.settings import number

Size = tuple[int, ...]
CROP_SIZES = ("global_crop_sizes", "local_crop_sizes")


@dataclass(frozen=True)
class ViewSettings:
    """Views that are drawn by sub-crop. Sizes are 3-tuples or, in 2D, 2-tuples of voxels; the spacing is in mm.

    Attributes:
        global_crop_sizes: sizes of the crops that global views are made of, voxels. Each crop draws one.
        local_crop_sizes: sizes of the crops that local views are made of, voxels.
        global_input_size: size to which global crops are resized, voxels.
        local_input_size: size to which local crops are resized, voxels.
        spacing: spacing of the preprocessed image, mm.
        num_local: number of local views of a sample.
        min_iou: least overlap of the two global crops: intersection over union.
        crops: how crops are drawn: local crops inside the box around the pair, or all crops anywhere and of any shape.
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

    No value is below 0. `p_flip` is 1 at most, and `scale` is below 1.

    Attributes:
        p_flip: probability of a flip, for each axis.
        rotation_degrees: largest angle of the rotation about each axis, in the plane for 2D; degrees.
        scale: largest change of the scale of each axis: 0.1 is a factor of 0.9 to 1.1.
    """

    p_flip: float = 0.5
    rotation_degrees: float = 10.0
    scale: float = 0.1

    def __post_init__(self) -> None:
        below_1 = ("scale", "swap_size", "grey", "cutout_size")
        for name, value in asdict(self).items():
            if value < 0 or (value > 1 and name.startswith("p_")) or (value >= 1 and name in below_1):
                raise UserError(f"augmentation.{name} is {value}; it is out of its range")


@dataclass(frozen=True)
class Augmentation(SpatialAugmentation):
    """Strengths of the views' augmentation, in space and of pixels; 0 everywhere is the identity.

    No value is below 0. Probabilities, whose names begin with ``p_``, are 1 at most. `scale`, `swap_size`, `grey` and
    `cutout_size` are below 1.

    Attributes:
        p_noise: probability of Gaussian noise.
        noise_sd: largest standard deviation of the noise, of z-scored intensities.
        p_blur: probability of Gaussian blur.
        blur_sigma: largest standard deviation of the blur, in voxels of the preprocessed image.
        p_gamma: probability of a gamma curve.
        gamma: strength of the gamma curve: its exponent lies between exp(-gamma) and exp(gamma).
        p_swap: probability that blocks are swapped, in global views only.
        swap_blocks: number of swaps in 3D. In 2D as many as change the same share of the view.
        swap_size: edge of a block, as a share of the global input.
        p_grey: probability of a change of brightness and contrast, in 2D only.
        grey: largest change of brightness and contrast: 0.4 is a factor of 0.6 to 1.4.
        p_cutout: probability of cutout, in global views in 2D only.
        cutout_holes: number of holes.
        cutout_size: edge of a hole, as a share of the global input.
    """

    p_noise: float = 0.5
    noise_sd: float = 0.25
    p_blur: float = 0.5
    blur_sigma: float = 2.0  # voxels of the preprocessed image
    p_gamma: float = 0.5
    gamma: float = 0.3
    p_swap: float = 0.5  # global views only
    swap_blocks: int = 100  # the authors' code: 100 swaps of 8x4x4 in 64x64x32
    swap_size: float = 0.1  # share of each axis of the global input: about the authors' share of the volume
    p_grey: float = 0.5  # 2D only
    grey: float = 0.4  # brightness and contrast factors 1 +- this; the authors' ColorJitter
    p_cutout: float = 0.5  # 2D only, global views only
    cutout_holes: int = 3
    cutout_size: float = 1 / 7  # share of each axis of the global input: the authors' 32 of 224
