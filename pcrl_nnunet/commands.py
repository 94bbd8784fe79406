"""Commands for people to paste into a terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

PROGRAMS = ("pcrl_nnunet_", "nnUNetv2_")


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


def train_command(dataset: str, configuration: str, fold: int | str, device: str, **options: object) -> str:
    """Write nnU-Net's command to train; its -device is left out for cuda, which nnU-Net takes by default."""
    given = None if device == "cuda" else device
    return command("nnUNetv2_train", dataset, configuration, fold, **options, device=given)


def corrected(option: str, wrong: str | None, right: str) -> str:
    """Return the typed command with another value, quoted for a shell.

    Of several values of an option only the wrong one changes. Where no word is wrong, the option is added: the last one
    counts.

    Args:
        option: such as ``-c``; nnU-Net's training takes the same values without an option.
        wrong: the value that was typed; None: the default was taken.
        right: the value to type instead.

    Returns:
        The command; ``OPTION RIGHT`` where the process is no command of ours or nnU-Net's.
    """
    program, words = Path(sys.argv[0]).stem, sys.argv[1:]
    if not program.startswith(PROGRAMS):
        return shlex.join([option, right])
    after = words.index(option) + 1 if option in words else 0
    places = [i for i, word in enumerate(words) if i >= after and word == wrong]
    if not places:
        return shlex.join([program, *words, option, right])
    return shlex.join([program, *words[: places[0]], right, *words[places[0] + 1 :]])
