"""A pretraining as far as it has come: what its checkpoint and its report are about."""

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
    """A pretraining as far as it has come.

    Attributes:
        folder: of the output.
        cases: as they are read.
        plan_network: the plan's own network, which shares what is trained with the method.
        network: the method with its weights.
        channels: of the images.
        loader: of the training's samples.
        init: what is known of the checkpoint that the training started from.
        steps: done.
        log: an epoch a value, by name.
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
        """Epochs that are complete."""
        return self.steps // self.request.settings.iters_per_epoch
