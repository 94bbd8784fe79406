"""The device of a command."""

from __future__ import annotations

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
