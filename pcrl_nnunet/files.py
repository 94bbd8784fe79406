"""Writing of files that appear completely or not at all."""

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
    """Yield a draft's path. At the end the draft replaces `path` at once.

    After an error, `path` is unchanged and the draft is gone. An OSError of the draft names `path`. Processes that
    write the same file do not disturb each other. The draft lies beside the file and has its ending, because libraries
    recognise formats by the ending.
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
    """Make a folder and its parents. An error removes the new folders with their files."""
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
    """Turn an error on writing a file or folder into a `UserError`.

    Args:
        what: beginning of the sentence.
        remedy: end of the sentence.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{what} cannot be written ({error.strerror}); {remedy}") from error


def is_draft(name: str) -> bool:
    """Tell if a file has the name of an unfinished draft of `whole`."""
    return name.startswith(DRAFT) and re.match(rf"{DRAFT}\d+_", name) is not None  # the first test is faster


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file completely or not at all."""
    with whole(path) as draft, open(draft, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def remove_drafts(folder: str) -> None:
    """Remove the drafts of killed writers. No other writer may work in the folder."""
    for path in glob(os.path.join(escape(folder), f"{DRAFT}[0-9]*_*")):
        with suppress(OSError):  # the folder may be read-only
            os.remove(path)
