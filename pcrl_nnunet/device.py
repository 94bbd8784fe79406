"""The device of a command."""

from __future__ import annotations

import torch

from pcrl_nnunet.errors import UserError


def device_named(name: str | None) -> torch.device:
    """Return an available device; None: the best one, whose name is printed."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name is None:
        name = next(kind for kind, there in present.items() if there)
        print(f"Using device {name}" + (": no GPU was found" if name == "cpu" else ""))  # noqa: T201
    if name not in present:
        raise UserError(f"-device is '{name}'; expected cuda, cpu or mps")
    if not present[name]:
        raise UserError(f"-device {name} was asked for, but torch finds none; leave -device out to use what there is")
    return torch.device(name)
