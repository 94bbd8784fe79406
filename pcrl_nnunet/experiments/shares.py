"""Each process's share of the cores and GPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from pcrl_nnunet.pretraining.distributed import cores


def threads(at_a_time: int) -> int:
    """Return each process's share of the cores, and no more than the user's OMP_NUM_THREADS."""
    share, given = max(1, cores() // at_a_time), os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(given)) if given.isdecimal() and int(given) else share


def environments(variables: Mapping[str, str], at_a_time: int) -> list[dict[str, str]]:
    """Return the environment variables of each process: a share of the cores, and the GPUs in turn.

    Args:
        variables: variables for all processes; they override the variables of this process.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    share = {
        **variables,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "OMP_NUM_THREADS": str(threads(at_a_time)),
        "nnUNet_n_proc_DA": os.environ.get("nnUNet_n_proc_DA", str(max(1, get_allowed_n_proc_DA() // at_a_time))),
        "nnUNet_def_n_proc": os.environ.get("nnUNet_def_n_proc", "2"),
    }
    return [
        {**os.environ, **share, **({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})}
        for slot in range(at_a_time)
    ]
