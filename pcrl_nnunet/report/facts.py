"""What a report is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pcrl_nnunet.loading.loader import ViewLoader
from pcrl_nnunet.methods.base import Method
from pcrl_nnunet.pretraining.cases import PretrainingCases
from pcrl_nnunet.pretraining.settings import PretrainSettings


@dataclass(frozen=True)
class Facts:
    """A pretraining as far as it has come.

    Attributes:
        folder: of the output.
        data: the cases, and what was left out.
        network: the method with its weights.
        loader: of the training's samples.
        init: what is known of the checkpoint that the training started from.
        steps: done.
        log: an epoch a value, by name.
        say: writes a line to the training's log.
    """

    folder: str
    plans_name: str
    configuration: str
    fold: int | str
    dataset_json: Mapping[str, Any]
    data: PretrainingCases
    network: Method
    settings: PretrainSettings
    loader: ViewLoader
    init: Mapping[str, Any] | None
    device: torch.device
    steps: int
    log: Mapping[str, Sequence[float]]
    say: Callable[[str], None]

    @property
    def epochs_done(self) -> int:
        """Epochs that are complete."""
        return self.steps // self.settings.iters_per_epoch
