"""The device of a command."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from pcrl_nnunet.errors import UserError

if TYPE_CHECKING:
    import torch

NAMES = ("cuda", "cpu", "mps")


def check_device_name(name: str | None) -> None:
    """Raise `UserError` for a name that is no device's. This does not import torch."""
    if name is not None and name not in NAMES:
        raise UserError(f"-device is '{name}'; expected cuda, cpu or mps")


def device_named(name: str | None) -> torch.device:
    """Return an available device; None: the best one, whose name is printed."""
    import torch

    check_device_name(name)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        name = next(kind for kind, there in present.items() if there)
        print(f"Using device {name}" + (": no GPU was found" if name == "cpu" else ""))  # noqa: T201
    if not present[name]:
        raise UserError(f"-device is {name}, but torch finds no such device; leave -device out to use what there is")
    return torch.device(name)


@contextmanager
def named_once() -> Iterator[None]:
    """Leave out the line in which nnU-Net's trainer names its device. Our commands name the device themselves."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        lines = said.getvalue().splitlines(keepends=True)
        sys.stdout.write("".join(line for line in lines if not line.startswith("Using device")))
