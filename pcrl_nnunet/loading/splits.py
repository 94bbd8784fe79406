"""nnU-Net's splits_final.json: a dataset's folds, checked against the existing cases."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import Any, Literal

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import writing

SPLITS = "splits_final.json"
NUM_FOLDS, SPLIT_SEED = 5, 12345  # nnU-Net's values
MOST_NAMED = 5
# usual surplus at the end of a case's name: a channel's number, an ending of images or preprocessed data
_SURPLUS = re.compile(
    r"(_\d{4})?\.(nii(\.gz)?|mha|mhd|nrrd|nhdr|gipl|png|bmp|jpe?g|tiff?|dcm|b2nd|np[yz]|pkl)$", re.IGNORECASE
)

Part = Literal["train", "val"]


@dataclass(frozen=True)
class Fold:
    """The names of a fold's training and validation cases."""

    train: list[str]
    val: list[str]


def fold_named(text: str) -> int | str:
    """Return the fold that ``-f`` names: a number, or ``all``."""
    if text != "all" and not (text.isascii() and text.isdecimal()):
        raise UserError(f"-f is '{text}'; expected the number of a fold, or all")
    return text if text == "all" else int(text)


def check_fold(folder: str, fold: int) -> None:
    """Raise `UserError` for a fold that the dataset does not have.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX_NAME.
    """
    file = os.path.join(folder, SPLITS)
    number = len(read_folds(file)) if os.path.isfile(file) else NUM_FOLDS
    if fold not in range(number):
        raise UserError(
            f"fold {fold} is not among the folds of {file}; give one of {', '.join(map(str, range(number)))}, or all"
        )


def fold_of(folder: str, fold: int, cases: Collection[str], parts: Sequence[Part] = ("train", "val")) -> Fold:
    """Return a fold from the dataset's split file, or from the split that nnU-Net will write for these cases.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX_NAME.
        cases: names of the existing cases.
        parts: parts of the fold whose cases have to exist.

    Raises:
        UserError: the file is damaged, lacks the fold, or the fold names missing cases.
    """
    file = os.path.join(folder, SPLITS)
    check_fold(folder, fold)
    folds = read_folds(file) if os.path.isfile(file) else _default_folds(folder, cases)
    found = folds[fold]
    missing = [name for part in parts for name in getattr(found, part) if name not in set(cases)]
    if missing:
        raise UserError(
            f"fold {fold} in {file} names {listed(missing, cases)}, which {'is' if len(missing) == 1 else 'are'} not "
            f"among the {len(cases)} preprocessed cases; correct the names in that file, or preprocess these cases"
        )
    return found


def refuse_unwritable(folder: str) -> None:
    """Raise `UserError` if nnU-Net would have to write the split file but has no permission."""
    file = os.path.join(folder, SPLITS)
    if os.path.isfile(file):
        return
    with writing_split(file), TemporaryFile(dir=folder):
        pass


def writing_split(file: str) -> AbstractContextManager[None]:
    """Turn an error on writing the missing split file into a `UserError`."""
    return writing(
        f"there is no {file}, which the first training of a fold writes, and its folder",
        f"make the folder writable for that training, or put a {SPLITS} there",
    )


def read_folds(file: str) -> list[Fold]:
    """Return the folds of a split file. Raise `UserError` for a damaged file."""
    try:
        with open(file, encoding="utf-8") as content:
            folds = [Fold(_names(split["train"]), _names(split["val"])) for split in json.load(content)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{file} is no list of folds with 'train' and 'val' ({type(error).__name__}: {error}); mend it, or give "
            f"the fold all"
        ) from error
    if not folds:
        raise UserError(f"{file} has no folds; write some, or remove it and nnU-Net makes {NUM_FOLDS}")
    return folds


def _names(given: Any) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise TypeError(f"{json.dumps(given)[:60]} is no list of names")
    return given


def _default_folds(folder: str, cases: Collection[str]) -> list[Fold]:
    if len(cases) < NUM_FOLDS:
        raise UserError(
            f"{len(cases)} cases are too few for nnU-Net's {NUM_FOLDS} folds; write a {SPLITS} with fewer into "
            f"{folder}, or give the fold all"
        )
    from nnunetv2.utilities.crossval_split import generate_crossval_split  # imports scikit-learn, which takes seconds

    made = generate_crossval_split(sorted(cases), seed=SPLIT_SEED, n_splits=NUM_FOLDS)
    return [Fold(list(map(str, split["train"])), list(map(str, split["val"]))) for split in made]


def listed(missing: Sequence[str], cases: Collection[str]) -> str:
    """Name the missing cases, or a few of many, each with the probably intended case."""
    by_form: dict[str, list[str]] = {}
    for case in cases:
        by_form.setdefault(_form(case), []).append(case)
    listed = []
    for name in list(dict.fromkeys(missing))[:MOST_NAMED]:
        meant = by_form.get(_form(name), [])
        listed.append(f"'{name}' (probably '{meant[0]}')" if len(meant) == 1 else f"'{name}'")
    more = len(set(missing)) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")


def _form(name: str) -> str:
    """Normalise a name for comparison: no folder, ending or channel, no capitals, no leading zeros."""
    bare = _SURPLUS.sub("", os.path.basename(name.strip().replace("\\", "/")))
    bare = re.sub(r"_0000$", "", bare)
    return re.sub(r"0+(?=\d)", "", re.sub(r"[\s_-]+", "_", bare.casefold()))
