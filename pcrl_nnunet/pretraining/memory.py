"""How much memory a training step takes, from shapes alone, and what the CPU's allocator does with it."""

from __future__ import annotations

import copy
import ctypes
import platform

import torch

from pcrl_nnunet.config import PretrainSettings
from pcrl_nnunet.methods.pcrlv2 import PCRLv2

COPIES_OF_WEIGHTS = {"sgd": 3, "adamw": 4}  # weights, gradients, and the optimiser's means
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def estimated_peak(method: PCRLv2, settings: PretrainSettings, channels: int, pairs: int | None = None) -> int:
    """Bytes of a float32 step at the deepest level: the weights' copies, and every tensor that backward keeps.

    The step runs on the meta device: it computes shapes, and holds no data. Workspaces of the convolutions and
    memory that an allocator keeps for later are not in it.

    Args:
        channels: of the image.
        pairs: of one process; None: the whole batch.
    """
    views, batch_size = settings.views, pairs or settings.batch_size
    method = copy.deepcopy(method).to("meta")
    global_shape = (batch_size, 2, channels, *views.global_input_size)
    batch = {
        "input": torch.empty(global_shape, device="meta"),
        "target": torch.empty(global_shape, device="meta"),
    }
    if views.num_local:
        local_shape = (batch_size, views.num_local, channels, *views.local_input_size)
        batch["local"] = torch.empty(local_shape, device="meta")
    storages: dict[int, torch.UntypedStorage] = {}  # of tensors, kept alive so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method(batch, method.all_levels()[-1])
    weights = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in method.state_dict().values()}
    kept = sum(storage.nbytes() for address, storage in storages.items() if address not in weights)
    return kept + COPIES_OF_WEIGHTS[settings.optimizer] * sum(weights.values())


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next tensors. For trainings on a CPU; does nothing without glibc.

    By default glibc gets a large tensor's memory from the system and gives it back when it is freed, and every page of
    the next one is cleared and mapped anew: a million page faults a step.
    """
    # scripts/benchmark_step.py: a float32 step takes 0.64 to 0.73 of the time and up to 1.4 times the memory
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
