"""The optimiser of a pretraining, its learning rates and gradient clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from pcrl_nnunet.methods.base import ParameterGroup
from pcrl_nnunet.pretraining.settings import PretrainSettings

GRADIENT_CLIP = 12  # nnU-Net's value


class CosineDecay(CosineAnnealingLR):
    """A cosine decay to 0 over all steps. A parameter group with ``decays`` False keeps its rate."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the rates of the next step."""
        rates = zip(super().get_lr(), self.optimizer.param_groups, self.base_lrs, strict=True)
        return [float(rate) if group.get("decays", True) else float(base) for rate, group, base in rates]


def optimiser(groups: Sequence[ParameterGroup], settings: PretrainSettings) -> tuple[Optimizer, CosineDecay]:
    """Return the optimiser of a method's parameters, and the schedule of its rates."""
    s = settings
    parameters = [
        {"params": list(group.parameters), "lr": s.initial_lr * group.lr_factor, "decays": group.decays}
        for group in groups
    ]
    made: Optimizer
    if s.optimizer == "adamw":
        made = torch.optim.AdamW(parameters, s.initial_lr, weight_decay=s.weight_decay)
    else:
        made = torch.optim.SGD(parameters, s.initial_lr, momentum=s.momentum, weight_decay=s.weight_decay)
    return made, CosineDecay(made, s.steps)


def clip(groups: Sequence[ParameterGroup]) -> Tensor:
    """Clip the gradients in place, and return the norm before. A group with its own ``clip`` is clipped separately."""
    together = [parameter for group in groups if group.clip is None for parameter in group.parameters]
    norms = [torch.nn.utils.clip_grad_norm_(together, GRADIENT_CLIP)]
    norms += [
        torch.nn.utils.clip_grad_norm_(group.parameters, group.clip) for group in groups if group.clip is not None
    ]
    if len(norms) == 1:
        return norms[0]
    device = groups[0].parameters[0].device  # torch returns 0 on the CPU for a group without gradients
    return torch.stack([norm.to(device) for norm in norms]).norm()
