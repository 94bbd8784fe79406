"""The base of methods that restore images with nnU-Net's whole U-Net. B: samples, C: image channels, *: space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pcrl_nnunet.loading.samples import Sample, ShownSample, ShownView
from pcrl_nnunet.losses import masked_restoration_loss, restoration_loss
from pcrl_nnunet.methods.base import Method, Picture, StepOutput
from pcrl_nnunet.methods.quantities import RESTORATION, variance_within
from pcrl_nnunet.networks import RestoringUNet
from pcrl_nnunet.views.crop import Crop


def shown_crop(sample: Sample, crop: Crop) -> ShownSample:
    """Return a sample with ``target`` and ``input`` for display, with the crop's place in the image."""
    images = {"target": sample["target"], "input": sample["input"]}
    return ShownSample(sample, [ShownView("crop", "crop", images, crop.box, crop.flipped)], crop.box, crop.slice)


class RestorationMethod(Method):
    """Restoration of ``target`` from ``input``, both (B, C, *), with the plan's U-Net and its skip connections.

    Encoder and decoder are trained, so that fine-tuning starts from both. If a batch has ``masked`` (B, 1, *), only the
    masked voxels count.
    """

    # After 300 steps AdamW restores held-out crops better than SGD with a rate of 0.03 (docs/methods/mae.md).
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "adamw"}
    terms: ClassVar[Mapping[str, str]] = {"restoration": "restoration"}
    terms_caption = "The error of the restoration should fall."
    quantities = (RESTORATION,)

    def __init__(self, network: nn.Module, channels: int, settings: Any) -> None:
        super().__init__(network, channels, settings)
        self.unet = RestoringUNet(network, channels)

    def forward(self, batch: Mapping[str, Tensor], drawn: None, progress: float = 0.0) -> StepOutput:
        """Compute the mean squared error of a batch."""
        target, masked = batch["target"], batch.get("masked")
        restored = self.unet(batch["input"])
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
