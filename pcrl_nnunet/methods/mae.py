"""Masked autoencoding of nnU-Net's U-Net (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022; for
nnU-Net's networks: Wald et al., "Revisiting MAE Pre-training for 3D Medical Image Segmentation", CVPR 2025).

A sample is a crop of the patch size in which most blocks are masked. The network sees the rest and restores the masked
blocks. B: samples, C: image channels, *: space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.samples import ArraySpec, Sample
from pcrl_nnunet.methods.restoration import CropViews, RestorationMethod
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import number, replaced
from pcrl_nnunet.views.masking import draw_masked, grid_of_blocks
from pcrl_nnunet.views.settings import Size, SpatialAugmentation, is_size

WHERE = "pcrl.pretrain.mae"
LARGEST_BLOCK = 16  # voxels; Wald et al.
MASK = 0.0  # the mean of z-scored intensities; if nnU-Net normalises within a mask, the background's value


@dataclass(frozen=True)
class MAESettings:
    """The settings of masked autoencoding.

    Attributes:
        block_size: size of the blocks that are masked, voxels. By default 16, and the encoder's total stride where that
            is less. So a block is never larger than what one voxel of the bottleneck stands for. Source: Wald et al.,
            and ours below 16.
        mask_share: share of the blocks that are masked. Source: He et al.
        augmentation: of the crop.
    """

    block_size: Size
    mask_share: float = number(0.75, above=0, below=1)
    augmentation: SpatialAugmentation = field(default_factory=SpatialAugmentation)

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_size", tuple(self.block_size))


class MaskedCrops(CropViews):
    """Crops whose ``input`` has zeros in the masked blocks; ``masked`` (1, *patch size) of bool."""

    def __init__(self, settings: MAESettings, plan: PlanFacts, channels: int) -> None:
        super().__init__(settings, plan, channels)
        self.arrays = {**self.arrays, "masked": ArraySpec((1, *plan.patch_size), "bool")}

    def spoiled(self, target: np.ndarray, rng: np.random.Generator) -> Sample:
        """Return the crop without its masked blocks, and the mask."""
        masked = draw_masked(self.size, self.settings.block_size, self.settings.mask_share, rng)[None]
        return {"input": np.where(masked, np.float32(MASK), target), "masked": masked}


class MAE(RestorationMethod):
    """Masked autoencoding with the plan's whole U-Net."""

    name = "mae"
    title = "Masked autoencoder"
    citations = (
        "He, K., Chen, X., Xie, S., Li, Y., Dollar, P., & Girshick, R. (2022). Masked autoencoders are scalable vision "
        "learners. CVPR, 16000-16009.",
        "Wald, T., Ulrich, C., Lukyanenko, S., Goncharov, A., Paderno, A., Miller, M., et al. (2025). Revisiting "
        "MAE pre-training for 3D medical image segmentation. CVPR, 5186-5196.",
    )
    Settings = MAESettings
    terms_caption = "The error of the masked blocks should fall."
    pictures_caption = (
        "A crop without its masked blocks, the crop itself, and the masked blocks as the network restores them."
    )

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[MAESettings, int]:
        """Derive blocks of 16 voxels or of the total stride. Patch and batch are the plan's own.

        Raises:
            UserError: a setting is unknown or out of range, or a mask would cover no block or all blocks.
        """
        total = np.prod(plan.strides, axis=0).tolist()
        block = tuple(min(LARGEST_BLOCK, stride) for stride in total)
        settings = replaced(MAESettings(block), WHERE, given)
        if not is_size(settings.block_size, len(plan.patch_size)):
            raise UserError(
                f"{WHERE}.block_size is {settings.block_size}; expected {len(plan.patch_size)} positive numbers of "
                f"voxels, such as {block}"
            )
        if any(size > length for size, length in zip(settings.block_size, plan.patch_size, strict=True)):
            raise UserError(
                f"{WHERE}.block_size is {settings.block_size}; expected blocks within the patch "
                f"{tuple(plan.patch_size)}, such as {block}"
            )
        blocks = math.prod(grid_of_blocks(plan.patch_size, settings.block_size))
        masked = round(settings.mask_share * blocks)
        if not 0 < masked < blocks:
            raise UserError(
                f"{WHERE}.mask_share {settings.mask_share} of the {blocks} blocks of a patch masks {masked} blocks; "
                f"{'raise' if masked == 0 else 'lower'} mask_share, or make block_size {settings.block_size} smaller"
            )
        return settings, plan.batch_size

    @classmethod
    def facts(cls, settings: MAESettings) -> dict[str, str]:
        """Return the size of the blocks and the share of masked blocks."""
        size = "x".join(map(str, settings.block_size))
        return {"masked": f"{settings.mask_share:.0%} of the blocks of {size} voxels"}

    @classmethod
    def views(cls, settings: MAESettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]) -> MaskedCrops:
        """Return the maker of samples."""
        return MaskedCrops(settings, plan, channels)
