"""nnU-Net's planning and preprocessing of datasets without masks, for classification or wholly unlabelled.

nnU-Net needs a mask of every case for intensity statistics and for training. This module writes masks of the image's
foreground into a temporary raw dataset. nnU-Net's own code does the rest and writes its usual files.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from scipy.ndimage import binary_fill_holes
from skimage.filters import threshold_otsu

from pcrl_nnunet.classification.label_table import FILES
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import write_text
from pcrl_nnunet.ingest.checks import header_of, short_reason
from pcrl_nnunet.ingest.find import left_over, misnumbered, own_scans, reader_of
from pcrl_nnunet.ingest.label_maps import looks_like_labels
from pcrl_nnunet.ingest.read import read_scan, spacing_file
from pcrl_nnunet.ingest.scans import ImageFormat, Scan, SetAside, Unusable
from pcrl_nnunet.ingest.sizes import check_spacing
from pcrl_nnunet.ingest.unlabelled import MAX_BAD
from pcrl_nnunet.loading.splits import SPLITS, read_folds
from pcrl_nnunet.plans import lacks_masks, read_json
from pcrl_nnunet.progress import counted

LABELS = {"background": 0, "foreground": 1}
WITHOUT_MASKS = "pcrl_without_masks"  # in the preprocessed dataset.json, which nnU-Net copies from the raw one
MASKS = "pcrl_masks"  # temporary folder in nnUNet_preprocessed; not a dataset's name
SAMPLED = 10**6  # this many voxels are enough for a threshold


def foreground(image: np.ndarray) -> np.ndarray:
    """Return the body: voxels above Otsu's threshold in any channel, and the holes within a slice.

    Dark lungs belong to the body for that reason.

    Args:
        image: (C, Z, Y, X) from `read_scan`, finite.

    Returns:
        (Z, Y, X) bool.

    Raises:
        Unusable: no channel has contrast.
    """
    found = np.zeros(image.shape[1:], bool)
    for channel in image:
        sample = channel.ravel()[:: max(1, channel.size // SAMPLED)]
        if sample.min() < sample.max():
            found |= channel > threshold_otsu(sample)
    if not found.any():
        raise Unusable("all voxels are the same")
    for slice_ in found:
        slice_[...] = binary_fill_holes(slice_)
    return found


def write_mask(scan: Scan, images: ImageFormat, path: str) -> SetAside | list[str]:
    """Write the mask of a case, complete or not at all. Return notes on the image, or the reason for no mask."""
    try:
        voxels = read_scan(scan, images)
        mask = foreground(voxels.data).astype(np.uint8)
        _write_seg(mask, voxels.properties, images, path)
    except Exception as error:  # one bad file must not stop the others
        return SetAside(scan.sources[0], short_reason(error))
    why = next(filter(None, map(looks_like_labels, voxels.data)), "")
    return voxels.notes + ([f"it looks like a label map: {why}"] if why else [])


def _write_seg(mask: np.ndarray, properties: dict[str, Any], images: ImageFormat, path: str) -> None:
    """Write with nnU-Net's writer, which puts a TIFF's spacing into a second file. The mask is written last."""
    folder, name = os.path.split(path)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        images.reader().write_seg(mask, os.path.join(draft, name), properties)
        for written in sorted(os.listdir(draft), key=lambda other: other == name):
            os.replace(os.path.join(draft, written), os.path.join(folder, written))


def is_without_masks(dataset_name: str, dataset_json: Mapping[str, Any]) -> bool:
    """Tell whether a preprocessed dataset has only foreground masks that were computed from its images.

    Planning records this in dataset.json. Older versions did not; then nnUNet_raw shows it if the variable is set.

    Args:
        dataset_json: the preprocessed dataset's dataset.json.
    """
    if WITHOUT_MASKS in dataset_json:
        return bool(dataset_json[WITHOUT_MASKS])
    return dataset_json.get("labels") == LABELS and lacks_masks(dataset_name)


def trainer_for(plans: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> str | None:
    """Name our trainer for a dataset with masks or with a table of classes; None if it has neither.

    Args:
        plans, dataset_json: the preprocessed dataset's files.
    """
    name = plans["dataset_name"]
    if not is_without_masks(name, dataset_json):
        return "PCRLFinetuneTrainer"
    roots = [root for root in (nnUNet_raw, nnUNet_preprocessed) if root.is_set()]
    tables = [os.path.join(root, name, table) for root in roots for table in FILES.values()]
    return "PCRLClassificationTrainer" if any(map(os.path.isfile, tables)) else None


def plan_and_preprocess(
    raw_folder: str,
    preprocessed: str,
    plans_name: str | None,
    configurations: Sequence[str],
    num_processes: int,
    pool: Executor,
    log: Callable[[str], None],
) -> list[SetAside]:
    """Plan and preprocess a dataset without masks, and return the unusable images.

    Masks of an interrupted run are kept, unless the image is newer.

    Args:
        raw_folder: nnUNet_raw/DatasetXXX_NAME.
        preprocessed: nnUNet_preprocessed.
        plans_name: name of an existing plan to preprocess with; None: plan, too.
        configurations: empty for nnU-Net's choice.

    Raises:
        UserError: over 10 % of the images are bad, or nnU-Net failed.
    """
    name = os.path.basename(raw_folder)
    dataset_json = read_json(os.path.join(raw_folder, "dataset.json"), "describe the dataset as nnU-Net wants it")
    scans = own_scans(raw_folder, dataset_json)
    if not scans:
        raise UserError(
            f"no image in {os.path.join(raw_folder, 'imagesTr')}; put them there, named CASE_0000 and so on"
        )
    images = ImageFormat.of(reader_of(scans, dataset_json), dataset_json)
    raw = os.path.join(preprocessed, MASKS, name)
    masks = os.path.join(raw, "labelsTr")
    os.makedirs(masks, exist_ok=True)
    bad = [] if "dataset" in dataset_json else left_over(os.path.join(raw_folder, "imagesTr"), images.file_ending)
    for where in bad:
        log(f"bad: {where.where}: {where.reason}")
    bad += [SetAside(scan.sources[0], reason) for scan in scans if (reason := misnumbered(scan, images))]
    bad += _absurd(scans, images)
    without = {s.where for s in bad}
    scans_left = [scan for scan in scans if scan.sources[0] not in without]
    bad += _make_masks(scans_left, images, masks, dataset_json["file_ending"], pool, log)
    if len(bad) > MAX_BAD * len(scans):
        raise UserError(
            f"{len(bad)} of {len(scans)} images are bad, over {MAX_BAD:.0%}: mend or remove them and run again; "
            f"finished masks are kept. The first is {bad[0].where}: {bad[0].reason}."
        )
    without = {s.where for s in bad}
    ending = dataset_json["file_ending"]
    good = [scan for scan in scans if scan.sources[0] not in without]
    _link_images(good, images, raw, ending)
    described = {**dataset_json, "labels": LABELS, "numTraining": len(good), WITHOUT_MASKS: True}
    for key in ("regions_class_order", "dataset"):
        described.pop(key, None)
    write_text(os.path.join(raw, "dataset.json"), json.dumps(described, indent=4))
    _bring_folds(
        raw_folder, os.path.join(preprocessed, name), raw, {scan.name for scan in scans} - {scan.name for scan in good}
    )
    _run_nnunet(name, os.path.dirname(raw), plans_name, configurations, num_processes)
    shutil.rmtree(raw)
    if not os.listdir(os.path.dirname(raw)):
        os.rmdir(os.path.dirname(raw))
    return bad


def _absurd(scans: Sequence[Scan], images: ImageFormat) -> list[SetAside]:
    """Set aside images whose header has an absurd voxel size compared to most images."""
    if images.is_2d:
        return []
    spacings: dict[Scan, Sequence[float]] = {}
    for scan in scans:
        with suppress(Unusable):  # the reason is reported when the image is read
            path = spacing_file(scan.files, images)
            spacings[scan] = read_json(path, "")["spacing"] if path else header_of(scan.files[0]).GetSpacing()[:3]
    found = []
    for scan, spacing in spacings.items():
        usual = np.median([other for other in spacings.values() if len(other) == len(spacing)], axis=0).tolist()
        try:
            check_spacing(spacing, usual, "most images")
        except Unusable as error:
            found.append(SetAside(scan.sources[0], str(error)))
    return found


def _link_images(scans: Sequence[Scan], images: ImageFormat | None, raw: str, ending: str) -> None:
    """Link images and files with their spacing under the names of nnU-Net's raw datasets."""
    folder = os.path.join(raw, "imagesTr")
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    os.makedirs(folder)
    for scan in scans:
        for channel, file in enumerate(scan.files):
            os.symlink(os.path.abspath(file), os.path.join(folder, f"{scan.name}_{channel:04d}{ending}"))
        if images is not None and (path := spacing_file(scan.files, images)):
            os.symlink(os.path.abspath(path), os.path.join(folder, f"{scan.name}.json"))


def _bring_folds(raw_folder: str, preprocessed_folder: str, raw: str, set_aside: Collection[str]) -> None:
    """Give nnU-Net's planning the dataset's own folds, which it copies, without the cases that were set aside.

    A file that is there in the preprocessed folder stays as it is.
    """
    own, copy = os.path.join(raw_folder, SPLITS), os.path.join(raw, SPLITS)
    with suppress(FileNotFoundError):  # left by an interrupted run
        os.remove(copy)
    if not os.path.isfile(own) or os.path.isfile(os.path.join(preprocessed_folder, SPLITS)):
        return
    folds = [
        {part: [name for name in of_part if name not in set_aside] for part, of_part in asdict(fold).items()}
        for fold in read_folds(own)
    ]
    write_text(copy, json.dumps(folds))


def _is_newer(path: str, files: Sequence[str]) -> bool:
    """Tell whether a file and the others exist, and the file is newer than the others."""
    if not all(map(os.path.isfile, (path, *files))):
        return False
    return all(os.path.getmtime(path) >= os.path.getmtime(file) for file in files)


@contextmanager
def planned_again(raw_folder: str, preprocessed_folder: str) -> Iterator[None]:
    """Provide an nnUNet_raw with planning's own dataset.json, which has its labels and number of cases.

    nnU-Net's planners read the file there, and copy it over the preprocessed dataset's file.
    """
    before, name = os.environ["nnUNet_raw"], os.path.basename(raw_folder)
    dataset_json = read_json(os.path.join(raw_folder, "dataset.json"), "describe the dataset as nnU-Net wants it")
    with tempfile.TemporaryDirectory() as root:
        _link_images(own_scans(raw_folder, dataset_json), None, os.path.join(root, name), dataset_json["file_ending"])
        shutil.copyfile(os.path.join(preprocessed_folder, "dataset.json"), os.path.join(root, name, "dataset.json"))
        os.environ["nnUNet_raw"] = root
        try:
            yield
        finally:
            os.environ["nnUNet_raw"] = before


def _make_masks(
    scans: Sequence[Scan],
    images: ImageFormat,
    folder: str,
    ending: str,
    pool: Executor,
    log: Callable[[str], None],
) -> list[SetAside]:
    todo = {scan: os.path.join(folder, scan.name + ending) for scan in scans}
    todo = {scan: path for scan, path in todo.items() if not _is_newer(path, scan.files)}
    bad = []
    try:
        futures = {pool.submit(write_mask, scan, images, path): scan for scan, path in todo.items()}
        for future in counted(as_completed(futures), len(todo), "images have a foreground"):
            found = future.result()
            if isinstance(found, SetAside):
                bad.append(found)
                log(f"bad: {found.where}: {found.reason}")
            else:
                for note in found:
                    log(f"note: {futures[future].sources[0]}: {note}")
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely because the memory ran out: run the same command with a smaller "
            "-np, finished masks are kept"
        ) from None
    return bad


def _run_nnunet(
    name: str, raw_root: str, plans_name: str | None, configurations: Sequence[str], num_processes: int
) -> None:
    """Run nnU-Net's own command on the dataset with masks."""
    number = str(int(name[len("Dataset") :].split("_")[0]))
    step = "plan_and_preprocess" if plans_name is None else "preprocess"
    entry = f"from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import {step}_entry as e; e()"
    command = [sys.executable, "-c", entry, "-d", number, "-np", str(num_processes)]
    command += ["-npfp", str(num_processes)] if plans_name is None else ["-plans_name", plans_name]
    if configurations:
        command += ["-c", *configurations]
    done = subprocess.run(command, env={**os.environ, "nnUNet_raw": raw_root}, check=False)
    if done.returncode != 0:
        raise UserError(
            f"nnUNetv2_{step} ended with status {done.returncode}, see above; mend what it says and run "
            f"the same command again"
        )
