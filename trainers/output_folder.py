"""nnU-Net's trainers make their output folder before they know whether they can train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape, glob

from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.lock import LOCK


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


def remove_if_unused(trainer: nnUNetTrainer) -> None:
    """Remove a folder that holds only logs: a training that never got anywhere leaves none that looks like one."""
    if trainer.local_rank != 0:
        return
    logs = glob(os.path.join(escape(trainer.output_folder), "training_log_*.txt"))
    lock = os.path.join(trainer.output_folder, LOCK)
    if set(os.listdir(trainer.output_folder)) <= {os.path.basename(path) for path in (lock, *logs)}:
        for path in (*logs, *([lock] if os.path.exists(lock) else [])):
            os.remove(path)
        with suppress(OSError):  # not empty: other folds lie there
            os.rmdir(trainer.output_folder)
            os.rmdir(trainer.output_folder_base)
            os.rmdir(os.path.dirname(trainer.output_folder_base))
