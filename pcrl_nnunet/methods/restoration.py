"""The base of methods that restore images with nnU-Net's whole U-Net. B: samples, C: image channels, *: space."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.samples import ArraySpec, Sample, ShownSample, ShownView, Views
from pcrl_nnunet.losses import masked_restoration_loss, restoration_loss
from pcrl_nnunet.methods.base import Method, Picture, StepOutput
from pcrl_nnunet.methods.quantities import RESTORATION, Quantity, variance_within
from pcrl_nnunet.networks import RestoringUNet
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.views.crop import Crop, draw_crop
from pcrl_nnunet.views.sub_crop import Volume


class CropViews(Views):
    """Crops of the plan's patch size: ``target``, and ``input``, from which it is restored, both (C, *patch size).

    Args:
        settings: the method's settings, with the crop's `augmentation`.
    """

    def __init__(self, settings: Any, plan: PlanFacts, channels: int) -> None:
        self.settings, self.size, self.spacing = settings, plan.patch_size, plan.spacing
        image = ArraySpec((channels, *plan.patch_size))
        self.arrays = {"target": image, "input": image}

    @abstractmethod
    def spoiled(self, target: np.ndarray, rng: np.random.Generator) -> Sample:
        """Return the arrays of a sample besides ``target``, which stays unchanged."""

    def __call__(self, case: Case, volume: Volume, rng: np.random.Generator) -> Sample:
        """Make the arrays of one sample."""
        return self._make(case, volume, rng)[0]

    def show(self, case: Case, volume: Volume, rng: np.random.Generator) -> ShownSample:
        """Make a sample with the place of its crop in the image."""
        sample, crop = self._make(case, volume, rng)
        images = {name: sample[name] for name in ("target", "input")}
        return ShownSample(sample, [ShownView("crop", "crop", images, crop.box, crop.flipped)], crop.box, crop.slice)

    def _make(self, case: Case, volume: Volume, rng: np.random.Generator) -> tuple[Sample, Crop]:
        """Make a sample and its crop."""
        crop = draw_crop(volume, self.size, self.spacing, self.settings.augmentation, rng)
        return {"target": crop.view, **self.spoiled(crop.view, rng)}, crop


class RestorationMethod(Method):
    """Restoration of ``target`` from ``input``, both (B, C, *), with the plan's U-Net and its skip connections.

    Encoder and decoder are trained, so that fine-tuning starts from both. If a batch has ``masked`` (B, 1, *), only the
    masked voxels count.
    """

    # After 300 steps AdamW restores held-out crops better than SGD with a rate of 0.03 (docs/methods/mae.md).
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "adamw"}
    terms: ClassVar[Mapping[str, str]] = {"restoration": "restoration"}
    terms_caption = "The error of the restoration should fall."
    quantities: ClassVar[tuple[Quantity, ...]] = (RESTORATION,)

    def __init__(self, network: nn.Module, channels: int, settings: Any) -> None:
        super().__init__(network, channels, settings)
        self.unet = RestoringUNet(network, channels)

    def forward(self, batch: Mapping[str, Tensor], drawn: None, progress: float = 0.0) -> StepOutput:
        """Compute the mean squared error of a batch."""
        return self.restoration(self.unet(batch["input"]), batch["target"], batch.get("masked"))

    def restoration(self, restored: Tensor, target: Tensor, masked: Tensor | None = None) -> StepOutput:
        """Compute the mean squared error of restored images."""
        if masked is None:
            loss = restoration_loss(restored, target)
        else:
            loss = masked_restoration_loss(restored, target, masked)
        error = loss.detach()
        return StepOutput(
            loss, {"restoration": error}, {RESTORATION.name: {"": error / variance_within(target, masked)}}
        )

    def pictures(self, batch: Mapping[str, Tensor]) -> list[Picture]:
        """Return input, target and restoration. The restoration of a masked image includes the visible part."""
        target, masked = batch["target"].float(), batch.get("masked")
        restored = self.unet(batch["input"]).float()
        where = torch.ones_like(target, dtype=torch.bool) if masked is None else masked.expand_as(target)
        squared = ((restored - target).square() * where).flatten(2).sum(2)
        errors = squared / where.flatten(2).sum(2) / target.flatten(2).var(2, correction=0).clamp_min(1e-12)
        return [
            Picture("input", batch["input"], "what the network gets"),
            Picture("target", target, "what it should restore"),
            Picture("restored", torch.where(where, restored, target), errors=errors),
        ]
