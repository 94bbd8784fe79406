"""The common part of convert_nih_chestxray.py and convert_chexpert.py: X-rays to a raw nnU-Net dataset without masks.

An image is complete or absent: it is written in the folder `unfinished`, then renamed. A second run converts only the
missing images. Damaged images are named, set aside, listed in `bad_cases.txt`, and have no line in the tables.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from filecmp import cmp
from itertools import islice
from pathlib import Path
from typing import Any

import convert
from chest_xray_images import FEWEST_PIXELS, Job, convert_images
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import write_text

ENDING = ".png"  # lossless, read by nnU-Net's NaturalImage2DIO
TABLES = {"Tr": "classes.csv", "Ts": "classesTs.csv"}
MISSING = "missing_images.txt"
STRAYS = "unlisted_images"
FOLDS = 8  # an eighth of the training and validation part of NIH ChestX-ray14 is a tenth of its images
PACKED = (".zip", ".tar", ".gz", ".tgz", ".7z")


@dataclass(frozen=True)
class Row:
    """An image that a table lists.

    Attributes:
        name: name of the case in nnU-Net.
        group: "Tr" (training and validation) or "Ts" (test), as in nnU-Net's folders.
        patient: name of the patient.
        labels: "1", "0", or "" for unknown, one for each label.
        validation: the image belongs to a validation part that the dataset itself names.
    """

    name: str
    group: str
    patient: str
    labels: tuple[str, ...]
    validation: bool = False


@dataclass
class Source:
    """The content of a download.

    Attributes:
        folder: the folder of -i.
        table: the table that lists the images.
        rows: the listed images.
        images: files by name of the case.
        labels: names of the labels.
        said: sentences about the dataset as a whole.
        hint: end of the message about missing images.
    """

    folder: Path
    table: Path
    rows: list[Row]
    images: dict[str, Path]
    labels: tuple[str, ...]
    said: list[str] = field(default_factory=list)
    hint: str = ""


# -------------------------------------------------------------------------------------------------------------- tables


def header_of(path: Path) -> list[str]:
    """Return the column names of a table; none if the file is not a table."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return [name.strip() for name in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def lines_of(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number and the cells of each line of a table. Raise `UserError` for a damaged table."""
    again = "download it again"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", restval=None, skipinitialspace=True)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if missing := [column for column in columns if column not in reader.fieldnames]:
                found = ", ".join(reader.fieldnames) or "none"
                raise UserError(f"{path} has no column {', '.join(missing)}; its columns are {found}: {again}")
            for row in reader:
                if any(row[column] is None for column in columns):
                    raise UserError(f"{path}, line {reader.line_num}, is shorter than the first line: {again}")
                yield reader.line_num, {column: row[column].strip() for column in columns}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): {again}, or check its permissions") from error


def add_row(rows: dict[str, Row], row: Row, table: Path, line: int) -> bool:
    """Add a row and return True, or return False for a line that is there twice.

    Raises:
        UserError: another line says something else about the same image.
    """
    before = rows.setdefault(row.name, row)
    if before == row:
        return before is not row
    raise UserError(
        f"{table}, line {line}, contradicts an earlier line about the image {row.name}: correct or remove one of them"
    )


def check_patients(rows: Iterable[Row]) -> None:
    """Raise `UserError` if a patient has images in two parts of the split."""
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        part = "validation" if row.validation else {"Tr": "training", "Ts": "test"}[row.group]
        parts[row.patient].setdefault(part, row.name)
    if both := sorted(patient for patient, of_patient in parts.items() if len(of_patient) > 1):
        example = " and ".join(f"{name} ({part})" for part, name in parts[both[0]].items())
        raise UserError(
            f"{len(both)} {'patients have' if len(both) > 1 else 'patient has'} images in two parts of the split, "
            f"{', '.join(both[:5])}: such as {example}; scores would be too good: use the original lists, or remove "
            "these patients from one of them"
        )


def indexed(files: Iterable[tuple[str, Path]]) -> tuple[dict[str, Path], list[str]]:
    """Return files by name, and sentences about files that are there twice.

    Raises:
        UserError: two files of one name differ, such as an image and its mask.
    """
    images: dict[str, Path] = {}
    twice = 0
    for name, path in files:
        first = images.setdefault(name, path)
        if first == path:
            continue
        if not cmp(first, path, shallow=False):
            raise UserError(
                f"{first} and {path} have the same name and other content; give the folder that has the original "
                "images alone, or move the others away"
            )
        twice += 1
    return images, [f"{twice} images are there twice, with the same content"] if twice else []


def packed_in(folder: Path) -> str:
    """Return the end of a message about files that were not unpacked; empty if there are none."""
    packed = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PACKED)
    return f"; unpack {', '.join(packed[:12])} first" if packed else ""


def content_of(folder: Path) -> str:
    """Return what a folder holds, for a message."""
    names = sorted(path.name for path in islice(folder.iterdir(), 1000))
    return f"it holds {', '.join(names[:5])}{' ...' * (len(names) > 5)}" if names else "it is empty"


# ------------------------------------------------------------------------------------------------------------- dataset


def image_path(folder: Path, group: str, name: str) -> Path:
    """Return the path of a converted image."""
    return folder / f"images{group}" / f"{name}_0000{ENDING}"


def finished(folder: Path) -> set[tuple[str, str]]:
    """Return the group and name of the converted images. An empty file, as after a power cut, does not count."""
    found = set()
    for group in TABLES:
        if (images := folder / f"images{group}").is_dir():
            with os.scandir(images) as entries:
                suffix = f"_0000{ENDING}"
                found |= {
                    (group, entry.name.removesuffix(suffix))
                    for entry in entries
                    if entry.name.endswith(suffix) and entry.stat().st_size
                }
    return found


def write_table(folder: Path, labels: Sequence[str], rows: Iterable[Row], group: str) -> None:
    """Write the labels of a group's images, in the format of docs/classification.md."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", *labels, "patient"])
    writer.writerows([row.name, *row.labels, row.patient] for row in rows)
    write_text(folder / TABLES[group], text.getvalue())


def fold_of(patient: str) -> int:
    """Return the fold that a patient validates. It does not depend on the other patients that were downloaded."""
    return int.from_bytes(hashlib.sha1(patient.encode()).digest()[:8], "big") % FOLDS


def make_splits(rows: Sequence[Row]) -> list[dict[str, list[str]]]:
    """Return the folds: the dataset's own validation part first, if it names one, then `FOLDS` folds by patient.

    There are fewer folds if patients are very few, and none for a single patient.
    """
    parts = [{row.name for row in rows if row.validation}]
    parts += [{row.name for row in rows if fold_of(row.patient) == fold} for fold in range(FOLDS)]
    names = sorted(row.name for row in rows)
    return [
        {"train": [name for name in names if name not in part], "val": sorted(part)}
        for part in parts
        if 0 < len(part) < len(names)
    ]


def write_splits(folder: Path, rows: Sequence[Row]) -> list[str]:
    """Write the folds, which pcrl_nnunet_preprocess takes over. Return sentences about them."""
    splits, own = make_splits(rows), folder / convert.SPLITS
    if not splits:
        own.unlink(missing_ok=True)
        return ["the images are of too few patients for folds"]
    write_text(own, json.dumps(splits))
    said = [
        f"{own}: {len(splits)} folds by patient; fold 0 trains on {len(splits[0]['train'])} images and validates on "
        f"{len(splits[0]['val'])}"
    ]
    used = Path(os.environ.get("nnUNet_preprocessed", "")) / folder.name / convert.SPLITS
    if os.environ.get("nnUNet_preprocessed") and used.is_file() and _folds(used) != splits:
        said.append(f"{used} has other folds and stays as it is: to use these, delete {used} and preprocess again")
    return said


def _folds(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None


def describe(folder: Path, number: int, reference: str) -> None:
    """Write dataset.json. "zscore" normalises each image by itself, so 8 and 16 bits may be mixed."""
    generate_dataset_json(
        str(folder), {0: "zscore"}, {"background": 0}, number, ENDING, dataset_name=folder.name, reference=reference,
        license=f"see {reference}", converted_by="a script of pcrl_nnunet",
    )  # fmt: skip


def refuse_missing(missing: Sequence[Row], source: Source, partial: bool) -> None:
    """Raise `UserError` for missing images, unless the user wants a part of the dataset."""
    if not missing:
        return
    there = len(source.rows) - len(missing)
    if not there:
        raise UserError(
            f"{source.folder} has none of the {len(source.rows)} images that {source.table} lists, such as "
            f"{missing[0].name}{packed_in(source.folder) or '; give the folder of the whole download'}"
        )
    if not partial:
        raise UserError(
            f"{len(missing)} of the {len(source.rows)} images that {source.table} lists are not in {source.folder}, "
            f"such as {missing[0].name}{source.hint}; download them, or give -partial to convert the {there} images "
            "that are there"
        )


def move_strays(folder: Path, rows: Iterable[Row]) -> list[str]:
    """Move converted images that no row has into another folder, and return a sentence about them.

    If the lists have changed, such an image may be a test image among the training images.
    """
    unknown = sorted(finished(folder) - {(row.group, row.name) for row in rows})
    for group, name in unknown:
        path = image_path(folder, group, name)
        target = folder / STRAYS / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    if not unknown:
        return []
    return [
        f"{len(unknown)} images that the tables do not list there, such as images{unknown[0][0]}/{unknown[0][1]}, went "
        f"to {folder / STRAYS}; if they were preprocessed before, preprocess into an empty folder again"
    ]


def run(args: argparse.Namespace, folder: Path, source: Source, settings: Mapping[str, object], reference: str) -> None:
    """Convert the images, write tables and folds, report.

    Args:
        settings: settings that determine which images there are, and their pixels.
    """
    if args.size < FEWEST_PIXELS:
        raise UserError(f"-size is {args.size}; expected at least {FEWEST_PIXELS} pixels")
    check_patients(source.rows)
    done = finished(folder) & {(row.group, row.name) for row in source.rows}
    todo = [row for row in source.rows if (row.group, row.name) not in done]
    missing = [row for row in todo if row.name not in source.images]
    refuse_missing(missing, source, args.partial)
    listed = Counter(row.group for row in source.rows)
    print(
        f"{listed['Tr']} images for training and validation and {listed['Ts']} test images in the tables of "
        f"{source.folder}; into {folder}",
        flush=True,
    )
    with convert.opened(folder, {"size": args.size, **settings}) as dataset:
        dataset.save()
        for group in TABLES:
            (folder / f"images{group}").mkdir(exist_ok=True)
        moved = move_strays(folder, source.rows)
        write_text(folder / MISSING, "".join(f"{row.name}\n" for row in missing))
        jobs = [
            Job(source.images[row.name], image_path(folder, row.group, row.name))
            for row in todo
            if row.name in source.images
        ]
        bad = convert_images(jobs, folder, args.size, args.np, len(source.rows) - len(todo))
        done = finished(folder)
        rows = sorted((row for row in source.rows if (row.group, row.name) in done), key=lambda row: row.name)
        dataset.cases = {row.name: {"group": row.group, "notes": []} for row in rows}
        training = [row for row in rows if row.group == "Tr"]
        for group in TABLES:
            write_table(folder, source.labels, [row for row in rows if row.group == group], group)
        describe(folder, len(training), reference)
        said = [*source.said, *moved, *unlisted(source), *write_splits(folder, training)]
        if missing:
            said.append(f"{len(missing)} of {len(source.rows)} images are missing: {folder / MISSING} names them")
        convert.finish(dataset, bad, said)


def unlisted(source: Source) -> list[str]:
    """Return a sentence about images without a row, which are left out."""
    without = sorted(source.images.keys() - {row.name for row in source.rows})
    if not without:
        return []
    first = source.images[without[0]]
    return [f"{len(without)} images are in no table and were left out, such as {first}"]
