"""Commands for users to paste into a terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

PROGRAMS = ("pcrl_nnunet_", "nnUNetv2_")


def command(name: str, /, *words: object, **options: object) -> str:
    """Return a command line, quoted for a shell.

    Args:
        name: name of the command.
        words: words after the name, flags such as ``--c`` included.
        options: values of options with one dash: ``d=4`` becomes ``-d 4``. None leaves the option out.
    """
    parts = [name, *map(str, words)]
    for option, value in options.items():
        if value is not None:
            parts += [f"-{option}", str(value)]
    return shlex.join(parts)


def train_command(dataset: str, configuration: str, fold: int | str, device: str, **options: object) -> str:
    """Return nnU-Net's training command, without -device for cuda, nnU-Net's default."""
    given = None if device == "cuda" else device
    return command("nnUNetv2_train", dataset, configuration, fold, **options, device=given)


def corrected(option: str, wrong: str | None, right: str) -> str:
    """Return the typed command with another value, quoted for a shell.

    Only the wrong value of an option changes. If no word is wrong, the option is appended, because the last one counts.

    Args:
        option: option such as ``-c``; nnU-Net's training takes the same values without an option.
        wrong: the typed value; None: the default was used.
        right: the value to type instead.

    Returns:
        The command; ``OPTION RIGHT`` if the process is neither our command nor nnU-Net's.
    """
    program, words = Path(sys.argv[0]).stem, sys.argv[1:]
    if not program.startswith(PROGRAMS):
        return shlex.join([option, right])
    after = words.index(option) + 1 if option in words else 0
    places = [i for i, word in enumerate(words) if i >= after and word == wrong]
    if not places:
        return shlex.join([program, *words, option, right])
    return shlex.join([program, *words[: places[0]], right, *words[places[0] + 1 :]])
