"""The copy of a network that follows it slowly, and the queue of its keys, for methods with a momentum encoder."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NO_CASE = -1  # the case of random keys; cases have numbers from 0


class MomentumCopy(nn.Module):
    """A copy of a network that follows it as a moving average (He et al., "Momentum Contrast", CVPR 2020, Eq. 2).

    It has no gradient. Buffers, such as the running means of batch norm, are copied as they are.

    Args:
        network: the network; the copy has its weights at first.
        momentum: share of the copy that stays in a step.
    """

    def __init__(self, network: nn.Module, momentum: float) -> None:
        super().__init__()
        self.network, self.momentum = deepcopy(network).requires_grad_(False), momentum

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output of the copy, without gradient."""
        with torch.no_grad():
            output: Tensor = self.network(*inputs)
        return output

    @torch.no_grad()
    def follow(self, network: nn.Module, momentum: float | None = None) -> None:
        """Move towards the network. Momentum 0 copies it."""
        kept = self.momentum if momentum is None else momentum
        for own, other in zip(self.network.parameters(), network.parameters(), strict=True):
            own.lerp_(other, 1 - kept)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)


class KeyQueue(nn.Module):
    """The newest keys of earlier steps, and their cases: the negatives of a contrastive loss.

    Keys of a sample's own case are no negatives of this sample. Small datasets would otherwise push views of one scan
    apart. MoCo and its followers have so many images that this hardly happens. A new queue holds random keys, as in the
    code of MoCo: without negatives the first steps would teach nothing.

    Args:
        length: K, number of keys.
        channels: c.
    """

    keys: Tensor
    cases: Tensor

    def __init__(self, length: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(length, channels), dim=1))  # (K, c), newest first
        self.register_buffer("cases", torch.full((length,), NO_CASE, dtype=torch.int64))

    def others(self, cases: Tensor) -> Tensor:
        """Return which keys are negatives of samples of these cases (B,): (B, K) of bool."""
        return self.cases != cases[:, None]

    @torch.no_grad()
    def push(self, keys: Tensor, cases: Tensor) -> None:
        """Put normalised keys (B, c) of cases (B,) before the queue. The oldest keys leave it."""
        length = len(self.keys)
        keys = F.normalize(keys.to(self.keys.dtype), dim=1)
        self.keys.copy_(torch.cat((keys, self.keys))[:length])
        self.cases.copy_(torch.cat((cases, self.cases))[:length])
