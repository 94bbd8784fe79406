"""Rubik's Cube++ (Tao et al., "Revisiting Rubik's Cube: Self-supervised Learning with Volume-wise Transformation for 3D
Medical Image Segmentation", MICCAI 2020): restoration of a crop whose cubes are turned.

A sample is a crop, and the same crop with its cubes turned at random. B: samples, C: image channels, *: space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn
from torch.func import functional_call

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.samples import Sample
from pcrl_nnunet.losses import adversarial_loss
from pcrl_nnunet.methods.base import ParameterGroup, StepOutput
from pcrl_nnunet.methods.restoration import CropViews, RestorationMethod
from pcrl_nnunet.networks import Discriminator
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import number, replaced
from pcrl_nnunet.views.configure import MAX_SAMPLES
from pcrl_nnunet.views.cubes import cube_size, keeps_cubes, turned_cubes, turned_layers
from pcrl_nnunet.views.settings import Size, SpatialAugmentation, is_size
from pcrl_nnunet.views.turns import turnable

WHERE = "pcrl.pretrain.rubiks_cube"
DISCRIMINATOR_CLIP = 12.0  # as for all other gradients, but apart from these
# Two flips are a half turn: after flips nothing would tell which way up the crop has to be restored.
UPRIGHT = SpatialAugmentation(p_flip=0.0)


@dataclass(frozen=True)
class RubiksCubeSettings:
    """Settings of Rubik's Cube++: the cubes, their turns, and the adversarial loss.

    Attributes:
        crop_size: size of the crop, voxels: the patch with equal edges on all axes that quarter turns exchange. Source:
            ours.
        cube_size: size of the cubes, voxels: at most 16 for each axis, and at most half of the crop. Source: PCRLv1's
            supplement, and ours below 16.
        turned: turn each cube by itself, or whole layers of cubes. Source: PCRLv1's supplement; Cube++ has layers.
        adversarial_weight: weight of the adversarial loss. 0: there is no discriminator. Source: ours.
        augmentation: of the crop, without flips. Source: ours.
    """

    crop_size: Size
    cube_size: Size
    turned: Literal["cubes", "layers"] = "cubes"
    adversarial_weight: float = number(0.1, at_least=0)
    augmentation: SpatialAugmentation = UPRIGHT

    def __post_init__(self) -> None:
        for name in ("crop_size", "cube_size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


class TurnedCubes(CropViews):
    """Crops whose ``input`` has turned cubes, or turned layers of cubes."""

    def __init__(self, settings: RubiksCubeSettings, plan: PlanFacts, channels: int) -> None:
        super().__init__(settings, replace(plan, patch_size=settings.crop_size), channels)

    def spoiled(self, target: np.ndarray, rng: np.random.Generator) -> Sample:
        """Return the crop with its cubes turned."""
        turn = turned_cubes if self.settings.turned == "cubes" else turned_layers
        return {"input": turn(target, self.settings.cube_size, self.spacing, rng)}


class RubiksCube(RestorationMethod):
    """Restoration of crops with turned cubes by the plan's whole U-Net, and a discriminator."""

    name = "rubiks_cube"
    title = "Rubik's Cube++"
    citations = (
        "Tao, X., Li, Y., Zhou, W., Ma, K., & Zheng, Y. (2020). Revisiting Rubik's cube: Self-supervised learning with "
        "volume-wise transformation for 3D medical image segmentation. MICCAI, 238-248.",
    )
    Settings = RubiksCubeSettings
    dimensions = (3,)
    terms: ClassVar[Mapping[str, str]] = {
        "restoration": "restoration",
        "adversarial": "adversarial",
        "discriminator": "discriminator",
    }
    terms_caption = (
        "The error of the restoration should fall. The discriminator's term is 0.69 if it guesses, and 0 if it tells "
        "restored from real crops. The adversarial term rises as the discriminator's falls."
    )
    pictures_caption = "A crop with turned cubes, the crop itself, and the network's restoration."

    def __init__(self, network: nn.Module, channels: int, settings: RubiksCubeSettings) -> None:
        super().__init__(network, channels, settings)
        self.weight = settings.adversarial_weight
        conv_op = self.unet.encoder.conv_op
        self.discriminator = Discriminator(conv_op, channels) if self.weight > 0 else None

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[RubiksCubeSettings, int]:
        """Derive a crop that turns keep, and cubes of up to 16 voxels. The batch keeps the plan's number of voxels.

        Raises:
            UserError: a setting is unknown or out of range, or the crop cannot be cut into cubes that turns keep.
        """
        crop = turnable(plan.patch_size, plan.spacing, plan.strides)
        settings = replaced(RubiksCubeSettings(crop, cube_size(crop)), WHERE, given)
        if "crop_size" in given and "cube_size" not in given and is_size(settings.crop_size, len(crop)):
            settings = replace(settings, cube_size=cube_size(settings.crop_size))
        _check(settings, plan)
        fitting = math.prod(plan.patch_size) * plan.batch_size // math.prod(settings.crop_size)
        return settings, max(plan.batch_size, min(fitting, MAX_SAMPLES[len(crop)]))

    @classmethod
    def facts(cls, settings: RubiksCubeSettings) -> dict[str, str]:
        """Return the sizes of crop and cubes."""
        crop, cube = ("x".join(map(str, size)) for size in (settings.crop_size, settings.cube_size))
        parts = [length // edge for length, edge in zip(settings.crop_size, settings.cube_size, strict=True)]
        what = "each turned by itself" if settings.turned == "cubes" else "turned in layers"
        return {"crop": f"{crop} voxels", "cubes": f"{math.prod(parts)} of {cube} voxels, {what}"}

    @classmethod
    def views(
        cls, settings: RubiksCubeSettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]
    ) -> TurnedCubes:
        """Return the maker of samples."""
        return TurnedCubes(settings, plan, channels)

    def groups(self) -> list[ParameterGroup]:
        """Return the U-Net, and the discriminator, whose gradient is clipped by itself."""
        groups = [ParameterGroup([*self.unet.parameters()])]
        if self.discriminator is not None:
            groups.append(ParameterGroup([*self.discriminator.parameters()], clip=DISCRIMINATOR_CLIP))
        return groups

    def forward(self, batch: Mapping[str, Tensor], drawn: None, progress: float = 0.0) -> StepOutput:
        """Compute the restoration's error, the adversarial term and the discriminator's term of a batch.

        One backward pass trains both networks. The adversarial term does not reach the discriminator's weights, and the
        discriminator's term does not reach the U-Net. So both are updated at the same time, not in turn.
        """
        target = batch["target"]
        restored = self.unet(batch["input"])
        output = self.restoration(restored, target)
        if self.discriminator is None:
            return output
        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        adversarial = adversarial_loss(functional_call(self.discriminator, fixed, (restored,)), real=True)
        found = self.discriminator(target), self.discriminator(restored.detach())
        discriminator = (adversarial_loss(found[0], real=True) + adversarial_loss(found[1], real=False)) / 2
        return replace(
            output,
            loss=output.loss + self.weight * adversarial + discriminator,
            terms={**output.terms, "adversarial": adversarial.detach(), "discriminator": discriminator.detach()},
        )


def _check(settings: RubiksCubeSettings, plan: PlanFacts) -> None:
    """Raise `UserError` for a crop or cubes that do not fit the plan or the turns."""
    crop, cube, fits = settings.crop_size, settings.cube_size, turnable(plan.patch_size, plan.spacing, plan.strides)
    total = [math.prod(stride[axis] for stride in plan.strides) for axis in range(len(fits))]
    whole = is_size(crop, len(fits)) and not any(length % t for length, t in zip(crop, total, strict=True))
    if not whole or not keeps_cubes(crop, plan.spacing):
        raise UserError(
            f"{WHERE}.crop_size is {crop}; expected multiples of the total stride {tuple(total)}, equal on axes that a "
            f"quarter turn exchanges, such as {fits}"
        )
    divides = is_size(cube, len(fits)) and not any(length % edge for length, edge in zip(crop, cube, strict=True))
    if not divides or cube == crop or not keeps_cubes(cube, plan.spacing):
        raise UserError(
            f"{WHERE}.cube_size is {cube}; expected a size that divides the crop {crop} into several cubes, with equal "
            f"edges on axes that a quarter turn exchanges, such as {cube_size(crop)}"
        )
