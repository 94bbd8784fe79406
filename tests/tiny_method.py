"""A method of pretraining with a stage before the training: it learns the means of views.

Tests offer it as a built-in one: ``monkeypatch.setitem(method_names.BUILT_IN, "mean", "tiny_method:Mean")``. `Queue` is
another one, with state that no gradient changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from pcrl_nnunet.methods import ArraySpec, Method, PlanFacts, Preparation, Sample, StepOutput, Views
from pcrl_nnunet.networks import encoder_of

PLACE = "tiny_method:Mean"


@dataclass(frozen=True)
class MeanSettings:
    """Its settings."""

    scale: float = 1.0  # factor for the images


class CornerViews(Views):
    """The first corner of an image, with noise."""

    def __init__(self, plan: PlanFacts, channels: int) -> None:
        self.size, self.spacing = (8,) * len(plan.patch_size), plan.spacing
        self.arrays = {"input": ArraySpec((channels, *self.size))}

    def __call__(self, case: Any, volume: Any, rng: np.random.Generator) -> Sample:
        corner = np.asarray(volume[(slice(None), *(slice(n) for n in self.size))], np.float32)
        return {"input": corner + rng.normal(size=corner.shape).astype(np.float32)}


class MeanViews(Views):
    """The first corner of an image, with the preparation of its case."""

    def __init__(self, plan: PlanFacts, channels: int, scale: float, prepared: Mapping[str, Any]) -> None:
        self.size, self.spacing, self.scale = (8,) * len(plan.patch_size), plan.spacing, scale
        self.prepared = prepared
        self.arrays = {"input": ArraySpec((channels, *self.size)), "mean": ArraySpec((1,))}

    def __call__(self, case: Any, volume: Any, rng: np.random.Generator) -> Sample:
        corner = np.asarray(volume[(slice(None), *(slice(n) for n in self.size))], np.float32)
        return {"input": self.scale * corner, "mean": np.asarray(self.prepared["means"][case.name], np.float32)}


class Mean(Method):
    """Learns the means."""

    name, title, citations = "mean", "Means", ("Nobody (2026). Means.",)
    Settings = MeanSettings
    prepared_for: list[str] = []  # noqa: RUF012  (filled by tests)

    def __init__(self, network: Any, channels: int, settings: MeanSettings) -> None:
        super().__init__(network, channels, settings)
        self.encoder = encoder_of(network)
        self.head = nn.Linear(self.encoder.output_channels[-1], 1)

    @classmethod
    def prepare(cls, preparation: Preparation) -> dict[str, Any]:
        cls.prepared_for.append(preparation.network.__class__.__name__)
        names = [case.name for case in preparation.cases]
        return {"means": {name: np.full(1, number, np.float32) for number, name in enumerate(names)}}

    @classmethod
    def views(cls, settings: MeanSettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]) -> MeanViews:
        return MeanViews(plan, channels, settings.scale, prepared)

    def forward(self, batch: Mapping[str, Tensor], drawn: Any, progress: float = 0.0) -> StepOutput:
        features = dropout(self.encoder(batch["input"])[-1].flatten(2).mean(2))  # dropout draws from torch's generator
        return StepOutput((self.head(features) - batch["mean"]).square().mean())


class Queue(Method):
    """Keeps keys of all samples in a queue, like methods with many negatives."""

    name, title = "queue", "Queue"
    min_batch_size = (2, "a comparison")

    def __init__(self, network: Any, channels: int, settings: Any) -> None:
        super().__init__(network, channels, settings)
        self.encoder = encoder_of(network)
        self.register_buffer("keys", torch.zeros(12, self.encoder.output_channels[-1]))

    @classmethod
    def views(cls, settings: Any, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]) -> CornerViews:
        return CornerViews(plan, channels)

    def forward(self, batch: Mapping[str, Tensor], drawn: Any, progress: float = 0.0) -> StepOutput:
        features = self.encoder(batch["input"])[-1].flatten(2).amax(2)
        return StepOutput((features - self.keys.mean(0)).square().mean(), kept={"keys": features.detach()})

    def after_step(self, output: StepOutput, stepped: bool) -> None:
        self.keys.copy_(torch.cat([output.kept["keys"], self.keys])[: len(self.keys)])
