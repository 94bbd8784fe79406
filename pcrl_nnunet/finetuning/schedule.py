"""Learning rates of a fine-tuning."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch.optim import Optimizer

from pcrl_nnunet.config import FinetuneSettings


class WarmupPolyLR(PolyLRScheduler):
    """nnU-Net's schedule after a linear warm-up; a step is an epoch, which nnU-Net gives as it starts.

    A parameter group may have a ``factor`` of the rate, and a number of first epochs at rate 0, ``frozen_epochs``.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, max_steps: int, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, initial_lr, max_steps - warmup_steps)

    def step(self, current_step: int | None = None) -> None:
        """Set the rate of an epoch; None is the call that torch's base class makes before the first one."""
        step = current_step or 0
        super().step(max(0, step - self.warmup_steps))
        for group in self.optimizer.param_groups:
            factor = 0.0 if step < group.get("frozen_epochs", 0) else group.get("factor", 1.0)
            group["lr"] *= min(1.0, (step + 1) / max(1, self.warmup_steps)) * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def keep_own_groups(optimizer: Optimizer) -> None:
    """Let an optimiser take the momentum of a checkpoint alone: the plan may have other rates and decay by now."""

    def with_own_groups(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "param_groups": optimizer.state_dict()["param_groups"]}

    optimizer.register_load_state_dict_pre_hook(with_own_groups)


def group_by_rate(optimizer: Optimizer, encoder: Any, settings: FinetuneSettings) -> None:
    """Split an optimiser's one group into groups of neighbouring parameters with the same factor of the rate.

    Every parameter keeps its number in the optimiser's state, whatever the number of groups.
    """
    shares: dict[int, tuple[float, int]] = {}
    for coarser, part in enumerate([*reversed(encoder.stages[1:]), encoder]):  # the last one adds stem and stage 0
        factor = settings.encoder_lr_factor * settings.layer_lr_decay**coarser
        for parameter in part.parameters():
            shares.setdefault(id(parameter), (factor, settings.frozen_epochs))
    (group,) = optimizer.param_groups
    optimizer.param_groups[:] = [
        {**group, "params": list(parameters), "factor": factor, "frozen_epochs": frozen_epochs}
        for (factor, frozen_epochs), parameters in groupby(group["params"], lambda p: shares.get(id(p), (1.0, 0)))
    ]
