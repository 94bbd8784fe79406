"""The arguments of the commands: their parser, and checks that take no time because they import neither torch nor
nnU-Net's trainers.
"""

from __future__ import annotations

import argparse
import os
from importlib import import_module

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.progress import doing

CONFIGURATION = "configuration of the plan (default: 3d_fullres, or the plan's only one)"
DEVICE = "cuda, cpu or mps (default: a GPU if there is one, else the CPU)"
PLANS = "name of the plan (default: nnUNetPlans)"
DATASET = "name or ID of the dataset"


def parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with examples.

    Args:
        description, examples: texts in lines as they are printed.
    """
    return argparse.ArgumentParser(
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
