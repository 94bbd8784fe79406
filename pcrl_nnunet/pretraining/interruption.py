"""Handling of SIGTERM, which schedulers send before they end a job, and the command to resume with."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from pcrl_nnunet.commands import command


class Terminated(BaseException):
    """SIGTERM arrived while no step had to be finished."""


class Sigterm:
    """A context in which SIGTERM does not end the process. Only the main thread receives the signal."""

    def __init__(self, at_once: bool) -> None:
        self.heard = False
        self.at_once = at_once  # raise `Terminated`; False: the code that checks `heard` stops in time

    def _hear(self, number: int, frame: Any) -> None:
        self.heard = True
        self.look()

    def look(self) -> None:
        """Raise `Terminated` if the signal arrived and needs an answer at once. The first of several signals counts."""
        if self.heard and self.at_once:
            self.at_once = False
            raise Terminated

    def __enter__(self) -> Sigterm:
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if self.in_main_thread:
            self.before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_main_thread:
            signal.signal(signal.SIGTERM, self.before)


def command_to_go_on(saved: bool = True) -> str:
    """Return the command that resumes this training, or restarts it if nothing has been saved."""
    words = [word for word in sys.argv[1:] if word != "--c" and (word != "--overwrite" or not saved)]
    again = command(os.path.basename(sys.argv[0]), *words, *([] if "--overwrite" in words else ["--c"]))
    return f"the same torchrun, with {again}" if "TORCHELASTIC_RUN_ID" in os.environ else again
