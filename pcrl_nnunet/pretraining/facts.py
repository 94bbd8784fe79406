"""The current facts of a pretraining, for its checkpoint and its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.loader import ViewLoader
from pcrl_nnunet.methods.base import Method
from pcrl_nnunet.pretraining.request import Request


@dataclass(frozen=True)
class Facts:
    """The current facts of a pretraining.

    Attributes:
        folder: the output folder.
        cases: the cases as they are read.
        plan_network: the plan's own network, which shares trained weights with the method.
        network: the method with its weights.
        channels: names of the images' channels.
        loader: loader of the training's samples.
        init: facts about the checkpoint that the training started from.
        steps: number of finished steps.
        log: values by name, one for each epoch.
        say: writes a line to the training's log.
    """

    request: Request
    folder: str
    cases: Sequence[Case]
    plan_network: nn.Module
    network: Method
    channels: int
    loader: ViewLoader
    init: Mapping[str, Any] | None
    device: torch.device
    steps: int
    log: Mapping[str, Sequence[float]]
    say: Callable[[str], None]

    @property
    def epochs_done(self) -> int:
        """Number of complete epochs."""
        return self.steps // self.request.settings.iters_per_epoch
