"""The arguments of the commands: their parser, and checks that take no time because they import neither torch nor
nnU-Net's trainers.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module
from typing import NoReturn

from pcrl_nnunet.errors import UserError, with_nearest
from pcrl_nnunet.progress import doing

CONFIGURATION = "configuration of the plan (default: 3d_fullres, or the plan's only one)"
DEVICE = "cuda, cpu or mps (default: a GPU if there is one, else the CPU)"
PLANS = "name of the plan (default: nnUNetPlans)"
DATASET = "name or ID of the dataset"


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest option where an option does not exist."""

    def error(self, message: str) -> NoReturn:
        """End the command with the usage, the message, and the option that was probably meant."""
        if message.startswith("unrecognized arguments: -"):
            unknown = message.split(": ", 1)[1].split()[0]
            message = with_nearest(message, unknown, self._option_string_actions)
        super().error(message)


def parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with examples.

    Args:
        description, examples: texts in lines as they are printed.
    """
    return Parser(
        prog=command,
        description=description.strip(),
        epilog="examples:\n" + examples.strip("\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def check_numbers(args: argparse.Namespace, **least: int) -> None:
    """Raise `UserError` for a number that is too small. An option that was left out is None."""
    for name, minimum in least.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise UserError(f"-{name} is {value}; expected {minimum} or more")


def check_file(option: str, path: str | None, what: str) -> None:
    """Raise `UserError` for a file that does not exist."""
    if path is not None and not os.path.isfile(path):
        raise UserError(f"{option} is {path}, which does not exist; give the path of {what}")


def check_folder(option: str, path: str, of: str) -> None:
    """Raise `UserError` for a folder that does not exist."""
    if not os.path.isdir(path):
        raise UserError(f"{option} is {path}, which is not a folder; give the folder with the {of}")


def load(*modules: str) -> None:
    """Import modules that need torch and nnU-Net, and say so: it takes seconds, and a minute on a busy file system."""
    with doing("Loading PyTorch and nnU-Net"):
        for module in modules:
            import_module(module)
