"""A step of PCRLv2 as in the authors' code, for comparison with ours."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pcrl_nnunet.losses import comparison_loss, restoration_loss
from pcrl_nnunet.methods import StepOutput
from pcrl_nnunet.methods.pcrlv2 import Levels, PCRLv2


class AuthorsWay(nn.Module):
    """A step as in the authors' code, from the same parts: all heads of all levels of all views.

    The loss has three parts. The first view is restored at full resolution and at the drawn level, whose weight fades.
    The two global views are compared at the drawn level. Each pair of a local and a global view is compared at a level
    drawn for the pair.
    """

    def __init__(self, method: PCRLv2) -> None:
        super().__init__()
        self.method = method
        self.name, self.terms, self.quantities = "the authors' way", method.terms, method.quantities
        self.rng = np.random.default_rng(0)

    def forward(self, batch: Mapping[str, Tensor], levels: Levels, progress: float = 0.0) -> StepOutput:
        """See `PCRLv2.forward`."""
        method, target, local = self.method, batch["target"], batch["local"]
        n, drawn = method.decoder.num_levels, levels.deepest
        of_global = method.decoder(method.encoder(batch["input"].flatten(0, 1)), n)
        of_local = method.decoder(method.encoder(local.flatten(0, 1)), n)
        restored, compared, compared_local = {}, {}, {}
        for level in range(1, n + 1):
            image = method.restoration_heads[str(level)](of_global[level], target.shape[3:])
            restored[level] = image.unflatten(0, target.shape[:2])
            head = method.comparison_heads[str(level)]
            compared[level] = tuple(x.unflatten(0, target.shape[:2]) for x in head(of_global[level]))
            compared_local[level] = tuple(x.unflatten(0, local.shape[:2]) for x in head(of_local[level]))
        v, p = compared[drawn]
        loss = restoration_loss(restored[n][:, 0], target[:, 0])
        fading = 0.5 * (1 + math.cos(math.pi * progress))
        loss = loss + fading * restoration_loss(restored[drawn][:, 0], target[:, 0])
        loss = loss + comparison_loss(v[:, 0], p[:, 0], v[:, 1], p[:, 1])
        pairs = []
        for number in range(local.shape[1]):
            for view in (0, 1):
                level = int(self.rng.integers(1, n + 1))
                v_l, p_l = (x[:, number] for x in compared_local[level])
                v_g, p_g = (x[:, view] for x in compared[level])
                pairs.append(comparison_loss(v_l, p_l, v_g, p_g))
        loss = loss + torch.stack(pairs).mean()
        return StepOutput(loss)

    def after_step(self, output: StepOutput, stepped: bool) -> None:
        """Do nothing."""
