"""The memory of a training step, estimated from shapes alone, and settings of the CPU's allocator."""

from __future__ import annotations

import copy
import ctypes
import platform
from collections.abc import Mapping

import numpy as np
import torch

from pcrl_nnunet.loading.samples import ArraySpec
from pcrl_nnunet.methods.base import Method

COPIES_OF_WEIGHTS = {"sgd": 3, "adamw": 4}  # weights, gradients, and the optimiser's means
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def estimated_peak(method: Method, arrays: Mapping[str, ArraySpec], batch_size: int, optimizer: str) -> int | None:
    """Estimate the bytes of a float32 step of the most expensive variant: weights, and tensors kept for backward.

    The step runs on the meta device: it computes shapes and holds no data. The estimate excludes the convolutions'
    workspaces and memory that an allocator keeps for later.

    Args:
        arrays: the arrays of a sample.
        batch_size: samples of one process.
        optimizer: "sgd" or "adamw".

    Returns:
        None if the meta device lacks an operation of the method.
    """
    method = copy.deepcopy(method).to("meta")
    batch = {
        name: torch.empty((batch_size, *spec.shape), dtype=getattr(torch, np.dtype(spec.dtype).name), device="meta")
        for name, spec in arrays.items()
    }
    storages: dict[int, torch.UntypedStorage] = {}  # kept alive so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            method(batch, method.variants()[-1])
    except (NotImplementedError, RuntimeError, TypeError):  # such as .item(): the meta device has no values
        return None
    weights = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in method.state_dict().values()}
    kept = sum(storage.nbytes() for address, storage in storages.items() if address not in weights)
    return kept + COPIES_OF_WEIGHTS[optimizer] * sum(weights.values())


def keep_freed_memory() -> None:
    """Make this process keep freed memory for its next tensors, for trainings on a CPU. Without glibc, do nothing.

    By default glibc returns a freed large tensor's memory to the system. Every page of the next tensor is then cleared
    and mapped again: a million page faults per step.
    """
    # scripts/benchmark_step.py: a float32 step takes 0.64 to 0.73 of the time and up to 1.4 times the memory
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
