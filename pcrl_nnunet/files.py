"""Files that appear whole, or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape, glob
from shutil import rmtree

from pcrl_nnunet.errors import UserError

DRAFT = "draft_"


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[str]:
    """A path to write to: the file there takes the place of `path` in the end, at once.

    An error leaves what was at `path`, and nothing else; an OSError of the draft names `path`. Processes that write the
    same file do not disturb each other. The path lies beside the file and ends as it does,
    as libraries tell formats by the ending.
    """
    folder, name = os.path.split(path)
    draft = os.path.join(folder, f"{DRAFT}{os.getpid()}_{name}")
    try:
        yield draft
        os.replace(draft, path)
    except OSError as error:
        if error.filename == draft:
            error.filename, error.filename2 = os.fspath(path), None
        raise
    finally:
        with suppress(OSError):
            os.remove(draft)


@contextmanager
def new_folder(path: str) -> Iterator[None]:
    """Make a folder, and those above it; an error removes the ones that were made, with the files in them."""
    made = path
    while not os.path.isdir(os.path.dirname(made)):
        made = os.path.dirname(made)
    was_there = os.path.isdir(path)
    try:
        os.makedirs(path, exist_ok=True)
        yield
    except BaseException:
        if not was_there:
            rmtree(made, ignore_errors=True)
        raise


@contextmanager
def writing(what: str, remedy: str) -> Iterator[None]:
    """Make a `UserError` of what keeps a file or folder from being written.

    Args:
        what: begins the sentence.
        remedy: ends it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written ({error.strerror}); {remedy}") from error


def is_draft(name: str) -> bool:
    """Tell if a file has the name of a draft, which `whole` has not finished."""
    return name.startswith(DRAFT) and re.match(rf"{DRAFT}\d+_", name) is not None  # the first is the faster one


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file whole, or not at all."""
    with whole(path) as draft, open(draft, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def remove_drafts(folder: str) -> None:
    """Remove what writers have left that were killed; no other one may be at work in the folder."""
    for path in glob(os.path.join(escape(folder), f"{DRAFT}[0-9]*_*")):
        with suppress(OSError):  # of a folder that is read-only
            os.remove(path)
