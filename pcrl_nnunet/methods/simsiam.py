"""SimSiam (Chen & He, "Exploring Simple Siamese Representation Learning", CVPR 2021): two views of a scan predict each
other's features.

B: samples, C: image channels, c: channels of the bottleneck, d = 2c: channels of the features, G: input size, *: space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pcrl_nnunet.losses import comparison_loss
from pcrl_nnunet.methods.base import Method, ParameterGroup, StepOutput
from pcrl_nnunet.methods.pairs import (
    PairViews,
    editable_pairs,
    facts_of_pairs,
    fitted_views,
    number_of_pairs,
    pair_settings,
)
from pcrl_nnunet.methods.quantities import MATCHING, RANK, matched_minus_shuffled
from pcrl_nnunet.networks import accept_any_size, encoder_of, mean_and_maximum
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import replaced
from pcrl_nnunet.views.settings import Augmentation, ViewSettings

WHERE = "pcrl.pretrain.simsiam"
BOTTLENECK = 4  # the predictor's width is d over this


@dataclass(frozen=True)
class SimSiamSettings:
    """Settings of SimSiam: the views, and their augmentation.

    A sample is a pair of global views. There are no local views: ``views.num_local`` is 0.

    Attributes:
        views: a pair. Source: SimSiam.
        augmentation: without swaps and cutout. Source: ours.
    """

    views: ViewSettings
    augmentation: Augmentation = field(default_factory=lambda: Augmentation(p_swap=0.0, p_cutout=0.0))


class SimSiamViews(PairViews):
    """The array ``input`` (2, C, *G), float32: two views of a case after pixel augmentation."""

    def __init__(self, settings: SimSiamSettings, channels: int) -> None:
        super().__init__(settings.views, settings.augmentation, channels)
        self.arrays = {"input": self.arrays["input"]}


class SimSiam(Method):
    """The encoder of a plan, a projector and a predictor."""

    name = "simsiam"
    title = "SimSiam"
    citations = ("Chen, X., & He, K. (2021). Exploring simple siamese representation learning. CVPR, 15750-15758.",)
    Settings = SimSiamSettings
    defaults: ClassVar[Mapping[str, Any]] = {"initial_lr": 0.03}
    min_batch_size = (4, "the batch normalisation of projector and predictor")
    min_samples_of_rank = 2  # the quantities compare the samples of the first rank
    terms: ClassVar[Mapping[str, str]] = {"comparison": "comparison"}
    terms_caption = (
        "The comparison should fall towards -1. A comparison near -1 alone is no proof: features that are the same for "
        "all images reach it, too; see above."
    )
    quantities = (MATCHING, RANK)  # after the last batch normalisation the spread says nothing

    def __init__(self, network: Any, channels: int, settings: SimSiamSettings) -> None:
        super().__init__(network, channels, settings)
        self.encoder = encoder_of(network)
        accept_any_size(self.encoder)  # a user's view size may not be a multiple of the strides
        d = 2 * self.encoder.output_channels[-1]
        self.projector = nn.Sequential(
            *_layer(d, d), *_layer(d, d), nn.Linear(d, d, bias=False), nn.BatchNorm1d(d, affine=False)
        )
        self.predictor = nn.Sequential(*_layer(d, d // BOTTLENECK), nn.Linear(d // BOTTLENECK, d))

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[SimSiamSettings, int]:
        """Derive size and number of the views from the plan, see `configure_views`. There are no local views."""
        settings = replaced(SimSiamSettings(pair_settings(plan)), WHERE, given)
        return settings, number_of_pairs(settings.views, plan, WHERE, cls.title)

    @classmethod
    def editable(cls, settings: SimSiamSettings) -> dict[str, Any]:
        """Return the settings that a planner writes into a plan for users to edit."""
        return editable_pairs(settings.views)

    @classmethod
    def fitted(cls, given: Mapping[str, Any], median: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
        """Drop the crop sizes if one of them exceeds the median image."""
        return fitted_views(given, median)

    @classmethod
    def facts(cls, settings: SimSiamSettings) -> dict[str, str]:
        """Return the views' sizes."""
        return facts_of_pairs(settings.views)

    @classmethod
    def views(
        cls, settings: SimSiamSettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]
    ) -> SimSiamViews:
        """Return the maker of pairs of views."""
        return SimSiamViews(settings, channels)

    def groups(self) -> list[ParameterGroup]:
        """Return encoder and projector, and the predictor, whose learning rate does not decay (section 4.2)."""
        return [
            ParameterGroup([*self.encoder.parameters(), *self.projector.parameters()]),
            ParameterGroup([*self.predictor.parameters()], decays=False),
        ]

    def forward(self, batch: Mapping[str, Tensor], drawn: None, progress: float = 0.0) -> StepOutput:
        """Compute the symmetric loss of a batch (Eq. 4) from ``input`` (B, 2, C, *G)."""
        pooled = self.pooled(batch["input"].flatten(0, 1))
        # float32 even under autocast: samples differ little, and batch normalisation would enlarge rounding errors
        with nullcontext() if pooled.is_meta else torch.autocast(pooled.device.type, enabled=False):
            features = self.projector(pooled.float())
            z, p = (x.unflatten(0, (-1, 2)) for x in (features, self.predictor(features)))
        loss = comparison_loss(z[:, 0], p[:, 0], z[:, 1], p[:, 1])
        values = {MATCHING.name: {"": matched_minus_shuffled(p.detach()[:, 0], z.detach()[:, 1])}}
        return StepOutput(loss, {"comparison": loss.detach()}, values, {"": features.detach()})

    def pooled(self, image: Tensor) -> Tensor:
        """Return the means and the maxima over space of the bottleneck's channels, (B, d)."""
        feature = self.encoder(image)[-1].float()  # half precision would round the means' small differences
        return mean_and_maximum(feature)


def _layer(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)
