"""Dense comparison: two overlapping views of a scan, whose features are compared point by point, with the plan's whole
U-Net (Pinheiro et al., "Unsupervised Learning of Dense Visual Representations", NeurIPS 2020; for scans: Yan et al.,
"SAM: Self-Supervised Learning of Pixel-Wise Anatomical Embeddings in Radiological Images", IEEE TMI 2022).

B: samples, C: image channels, P: points of a sample, D: channels of all levels together, c: channels of a vector,
d: axes, G: input size, *: space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.samples import ArraySpec
from pcrl_nnunet.losses import paired_contrastive_loss, restoration_loss
from pcrl_nnunet.methods.base import Method, Picture, StepOutput
from pcrl_nnunet.methods.pairs import (
    PairViews,
    editable_pairs,
    facts_of_pairs,
    fitted_views,
    number_of_pairs,
    pair_settings,
)
from pcrl_nnunet.methods.quantities import RANK, RESTORATION, RIGHT, restoration_error, right_over_chance
from pcrl_nnunet.networks import UNet, at_points, gathered
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import number, replaced
from pcrl_nnunet.views import SubCropTransform
from pcrl_nnunet.views.configure import total_stride
from pcrl_nnunet.views.intensities import Intensities, IntensitiesTransform
from pcrl_nnunet.views.points import PointsTransform
from pcrl_nnunet.views.settings import Augmentation, ViewSettings

WHERE = "pcrl.pretrain.dense"
MOST_PAIRS = 32  # similarities of all points with all grow with the square of the batch


@dataclass(frozen=True)
class DenseSettings:
    """Settings of dense comparison: the views, their augmentation, the points, and the head.

    A sample is a pair of global views. There are no local views: ``views.num_local`` is 0.

    Attributes:
        views: a pair. Source: PCRLv2.
        augmentation: crop, flip, rotation, and strong changes of intensities. Source: ours.
        points: number of points of a pair, which both views show. Source: ours.
        temperature: divisor of the cosines. Source: ours.
        hidden_channels: channels between the two layers of the head. Source: ours.
        vector_channels: channels of the vectors that are compared. Source: ours.
        restoration_weight: weight of the restoration of the views from the last level. 0: no restoration. Source: ours.
    """

    views: ViewSettings
    augmentation: Intensities = field(default_factory=Intensities)
    points: int = number(64, at_least=1, at_most=4096)
    temperature: float = number(0.1, above=0)
    hidden_channels: int = number(128, at_least=1)
    vector_channels: int = number(64, at_least=2)
    restoration_weight: float = number(0.0, at_least=0)


class DenseViews(PairViews):
    """Two views of a case, and points that both show.

    The arrays, all float32: ``input`` (2, C, *G), the views with changed intensities; ``points`` (2, P, d), the indices
    of the same points in the voxels of each view; ``target`` (2, C, *G), the views themselves, if they are restored.
    """

    def __init__(self, settings: DenseSettings, channels: int) -> None:
        own = settings.augmentation
        spatial = Augmentation(p_flip=own.p_flip, rotation_degrees=own.rotation_degrees, scale=own.scale)
        super().__init__(settings.views, spatial, channels)
        self._draw = PointsTransform(SubCropTransform(settings.views, spatial), settings.points)
        self._augment = IntensitiesTransform(own)
        points = ArraySpec((2, settings.points, len(self.spacing)))
        restored = {"target": self.arrays["target"]} if settings.restoration_weight else {}
        self.arrays = {**restored, "input": self.arrays["input"], "points": points}


class Dense(Method):
    """The plan's U-Net with skip connections, and a head on the features of all its levels at a point."""

    name = "dense"
    title = "Dense comparison"
    citations = (
        "Pinheiro, P. O., Almahairi, A., Benmalek, R. Y., Golemo, F., & Courville, A. (2020). Unsupervised learning of "
        "dense visual representations. NeurIPS, 33, 4489-4500.",
        "Yan, K., Cai, J., Jin, D., Miao, S., Guo, D., Harrison, A. P., et al. (2022). SAM: Self-supervised learning "
        "of pixel-wise anatomical embeddings in radiological images. IEEE TMI, 41(10), 2658-2669.",
    )
    Settings = DenseSettings
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "adamw"}
    min_batch_size = (2, "the comparison with points of other scans")
    terms: ClassVar[Mapping[str, str]] = {"comparison": "comparison", "restoration": "restoration"}
    terms_caption = (
        "The comparison is the cross-entropy of the right point among all points of the batch. It should fall below "
        "the log of their number. The restoration's error should fall, if there is a restoration."
    )
    quantities = (RIGHT, RESTORATION, RANK)
    pictures_caption = (
        "A view with changed intensities, the view itself, and the network's restoration. Without a restoration there "
        "are no pictures."
    )

    def __init__(self, network: Any, channels: int, settings: DenseSettings) -> None:
        super().__init__(network, channels, settings)
        self.temperature, self.restoration_weight = settings.temperature, settings.restoration_weight
        self.unet = UNet(network)
        hidden = settings.hidden_channels
        self.head = nn.Sequential(
            nn.Linear(sum(self.unet.channels), hidden, bias=False),  # the next norm has the bias
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, settings.vector_channels),
        )
        if self.restoration_weight:
            self.restore = self.unet.encoder.conv_op(self.unet.channels[-1], channels, 1)

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[DenseSettings, int]:
        """Derive size and number of the views from the plan, see `configure_views`. There are no local views.

        Raises:
            UserError: a setting is unknown or out of range, or the decoder cannot decode views of this size.
        """
        settings = replaced(DenseSettings(pair_settings(plan)), WHERE, given)
        size, total = settings.views.global_input_size, total_stride(plan.strides)
        if any(length % stride for length, stride in zip(size, total, strict=True)):
            raise UserError(
                f"{WHERE}.views.global_input_size is {size}; expected multiples of the network's total stride {total}: "
                f"change global_input_size"
            )
        return settings, min(MOST_PAIRS, number_of_pairs(settings.views, plan, WHERE, cls.title))

    @classmethod
    def editable(cls, settings: DenseSettings) -> dict[str, Any]:
        """Return the settings that a planner writes into a plan for users to edit."""
        return editable_pairs(settings.views)

    @classmethod
    def fitted(cls, given: Mapping[str, Any], median: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
        """Drop the crop sizes if one of them exceeds the median image."""
        return fitted_views(given, median)

    @classmethod
    def facts(cls, settings: DenseSettings) -> dict[str, str]:
        """Return the views' sizes and the number of points."""
        return {**facts_of_pairs(settings.views), "points": f"{settings.points} a pair"}

    @classmethod
    def views(cls, settings: DenseSettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]) -> DenseViews:
        """Return the maker of pairs of views with their common points."""
        return DenseViews(settings, channels)

    def forward(self, batch: Mapping[str, Tensor], drawn: None, progress: float = 0.0) -> StepOutput:
        """Compute InfoNCE of a batch from ``input`` (B, 2, C, *G) and ``points`` (B, 2, P, d), both directions."""
        levels = self.unet.features(batch["input"].flatten(0, 1))
        vectors = self.vectors(levels, batch["points"])  # (B, 2, P, c)
        # all samples of all processes: the number of candidates must not depend on the number of processes
        one, two = (gathered(of_view.contiguous()).flatten(0, 1) for of_view in vectors.unbind(1))  # (BP, c) each
        comparison = paired_contrastive_loss(one, two, self.temperature)
        loss, terms = comparison, {"comparison": comparison.detach()}
        values = {RIGHT.name: {"": partners_over_chance(one.detach(), two.detach())}}
        if self.restoration_weight:
            target, restored = batch["target"], self.restored(levels, batch["target"])
            restoration = restoration_loss(restored, target)
            loss, terms["restoration"] = comparison + self.restoration_weight * restoration, restoration.detach()
            values[RESTORATION.name] = {"": restoration_error(restored.detach(), target)}
        return StepOutput(loss, terms, values, {"": vectors.detach().flatten(0, 2)})

    def vectors(self, levels: Sequence[Tensor], points: Tensor) -> Tensor:
        """Return the vectors (B, 2, P, c) at points (B, 2, P, d) from the features (2B, *) of all levels."""
        size = levels[-1].shape[2:]  # the last level has full resolution
        sampled = torch.cat([at_points(level, points.flatten(0, 1), size) for level in levels], 2)  # (2B, P, D)
        # float32 even under autocast: half precision would round small differences away
        with nullcontext() if sampled.is_meta else torch.autocast(sampled.device.type, enabled=False):
            vectors: Tensor = self.head(sampled.flatten(0, 1)).unflatten(0, points.shape[:3])
        return vectors

    def restored(self, levels: Sequence[Tensor], target: Tensor) -> Tensor:
        """Return the restored views (B, 2, C, *G)."""
        restored: Tensor = self.restore(levels[-1]).unflatten(0, target.shape[:2])
        return restored

    def pictures(self, batch: Mapping[str, Tensor]) -> list[Picture]:
        """Return the first view: input, target and restoration. Empty without a restoration."""
        if not self.restoration_weight:
            return []
        restored = self.restored(self.unet.features(batch["input"].flatten(0, 1)), batch["target"])[:, 0].float()
        target = batch["target"][:, 0].float()
        variance = target.flatten(2).var(2, correction=0).clamp_min(1e-12)
        errors = (restored - target).square().flatten(2).mean(2) / variance
        return [
            Picture("input", batch["input"][:, 0], "what the network gets"),
            Picture("target", target, "what it should restore"),
            Picture("restored", restored, errors=errors),
        ]


def partners_over_chance(one: Tensor, two: Tensor) -> Tensor:
    """Return the share of points whose partner is the most similar point of the other view, over chance.

    Args:
        one, two: (K, c), the vectors of the same points in both views.
    """
    with nullcontext() if one.is_meta else torch.autocast(one.device.type, enabled=False):
        cosines = F.normalize(one.float(), dim=1) @ F.normalize(two.float(), dim=1).T
    return right_over_chance(cosines, torch.arange(len(one), device=one.device))
