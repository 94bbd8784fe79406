"""Output folders: nnU-Net's trainers make them before they know whether they can train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape, glob

from nnunetv2.paths import nnUNet_results

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.lock import LOCK

LOGS = "training_log_*.txt"


METHOD = "[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*"  # names of methods; nnU-Net splits names of folders at two underscores
PRETRAINER = "PCRLPretrainTrainer"  # part of the folder's name, as for every trainer of nnU-Net


def name_of_pretrainer(method: str) -> str:
    """Return the name of the class that pretrains with a method, so that each method has its own results folder."""
    return f"{PRETRAINER}_{method}"


def path_of(trainer: str, dataset: str, plans_name: str, configuration: str, fold: int | str) -> str:
    """Return nnU-Net's output folder of a trainer, without making it."""
    return os.path.join(nnUNet_results.get(), dataset, f"{trainer}__{plans_name}__{configuration}", f"fold_{fold}")


def title_of(trainer: str, dataset: str, plans_name: str, configuration: str, fold: int | str) -> str:
    """Return the training of an output folder in words, in two lines, for the headings of its pictures."""
    return f"{dataset}\n{trainer}, configuration {configuration}, plan {plans_name}, fold {fold}"


OVERWRITING = "overwriting.txt"
STARTED_WITH = ("transfer.json",)  # files that a fine-tuning writes before it is sure to start


@contextmanager
def creating() -> Iterator[None]:
    """Raise `UserError` if the folder cannot be made."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or nnUNet_results} cannot be written to ({error.strerror}); nnUNet_results, now "
            f"{nnUNet_results}, has to be a folder that you may write to"
        ) from error


def set_overwriting(folder: str, at_work: bool) -> None:
    """Mark a folder's result as an earlier training's until the present training has a result."""
    path = os.path.join(folder, OVERWRITING)
    if at_work:
        with open(path, "w", encoding="utf-8") as file:
            file.write("checkpoint_final.pth is of the pretraining before, until the present one is finished.\n")
    else:
        with suppress(FileNotFoundError):
            os.remove(path)


def is_overwriting(folder: str) -> bool:
    """Tell whether a folder's result is an earlier training's."""
    return os.path.isfile(os.path.join(folder, OVERWRITING))


def remove_unused(folder: str, log: str | None = None) -> None:
    """Remove the log of a training that never started, and the folder if it holds nothing else.

    Files of other trainings stay: one of them may be at work.
    """
    if log is not None and os.path.isfile(log):
        os.remove(log)
        if not glob(os.path.join(escape(folder), LOGS)):  # no other training has begun here
            for name in STARTED_WITH:
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))
    if os.path.isdir(folder) and set(os.listdir(folder)) <= {LOCK}:
        with suppress(FileNotFoundError):
            os.remove(os.path.join(folder, LOCK))
        remove_if_empty(folder)


def remove_if_empty(folder: str) -> None:
    """Remove a fold's empty folder, and the trainer's and the dataset's folder around it if they are empty."""
    with suppress(OSError):  # not empty: other folds are there
        for _ in range(3):
            os.rmdir(folder)
            folder = os.path.dirname(folder)
