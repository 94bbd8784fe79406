"""Models Genesis (Zhou et al., "Models Genesis", Medical Image Analysis 67, 2021): restoration of corrupted crops by
the whole U-Net.

A sample is a crop of the patch size, and the same crop corrupted. B: samples, C: image channels, *: space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pcrl_nnunet.loading.samples import Sample
from pcrl_nnunet.methods.restoration import CropViews, RestorationMethod
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import replaced
from pcrl_nnunet.views.corruption import Corruption, corrupt
from pcrl_nnunet.views.settings import SpatialAugmentation

FLIPS = SpatialAugmentation(p_flip=0.5, rotation_degrees=0.0, scale=0.0)  # the same for crop and target


@dataclass(frozen=True)
class ModelsGenesisSettings:
    """Settings of Models Genesis: the corruption, and the augmentation before it.

    Attributes:
        augmentation: flips only. Source: Models Genesis.
    """

    corruption: Corruption = field(default_factory=Corruption)
    augmentation: SpatialAugmentation = FLIPS


class CorruptedCrops(CropViews):
    """Crops whose ``input`` is their corruption."""

    def spoiled(self, target: np.ndarray, rng: np.random.Generator) -> Sample:
        """Return the corrupted crop."""
        return {"input": corrupt(target, self.settings.corruption, rng)}


class ModelsGenesis(RestorationMethod):
    """Restoration of corrupted crops with the plan's whole U-Net."""

    name = "models_genesis"
    title = "Models Genesis"
    citations = (
        "Zhou, Z., Sodha, V., Pang, J., Gotway, M. B., & Liang, J. (2021). Models Genesis. Medical Image Analysis, 67, "
        "101840.",
    )
    Settings = ModelsGenesisSettings
    pictures_caption = "A corrupted crop, the crop itself, and the network's restoration."

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[ModelsGenesisSettings, int]:
        """Use the plan's own patch and batch."""
        return replaced(ModelsGenesisSettings(), f"pcrl.pretrain.{cls.name}", given), plan.batch_size

    @classmethod
    def facts(cls, settings: ModelsGenesisSettings) -> dict[str, str]:
        """Return the probabilities of the corruption's parts."""
        c = settings.corruption
        return {"corruption": f"shuffling {c.p_shuffle:g}, Bezier curve {c.p_curve:g}, painting {c.p_paint:g}"}

    @classmethod
    def views(
        cls, settings: ModelsGenesisSettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]
    ) -> CorruptedCrops:
        """Return the maker of samples."""
        return CorruptedCrops(settings, plan, channels)
