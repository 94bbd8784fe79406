"""One command at a time in a folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pcrl_nnunet.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def locked(folder: str, command: str) -> Iterator[None]:
    """Keep a second run of a command out; the lock goes with the process, however it ends.

    Raises:
        UserError: there is a second one, or the folder cannot be written to.
    """
    with ExitStack() as stack:
        try:
            with tempfile.TemporaryFile(dir=folder):  # the lock's file may be there, and the folder read-only by now
                pass
            file = stack.enter_context(open(os.path.join(folder, LOCK), "w"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another {command} is at work on {folder}: wait for it to end.") from None
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written to, or not be locked ({error.strerror}); it has to be a folder that you "
                f"may write to, on a file system with locks"
            ) from error
        yield
