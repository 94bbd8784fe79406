"""The common part of convert_luna16.py and convert_lits.py: conversion of scans to a raw nnU-Net dataset, one by one.

A case is complete or absent: every file is written in the folder `unfinished`, then renamed, the image last. The
folder's `conversion.json` records the settings, and each case's origin and oddities; a second run resumes from it.
Unusable scans are named, set aside and listed in `bad_cases.txt`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import SimpleITK as sitk
from nnunetv2.configuration import default_num_processes
from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json
from numpy.typing import NDArray
from tqdm import tqdm

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import write_text
from pcrl_nnunet.ingest.checks import check_intensities, short_reason
from pcrl_nnunet.ingest.read import read_image
from pcrl_nnunet.ingest.scans import SetAside, Unusable
from pcrl_nnunet.ingest.unlabelled import BAD_LIST
from pcrl_nnunet.ingest.workers import worker_pool
from pcrl_nnunet.lock import locked

ENDING = ".nii.gz"
RECORD = "conversion.json"
SPLITS = "splits_final.json"
UNFINISHED = "unfinished"
LISTED = 20  # scans on the screen; the files list all


class Loaded(NamedTuple):
    """A case to write: int16 or float32, its labels in uint8 on the same grid, and its oddities."""

    image: sitk.Image
    label: sitk.Image | None
    notes: list[str]


@dataclass(frozen=True)
class Case:
    """A scan that was found but not yet read. Subclasses read it.

    Attributes:
        name: name of the case in nnU-Net.
        group: "Tr" (training) or "Ts" (test), as in nnU-Net's folders.
        labelled: whether the case has labels, which are optional for a test case.
        image: file of the image.
    """

    name: str
    group: str
    labelled: bool
    image: Path

    def load(self) -> Loaded:
        """Read the case. Raise `Unusable`, or any error of a reader."""
        raise NotImplementedError

    def entry(self) -> dict[str, Any]:
        """Return the case's entry in the record."""
        return {"group": self.group, "labelled": self.labelled, "image": str(self.image.absolute())}


def image_path(folder: Path, name: str, group: str) -> Path:
    return folder / f"images{group}" / f"{name}_0000{ENDING}"


def label_path(folder: Path, name: str, group: str) -> Path:
    return folder / f"labels{group}" / f"{name}{ENDING}"


def files_of(folder: Path, name: str, entry: dict[str, Any]) -> list[Path]:
    """Return the files of a finished case."""
    labels = [label_path(folder, name, entry["group"])] if entry["labelled"] else []
    return [image_path(folder, name, entry["group"]), *labels]


@dataclass
class Dataset:
    """The output folder with its record."""

    folder: Path
    settings: dict[str, Any]
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)  # finished cases: name -> entry

    def names(self, group: str) -> list[str]:
        return sorted(name for name, entry in self.cases.items() if entry["group"] == group)

    def save(self) -> None:
        record = {"settings": self.settings, "cases": dict(sorted(self.cases.items()))}
        write_text(self.folder / RECORD, json.dumps(record, indent=1))


# ------------------------------------------------------------------------------------------------------- command line


def dataset_folder(args: argparse.Namespace, name: str) -> Path:
    """Return the dataset's folder. Raise `UserError` for options of `options` that make no sense."""
    if not args.i.is_dir():
        raise UserError(f"-i is {args.i}, which is not a folder; give the folder that was downloaded")
    if not 1 <= args.d <= 999:
        raise UserError(f"-d is {args.d}; expected a dataset ID from 1 to 999")
    if args.np is not None and args.np < 1:
        raise UserError(f"-np is {args.np}; expected at least 1")
    raw = args.o or os.environ.get("nnUNet_raw")
    if not raw:
        raise UserError("nnUNet_raw is not set: set it as for nnU-Net, or give the folder for the dataset with -o")
    folder = Path(raw) / f"Dataset{args.d:03d}_{name}"
    for place in {str(raw), *(os.environ.get(v, "") for v in ("nnUNet_raw", "nnUNet_preprocessed"))} - {""}:
        for other in Path(place).glob(f"Dataset{args.d:03d}_*"):
            if other.name != folder.name:
                raise UserError(f"the dataset ID {args.d} is taken by {other}: choose another -d")
    return folder


@contextmanager
def opened(folder: Path, settings: dict[str, Any]) -> Iterator[Dataset]:
    """Make or resume the dataset's folder, and lock it against other runs.

    Args:
        settings: settings that determine the voxels; cases of other settings must not be mixed in.

    Raises:
        UserError: the folder has cases of other settings or of another origin, or is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(str(folder), "conversion"):
            yield _continued(folder, settings)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: {error.strerror or error}: check permissions and free space, and run the "
            "same command again; finished cases are kept"
        ) from error
    except KeyboardInterrupt:
        print("\nStopped. Finished cases are kept; the same command goes on from here.", file=sys.stderr)
        raise


def _continued(folder: Path, settings: dict[str, Any]) -> Dataset:
    """Return the record of an earlier run, without cases whose files are gone."""
    remedy = f"delete {folder} and run again, or choose another -d"
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        before, cases = record["settings"], record["cases"]
    except FileNotFoundError:
        if any(folder.glob("images*/*")):
            raise UserError(f"{folder} has images but no {RECORD} that says how they were made: {remedy}") from None
        return Dataset(folder, settings)
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{folder / RECORD} is damaged: {remedy}") from None
    changed = [f"{key} {before.get(key)} (now {settings[key]})" for key in settings if before.get(key) != settings[key]]
    if changed:
        raise UserError(f"the cases in {folder} were made with {', '.join(changed)} and must not be mixed: {remedy}")
    complete = {name: entry for name, entry in cases.items() if all(f.is_file() for f in files_of(folder, name, entry))}
    return Dataset(folder, settings, complete)


# ------------------------------------------------------------------------------------------------------------ reading


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files in and below a folder, in order, following links, without hidden files."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): check its permissions")

    for directory, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(directory, name) for name in sorted(names) if not name.startswith("."))


def read(path: Path) -> sitk.Image:
    """Read a 3D volume like the rest of the package. Raise `Unusable` for other files."""
    image = read_image(str(path))
    if image.GetDimension() != 3:
        raise Unusable(f"its size is {image.GetSize()}; expected one 3D volume")
    return image


def int16_if_whole(image: sitk.Image) -> sitk.Image:
    """Convert to int16 if all values are whole numbers in its range, such as HU, else to float32."""
    values = sitk.GetArrayViewFromImage(image)  # (Z, Y, X)
    if values.dtype == np.int16:
        return image
    limits = np.iinfo(np.int16)
    whole = np.empty(values.shape, np.int16)
    for to, plane in zip(whole, values, strict=True):  # slice by slice: no second volume of float64 in memory
        if plane.min() < limits.min or plane.max() > limits.max or (plane != np.rint(plane)).any():
            return sitk.Cast(image, sitk.sitkFloat32)
        to[...] = plane
    return with_geometry(whole, image)


def with_geometry(values: NDArray[np.int16] | NDArray[np.uint8], image: sitk.Image) -> sitk.Image:
    """Return voxels (Z, Y, X) as an image on the grid of `image`."""
    volume = sitk.GetImageFromArray(values)
    volume.CopyInformation(image)
    return volume


def differences(one: sitk.Image, other: sitk.Image) -> list[str]:
    """Return which of spacing, origin and direction differ in two images or headers, by nnU-Net's tolerance."""
    pairs = {
        "spacing": (one.GetSpacing(), other.GetSpacing()),
        "origin": (one.GetOrigin(), other.GetOrigin()),
        "direction": (one.GetDirection(), other.GetDirection()),
    }
    return [name for name, (a, b) in pairs.items() if not np.allclose(a, b)]


# --------------------------------------------------------------------------------------------------------- converting


def convert(cases: Sequence[Case], dataset: Dataset, processes: int | None) -> list[SetAside]:
    """Convert the missing cases, and return the cases that failed.

    Raises:
        UserError: a worker was killed, or the folder is not writable.
    """
    todo = [case for case in cases if case.name not in dataset.cases]
    bad: list[SetAside] = []
    scratch = dataset.folder / UNFINISHED
    shutil.rmtree(scratch, ignore_errors=True)
    dataset.save()
    if not todo:
        return bad
    for case in todo:
        for file in files_of(dataset.folder, case.name, case.entry()):
            file.parent.mkdir(exist_ok=True)
    scratch.mkdir()
    number = min(processes or min(default_num_processes, os.cpu_count() or 1), len(todo))
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a log needs few lines
    with (
        worker_pool(number) as pool,
        tqdm(total=len(cases), initial=len(cases) - len(todo), unit="scan", mininterval=every) as bar,
    ):
        futures = {pool.submit(convert_case, case, dataset.folder): case for case in todo}
        try:
            for future in as_completed(futures):
                case, result = futures[future], future.result()
                if isinstance(result, SetAside):
                    bad.append(result)
                    tqdm.write(f"bad: {result.where}: {result.reason}", sys.stderr)
                else:
                    dataset.cases[case.name] = {**case.entry(), "notes": result}
                    dataset.save()
                bar.update()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, most likely because the memory ran out: run the same command with a "
                "smaller -np; finished cases are kept"
            ) from None
    shutil.rmtree(scratch)
    return bad


def convert_case(case: Case, folder: Path) -> list[str] | SetAside:
    """Convert one scan. Return its oddities, or the reason why it is unusable.

    Raises:
        UserError: a file cannot be written, which is not the scan's fault.
    """
    try:
        loaded = case.load()
        check_intensities(sitk.GetArrayViewFromImage(loaded.image)[None])
    except MemoryError:
        return SetAside(str(case.image), "not enough memory for it")
    except Exception as error:  # one bad file must not stop the other scans
        return SetAside(str(case.image), short_reason(error))
    image = image_path(folder, case.name, case.group)
    try:
        if loaded.label is not None:
            _write(loaded.label, label_path(folder, case.name, case.group), folder / UNFINISHED)
        _write(loaded.image, image, folder / UNFINISHED)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write {image} ({short_reason(error)}): check permissions and free space, and run the same command "
            "again; finished cases are kept"
        ) from error
    return loaded.notes


def _write(volume: sitk.Image, path: Path, scratch: Path) -> None:
    sitk.WriteImage(volume, str(scratch / path.name), useCompression=True, compressionLevel=1)  # the quickest level
    os.replace(scratch / path.name, path)


# ------------------------------------------------------------------------------------------------------------- ending


def write_dataset_json(dataset: Dataset, labels: dict[str, int], reference: str) -> None:
    """Write dataset.json for the finished training cases."""
    generate_dataset_json(
        str(dataset.folder), {0: "CT"}, dict(labels), len(dataset.names("Tr")), ENDING,
        dataset_name=dataset.folder.name, reference=reference, license=f"see {reference}",
        converted_by="a script of pcrl_nnunet",
    )  # fmt: skip


def check(dataset: Dataset) -> list[SetAside]:
    """Check the headers of the written files, and return what is wrong."""
    wrong: list[SetAside] = []
    again = "delete it and run the same command again"
    files = {name: files_of(dataset.folder, name, entry) for name, entry in dataset.cases.items()}
    present = {path for kind in ("images", "labels") for path in dataset.folder.glob(f"{kind}T[rs]/*{ENDING}")}
    for path in sorted(present - {path for both in files.values() for path in both}):
        wrong.append(SetAside(str(path), "belongs to no case, and nnU-Net would fail on it: delete it"))
    for image, *labels in files.values():
        try:
            first = header(image)
            for label in labels:
                second = header(label)
                apart = [*differences(first, second), *["size"] * (first.GetSize() != second.GetSize())]
                if apart:
                    wrong.append(SetAside(str(label), f"its {' and '.join(apart)} is not the image's: {again}"))
        except RuntimeError as error:
            wrong.append(SetAside(str(image), f"it or its label: {short_reason(error)}: {again}"))
    return wrong


def header(path: Path) -> sitk.ImageFileReader:
    """Read the size, spacing, origin and direction of a file, without voxels."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return reader


def finish(dataset: Dataset, bad: Iterable[SetAside], said: Sequence[str]) -> None:
    """Print the outcome.

    Args:
        said: sentences about the dataset as a whole.

    Raises:
        UserError: a file was bad; the command ends with status 1.
    """
    bad = list(bad)
    write_text(dataset.folder / BAD_LIST, "".join(sorted(f"{b.where}\t{b.reason}\n" for b in bad)))
    notes = [f"{name}: {note}" for name, entry in sorted(dataset.cases.items()) for note in entry["notes"]]
    _list(notes, "note", dataset.folder / RECORD)
    _list([f"{b.where}: {b.reason}" for b in bad], "bad", dataset.folder / BAD_LIST)
    if not dataset.names("Tr"):
        raise UserError(f"no scan could be converted to a training case: see above, and {dataset.folder / BAD_LIST}")
    tests = f" and {len(dataset.names('Ts'))} test cases" if dataset.names("Ts") else ""
    print(f"{dataset.folder}: {len(dataset.names('Tr'))} training cases{tests}")
    for sentence in said:
        print(sentence)
    if bad:
        raise UserError(
            f"{len(bad)} {'file is' if len(bad) == 1 else 'files are'} bad, as listed above and in "
            f"{dataset.folder / BAD_LIST}: mend, download again or remove them, and run the same command; finished "
            "cases are kept, and the dataset can be used without the bad ones"
        )


def _list(lines: Sequence[str], kind: str, file: Path) -> None:
    for line in lines[:LISTED]:
        print(f"{kind}: {line}")
    if len(lines) > LISTED:
        print(f"... and {len(lines) - LISTED} more, in {file}")
