"""Training on several processes (ranks), each with a part of every batch.

Without a process group all functions work for a single process. In a group, sums over ranks make the training equal to
a single process with the same batch, up to the order of floating-point sums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from nnunetv2.utilities.ddp_allgather import AllGatherGrad
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pcrl_nnunet.errors import UserError

_T = TypeVar("_T")


def launched() -> bool:
    """Tell if torchrun or `-num_gpus` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()


def cores() -> int:
    """Return the number of cores that this process may use; a cluster may allot only some of the machine's cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_distributed() -> bool:
    """Tell if there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process; only process 0 writes."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ["LOCAL_RANK"]) if is_distributed() else 0


@contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes, if there are any. All processes but the first are silent.

    Yields:
        this process's device: the GPU with the process's number on the machine.
    """
    if not launched():
        yield device
        return
    of_rank = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if device.type == "cuda" else device
    if of_rank.type == "cuda":
        torch.cuda.set_device(of_rank)
    # ranks wait while the first rank unpacks old data, prepares, and writes report and files
    dist.init_process_group("nccl" if of_rank.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        if rank() == 0:
            yield of_rank
        else:
            os.environ["nnUNet_wandb_enabled"] = "0"  # list the run once
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                yield of_rank
    except UserError:
        raise  # the group ends with the process: ending it now would show the others' errors instead of this one
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def part_of(batch_size: int, least: int = 1) -> tuple[int, int]:
    """Return the first sample and the number of samples of this rank's part. Raise `UserError` as `largest_part`."""
    largest_part(batch_size, world_size(), least)
    first, last = (batch_size * number // world_size() for number in (rank(), rank() + 1))
    return first, last - first


def largest_part(batch_size: int, ranks: int, least: int = 1) -> int:
    """Return the largest number of samples of any rank.

    Args:
        least: number of samples that each rank needs.

    Raises:
        UserError: there are too few samples for this number of ranks.
    """
    if batch_size < least * ranks:
        raise UserError(
            f"{ranks} processes share a batch of {batch_size} samples, and each needs {least}: give -batch_size "
            f"{least * ranks} or more, or fewer processes"
        )
    return -(-batch_size // ranks)


def total(values: Tensor) -> Tensor:
    """Return the sum over ranks, without gradient."""
    values = values.detach().clone()
    if is_distributed():
        dist.all_reduce(values)
    return values


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Tell if the flag is set on any rank; a single process does not wait for its device."""
    return bool(total(torch.tensor(float(flag), device=device))) if is_distributed() else flag


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over ranks, in place. All ranks draw the same choices, so the same parameters have gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not is_distributed() or not gradients:
        return
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    for gradient, summed in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def of_first_rank(make: Callable[[], _T]) -> _T:
    """Call a function on the first rank only, and return its result or raise its `UserError` on every rank."""
    if not is_distributed():
        return make()
    holder: list[Any] = [None, None]
    if rank() == 0:
        try:
            holder[0] = make()
        except UserError as error:
            holder[1] = str(error)
    dist.broadcast_object_list(holder)
    found: _T = holder[0]
    if holder[1] is not None:
        raise UserError(holder[1])
    return found


def wait_for_all() -> None:
    """Wait until every rank is here."""
    if is_distributed():
        dist.barrier()


def of_all_ranks(value: _T) -> list[_T]:
    """Return every rank's value, by rank."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def require_same(what: str, value: str) -> None:
    """Raise `UserError` on all ranks unless they have the same value."""
    values = of_all_ranks(value)
    differing = [number for number, other in enumerate(values) if other != values[0]]
    if differing:
        raise UserError(
            f"rank 0 and rank {', '.join(map(str, differing))} have different {what}: every machine needs the same "
            f"plans and preprocessed data, and the same version of pcrl_nnunet"
        )


def same_weights(network: nn.Module) -> None:
    """Give all ranks the weights of the first rank."""
    if is_distributed():
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)


def synchronise_batch_norms(network: nn.Module) -> None:
    """Make every batch norm normalise over the samples of all ranks, in place, on any device.

    torch's SyncBatchNorm does not run on a CPU, and its conversion replaces a module with two names by two modules.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = SyncedBatchNorm


class SyncedBatchNorm(_BatchNorm):
    """Batch norm over all ranks' samples while training. An all-gather gives mean and variance of c channels."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # any number of dimensions

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, c, *) to (B, c, *)."""
        if not self.training or not is_distributed():
            return super().forward(input)
        others = [0, *range(2, input.ndim)]
        variance, mean = torch.var_mean(input.float(), others, correction=0)
        number = mean.new_tensor([input.numel() / input.shape[1]])  # values for each channel; ranks may differ
        of_ranks: Tensor = AllGatherGrad.apply(torch.cat([mean, variance, number]))
        means, variances, numbers = of_ranks.split([len(mean), len(mean), 1], 1)
        share = numbers / numbers.sum()
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean) ** 2)).sum(0)
        self._follow(mean.detach(), variance.detach(), numbers.detach().sum())
        shape = (1, -1, *[1] * (input.ndim - 2))
        scale = torch.rsqrt(variance + self.eps)
        output = (input - mean.view(shape)) * (scale * self.weight if self.affine else scale).view(shape)
        return (output + self.bias.view(shape) if self.affine else output).to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor, number: Tensor) -> None:
        """Update the running statistics like nn.BatchNorm, with the unbiased variance."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(variance * number / (number - 1), momentum)
