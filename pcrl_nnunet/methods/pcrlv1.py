"""PCRLv1 (Zhou et al., "Preservational Learning Improves Self-supervised Medical Image Models by Reconstructing Diverse
Contexts", ICCV 2021): contrast of views, and restoration of transformed views.

A sample is a pair of global views. The ordinary encoder sees the first view, the momentum encoder the second one. The
hybrid encoder is a mixture of both: its features are mixed features. One decoder restores transformed images from the
features of all three encoders.

B: samples, C: image channels, c: channels of the bottleneck, K: bits of an indicator, E: encoders that are restored
from, G: input size, *: space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from batchgenerators.transforms.abstract_transforms import AbstractTransform, Compose
from torch import Tensor, nn
from torch.nn import functional as F

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.samples import ArraySpec
from pcrl_nnunet.losses import contrastive_loss, restoration_loss
from pcrl_nnunet.methods.base import Method, Picture, StepOutput
from pcrl_nnunet.methods.keys import LARGEST_QUEUE, queue_size_for
from pcrl_nnunet.methods.pairs import (
    PairViews,
    editable_pairs,
    facts_of_pairs,
    fitted_views,
    number_of_pairs,
    pair_settings,
)
from pcrl_nnunet.methods.quantities import MATCHING, RANK, RESTORATION, matched_minus_shuffled, variance_within
from pcrl_nnunet.networks import (
    ChannelAttention,
    KeyQueue,
    MomentumCopy,
    OuterProductAttention,
    RestoringUNet,
    encoder_of,
    mean_and_maximum,
)
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import number, replaced
from pcrl_nnunet.views import PixelTransform
from pcrl_nnunet.views.configure import MIN_BOTTLENECK_VOXELS
from pcrl_nnunet.views.corruption import Corruption, corrupt
from pcrl_nnunet.views.settings import Augmentation, ViewSettings
from pcrl_nnunet.views.transformations import QUARTERS, Transformations, plane_of_quarters, turned
from pcrl_nnunet.views.turns import turnable

WHERE = "pcrl.pretrain.pcrlv1"
MIN_IOU = 0.2  # of the pair; the paper
KEY_CHANNELS = 128  # the authors' code
ENCODERS = ("ordinary encoder", "momentum encoder", "hybrid encoder")
WIDEST = 320  # channels of nnU-Net's bottleneck in 3D, for the dry run

# crop, flip, rotation and blur of the paper
CROP_AND_BLUR = Augmentation(scale=0.0, p_noise=0.0, p_gamma=0.0, p_swap=0.0, p_grey=0.0, p_cutout=0.0)
PAINTING = Corruption(p_shuffle=0.0, p_curve=0.0)


@dataclass(frozen=True)
class PCRLv1Settings:
    """The settings of PCRLv1.

    A sample is a pair of global views. There are no local views: ``views.num_local`` is 0.

    Attributes:
        views: a pair. Source: PCRLv1.
        augmentation: crop, flip, rotation and blur. Source: PCRLv1.
        corruption: inner and outer painting. Source: PCRLv1, with the probabilities of its code.
        transformations: transformations of the restoration's targets, which the attention is told: flips and quarter
            turns, flips, or none. Without transformations there is no attention. Source: PCRLv1, Table 2.
        attention: ``channels`` scales the bottleneck by a function of the indicator (the authors' code).
            ``outer_product`` also uses the feature (the paper). It has a layer of c^3 weights for c channels: 33
            million for 320. Source: PCRLv1's code.
        mixup: range of the share of the ordinary encoder in the hybrid one. Empty: no hybrid encoder. Source: PCRLv1,
            Table 2.
        contrast_weight: weight of the contrastive loss. Source: PCRLv1.
        restoration_weight: weight of the sum of the restoration losses. 0: the decoder is not trained. Source: PCRLv1.
        rotation_task: also predict by how many quarters an image is turned. Source: PCRLv1, Table 2.
        queue_size: number of keys in the queue. 0: 16384, or 16 for each case if this is less. Source: PCRLv1, and ours
            for few cases.
        temperature: divisor of the cosines. Source: PCRLv1.
        key_momentum: share of the momentum encoder's weights that stays in a step. Source: PCRLv1.
    """

    views: ViewSettings
    augmentation: Augmentation = CROP_AND_BLUR
    corruption: Corruption = PAINTING
    transformations: Literal["all", "flips", "none"] = "all"
    attention: Literal["channels", "outer_product"] = "channels"
    mixup: tuple[float, ...] = (0.0, 1.0)
    contrast_weight: float = number(0.5, above=0)
    restoration_weight: float = number(0.5, at_least=0)
    rotation_task: bool = False
    queue_size: int = number(0, at_least=0)
    temperature: float = number(0.2, above=0)
    key_momentum: float = number(0.99, at_least=0, below=1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mixup", tuple(self.mixup))
        numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in self.mixup)
        if self.mixup and not (numbers and len(self.mixup) == 2 and 0 <= self.mixup[0] <= self.mixup[1] <= 1):
            raise UserError(
                f"{WHERE}.mixup is {list(self.mixup)}; expected the two ends of a range within 0 and 1, such as "
                f"[0.5, 1], or [] for no mixup"
            )

    @property
    def plane(self) -> tuple[int, int] | None:
        """The plane of quarter turns; None: spacing or edges of the input differ in it."""
        return plane_of_quarters(self.views.spacing, self.views.global_input_size)

    @property
    def told(self) -> Transformations | None:
        """The transformations of the targets; None: the targets are not transformed."""
        if self.transformations == "none" or not self.restoration_weight:
            return None
        return Transformations(len(self.views.spacing), self.plane if self.transformations == "all" else None)


class PCRLv1Views(PairViews):
    """Two views of a case, and the transformations of the targets.

    The arrays: ``target`` (2, C, *G), the views; ``input`` (2, C, *G), the same blurred and painted; ``case`` (1,),
    int64, a number that stands for the case. If targets are transformed: ``indicators`` (3, K), for the three encoders.
    With the rotation task: ``quarters`` (1,), int64.
    """

    def __init__(self, settings: PCRLv1Settings, channels: int) -> None:
        super().__init__(settings.views, settings.augmentation, channels)
        self.arrays = {**self.arrays, "case": ArraySpec((1,), "int64")}
        told = settings.told
        if told is not None:
            self.arrays["indicators"] = ArraySpec((len(ENCODERS), told.bits))
        if settings.rotation_task:
            self.arrays["quarters"] = ArraySpec((1,), "int64")
        self._augment = Compose(
            [
                PixelTransform(settings.augmentation, "target", "input", whole=True),
                CorruptAndTell(settings.corruption, told),
            ]
        )


class CorruptAndTell(AbstractTransform):
    """Corrupt the views of ``input``, and draw ``indicators`` and ``quarters``."""

    def __init__(self, corruption: Corruption, told: Transformations | None) -> None:
        self.corruption, self.told = corruption, told

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        rng = data_dict["rng"]
        data_dict["input"] = np.stack([corrupt(view, self.corruption, rng) for view in data_dict["input"]])
        if self.told is not None:
            data_dict["indicators"] = np.stack([self.told.draw(rng) for _ in ENCODERS])
        data_dict["quarters"] = rng.integers(QUARTERS, size=1)
        return data_dict


class PCRLv1(Method):
    """The plan's whole U-Net with attention at its bottleneck, a projector, momentum copies, and a queue of keys."""

    name = "pcrlv1"
    title = "PCRLv1"
    citations = (
        "Zhou, H.-Y., Lu, C., Yang, S., Han, X., & Yu, Y. (2021). Preservational learning improves self-supervised "
        "medical image models by reconstructing diverse contexts. ICCV, 3499-3509.",
    )
    Settings = PCRLv1Settings
    # The paper's SGD with a rate of 1e-3 learns no more in 300 steps than a frozen encoder (docs/methods/pcrlv1.md).
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "adamw"}
    min_batch_size = (4, "the batch normalisation of the projector")
    min_cases = (2, "the queue of keys of other scans")
    min_samples_of_rank = 2  # the quantities compare the samples of the first rank
    terms: ClassVar[Mapping[str, str]] = {
        "contrast": "contrast",
        "restoration": "restoration",
        "rotation": "rotation",
    }
    terms_caption = (
        "Both should fall. At first the contrast may rise: random keys are easy to tell from views, and the "
        "keys of other cases are not."
    )
    quantities = (RESTORATION, MATCHING, RANK)
    pictures_caption = (
        "What the ordinary encoder gets, the transformed image that the decoder should restore from it, and its "
        "restoration; then the same for the hybrid encoder."
    )

    def __init__(self, network: Any, channels: int, settings: PCRLv1Settings) -> None:
        super().__init__(network, channels, settings)
        self.own = settings
        self.encoder = encoder_of(network)
        c = self.encoder.output_channels[-1]
        # without the batch norm, pooled features behind instance norm are so alike that the contrast does not learn
        self.projector = nn.Sequential(
            nn.BatchNorm1d(2 * c), nn.Linear(2 * c, 2 * c), nn.ReLU(inplace=True), nn.Linear(2 * c, KEY_CHANNELS)
        )
        self.momentum_encoder = MomentumCopy(self.encoder, settings.key_momentum)
        self.momentum_projector = MomentumCopy(self.projector, settings.key_momentum)
        if settings.restoration_weight:
            self.unet = RestoringUNet(network, channels)
        self.told = settings.told
        if self.told is not None and settings.attention == "channels":
            self.attention: nn.Module = ChannelAttention(self.told.bits, c)
        elif self.told is not None:
            self.attention = OuterProductAttention(self.encoder.conv_op, self.told.bits, c)
        if settings.rotation_task:
            self.rotation_head = nn.Linear(2 * c, QUARTERS)
        self.queue = KeyQueue(settings.queue_size or LARGEST_QUEUE, KEY_CHANNELS)

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[PCRLv1Settings, int]:
        """Derive size and number of the views from the plan, see `configure_views`. Quarter turns need equal edges."""
        views = pair_settings(plan)
        views = with_equal_edges(replace(views, min_iou=MIN_IOU), plan.strides)
        settings = replaced(PCRLv1Settings(views), WHERE, given)
        samples = number_of_pairs(settings.views, plan, WHERE, cls.title)
        size, total = settings.views.global_input_size, np.prod(plan.strides, axis=0).tolist()
        if any(length % stride for length, stride in zip(size, total, strict=True)):
            raise UserError(
                f"{WHERE}.views.global_input_size is {size}; expected multiples of the encoder's total stride "
                f"{tuple(total)}, such as {views.global_input_size}"
            )
        if settings.rotation_task and settings.plane is None:
            raise UserError(
                f"{WHERE}.rotation_task needs a plane for quarter turns, and the spacing {settings.views.spacing} with "
                f"the input {size} has none; set rotation_task to false"
            )
        return settings, samples

    @classmethod
    def for_cases(cls, settings: PCRLv1Settings, number: int) -> PCRLv1Settings:
        """Fit the queue to the number of cases.

        Raises:
            UserError: the given queue is too long.
        """
        return replace(settings, queue_size=queue_size_for(number, settings.queue_size, WHERE))

    @classmethod
    def editable(cls, settings: PCRLv1Settings) -> dict[str, Any]:
        """Return the settings that a planner writes into a plan for users to edit."""
        return {"attention": settings.attention, **editable_pairs(settings.views)}

    @classmethod
    def fitted(cls, given: Mapping[str, Any], median: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
        """Drop the crop sizes if one of them exceeds the median image."""
        return fitted_views(given, median)

    @classmethod
    def facts(cls, settings: PCRLv1Settings) -> dict[str, str]:
        """Return the views' sizes, the transformations, the attention, and the length of the queue."""
        told = settings.told
        transformed = (
            "none" if told is None else "flips" if told.plane is None else f"flips, turns of axes {told.plane}"
        )
        attention = settings.attention.replace("_", " ")
        if settings.attention == "outer_product":
            attention += f", a layer of {WIDEST**3 / 1e6:.1f} million weights for {WIDEST} channels"
        return {
            **facts_of_pairs(settings.views),
            "transformations": transformed,
            "attention": attention if told is not None else "",
            "queue": f"{settings.queue_size or LARGEST_QUEUE} keys",
        }

    @classmethod
    def ablations(cls, plan: PlanFacts, batch_size: int) -> dict[str, dict[str, Any]]:
        """Return the rows of Table 2. The last row, with everything, is PCRLv1 itself."""

        def row(**own: Any) -> dict[str, Any]:
            return {"batch_size": batch_size, cls.name: own}

        plain: dict[str, Any] = {"transformations": "none", "mixup": []}
        rows = {
            "contrast_only": row(**plain, restoration_weight=0.0),
            "restoration": row(**plain),
            "rotation_task": row(**plain, rotation_task=True),
            "attention_flips": row(transformations="flips", mixup=[]),
            "attention": row(mixup=[]),
            "mixup_half": row(mixup=[0.5, 1.0]),
        }
        if cls.configure(plan, {})[0].plane is None:  # no quarter turns
            del rows["rotation_task"], rows["attention_flips"]
        return rows

    @classmethod
    def views(
        cls, settings: PCRLv1Settings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]
    ) -> PCRLv1Views:
        """Return the maker of pairs of views."""
        return PCRLv1Views(settings, channels)

    def draw(self, rng: np.random.Generator) -> float | None:
        """Draw the share of the ordinary encoder in the hybrid one, from Beta(1, 1); None: there is none."""
        if not self.own.mixup:
            return None
        low, high = self.own.mixup
        return low + (high - low) * float(rng.beta(1, 1))

    def variants(self) -> list[float | None]:
        """Return one share. All shares cost the same."""
        return [sum(self.own.mixup) / 2 if self.own.mixup else None]

    def forward(self, batch: Mapping[str, Tensor], drawn: float | None, progress: float = 0.0) -> StepOutput:
        """Compute contrast and restoration of a batch; see `PCRLv1Views` for its arrays."""
        case, own = batch["case"][:, 0], self.own
        features = self._features(batch["input"], drawn)
        keys = self._keys(features)
        queries = [keys[0], *keys[2:]]  # of the ordinary and of the hybrid encoder
        others = self.queue.others(case)
        contrasts = [
            contrastive_loss(query, keys[1], self.queue.keys, others, own.temperature, positive_below=False)
            for query in queries
        ]
        terms = {"contrast": torch.stack(contrasts).mean()}
        weighted = [own.contrast_weight * terms["contrast"]]
        values = {MATCHING.name: {"": matched_minus_shuffled(keys[0].detach(), keys[1])}}
        if own.restoration_weight:
            pairs = list(zip(self._restored(features, batch), self._targets(batch, drawn), strict=True))
            errors = [restoration_loss(restored, target) for restored, target in pairs]
            terms["restoration"] = torch.stack(errors).sum()
            weighted.append(own.restoration_weight * terms["restoration"])
            values[RESTORATION.name] = {
                name: error.detach() / variance_within(target)
                for name, error, (_, target) in zip(ENCODERS, errors, pairs, strict=False)
            }
        if own.rotation_task:
            terms["rotation"] = self._rotation_loss(batch)
            weighted.append(terms["rotation"])
        return StepOutput(
            torch.stack(weighted).sum(),
            {name: term.detach() for name, term in terms.items()},
            values,
            {"": keys[0].detach()},
            {"keys": torch.stack(keys, 1).detach(), "cases": case},
        )

    def after_step(self, output: StepOutput, stepped: bool) -> None:
        """Let the momentum copies follow (Eq. 9), and put the keys of all encoders into the queue."""
        if stepped:
            self._follow(self.own.key_momentum)
            keys = output.kept["keys"]  # (B, E, 128)
            self.queue.push(keys.flatten(0, 1), output.kept["cases"].repeat_interleave(keys.shape[1]))

    def after_loading(self) -> None:
        """Give the momentum copies the weights of ``-init``."""
        self._follow(0.0)

    def pictures(self, batch: Mapping[str, Tensor]) -> list[Picture]:
        """Return input, target and restoration of the ordinary encoder, and target and restoration of the hybrid."""
        if not self.own.restoration_weight:
            return []
        drawn = self.variants()[-1]
        targets = self._targets(batch, drawn)
        restored = self._restored(self._features(batch["input"], drawn), batch)
        shown = [Picture("input", batch["input"][:, 0], "what the ordinary encoder gets")]
        for name, target, image in zip(ENCODERS, targets, restored, strict=False):
            if name == "momentum encoder":
                continue
            squared = (image.float() - target.float()).flatten(2).square().mean(2)  # (K, C)
            errors = squared / target.float().flatten(2).var(2, correction=0).clamp_min(1e-12)
            of = name.split()[0]
            shown += [Picture(f"target, {of}", target), Picture(f"restored, {of}", image.float(), errors=errors)]
        return shown

    def pooled(self, bottleneck: Tensor) -> Tensor:
        """Return the means and the maxima over space of the bottleneck's channels, (B, 2c), float32."""
        return mean_and_maximum(bottleneck.float())

    def _features(self, pair: Tensor, drawn: float | None) -> list[Sequence[Tensor]]:
        """Return the stages' features of the ordinary, the momentum and the hybrid encoder (Eq. 6), of (B, 2, C, *)."""
        ordinary, momentum = self.encoder(pair[:, 0]), self.momentum_encoder(pair[:, 1])
        if drawn is None:
            return [ordinary, momentum]
        return [ordinary, momentum, [mixed(a, b, drawn) for a, b in zip(ordinary, momentum, strict=True)]]

    def _keys(self, features: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return normalised vectors (B, 128) of the ordinary, the momentum and the hybrid encoder."""
        pooled = [self.pooled(stages[-1]) for stages in features]
        projectors = [self.projector, self.momentum_projector, self.projector]
        # float32 even under autocast: samples differ little
        with nullcontext() if pooled[0].is_meta else torch.autocast(pooled[0].device.type, enabled=False):
            return [F.normalize(project(x), dim=1) for project, x in zip(projectors, pooled, strict=False)]

    def _targets(self, batch: Mapping[str, Tensor], drawn: float | None) -> list[Tensor]:
        """Return T_o, T_m and T_h of the clean images (Eq. 8), (B, C, *) each. The hybrid image is mixed (Eq. 5)."""
        one, two = batch["target"].unbind(1)
        clean = [one, two] if drawn is None else [one, two, mixed(one, two, drawn)]
        if self.told is None:
            return clean
        return [self.told.apply(image, batch["indicators"][:, number]) for number, image in enumerate(clean)]

    def _restored(self, features: Sequence[Sequence[Tensor]], batch: Mapping[str, Tensor]) -> Sequence[Tensor]:
        """Return what the decoder restores from each encoder's features, (B, C, *) each."""
        stages = [torch.cat(of_encoders) for of_encoders in zip(*features, strict=True)]  # (E * B, c, *)
        if self.told is not None:
            indicators = batch["indicators"][:, : len(features)].transpose(0, 1).flatten(0, 1)  # (E * B, K)
            stages[-1] = self.attention(stages[-1], indicators)
        return self.unet.decode(stages).chunk(len(features))

    def _rotation_loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the cross-entropy of the quarters by which the ordinary encoder's image is turned."""
        plane = self.own.plane
        assert plane is not None, "configure allows the rotation task only with a plane"
        quarters = batch["quarters"][:, 0]
        bottleneck = self.encoder(turned(batch["input"][:, 0], quarters, plane))[-1]
        return F.cross_entropy(self.rotation_head(self.pooled(bottleneck)).float(), quarters)

    def _follow(self, momentum: float) -> None:
        self.momentum_encoder.follow(self.encoder, momentum)
        self.momentum_projector.follow(self.projector, momentum)


def mixed(one: Tensor, other: Tensor, share: float) -> Tensor:
    """Return the mixture of two images or features (Eq. 5-6)."""
    return share * one + (1 - share) * other


def with_equal_edges(views: ViewSettings, strides: Sequence[Sequence[int]]) -> ViewSettings:
    """Return views whose input has equal edges in the plane of quarter turns, if the spacing allows turns.

    The edge is the smaller one, see `turnable`, unless too few voxels would remain at the bottleneck. Crops change by
    the same factor.
    """
    plane = plane_of_quarters(views.spacing)
    if plane is None:
        return views
    total = np.prod(strides, axis=0)
    size = list(views.global_input_size)
    in_plane = [[stride[axis] for axis in plane] for stride in strides]
    edge = turnable([size[axis] for axis in plane], [views.spacing[axis] for axis in plane], in_plane)[0]
    step = math.lcm(*(int(total[axis]) for axis in plane))
    size = [edge if axis in plane else length for axis, length in enumerate(size)]
    while math.prod(length // int(t) for length, t in zip(size, total, strict=True)) < MIN_BOTTLENECK_VOXELS:
        size = [length + step if axis in plane else length for axis, length in enumerate(size)]
    crops = [
        tuple(max(1, round(c * new / old)) for c, new, old in zip(crop, size, views.global_input_size, strict=True))
        for crop in views.global_crop_sizes
    ]
    return replace(views, global_input_size=tuple(size), global_crop_sizes=tuple(dict.fromkeys(crops)))
