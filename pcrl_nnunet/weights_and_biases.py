"""nnU-Net's run of Weights & Biases, started only when the training starts.

nnU-Net starts a run when a trainer is built. It then deletes the ``wandb`` folder of an earlier run, or of another
process that trains in the same folder. A trainer that is refused afterwards has already done both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nnunetv2.training.logging import nnunet_logger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from pcrl_nnunet.errors import UserError

FOLDER = "wandb"  # in the output folder
_ENABLED = "nnUNet_wandb_enabled"
_ON, _OFF = ("1", "True", "true"), ("0", "False", "false")


def check() -> None:
    """Raise `UserError` if nnU-Net's switch has a wrong value, or is on without wandb installed."""
    value = os.environ.get(_ENABLED, "0")
    if value not in (*_ON, *_OFF):
        raise UserError(f"the variable {_ENABLED} is '{value}'; set it to 1, to log to Weights & Biases, or to 0")
    if value in _ON and nnunet_logger.wandb is None:
        raise UserError(
            f"the variable {_ENABLED} is {value}, and the package wandb is not installed: run pip install wandb, or "
            f"set {_ENABLED} to 0"
        )


class _Later:
    """A stand-in for nnU-Net's `WandbLogger` that stores log calls until the run starts."""

    def __init__(self, output_folder: str, resume: bool) -> None:
        self.output_folder, self.resume = output_folder, resume
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:  # update_config, log, log_summary
        return lambda *given: self.calls.append((name, given))

    def begun(self) -> Any:
        """Start the run, and log the stored calls."""
        try:
            logger = nnunet_logger.WandbLogger(self.output_folder, self.resume)
        except (OSError, StopIteration) as error:  # nnU-Net searches the run to resume
            raise UserError(
                f"{os.path.join(self.output_folder, FOLDER)} has no run of Weights & Biases to go on with "
                f"({type(error).__name__}: {error}); remove that folder and run this again"
            ) from error
        except Exception as error:  # wandb raises many kinds of errors, for example without a login
            raise UserError(
                f"Weights & Biases did not begin a run ({type(error).__name__}: {error}); run wandb login, or set "
                f"{_ENABLED} to 0"
            ) from error
        for name, given in self.calls:
            getattr(logger, name)(*given)
        return logger


@contextmanager
def held_back() -> Iterator[None]:
    """Keep trainers from starting a run while they are built."""
    nnunets = nnunet_logger.WandbLogger
    nnunet_logger.WandbLogger = _Later
    try:
        yield
    finally:
        nnunet_logger.WandbLogger = nnunets


def begin(trainer: nnUNetTrainer) -> None:
    """Start the run of a trainer that was built within `held_back`, in the first process only."""
    loggers = trainer.logger.loggers if trainer.local_rank == 0 else []
    trainer.logger.loggers = [logger.begun() if isinstance(logger, _Later) else logger for logger in loggers]
