"""Comparing to Learn (Zhou et al., "Comparing to Learn: Surpassing ImageNet Pretraining on Radiographs by Comparing
Image Representations", MICCAI 2020): contrast of views, and of mixtures of views of two samples.

B: samples, C: image channels, c: channels of the bottleneck, K: keys of the queue, G: input size, *: space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcrl_nnunet.loading.samples import ArraySpec
from pcrl_nnunet.losses import contrastive_loss
from pcrl_nnunet.methods.base import Method, ParameterGroup, StepOutput
from pcrl_nnunet.methods.keys import LARGEST_QUEUE, queue_size_for
from pcrl_nnunet.methods.pairs import (
    PairViews,
    editable_pairs,
    facts_of_pairs,
    fitted_views,
    number_of_pairs,
    pair_settings,
)
from pcrl_nnunet.methods.quantities import MATCHING, RANK, matched_minus_shuffled
from pcrl_nnunet.networks import (
    KeyQueue,
    MomentumCopy,
    accept_any_size,
    encoder_of,
    mean_and_maximum,
    of_next_sample,
)
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import number, replaced
from pcrl_nnunet.views.holes import GreyAndHoles, GreyAndHolesTransform
from pcrl_nnunet.views.settings import Augmentation, ViewSettings

WHERE = "pcrl.pretrain.c2l"
KEY_CHANNELS = 128  # the paper's


@dataclass(frozen=True)
class C2LSettings:
    """Settings of Comparing to Learn: the views, their augmentation, and the contrast.

    A sample is a pair of global views. There are no local views: ``views.num_local`` is 0.

    Attributes:
        views: a pair. Source: C2L.
        augmentation: crop, flip, rotation, brightness, contrast and holes. Source: C2L's code.
        queue_size: number of keys in the queue. 0: 16384, or 16 for each case if this is less. Source: C2L, and ours
            for few cases.
        temperature: divisor of the cosines. Source: C2L's code.
        key_momentum: share of the momentum encoder's weights that stays in a step. Source: C2L.
    """

    views: ViewSettings
    augmentation: GreyAndHoles = field(default_factory=GreyAndHoles)
    queue_size: int = number(0, at_least=0)
    temperature: float = number(0.07, above=0)
    key_momentum: float = number(0.999, at_least=0, below=1)


class C2LViews(PairViews):
    """Two views of a case.

    The arrays: ``input`` (2, C, *G), float32, after augmentation; ``case`` (1,), int64, a number that stands for the
    case.
    """

    def __init__(self, settings: C2LSettings, channels: int) -> None:
        own = settings.augmentation
        spatial = Augmentation(p_flip=own.p_flip, rotation_degrees=own.rotation_degrees, scale=own.scale)
        super().__init__(settings.views, spatial, channels)
        self._augment = GreyAndHolesTransform(own)
        self.arrays = {"input": self.arrays["input"], "case": ArraySpec((1,), "int64")}


class KeyEncoder(nn.Module):
    """An encoder, pooling, and a head of two layers, which make a vector of an image.

    Behind instance norm, pooled features hardly differ between images. Batch normalisation enlarges the differences.

    Args:
        encoder: the plan's encoder.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        d = 2 * encoder.output_channels[-1]
        self.head = nn.Sequential(nn.BatchNorm1d(d), nn.Linear(d, d), nn.ReLU(inplace=True), nn.Linear(d, KEY_CHANNELS))

    def forward(self, image: Tensor) -> Tensor:
        """Return vectors (B, 128), float32, of images (B, C, *)."""
        pooled = self.pooled(image)
        # float32 even under autocast: samples differ little
        with nullcontext() if pooled.is_meta else torch.autocast(pooled.device.type, enabled=False):
            vectors: Tensor = self.head(pooled)
        return vectors

    def pooled(self, image: Tensor) -> Tensor:
        """Return the means and the maxima over space of the bottleneck's channels, (B, 2c), float32."""
        return mean_and_maximum(self.encoder(image)[-1].float())


class C2L(Method):
    """The encoder of a plan with its head, their momentum copy, and a queue of keys."""

    name = "c2l"
    title = "Comparing to Learn"
    citations = (
        "Zhou, H.-Y., Yu, S., Bian, C., Hu, Y., Ma, K., & Zheng, Y. (2020). Comparing to learn: Surpassing ImageNet "
        "pretraining on radiographs by comparing image representations. MICCAI, 398-407.",
    )
    Settings = C2LSettings
    defaults: ClassVar[Mapping[str, Any]] = {"initial_lr": 0.03}
    min_batch_size = (4, "the batch normalisation of the head")
    min_cases = (2, "the queue of keys of other scans")
    min_samples_of_rank = 2  # the quantities compare the samples of the first rank
    terms: ClassVar[Mapping[str, str]] = {
        "views": "views",
        "mixed_views": "mixed views",
        "mixed_keys": "mixed keys",
    }
    terms_caption = (
        "All terms should fall below the log of the number of keys. At first they may rise, while keys of other cases "
        "replace the random keys of a new queue, which are easy to tell from views."
    )
    quantities = (MATCHING, RANK)

    def __init__(self, network: Any, channels: int, settings: C2LSettings) -> None:
        super().__init__(network, channels, settings)
        encoder = encoder_of(network)
        accept_any_size(encoder)  # a user's view size may not be a multiple of the strides
        self.temperature = settings.temperature
        self.query = KeyEncoder(encoder)
        self.momentum = MomentumCopy(self.query, settings.key_momentum)
        self.queue = KeyQueue(settings.queue_size or LARGEST_QUEUE, KEY_CHANNELS)

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[C2LSettings, int]:
        """Derive size and number of the views from the plan, see `configure_views`. There are no local views."""
        settings = replaced(C2LSettings(pair_settings(plan)), WHERE, given)
        return settings, number_of_pairs(settings.views, plan, WHERE, cls.title)

    @classmethod
    def for_cases(cls, settings: C2LSettings, number: int) -> C2LSettings:
        """Fit the queue to the number of cases.

        Raises:
            UserError: the given queue is too long.
        """
        return replace(settings, queue_size=queue_size_for(number, settings.queue_size, WHERE))

    @classmethod
    def editable(cls, settings: C2LSettings) -> dict[str, Any]:
        """Return the settings that a planner writes into a plan for users to edit."""
        return editable_pairs(settings.views)

    @classmethod
    def fitted(cls, given: Mapping[str, Any], median: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
        """Drop the crop sizes if one of them exceeds the median image."""
        return fitted_views(given, median)

    @classmethod
    def facts(cls, settings: C2LSettings) -> dict[str, str]:
        """Return the views' sizes and the length of the queue."""
        return {**facts_of_pairs(settings.views), "queue": f"{settings.queue_size or LARGEST_QUEUE} keys"}

    @classmethod
    def views(cls, settings: C2LSettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]) -> C2LViews:
        """Return the maker of pairs of views."""
        return C2LViews(settings, channels)

    def groups(self) -> list[ParameterGroup]:
        """Return the encoder and its head."""
        return [ParameterGroup([*self.query.parameters()])]

    def draw(self, rng: np.random.Generator) -> float:
        """Draw the share of a sample in its mixture with another, 0.5 to 1: max(l, 1 - l) with l from Beta(1, 1)."""
        share = float(rng.beta(1, 1))
        return max(share, 1 - share)

    def variants(self) -> list[float]:
        """Return one share. All shares cost the same."""
        return [0.75]

    def forward(self, batch: Mapping[str, Tensor], drawn: float, progress: float = 0.0) -> StepOutput:
        """Compute the mean of the three contrastive terms from ``input`` (B, 2, C, *G) and ``case`` (B, 1)."""
        one, two = batch["input"].unbind(1)
        case = batch["case"][:, 0]
        mixed_one, mixed_two = mixed(one, drawn), mixed(two, drawn)
        query, mixed_query = self.query(torch.cat((one, mixed_one))).chunk(2)
        key, mixed_key = self.momentum(torch.cat((two, mixed_two))).chunk(2)
        others = self.queue.others(case)
        others_of_both = others & self.queue.others(of_next_sample(case))
        terms = {
            "views": self._contrast(query, key, others),
            "mixed_views": self._contrast(mixed_query, mixed_key, others_of_both),
            "mixed_keys": self._contrast(mixed_query, mixed(F.normalize(key, dim=1), drawn), others_of_both),
        }
        loss = torch.stack([*terms.values()]).mean()
        return StepOutput(
            loss,
            {name: term.detach() for name, term in terms.items()},
            {MATCHING.name: {"": matched_minus_shuffled(query.detach(), key)}},
            {"": query.detach()},
            {"keys": key, "cases": case},
        )

    def _contrast(self, query: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
        return contrastive_loss(query, key, self.queue.keys, allowed, self.temperature)

    def after_step(self, output: StepOutput, stepped: bool) -> None:
        """Let the momentum copy follow, and put the keys into the queue."""
        if stepped:
            self.momentum.follow(self.query)
            self.queue.push(output.kept["keys"], output.kept["cases"])

    def after_loading(self) -> None:
        """Give the momentum copy the weights of ``-init``."""
        self.momentum.follow(self.query, momentum=0.0)


def mixed(part: Tensor, share: float) -> Tensor:
    """Return the mixture of each sample with the next sample of the batch.

    The order of a batch's cases is random, so the next sample is as good as a random one. It does not depend on how
    processes share the batch.

    Args:
        part: (B, ...), this process's samples.
        share: share of the sample itself, 0.5 to 1.
    """
    return share * part + (1 - share) * of_next_sample(part)
