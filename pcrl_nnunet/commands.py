"""Commands for people to paste into a terminal."""

from __future__ import annotations

import shlex


def command(name: str, /, *words: object, **options: object) -> str:
    """Write a command line, with quotes where a shell needs them.

    Args:
        name: of the command.
        words: what follows, flags such as ``--c`` included.
        options: the value after each option of one dash: ``d=4`` becomes ``-d 4``. None leaves the option out.
    """
    parts = [name, *map(str, words)]
    for option, value in options.items():
        if value is not None:
            parts += [f"-{option}", str(value)]
    return shlex.join(parts)


def device_option(device: str) -> str | None:
    """Return the value of nnU-Net's -device for a kind of device: None for cuda, which nnU-Net takes by default."""
    return None if device == "cuda" else device
