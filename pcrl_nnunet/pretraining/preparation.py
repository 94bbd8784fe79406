"""A method's stage before the training; see `Method.prepare`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from pcrl_nnunet import checkpoint
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.base import Method, Preparation
from pcrl_nnunet.pretraining import distributed

PREPARED = "prepared.pth"  # in the output folder, until the training is finished
FORMAT = "pcrl_nnunet/prepared/2"


def prepares(method: type[Method]) -> bool:
    """Tell whether a method has such a stage."""
    return method.prepare.__func__ is not Method.prepare.__func__  # type: ignore[attr-defined]


def prepared(
    method: type[Method],
    preparation: Preparation,
    agreement: Mapping[str, Any],
    folder: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Return the method's preparation. The first process prepares; a resumed training reads the file.

    Args:
        agreement: settings, plan and cases of the training. If they differ from the file's, the method prepares again.
        folder: the training's output folder.
        say: writes a line to the log.

    Raises:
        UserError: the file is damaged or cannot be written.
    """
    if not prepares(method):
        return {}
    path = os.path.join(folder, PREPARED)

    def make() -> dict[str, Any]:
        of_training = fingerprint_of(agreement)
        content = checkpoint.read(path, FORMAT) if os.path.isfile(path) else {}
        if content.get("of_training") == of_training:
            say(f"Prepared before: {path}")
        else:
            say(f"{method.title} prepares the training")
            made = make_anew(method, preparation)
            content = {"format": FORMAT, "of_training": of_training, "prepared": _converted(made, _as_tensor)}
            checkpoint.write(path, content)
        # checkpoints hold tensors, views use arrays
        return _converted(content["prepared"], _as_array)

    return distributed.of_first_rank(make)


def refuse_another_preparation(now: Mapping[str, Any], before: str | None, folder: str) -> None:
    """Raise `UserError` if a training would resume with another preparation than it began with.

    Args:
        now: the method's preparation.
        before: `fingerprint_of` the preparation at the beginning; None: the training begins.
    """
    if before not in (None, fingerprint_of(now)):
        raise UserError(
            f"the method's preparation differs from the one that the training in {folder} began with; restore its "
            f"{PREPARED} and the cases, or start anew with --overwrite instead of --c"
        )


def fingerprint_of(value: Any) -> str:
    """Return the sha256 of a value of dicts, lists, plain values and arrays."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value, key=str):
                digest.update(f"{name}:".encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} values".encode())
            for inner in value:
                add(inner)
        elif isinstance(value, np.ndarray):
            digest.update(f"{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        else:
            digest.update(repr(value).encode())

    add(value)
    return digest.hexdigest()


def make_anew(method: type[Method], preparation: Preparation) -> dict[str, Any]:
    """Call `Method.prepare` without any effect on the training that follows.

    Raises:
        TypeError: the method returns anything but plain values and arrays of numbers.
    """
    devices = [preparation.device] if preparation.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        made = method.prepare(preparation)
    _refuse_other_types(made, method.name)
    return made


def _refuse_other_types(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_other_types(inner, f"{where}[{name!r}]")
    elif isinstance(value, (list, tuple)):
        for number, inner in enumerate(value):
            _refuse_other_types(inner, f"{where}[{number}]")
    elif isinstance(value, np.ndarray):
        if value.dtype.kind not in "biuf":
            raise TypeError(f"prepare returned an array of {value.dtype} as {where}; expected numbers")
    elif not isinstance(value, (bool, int, float, str, type(None))):
        raise TypeError(f"prepare returned {value!r} as {where}; expected plain values and arrays of numbers")


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def _as_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


def _converted(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Return a value with its innermost values converted."""
    if isinstance(value, dict):
        return {name: _converted(inner, convert) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_converted(inner, convert) for inner in value)
    return convert(value)
