"""Errors that a user can act on, and their display by commands."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """An error with one sentence: what came, what was expected, what to do."""


def with_nearest(sentence: str, name: str, known: Iterable[str]) -> str:
    """Return the beginning of an error, with the known name that is most like the given one if any is alike."""
    near = get_close_matches(name, list(known), 1)
    return f"{sentence}, the nearest is {near[0]}" if near else sentence


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the process with only the sentence: nnU-Net's commands, which call our trainers, would add a traceback."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"Error: {error}") from None


def console(main: Callable[[], None]) -> None:
    """Run a console script's main. A `UserError` prints without a traceback and exits with status 1."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)  # a log gets each line at once, too
    with exit_on_user_error():
        try:
            main()
        except KeyboardInterrupt:
            sys.exit(130)
