"""One command at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pcrl_nnunet.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def locked(folder: str, command: str) -> Iterator[None]:
    """Keep a second run of a command out; the lock goes with the process, however it ends."""
    with open(os.path.join(folder, LOCK), "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"Another {command} is at work on {folder}: wait for it to end.") from None
        yield
