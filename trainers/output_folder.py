"""nnU-Net's trainers make their output folder before they know whether they can train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.lock import LOCK

LOGS = "training_log_*.txt"


def path_of(trainer: type[nnUNetTrainer], dataset: str, plans_name: str, configuration: str, fold: int | str) -> str:
    """Return the folder that a trainer of nnU-Net would make, without making one."""
    name = f"{trainer.__name__}__{plans_name}__{configuration}"
    return os.path.join(nnUNet_results.get(), dataset, name, f"fold_{fold}")


@contextmanager
def creating() -> Iterator[None]:
    """`UserError` where the folder cannot be made."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or nnUNet_results} cannot be written to ({error.strerror}); nnUNet_results, now "
            f"{nnUNet_results}, has to be a folder that you may write to"
        ) from error


def remove_unused(folder: str, log: str | None = None) -> None:
    """Remove the log of a training that never got anywhere, and the folder if it holds nothing else.

    What other trainings have left there stays: one of them may be at work.
    """
    if log is not None and os.path.isfile(log):
        os.remove(log)
    if os.path.isdir(folder) and set(os.listdir(folder)) <= {LOCK}:
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, LOCK))
        remove_if_empty(folder)


def remove_if_empty(folder: str) -> None:
    """Remove an empty folder of a fold, and the trainer's and the dataset's folder around it if these are empty."""
    with suppress(OSError):  # not empty: other folds lie there
        for _ in range(3):
            os.rmdir(folder)
            folder = os.path.dirname(folder)
