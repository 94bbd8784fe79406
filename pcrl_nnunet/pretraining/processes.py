"""The processes of this machine that share a training (``-num_gpus``)."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from nnunetv2.run.run_training import find_free_network_port

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.pretraining import distributed

GRACE = 5  # seconds that the other processes have to end in order after the first failure


def to_start(number: int, device: torch.device) -> bool:
    """Tell whether this process has to start the processes of a training.

    Args:
        number: number of processes.

    Raises:
        UserError: there are too few GPUs, or torchrun has started the processes.
    """
    if number < 1:
        raise UserError(f"-num_gpus is {number}; expected 1 or more")
    if distributed.launched():
        if number > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError(f"-num_gpus {number} was given to a process of torchrun, which starts them: leave it out")
        return False
    if number > 1 and device.type == "mps":
        raise UserError(f"-num_gpus is {number}, and -device mps has one; leave it out")
    if device.type == "cuda" and number > torch.cuda.device_count():
        raise UserError(
            f"-num_gpus is {number}, and torch finds {torch.cuda.device_count()}; give that number or fewer"
        )
    return number > 1


def start(run: Callable[[Any], None], argument: Any, number: int) -> None:
    """Call a function in `number` processes, and wait for them. The first `UserError` is raised here."""
    # the processes read it when they import torch
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, distributed.cores() // number)))
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
        "WORLD_SIZE": str(number),
    }
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    ranks = torch.multiprocessing.spawn(_rank, (run, argument, variables, errors), number, join=False)
    before = signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in ranks.processes])
    try:
        while not ranks.join(grace_period=GRACE):
            pass
    except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as error:
        if not errors.empty():  # the error of the first failure; the others fail as a consequence
            raise UserError(errors.get()) from None
        if isinstance(error, torch.multiprocessing.ProcessRaisedException):
            raise
        raise UserError(
            f"{error} (see its output above); the training has ended, and its state of the last epoch is kept: "
            f"continue with --c"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _rank(number: int, run: Callable[[Any], None], argument: Any, variables: dict[str, str], errors: Any) -> None:
    """Run one process."""
    os.environ |= {**variables, "RANK": str(number), "LOCAL_RANK": str(number)}
    try:
        run(argument)
    except UserError as error:
        errors.put(str(error))
        sys.exit(1)
