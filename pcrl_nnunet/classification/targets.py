"""What a classification learns: labels of cases or of points, read from a table beside the images.

- ``classes.csv``, a label per case: the columns ``case``, if wanted ``patient``, and one a label. Empty is unknown.
- ``candidates.csv``, a label per point, in LUNA16's format: ``seriesuid`` (the case), ``coordX``, ``coordY`` and
  ``coordZ`` in world mm (LPS, as in DICOM and ITK), ``class``, and if wanted ``patient``.

One column of other values than 0 and 1 is of more classes, of which a case or point has one; several columns of 0 and 1
are labels that may occur together.
"""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from batchgenerators.utilities.file_and_folder_operations import save_json
from pandas.errors import ParserWarning
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from pcrl_nnunet.config import ClassifySettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import whole
from pcrl_nnunet.loading.splits import NUM_FOLDS, SPLIT_SEED, SPLITS, unwritable

Kind = Literal["classes", "candidates"]
FILES: dict[Kind, str] = {"classes": "classes.csv", "candidates": "candidates.csv"}
CASE: dict[Kind, str] = {"classes": "case", "candidates": "seriesuid"}
COORDINATES = ("coordX", "coordY", "coordZ")
PATIENT = "patient"
# of nnU-Net's .pkl, what its readers have noted down
GEOMETRY = (
    *("sitk_stuff", "nibabel_stuff", "spacing"),
    *("bbox_used_for_cropping", "shape_after_cropping_and_before_resampling"),
)
LIKE_PATIENT = ("patient", "patients", "patientid", "subject", "subjects", "subjectid")
UNKNOWN_WORDS = ("na", "n/a", "nan", "null", "?")  # in a table; of a class nobody thinks so
MAX_CLASSES = 100  # more different values are no classes, but a measurement


@dataclass(frozen=True)
class Targets:
    """N samples, each a case or a point in one, and what is known of them.

    Attributes:
        names: of the L outputs: one a label, or one a class.
        exclusive: a sample has exactly one of them (classes), rather than each or not (labels).
        case: (N,) names.
        point: (N, 3) world mm, LPS; None for cases.
        value: (N, L) 1, 0, or NaN for unknown; of exclusive classes a row is known as a whole or not at all.
        patient: of every case that has one in the table.
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
        """Indices of the samples of these cases of which anything is known."""
        return np.flatnonzero(np.isin(self.case, list(cases)) & ~np.isnan(self.value).all(1))

    def class_weights(self, samples: np.ndarray) -> np.ndarray:
        """(L,) of positives: so that positives and negatives (of classes: all of them) weigh the same in sum.

        Raises:
            UserError: a label of which all known values are the same.
        """
        positive, known = np.nansum(self.value[samples], 0), (~np.isnan(self.value[samples])).sum(0)
        constant = [name for name, p, k in zip(self.names, positive, known, strict=True) if p in (0, k)]
        if constant:
            raise UserError(
                f"of {', '.join(constant)} all {len(samples)} training samples have the same value; give cases of both "
                f"values, or take the column out of {FILES[self.kind]}"
            )
        weights: np.ndarray = known / (len(self.names) * positive) if self.exclusive else (known - positive) / positive
        return weights


def bring_tables(raw_folder: str, folder: str) -> list[str]:
    """Copy a dataset's tables to where nnU-Net's trainings look.

    Returns:
        the names of the tables that were not there, or have changed.

    Raises:
        UserError: such a table cannot be written.
    """
    changed = []
    for name in FILES.values():
        source, copy = os.path.join(raw_folder, name), os.path.join(folder, name)
        if os.path.isfile(source) and not (os.path.isfile(copy) and filecmp.cmp(source, copy, shallow=False)):
            try:
                with whole(copy) as draft:  # folds may start at the same time
                    shutil.copyfile(source, draft)
            except OSError as error:
                raise UserError(
                    f"{source} is new and has to be copied to {copy}, which cannot be written ({error.strerror}); make "
                    f"that folder writable for the first training, or copy the table there"
                ) from error
            changed.append(name)
    return changed


def planned_targets(plans: Mapping[str, Any], folder: str, raw_folder: str | None) -> Targets:
    """What a plan's dataset has to classify, from its raw folder where that is there; `UserError` if nothing."""
    if raw_folder is not None:
        bring_tables(raw_folder, folder)
    return read_targets(folder, ClassifySettings.from_plan(plans).target or None)


def write_split_by_patient(names: Sequence[str], targets: Targets, folder: str) -> str | None:
    """Make nnU-Net's splits_final.json by patient, unless there is one.

    Args:
        names: of the dataset's cases.
        targets: with patients; without them nnU-Net's own split will do.
        folder: nnUNet_preprocessed/DatasetXXX_NAME.

    Returns:
        its path if it was made.

    Raises:
        UserError: it cannot be written, or there are fewer patients than folds.
    """
    file = os.path.join(folder, SPLITS)
    if not targets.patient or os.path.isfile(file):
        return None
    folds = split_by_patient(names, targets)
    try:
        with whole(file) as draft:
            save_json(folds, draft, sort_keys=False)
    except OSError as error:
        raise unwritable(file, error) from error
    return file


def split_by_patient(names: Sequence[str], targets: Targets) -> list[dict[str, list[str]]]:
    """nnU-Net's five folds, with all cases of a patient in one, and as many positives in each as can be.

    These are of the last class that a case has, of labels of the rarest.

    Raises:
        UserError: there are fewer patients than folds.
    """
    of_names = {name: 0 for name in names}
    value = np.nan_to_num(targets.value)
    kind = value.argmax(1) if targets.exclusive else value[:, value.sum(0).argmin()].astype(int)
    for name, of_sample in zip(targets.case, kind, strict=True):
        if name in of_names:
            of_names[str(name)] = max(of_names[str(name)], int(of_sample))
    groups = [targets.patient.get(name, name) for name in names]
    if len(set(groups)) < NUM_FOLDS:
        raise UserError(
            f"the cases are of {len(set(groups))} patients, too few for nnU-Net's {NUM_FOLDS} folds; write a {SPLITS} "
            f"with fewer into the dataset's folder in nnUNet_preprocessed"
        )
    folds = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=SPLIT_SEED)
    if max(Counter(of_names.values()).values()) < NUM_FOLDS:  # no class has a case for every fold
        folds = GroupKFold(NUM_FOLDS)
    return [
        {"train": [names[i] for i in train], "val": [names[i] for i in held_out]}
        for train, held_out in folds.split(names, list(of_names.values()), groups)
    ]


def read_targets(folder: str, kind: Kind | None = None) -> Targets:
    """The table of a dataset's folder.

    Args:
        kind: which of the two; None: the one that is there.

    Raises:
        UserError: there is none, or it is not as it should be, with the line.
    """
    there = [k for k, file in FILES.items() if os.path.isfile(os.path.join(folder, file))]
    if kind is None and len(there) > 1:
        raise UserError(
            f"{folder} has both {' and '.join(FILES.values())}; say which one with pcrl.classify.target in the plan: "
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


def read_points(path: str, cases: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Points to classify, of a table as candidates.csv, in which the column class is not needed.

    Args:
        cases: names of the images.

    Returns:
        (N,) names of cases, (N, 3) world mm.

    Raises:
        UserError: it is not as it should be, or none of its points lies in an image of `cases`.
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
    """All of it as text."""
    options: dict[str, Any] = {"dtype": str, "keep_default_na": False, "skipinitialspace": True, "index_col": False}
    try:
        header = pd.read_csv(path, header=None, nrows=1, **options).iloc[0].str.strip()
        if header.duplicated().any():  # pandas would give them other names
            raise ValueError(f"two columns are called '{header[header.duplicated()].iloc[0]}'")
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # lines that are longer than that of the names
            table = pd.read_csv(path, **options)
    except (OSError, ValueError, ParserWarning) as error:  # pandas' own errors are of the second kind
        raise UserError(f"{path} cannot be read ({error}); expected a table with commas and a line of names") from error
    table = table.apply(lambda column: column.str.strip())
    nameless = table.columns[header.reindex(range(len(table.columns)), fill_value="") == ""]
    if (table[nameless] != "").any(axis=None):
        raise UserError(f"{path} has a column without a name; give it one, or take it out")
    table = table.drop(columns=nameless)  # of a comma at the end of every line
    missing = [name for name in needed if name not in table]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has {', '.join(table.columns)}")
    return table


def _coordinates(path: str, table: pd.DataFrame) -> np.ndarray:
    numbers: np.ndarray = table[list(COORDINATES)].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    _all_or_line(path, np.isfinite(numbers).all(1), "coordinates that are no numbers")
    return numbers


def _parse(path: str, kind: Kind) -> Targets:
    case = CASE[kind]
    table = _read(path, (case, *((*COORDINATES, "class") if kind == "candidates" else ())))
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
    point = _coordinates(path, table) if kind == "candidates" else None
    exclusive, names, value = _values(path, table[labels])
    columns = [case, *(COORDINATES if kind == "candidates" else ()), *names, *(f"p_{name}" for name in names)]
    twice = [name for name, number in Counter(columns).items() if number > 1]
    if twice:
        raise UserError(
            f"{path} has a label or class '{twice[0]}', which is the name of another column of predictions.csv "
            f"({', '.join(columns)}); give it another name"
        )
    patient = {}
    if PATIENT in table:
        of_case = table.groupby(case)[PATIENT].unique()
        several = [str(name) for name, patients in of_case.items() if len(patients) > 1]
        if several:
            raise UserError(f"{path} has more than one patient for case {several[0]}; correct the column {PATIENT}")
        patient = {str(name): str(patients[0]) for name, patients in of_case.items() if patients[0]}
    return Targets(kind, names, exclusive, table[case].to_numpy(str), point, value, patient)


def _values(path: str, columns: pd.DataFrame) -> tuple[bool, tuple[str, ...], np.ndarray]:
    """Whether they exclude each other, their names, (N, L)."""
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
    if all(map(_is_number, classes)):  # 1 and 1.0 are one
        given = np.array([f"{float(value):g}" if value else "" for value in given])
        classes = sorted(set(given) - {""}, key=float)
    if len(classes) > MAX_CLASSES or len(classes) < 2:
        raise UserError(
            f"{path} has {len(classes)} different values in column {columns.columns[0]}; expected 2 to {MAX_CLASSES} "
            f"classes"
        )
    one_hot = (given[:, None] == np.array(classes)[None]).astype(float)
    one_hot[given == ""] = np.nan
    return True, tuple(map(str, classes)), one_hot  # plain ones, not numpy's: they go into checkpoints


def _is_number(value: str) -> bool:
    return bool(np.isfinite(pd.to_numeric(value, errors="coerce")))


def _all_or_line(path: str, fine: np.ndarray, what: str) -> None:
    if not fine.all():
        raise UserError(f"{path} has {what} in line {int(np.argmin(fine)) + 2}; correct it")


class Drawing:
    """Draws samples, with or without regard to their values.

    Balanced: first a class, or a label and one of its values, each with the same probability; then a sample of these.
    So 1,500 positives among 755,000 are half of what a binary classification sees.
    """

    def __init__(self, targets: Targets, samples: np.ndarray, balanced: bool) -> None:
        value = targets.value[samples]
        groups = [samples]
        if balanced:
            wanted = [(i, 1.0) for i in range(value.shape[1])]
            if not targets.exclusive:
                wanted += [(i, 0.0) for i in range(value.shape[1])]
            groups = [samples[value[:, i] == v] for i, v in wanted]
        self.groups = [group for group in groups if len(group)]

    def __call__(self, rng: np.random.Generator, number: int) -> np.ndarray:
        """(number,) indices into the targets."""
        drawn = [self.groups[group] for group in rng.integers(len(self.groups), size=number)]
        return np.array([group[rng.integers(len(group))] for group in drawn], dtype=int)


def to_voxels(
    point: np.ndarray, properties: Mapping[str, Any], shape: Sequence[int], transpose: Sequence[int]
) -> np.ndarray:
    """Where points of the world lie in a preprocessed image.

    Through the geometry that nnU-Net's reader has noted down: world to voxel of the file, axes to nnU-Net's order,
    crop to the non-zero region, and resampling, in which voxel centres k become (k + 0.5) * new / old - 0.5. Of images
    without a place in the world (PNG, TIFF) the first voxel's is 0; of 2D images the third coordinate is not looked at.

    Args:
        point: (N, 3) world mm, LPS.
        properties: of the case, as nnU-Net's preprocessing saves them.
        shape: of the preprocessed image, without channels.
        transpose: the plan's transpose_forward.

    Returns:
        (N, 3) in voxels, not rounded; may lie outside.
    """
    matrix, origin = _voxel_to_world(properties)
    axes = len(origin)
    index = np.zeros((len(point), 3))  # (z, y, x)
    index[:, 3 - axes :] = np.linalg.solve(matrix, (np.asarray(point)[:, :axes] - origin).T).T[:, ::-1]
    index = index[:, list(transpose)] - np.array([lower for lower, _ in properties["bbox_used_for_cropping"]])
    old = np.asarray(properties["shape_after_cropping_and_before_resampling"], float)
    voxels: np.ndarray = (index + 0.5) * np.asarray(shape) / old - 0.5
    return voxels


def _voxel_to_world(properties: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(axes, axes) and (axes,): voxel (x, y, z), in 2D (x, y), to mm, LPS."""
    if "sitk_stuff" in properties:
        geometry = properties["sitk_stuff"]
        axes = len(geometry["origin"])
        return np.reshape(geometry["direction"], (axes, axes)) * geometry["spacing"], np.asarray(geometry["origin"])
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.diag([-1, -1, 1, 1]) @ np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]))
        return affine[:3, :3], affine[:3, 3]
    return np.diag(np.asarray(properties["spacing"], float)[::-1]), np.zeros(3)


def outside(voxels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """(N,) which points (N, 3) lie more than a voxel beyond an image of this shape."""
    beyond: np.ndarray = np.any((voxels < -1) | (voxels > np.asarray(shape)), axis=1)
    return beyond
