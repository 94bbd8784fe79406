"""The command line that a user typed, corrected: an error ends with what can be pasted."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

PROGRAMS = ("pcrl_nnunet_", "nnUNetv2_")


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
