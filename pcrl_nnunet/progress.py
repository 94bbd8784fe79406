"""Lines of progress, so that no command is silent for long, on a terminal and in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from threading import Event, Thread
from time import monotonic
from typing import TypeVar

SILENT_SECONDS = 20.0
OF_TIME_SO_FAR = 0.01  # the lines of a long run come less often: about a hundred in the first half hour, few later

_T = TypeVar("_T")


@contextmanager
def telling(line: Callable[[], str], say: Callable[[str], object] | None = None) -> Iterator[None]:
    """Say a line every 20 seconds, and in a long run whenever another 1 % of the time so far has passed.

    Args:
        line: returns the line, empty if there is nothing to say; called in another thread.
        say: takes the line; by default it is printed.
    """
    stream, start, ended = sys.stdout, monotonic(), Event()

    def print_it(text: str) -> None:
        stream.write(f"{text}\n")
        stream.flush()

    def tell() -> None:
        while not ended.wait(max(SILENT_SECONDS, OF_TIME_SO_FAR * (monotonic() - start))):
            if text := line():
                (say or print_it)(text)

    thread = Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Print what begins now, and repeat it with the time so far while it takes long."""
    start = monotonic()
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()
    with telling(lambda: f"  {what}: {duration(monotonic() - start)} so far"):
        yield


def counted(items: Iterable[_T], total: int, done: str) -> Iterator[_T]:
    """Yield items, with a bar on a terminal, and otherwise with lines such as "7 of 20 images are classified".

    Args:
        total: number of items.
        done: end of the lines.
    """
    from tqdm import tqdm  # pcrl_nnunet_register, which counts nothing, runs without it

    number = 0
    bar = tqdm(items, total=total, disable=None, dynamic_ncols=True)
    with telling(lambda: f"{number} of {total} {done}") if bar.disable else nullcontext():
        for item in bar:
            yield item
            number += 1


def duration(seconds: float) -> str:
    """Return a duration in words, such as 45 s, 12 min or 3 h 20 min."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
