"""The learning rates of a fine-tuning."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn
from torch.optim import AdamW, Optimizer

from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.networks import encoder_of, seg_layers_of


class WarmupPolyLR(PolyLRScheduler):
    """nnU-Net's schedule after a linear warm-up. A step is an epoch, and nnU-Net passes its number at the start.

    A parameter group may have a ``factor`` of the rate, and ``frozen_epochs``, a number of first epochs at rate 0.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, max_steps: int, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, initial_lr, max_steps - warmup_steps)

    def step(self, current_step: int | None = None) -> None:
        """Set the rate of an epoch. torch's base class calls it with None before the first epoch."""
        step = current_step or 0
        super().step(max(0, step - self.warmup_steps))
        for group in self.optimizer.param_groups:
            factor = 0.0 if step < group.get("frozen_epochs", 0) else group.get("factor", 1.0)
            group["lr"] *= min(1.0, (step + 1) / max(1, self.warmup_steps)) * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def keep_own_groups(optimizer: Optimizer) -> None:
    """Make an optimiser load only a checkpoint's momentum: rates and decay in the plan may have changed.

    The momentum of another kind of optimiser is left out. The attribute ``other_kind`` then names that kind.
    """

    def with_own_groups(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        given = "adamw" if any("exp_avg" in of_parameter for of_parameter in state["state"].values()) else "sgd"
        own = "adamw" if isinstance(optimizer, AdamW) else "sgd"
        if state["state"] and given != own:
            vars(optimizer)["other_kind"] = given
            state = {**state, "state": {}}
        return {**state, "param_groups": optimizer.state_dict()["param_groups"]}

    optimizer.register_load_state_dict_pre_hook(with_own_groups)


def group_by_rate(optimizer: Optimizer, network: nn.Module, settings: FinetuneSettings) -> None:
    """Split an optimiser's only group into groups of neighbouring parameters with the same factor of the rate.

    Every parameter keeps its number in the optimiser's state, for any number of groups.
    """
    encoder, only = encoder_of(network), settings.seg_layers_only_epochs
    shares: dict[int, tuple[float, int, bool]] = {}  # factor, frozen epochs, whether it belongs to the encoder
    for coarser, part in enumerate([*reversed(encoder.stages[1:]), encoder]):  # the last part adds stem and stage 0
        factor = settings.encoder_lr_factor * settings.layer_lr_decay**coarser
        for parameter in part.parameters():
            shares.setdefault(id(parameter), (factor, max(only, settings.frozen_epochs), True))
    for layer in seg_layers_of(network):
        shares |= {id(parameter): (1.0, 0, False) for parameter in layer.parameters()}
    (group,) = optimizer.param_groups
    optimizer.param_groups[:] = [
        {**group, "params": list(parameters), "factor": factor, "frozen_epochs": epochs, "of_encoder": of_encoder}
        for (factor, epochs, of_encoder), parameters in groupby(
            group["params"], lambda p: shares.get(id(p), (1.0, only, False))
        )
    ]
