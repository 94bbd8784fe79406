"""One step of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, autocast
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.base import Method, ParameterGroup, StepOutput
from pcrl_nnunet.networks import gathered
from pcrl_nnunet.pretraining import distributed
from pcrl_nnunet.pretraining.optimisation import clip
from pcrl_nnunet.pretraining.settings import PretrainSettings


@dataclass
class Stepper:
    """Forward and backward pass, exchange among processes, clipping, optimiser, and the method's own update.

    Attributes:
        method: the method, on the device.
        groups: the trained parameters.
        grad_scaler: scaler for mixed precision; None: float32.
    """

    method: Method
    groups: Sequence[ParameterGroup]
    optimizer: Optimizer
    scheduler: LRScheduler
    grad_scaler: torch.amp.GradScaler | None
    settings: PretrainSettings
    device: torch.device

    def __call__(self, batch: Mapping[str, Any], step: int, drawn: Any = None) -> tuple[StepOutput, dict[str, float]]:
        """Do one step. Random choices are drawn for the step unless given as `drawn`.

        Args:
            batch: this process's part of the batch: arrays, and the names of the ``cases``.
            step: number of the step.

        Returns:
            The method's output and the losses by name, for the whole batch.

        Raises:
            UserError: the loss or the gradient is not finite (the weights are still unchanged), or the GPU's memory is
                too small.
        """
        data = {
            name: torch.as_tensor(value).to(self.device, non_blocking=True)
            for name, value in batch.items()
            if name != "cases"
        }
        if drawn is None:
            drawn = self.method.draw(np.random.default_rng((self.settings.seed, step)))
        # losses are means over a part: weighted by its share of the batch, they sum to the whole batch's mean
        share = len(batch["cases"]) / self.settings.batch_size if distributed.is_distributed() else 1.0
        self.optimizer.zero_grad(set_to_none=True)
        try:
            output = self._step(data, drawn, batch["cases"], step, share)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory does not suffice for a step of {self.settings.batch_size} samples "
                f"({str(error).splitlines()[0]}); give a smaller -batch_size, not under "
                f"{self.method.min_batch_size[0]}, or make smaller views under pcrl.pretrain.{self.method.name} in the "
                f"plan"
            ) from error
        self.scheduler.step()
        losses = torch.stack([output.loss.detach(), *output.terms.values()]).float()
        values = distributed.total(losses * share).tolist()
        return output, dict(zip(("loss", *output.terms), values, strict=True))

    def _check(self, output: StepOutput) -> None:
        """Raise `TypeError` for an output that log and report would not show as its author expects."""
        method, quantities = self.method, {quantity.name for quantity in self.method.quantities}
        if output.loss.ndim:
            raise TypeError(f"the loss of {method.name} has the shape {tuple(output.loss.shape)}; expected one number")
        for what, given, known in (("terms", output.terms, {*method.terms}), ("values", output.values, quantities)):
            if surplus := sorted(given.keys() - known):
                raise TypeError(f"a step of {method.name} gives {what} that the method does not declare: {surplus}")

    def _step(
        self, data: Mapping[str, Tensor], drawn: Any, cases: Sequence[str], step: int, share: float
    ) -> StepOutput:
        # float32 on the CPU: bfloat16 3D convolutions there gave gradients that were not finite
        with autocast("cuda") if self.device.type == "cuda" else nullcontext():
            output: StepOutput = self.method(data, drawn, step / self.settings.steps)
        self._check(output)
        loss = output.loss * share
        _stop_unless_finite("loss", distributed.total(loss), cases, step)
        stepped = True
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            distributed.sum_gradients(self.method.parameters())
            self.grad_scaler.unscale_(self.optimizer)
            clip(self.groups)
            scale = self.grad_scaler.get_scale()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            stepped = self.grad_scaler.get_scale() >= scale  # the scale shrinks if a step is skipped
        else:
            loss.backward()
            distributed.sum_gradients(self.method.parameters())
            norm = clip(self.groups)
            _stop_unless_finite("gradient", norm, cases, step)  # clipping turns an infinite gradient into NaN
            self.optimizer.step()
        with torch.no_grad():
            kept = {name: gathered(value) for name, value in output.kept.items()}
            self.method.after_step(replace(output, kept=kept), stepped)
        return output


def _stop_unless_finite(what: str, value: Tensor, cases: Sequence[str], step: int) -> None:
    if torch.isfinite(value):  # equal on all ranks, because it is their sum
        return
    names = sorted({case for of_rank in distributed.of_all_ranks(cases) for case in of_rank})
    raise UserError(
        f"the {what} of step {step} is {value.item()}; the weights of the last epoch are kept. Look at the images of "
        f"its cases {', '.join(names)}, or lower pcrl.pretrain.initial_lr and start again"
    )
