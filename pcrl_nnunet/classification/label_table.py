"""The labels of a classification, for cases or points, from a table beside the images.

- ``classes.csv`` labels cases. Its columns: ``case``, one for each label, and optionally ``patient``. Empty is unknown.
- ``candidates.csv`` labels points, in LUNA16's format: ``seriesuid`` (the case), ``coordX``, ``coordY`` and ``coordZ``
  in world mm (LPS, as in DICOM and ITK), ``class``, and optionally ``patient``.

A single column with values other than 0 and 1 holds classes that exclude each other. Several columns of 0 and 1 hold
labels that may occur together.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from pandas.errors import ParserWarning

from pcrl_nnunet.config import ClassifySettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import whole, writing

Kind = Literal["classes", "candidates"]
FILES: dict[Kind, str] = {"classes": "classes.csv", "candidates": "candidates.csv"}
CASE: dict[Kind, str] = {"classes": "case", "candidates": "seriesuid"}
COORDINATES = ("coordX", "coordY", "coordZ")
PATIENT = "patient"
LIKE_PATIENT = ("patient", "patients", "patientid", "subject", "subjects", "subjectid")
UNKNOWN_WORDS = ("na", "n/a", "nan", "null", "?")  # spellings of "unknown" in a table; no class has such a name
MAX_CLASSES = 100  # a column with more different values holds a measurement


@dataclass(frozen=True)
class LabelTable:
    """N samples, each a case or a point in a case, and their labels.

    Attributes:
        names: names of the L labels or classes, which are the network's outputs.
        exclusive: a sample has exactly one class; otherwise it has any number of labels.
        case: (N,) names of cases.
        point: (N, 3) world mm, LPS; None for cases.
        value: (N, L) 1, 0, or NaN for unknown; a row of exclusive classes is known completely or not at all.
        patient: the patient by case, for the cases with a patient in the table.
    """

    kind: Kind
    names: tuple[str, ...]
    exclusive: bool
    case: np.ndarray
    point: np.ndarray | None
    value: np.ndarray
    patient: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.case)

    def of_cases(self, cases: Sequence[str]) -> np.ndarray:
        """Return the indices of these cases' samples that have a known label."""
        return np.flatnonzero(np.isin(self.case, list(cases)) & ~np.isnan(self.value).all(1))


def bring_tables(raw_folder: str, folder: str) -> list[str]:
    """Copy a dataset's tables to the folder that nnU-Net's trainings read.

    Returns:
        The names of the tables that were missing or have changed.

    Raises:
        UserError: a table cannot be written.
    """
    changed = []
    for name in FILES.values():
        source, copy = os.path.join(raw_folder, name), os.path.join(folder, name)
        if os.path.isfile(source) and not (os.path.isfile(copy) and filecmp.cmp(source, copy, shallow=False)):
            what = f"{source} is new and has to be copied to {copy}, which"
            remedy = "make that folder writable for the first training, or copy the table there"
            with writing(what, remedy), whole(copy) as draft:  # folds may start at the same time
                shutil.copyfile(source, draft)
            changed.append(name)
    return changed


def planned_labels(plans: Mapping[str, Any], folder: str, raw_folder: str | None) -> LabelTable:
    """Return the labels of a plan's dataset, from its raw folder if possible. Raise `UserError` if it has none."""
    if raw_folder is not None:
        bring_tables(raw_folder, folder)
    return read_labels(folder, ClassifySettings.from_plan(plans).table or None)


def read_labels(folder: str, kind: Kind | None = None) -> LabelTable:
    """Read the table of a dataset's folder.

    Args:
        kind: which of the two tables; None: the only one in the folder.

    Raises:
        UserError: there is no table, or one of its lines is wrong; the message names the line.
    """
    there = [k for k, file in FILES.items() if os.path.isfile(os.path.join(folder, file))]
    if kind is None and len(there) > 1:
        raise UserError(
            f"{folder} has both {' and '.join(FILES.values())}; say which one with pcrl.classify.table in the plan: "
            f"'classes' or 'candidates'"
        )
    wanted = [kind] if kind else there
    if not set(wanted) & set(there):
        names = " or ".join(FILES[k] for k in wanted or FILES)
        raise UserError(
            f"there is no {names} in {folder}; put it into the dataset's folder in nnUNet_raw, with the columns "
            f"{CASE['classes']} and one a label, or {', '.join((CASE['candidates'], *COORDINATES, 'class'))}"
        )
    return _parse(os.path.join(folder, FILES[wanted[0]]), wanted[0])


def read_truth(path: str, names: Sequence[str], exclusive: bool, cases: Collection[str]) -> LabelTable:
    """Read a table such as classes.csv of images that trained folds classify. It gets the folds' labels in their order.

    Args:
        names: the folds' labels or classes.
        exclusive: the folds' classes exclude each other.
        cases: names of the images.

    Raises:
        UserError: the table is wrong, lacks a label, has other classes, or has none of the images.
    """
    table = _parse(path, "classes")
    other = sorted(set(table.names) - set(names)) if exclusive else sorted(set(names) - set(table.names))
    if other or table.exclusive != exclusive:
        raise UserError(
            f"{path} has the {'classes' if table.exclusive else 'labels'} {', '.join(table.names)}, but the folds were "
            f"trained on the {'classes' if exclusive else 'labels'} {', '.join(names)}; give the labels of the images "
            "in the form of the training's table"
        )
    if not set(table.case) & set(cases):
        raise UserError(
            f"{path} has no label of any image: it has {', '.join(map(str, table.case[:3]))} ..., the images are "
            f"{', '.join(list(cases)[:3])} ...; correct its column {CASE['classes']}"
        )
    columns = {name: table.value[:, i] for i, name in enumerate(table.names)}
    absent = np.where(np.isnan(table.value).all(1), np.nan, 0.0)  # a class that no image has
    value = np.stack([columns.get(name, absent) for name in names], 1)
    return replace(table, names=tuple(names), value=value)


def read_points(path: str, cases: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read points to classify, from a table such as candidates.csv. The column class is optional.

    Args:
        cases: names of the images.

    Returns:
        (N,) names of cases, (N, 3) world mm.

    Raises:
        UserError: the table is wrong, or none of its points lies in an image of `cases`.
    """
    table = _read(path, (CASE["candidates"], *COORDINATES))
    names = table[CASE["candidates"]].to_numpy(str)
    if not set(names) & set(cases):
        raise UserError(
            f"{path} has no point of any image: it has {', '.join(dict.fromkeys(names[:3]))}..., the images are "
            f"{', '.join(list(cases)[:3])}...; correct its column {CASE['candidates']}"
        )
    return names, _coordinates(path, table)


def _read(path: str, needed: Sequence[str]) -> pd.DataFrame:
    """Read all columns as text."""
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "skipinitialspace": True, "index_col": False}
    try:
        header = pd.read_csv(path, header=None, nrows=1, **options).iloc[0].str.strip()
        if header.duplicated().any():  # pandas would rename them
            raise ValueError(f"two columns are called '{header[header.duplicated()].iloc[0]}'")
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # for lines that are longer than the header
            table = pd.read_csv(path, **options)
    except (OSError, ValueError, ParserWarning) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path} cannot be read ({error}); expected a table with commas and a line of names") from error
    table = table.apply(lambda column: column.str.strip())
    nameless = table.columns[header.reindex(range(len(table.columns)), fill_value="") == ""]
    if (table[nameless] != "").any(axis=None):
        raise UserError(f"{path} has a column without a name; give it one, or take it out")
    table = table.drop(columns=nameless)  # from a comma at the end of every line
    missing = [name for name in needed if name not in table]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    return table


def _coordinates(path: str, table: pd.DataFrame) -> np.ndarray:
    numbers: np.ndarray = table[list(COORDINATES)].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    fine = np.isfinite(numbers).all(1)
    if not fine.all():
        raise UserError(f"{path} has coordinates that are no numbers in line {int(np.argmin(fine)) + 2}; correct it")
    return numbers


def _parse(path: str, kind: Kind) -> LabelTable:
    case = CASE[kind]
    table = _read(path, (case, *((*COORDINATES, "class") if kind == "candidates" else ())))
    columns = _label_columns(path, kind, table)
    point = _coordinates(path, table) if kind == "candidates" else None
    exclusive, names, value = _values(path, table[columns])
    _refuse_names_of_other_columns(path, kind, names)
    return LabelTable(kind, names, exclusive, table[case].to_numpy(str), point, value, _patients(path, kind, table))


def _label_columns(path: str, kind: Kind, table: pd.DataFrame) -> list[str]:
    """Return the columns that hold labels. Raise `UserError` if the table has no labels or unclear lines."""
    case = CASE[kind]
    for name in table:
        if name != PATIENT and re.sub(r"[\s_.-]", "", name.lower()) in LIKE_PATIENT:
            raise UserError(
                f"{path} has a column '{name}'; call it {PATIENT} if it names patients, whose cases then stay on one "
                f"side of a split, or take it out"
            )
    labels = ["class"] if kind == "candidates" else [name for name in table if name not in (case, PATIENT)]
    if not labels or table.empty:
        raise UserError(f"{path} has no {'line' if labels else 'column of a label'}; add what is to be learned")
    if kind == "classes" and table[case].duplicated().any():
        twice = table[case][table[case].duplicated()].iloc[0]
        raise UserError(f"{path} has more than one line for case {twice}; keep one")
    return labels


def _refuse_names_of_other_columns(path: str, kind: Kind, names: Sequence[str]) -> None:
    columns = [CASE[kind], *(COORDINATES if kind == "candidates" else ()), *names, *(f"p_{name}" for name in names)]
    twice = [name for name, number in Counter(columns).items() if number > 1]
    if twice:
        raise UserError(
            f"{path} has a label or class '{twice[0]}', which is the name of another column of predictions.csv "
            f"({', '.join(columns)}); give it another name"
        )


def _patients(path: str, kind: Kind, table: pd.DataFrame) -> dict[str, str]:
    if PATIENT not in table:
        return {}
    of_case = table.groupby(CASE[kind])[PATIENT].unique()
    several = [str(name) for name, patients in of_case.items() if len(patients) > 1]
    if several:
        raise UserError(f"{path} has more than one patient for case {several[0]}; correct the column {PATIENT}")
    return {str(name): str(patients[0]) for name, patients in of_case.items() if patients[0]}


def _values(path: str, columns: pd.DataFrame) -> tuple[bool, tuple[str, ...], np.ndarray]:
    """Tell whether the labels exclude each other, and return their names and values (N, L)."""
    found = [{value for value in columns[name] if value} for name in columns]
    if empty := [name for name, values in zip(columns, found, strict=True) if not values]:
        raise UserError(f"{path} has no value in column {empty[0]}; fill it in, or take it out")
    for name, values in zip(columns, found, strict=True):
        words = sorted(value for value in values if value.lower() in UNKNOWN_WORDS)
        if words:
            raise UserError(f"{path} has '{words[0]}' in column {name}; leave a cell empty where a value is unknown")
    binary = [values <= {"0", "1", "0.0", "1.0"} for values in found]
    if all(binary):
        numbers = columns.apply(pd.to_numeric, errors="coerce").to_numpy(float)
        return False, tuple(columns.columns), numbers
    if len(found) > 1:
        name = columns.columns[binary.index(False)]
        raise UserError(
            f"{path} has {', '.join(sorted(found[binary.index(False)])[:5])} in column {name}; of several labels each "
            f"is 0, 1 or empty: give classes that exclude each other a single column"
        )
    given = columns.iloc[:, 0].to_numpy(str)
    classes = sorted(found[0])
    if all(map(_is_number, classes)):  # 1 and 1.0 are equal
        given = np.array([f"{float(value):g}" if value else "" for value in given])
        classes = sorted(set(given) - {""}, key=float)
    if len(classes) > MAX_CLASSES or len(classes) < 2:
        raise UserError(
            f"{path} has {len(classes)} different values in column {columns.columns[0]}; expected 2 to {MAX_CLASSES} "
            f"classes"
        )
    one_hot = (given[:, None] == np.array(classes)[None]).astype(float)
    one_hot[given == ""] = np.nan
    return True, tuple(map(str, classes)), one_hot  # plain strings, not numpy's: they go into checkpoints


def _is_number(value: str) -> bool:
    return bool(np.isfinite(pd.to_numeric(value, errors="coerce")))
