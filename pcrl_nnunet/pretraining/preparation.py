"""A method's stage before the training; see `Method.prepare`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pcrl_nnunet import checkpoint
from pcrl_nnunet.methods.base import Method, Preparation
from pcrl_nnunet.pretraining import distributed

PREPARED = "prepared.pth"  # in the output folder, until the training is finished
FORMAT = "pcrl_nnunet/prepared/1"


def prepares(method: type[Method]) -> bool:
    """Tell whether a method has such a stage."""
    return method.prepare.__func__ is not Method.prepare.__func__  # type: ignore[attr-defined]


def prepared(method: type[Method], preparation: Preparation, folder: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Return what the method has prepared. The first process prepares; a training that goes on reads the file.

    Args:
        folder: of the training's output.
        say: writes a line to the log.

    Raises:
        UserError: the file is damaged, or cannot be written.
    """
    if not prepares(method):
        return {}
    path = os.path.join(folder, PREPARED)

    def make() -> dict[str, Any]:
        if os.path.isfile(path):
            say(f"Prepared before: {path}")
        else:
            say(f"{method.title} prepares the training")
            made = _converted(method.prepare(preparation), np.ndarray, torch.from_numpy)
            checkpoint.write(path, {"format": FORMAT, "prepared": made})
        # checkpoints hold tensors, and views work with arrays
        return _converted(checkpoint.read(path, FORMAT)["prepared"], torch.Tensor, torch.Tensor.numpy)

    return distributed.of_first_rank(make)


def _converted(value: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Return a value with all values of a kind converted, also those within dicts, lists and tuples."""
    if isinstance(value, kind):
        return convert(value)
    if isinstance(value, dict):
        return {name: _converted(inner, kind, convert) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_converted(inner, kind, convert) for inner in value)
    return value
