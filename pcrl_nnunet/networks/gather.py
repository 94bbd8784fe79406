"""Features of other samples of a batch that several processes share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import Tensor


def gathered(part: Tensor) -> Tensor:
    """Concatenate the parts of all processes, in the order of the batch's samples.

    Gradients flow back to each process's own part, summed over the processes. A single process gets its own part.

    Args:
        part: (B, ...), this process's part; B may differ between processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return part
    numbers: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, len(part))
    padding = part.new_zeros(max(numbers) - len(part), *part.shape[1:])
    parts = AllGatherGrad.apply(torch.cat([part, padding]))
    return torch.cat([of_rank[:number] for of_rank, number in zip(parts, numbers, strict=True)])


def of_next_sample(part: Tensor) -> Tensor:
    """Return each sample's successor in the batch of all processes, without gradient. The first follows the last.

    Only one sample of each process is exchanged.

    Args:
        part: (B, ...), this process's part, with at least one sample.
    """
    part = part.detach()
    firsts = gathered(part[:1])
    rank = dist.get_rank() if len(firsts) > 1 else 0
    following = firsts[(rank + 1) % len(firsts)]
    return torch.cat((part[1:], following[None]))
