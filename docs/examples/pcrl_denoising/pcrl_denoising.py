"""Denoising, a method of pretraining in a package of its own: an example to start from.

A sample is one crop; the network gets it with Gaussian noise and restores it (a denoising autoencoder, Vincent et al.,
JMLR 2010). B samples, C channels, * space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.losses import restoration_loss
from pcrl_nnunet.methods import ArraySpec, Method, Picture, PlanFacts, StepOutput, Views
from pcrl_nnunet.methods.quantities import RESTORATION, restoration_error
from pcrl_nnunet.networks import Decoder, RestorationHead, encoder_of
from pcrl_nnunet.views.crop import draw_crop
from pcrl_nnunet.views.settings import Augmentation


@dataclass(frozen=True)
class Settings:
    """The plan's ``pcrl.pretrain.denoising``."""

    noise_sd: float = 0.5  # standard deviation; intensities are z-scored

    def __post_init__(self) -> None:
        if self.noise_sd <= 0:
            raise UserError(f"pcrl.pretrain.denoising.noise_sd is {self.noise_sd}; expected a number above 0")


class NoisyCrops(Views):
    """Crops of the plan's patch size: ``target``, and ``input`` with noise, both (C, *patch size)."""

    def __init__(self, settings: Settings, plan: PlanFacts, channels: int) -> None:
        self.noise_sd, self.size, self.spacing = settings.noise_sd, plan.patch_size, plan.spacing
        spec = ArraySpec((channels, *plan.patch_size))
        self.arrays = {"target": spec, "input": spec}

    def __call__(self, case: Any, volume: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Make one sample."""
        target = draw_crop(volume, self.size, self.spacing, Augmentation(), rng).view
        noise = self.noise_sd * rng.standard_normal(target.shape, dtype=np.float32)
        return {"target": target, "input": target + noise.astype(np.float32)}


class Denoising(Method):
    """The plan's encoder, a decoder without skip connections, and one head at full resolution."""

    name = "denoising"
    title = "Denoising"
    citations = ("Vincent, P., et al. (2010). Stacked denoising autoencoders. JMLR, 11, 3371-3408.",)
    Settings = Settings
    defaults: ClassVar[Mapping[str, Any]] = {"initial_lr": 0.03}
    terms: ClassVar[Mapping[str, str]] = {"restoration": "restoration"}
    quantities = (RESTORATION,)
    pictures_caption = "A crop with noise, the crop itself, and what the network makes of the noisy one."

    def __init__(self, network: nn.Module, channels: int, settings: Settings) -> None:
        super().__init__(network, channels, settings)
        self.encoder = encoder_of(network)
        self.decoder = Decoder(self.encoder)
        self.head = RestorationHead(
            self.encoder.conv_op, self.decoder.channels[-1], channels, self.encoder.kernel_sizes[0]
        )

    @classmethod
    def views(cls, settings: Settings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]) -> NoisyCrops:
        """Return what makes the samples."""
        return NoisyCrops(settings, plan, channels)

    def forward(self, batch: Mapping[str, Tensor], drawn: None, progress: float = 0.0) -> StepOutput:
        """Restore ``input``, compare with ``target`` (B, C, *)."""
        target = batch["target"]
        restored = self._restored(batch["input"])
        loss = restoration_loss(restored, target)
        error = restoration_error(restored.detach()[:, None], target[:, None])
        return StepOutput(loss, {"restoration": loss.detach()}, {RESTORATION.name: {"": error}})

    def _restored(self, image: Tensor) -> Tensor:
        features = self.decoder(self.encoder(image), self.decoder.num_levels)
        return self.head(features[-1], image.shape[2:])

    def pictures(self, batch: Mapping[str, Tensor]) -> list[Picture]:
        """Return the input, the target, and what is restored."""
        shown = {"input": batch["input"], "target": batch["target"], "restored": self._restored(batch["input"])}
        return [Picture(title, images) for title, images in shown.items()]
