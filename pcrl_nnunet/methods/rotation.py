"""Rotation (Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018; in 3D:
Taleb et al., "3D Self-Supervised Methods for Medical Imaging", NeurIPS 2020): the network names the turn of a crop.

B: samples, C: image channels, c: channels of the bottleneck, L: turns, *: space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.samples import ArraySpec, Sample, ShownSample, ShownView, Views
from pcrl_nnunet.methods.base import Method, StepOutput
from pcrl_nnunet.methods.quantities import RANK, RIGHT, right_over_chance
from pcrl_nnunet.networks import accept_any_size, encoder_of, mean_and_maximum
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import NOT_IN_BLOCK, replaced
from pcrl_nnunet.views.configure import MAX_SAMPLES, check_size, turnable_crop
from pcrl_nnunet.views.crop import Crop, draw_crop
from pcrl_nnunet.views.settings import Size, SpatialAugmentation, is_size
from pcrl_nnunet.views.sub_crop import Volume
from pcrl_nnunet.views.turns import planes_of_quarters, turns

WHERE = "pcrl.pretrain.rotation"
UNCLEAR_ANGLE = 45.0  # degrees: a larger rotation is nearer to the next quarter turn


@dataclass(frozen=True)
class RotationSettings:
    """The settings of rotation.

    Attributes:
        crop_size: size of the crop, voxels. Its edges are equal on axes that a quarter turn exchanges. By default the
            largest such crop within the plan's patch and the median image. Source: ours; Taleb et al. turn cubes.
        spacing: spacing of the preprocessed image, mm. It decides which turns there are. Source: nnU-Net's plan.
        augmentation: of the crop before the turn. Without flips, because two flips are a half turn. Source: ours.
    """

    crop_size: Size
    spacing: tuple[float, ...] = field(metadata=NOT_IN_BLOCK)
    augmentation: SpatialAugmentation = field(default_factory=lambda: SpatialAugmentation(p_flip=0.0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_size", tuple(self.crop_size))


class TurnedCrops(Views):
    """A turned crop ``input`` (C, *crop size), and the number ``turn`` of its turn among `turns`."""

    def __init__(self, settings: RotationSettings, channels: int) -> None:
        self.settings, self.spacing = settings, settings.spacing
        self.turns = turns(settings.spacing)
        self.arrays = {"input": ArraySpec((channels, *settings.crop_size)), "turn": ArraySpec((), "int64")}

    def __call__(self, case: Case, volume: Volume, rng: np.random.Generator) -> Sample:
        """Make the arrays of one sample."""
        return self._make(volume, rng)[0]

    def show(self, case: Case, volume: Volume, rng: np.random.Generator) -> ShownSample:
        """Make a sample with its crop before the turn."""
        sample, crop = self._make(volume, rng)
        turn = self.turns[int(sample["turn"])]
        title = f"{90 * turn.quarters} degrees" + (f", axes {turn.axes}" if turn.quarters else "")
        images = {"before": crop.view, "turned": sample["input"]}
        view = ShownView("crop", title, images, crop.box, crop.flipped)
        return ShownSample(sample, [view], crop.box, crop.slice)

    def _make(self, volume: Volume, rng: np.random.Generator) -> tuple[Sample, Crop]:
        settings = self.settings
        crop = draw_crop(volume, settings.crop_size, self.spacing, settings.augmentation, rng)
        number = int(rng.integers(len(self.turns)))
        return {"input": self.turns[number].apply(crop.view), "turn": np.array(number, np.int64)}, crop


class Rotation(Method):
    """The plan's encoder, and a linear layer that names the turn."""

    name = "rotation"
    title = "Rotation"
    citations = (
        "Gidaris, S., Singh, P., & Komodakis, N. (2018). Unsupervised representation learning by predicting image "
        "rotations. ICLR.",
        "Taleb, A., Loetzsch, W., Danz, N., Severin, J., Gaertner, T., Bergner, B., & Lippert, C. (2020). 3D "
        "self-supervised methods for medical imaging. NeurIPS, 33, 18158-18172.",
    )
    Settings = RotationSettings
    defaults: ClassVar[Mapping[str, Any]] = {"initial_lr": 0.03}
    terms: ClassVar[Mapping[str, str]] = {"turn": "turn"}
    terms_caption = "The cross-entropy of the turn should fall."
    quantities = (RIGHT, RANK)

    def __init__(self, network: Any, channels: int, settings: RotationSettings) -> None:
        super().__init__(network, channels, settings)
        self.encoder = encoder_of(network)
        accept_any_size(self.encoder)  # a user's crop size may not be a multiple of the strides
        self.head = nn.Linear(2 * self.encoder.output_channels[-1], len(turns(settings.spacing)))

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[RotationSettings, int]:
        """Derive the size of the crop and the number of crops that fit the plan's budget of voxels.

        Raises:
            UserError: a setting is unknown or out of range, or the augmentation would make turns ambiguous.
        """
        crop_size = turnable_crop(plan)
        settings = replaced(RotationSettings(crop_size, plan.spacing), WHERE, given)
        _check(settings, plan, crop_size)
        fitting = math.prod(plan.patch_size) * plan.batch_size // math.prod(settings.crop_size)
        return settings, min(max(1, fitting), MAX_SAMPLES[len(plan.patch_size)])

    @classmethod
    def editable(cls, settings: RotationSettings) -> dict[str, Any]:
        """Return the settings that a planner writes into a plan for users to edit."""
        return {"crop_size": settings.crop_size}

    @classmethod
    def facts(cls, settings: RotationSettings) -> dict[str, str]:
        """Return the size of the crop and the number of turns."""
        return {
            "crop": f"{'x'.join(map(str, settings.crop_size))} voxels",
            "turns": f"{len(turns(settings.spacing))}, among them no turn",
        }

    @classmethod
    def views(
        cls, settings: RotationSettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]
    ) -> TurnedCrops:
        """Return the maker of turned crops."""
        return TurnedCrops(settings, channels)

    def forward(self, batch: Mapping[str, Tensor], drawn: None, progress: float = 0.0) -> StepOutput:
        """Compute the cross-entropy of the turns ``turn`` (B,) of crops ``input`` (B, C, *)."""
        pooled = mean_and_maximum(self.encoder(batch["input"])[-1].float())  # (B, 2c)
        logits, turn = self.head(pooled).float(), batch["turn"]
        loss = F.cross_entropy(logits, turn)
        right = right_over_chance(logits.detach(), turn)
        return StepOutput(loss, {"turn": loss.detach()}, {RIGHT.name: {"": right}}, {"": pooled.detach()})


def _check(settings: RotationSettings, plan: PlanFacts, default: Size) -> None:
    """Raise `UserError` for a crop that turns would change, or an augmentation that looks like a turn."""
    size = settings.crop_size
    if not is_size(size, len(plan.patch_size)):
        raise UserError(
            f"{WHERE}.crop_size is {size}; expected {len(plan.patch_size)} positive numbers of voxels, "
            f"such as {default}"
        )
    for one, other in planes_of_quarters(plan.spacing):
        if size[one] != size[other]:
            raise UserError(
                f"{WHERE}.crop_size is {size}; quarter turns exchange the axes {one} and {other}: give both the same "
                f"number of voxels, such as {default}"
            )
    check_size(f"{WHERE}.crop_size", size, plan.strides)
    if settings.augmentation.p_flip:
        raise UserError(
            f"{WHERE}.augmentation.p_flip is {settings.augmentation.p_flip}; two flips are a half turn, which the "
            f"network has to find: set 0"
        )
    if settings.augmentation.rotation_degrees >= UNCLEAR_ANGLE:
        raise UserError(
            f"{WHERE}.augmentation.rotation_degrees is {settings.augmentation.rotation_degrees}; such a rotation looks "
            f"like a quarter turn, which the network has to find: set it below {UNCLEAR_ANGLE:.0f}"
        )
