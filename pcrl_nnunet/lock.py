"""A lock that allows one command at a time in a folder."""

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
    """Refuse a second run of a command. The lock ends with the process, however it ends.

    Raises:
        UserError: another run is at work, or the folder is not writable.
    """
    with ExitStack() as stack:
        try:
            with tempfile.TemporaryFile(dir=folder):  # the lock's file may exist in a folder that became read-only
                pass
            if fcntl is not None:
                stack.callback(os.close, _lock(os.path.join(folder, LOCK)))
        except BlockingIOError:
            raise UserError(f"Another {command} is at work on {folder}: wait for it to end.") from None
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written to, or cannot be locked ({error.strerror}); it has to be a folder "
                f"with write permission on a file system with locks"
            ) from error
        yield


def _lock(path: str) -> int:
    """Lock the file of that path. The previous owner may remove the file while it is being opened.

    Returns:
        the file's descriptor.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
