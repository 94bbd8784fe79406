"""Dense comparison: two overlapping views of a scan, whose features are compared point by point, with the plan's whole
U-Net (Pinheiro et al., "Unsupervised Learning of Dense Visual Representations", NeurIPS 2020; for scans: Yan et al.,
"SAM: Self-Supervised Learning of Pixel-Wise Anatomical Embeddings in Radiological Images", IEEE TMI 2022).

B: samples, C: image channels, P: points of a sample, D: channels of all levels together, c: channels of a vector,
d: axes, G: input size, *: space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from pcrl_nnunet.losses import restoration_loss
from pcrl_nnunet.methods.base import Method, Picture, StepOutput
from pcrl_nnunet.methods.pairs import (
    PairViews,
    editable_pairs,
    facts_of_pairs,
    fitted_views,
    pair_settings,
)
from pcrl_nnunet.methods.points import (
    HIDDEN_CHANNELS,
    POINTS,
    TEMPERATURE,
    VECTOR_CHANNELS,
    PointHead,
    number_of_pairs_with_points,
    point_comparison,
)
from pcrl_nnunet.methods.quantities import RANK, RESTORATION, RIGHT, restoration_error
from pcrl_nnunet.networks import UNet
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import number, replaced
from pcrl_nnunet.views.intensities import Intensities, IntensitiesTransform
from pcrl_nnunet.views.settings import Augmentation, ViewSettings

WHERE = "pcrl.pretrain.dense"


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
    points: int = number(POINTS, at_least=1, at_most=4096)
    temperature: float = number(TEMPERATURE, above=0)
    hidden_channels: int = number(HIDDEN_CHANNELS, at_least=1)
    vector_channels: int = number(VECTOR_CHANNELS, at_least=2)
    restoration_weight: float = number(0.0, at_least=0)


class DenseViews(PairViews):
    """Two views of a case, and points that both show.

    The arrays, all float32: ``input`` (2, C, *G), the views with changed intensities; ``points`` (2, P, d), the indices
    of the same points in the voxels of each view; ``target`` (2, C, *G), the views themselves, if they are restored.
    """

    def __init__(self, settings: DenseSettings, channels: int) -> None:
        own = settings.augmentation
        spatial = Augmentation(p_flip=own.p_flip, rotation_degrees=own.rotation_degrees, scale=own.scale)
        super().__init__(settings.views, spatial, channels, settings.points)
        self._augment = IntensitiesTransform(own)
        if not settings.restoration_weight:
            self.arrays = {name: spec for name, spec in self.arrays.items() if name != "target"}


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
        self.head = PointHead(sum(self.unet.channels), settings.hidden_channels, settings.vector_channels)
        if self.restoration_weight:
            self.restore = self.unet.encoder.conv_op(self.unet.channels[-1], channels, 1)

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[DenseSettings, int]:
        """Derive size and number of the views from the plan, see `configure_views`. There are no local views.

        Raises:
            UserError: a setting is unknown or out of range, or the decoder cannot decode views of this size.
        """
        settings = replaced(DenseSettings(pair_settings(plan)), WHERE, given)
        return settings, number_of_pairs_with_points(settings.views, plan, WHERE, cls.title)

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
        # the last level has full resolution
        vectors = self.head.vectors(levels, batch["points"], levels[-1].shape[2:])  # (B, 2, P, c)
        comparison, right = point_comparison(vectors, self.temperature)
        loss, terms = comparison, {"comparison": comparison.detach()}
        values = {RIGHT.name: {"": right}}
        if self.restoration_weight:
            target, restored = batch["target"], self.restored(levels, batch["target"])
            restoration = restoration_loss(restored, target)
            loss, terms["restoration"] = comparison + self.restoration_weight * restoration, restoration.detach()
            values[RESTORATION.name] = {"": restoration_error(restored.detach(), target)}
        return StepOutput(loss, terms, values, {"": vectors.detach().flatten(0, 2)})

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
