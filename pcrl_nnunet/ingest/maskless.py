"""Datasets without masks, for classification or wholly unlabelled, through nnU-Net's own planning and preprocessing.

nnU-Net wants a mask of every case: for the statistics of its intensities, and to train on. Here the mask is the
foreground found from the image, made in a raw dataset beside the real one; nnU-Net does the rest, with its own code,
and writes what it always writes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from typing import Any

import numpy as np
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from scipy.ndimage import binary_fill_holes
from skimage.filters import threshold_otsu
from tqdm import tqdm

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import whole, write_text
from pcrl_nnunet.ingest.scans import Scan, SetAside, own_scans, short_reason
from pcrl_nnunet.ingest.unlabelled import MAX_BAD
from pcrl_nnunet.plans import read_json

LABELS = {"background": 0, "foreground": 1}
MASKS = "pcrl_masks"  # in nnUNet_preprocessed, while at work; no name of a dataset
SAMPLED = 10**6  # voxels are enough for a threshold


def foreground(image: np.ndarray) -> np.ndarray:
    """Where there is a body: brighter than Otsu's threshold in any channel, and what that surrounds within a slice.

    So lungs belong to it, dark as they are.

    Args:
        image: (C, Z, Y, X) as nnU-Net's readers give it.

    Returns:
        (Z, Y, X) bool.

    Raises:
        ValueError: the image is constant, or not finite.
    """
    found = np.zeros(image.shape[1:], bool)
    for channel in image:
        if not np.isfinite(channel).all():
            raise ValueError("voxels that are not finite numbers")
        sample = channel.ravel()[:: max(1, channel.size // SAMPLED)]
        if sample.min() < sample.max():
            found |= channel > threshold_otsu(sample)
    if not found.any():
        raise ValueError("all voxels are the same")
    for slice_ in found:
        slice_[...] = binary_fill_holes(slice_)
    return found


def write_mask(scan: Scan, reader: Any, path: str) -> SetAside | None:
    """Write the mask of a case, whole or not at all; why it has none."""
    try:
        image, properties = reader().read_images(list(scan.files))
        mask = foreground(image).astype(np.uint8)
        with whole(path) as draft:
            reader().write_seg(mask, draft, properties)
    except Exception as error:  # whatever a file makes a reader do, the others go on
        return SetAside(scan.sources[0], short_reason(error, ""))
    return None


def plan_and_preprocess(
    raw_folder: str,
    preprocessed: str,
    plans_name: str | None,
    configurations: Sequence[str],
    num_processes: int,
    pool: Executor,
    log: Callable[[str], None],
    progress: bool,
) -> list[SetAside]:
    """Plan and preprocess a dataset without masks; what could not be used.

    Masks that an interrupted run has made are kept, unless an image has been written since.

    Args:
        raw_folder: nnUNet_raw/DatasetXXX_NAME.
        preprocessed: nnUNet_preprocessed.
        plans_name: of a plan that is there, to preprocess by; None: plan, too.
        configurations: empty for nnU-Net's choice.

    Raises:
        UserError: over 10 % bad, or nnU-Net failed.
    """
    name = os.path.basename(raw_folder)
    dataset_json = read_json(os.path.join(raw_folder, "dataset.json"), "describe the dataset as nnU-Net wants it")
    scans = own_scans(raw_folder, dataset_json)
    if not scans:
        raise UserError(
            f"no image in {os.path.join(raw_folder, 'imagesTr')}; put them there, named CASE_0000 and so on"
        )
    reader = _reader_of(scans, dataset_json)
    raw = os.path.join(preprocessed, MASKS, name)
    masks = os.path.join(raw, "labelsTr")
    os.makedirs(masks, exist_ok=True)
    bad = _make_masks(scans, reader, masks, dataset_json["file_ending"], pool, log, progress)
    if len(bad) > MAX_BAD * len(scans):
        raise UserError(
            f"{len(bad)} of {len(scans)} images are bad, over {MAX_BAD:.0%}: mend or remove them and run again; "
            f"finished masks are kept. The first is {bad[0].where}: {bad[0].reason}."
        )
    without = {s.where for s in bad}
    ending = dataset_json["file_ending"]
    good = [scan for scan in scans if scan.sources[0] not in without]
    _link_images(good, raw, ending)
    described = {**dataset_json, "labels": LABELS, "numTraining": len(good)}
    for key in ("regions_class_order", "dataset"):
        described.pop(key, None)
    write_text(os.path.join(raw, "dataset.json"), json.dumps(described, indent=4))
    _run_nnunet(name, os.path.dirname(raw), plans_name, configurations, num_processes)
    shutil.rmtree(raw)
    if not os.listdir(os.path.dirname(raw)):
        os.rmdir(os.path.dirname(raw))
    return bad


def _link_images(scans: Sequence[Scan], raw: str, ending: str) -> None:
    """Under the names that nnU-Net's raw datasets have."""
    images = os.path.join(raw, "imagesTr")
    shutil.rmtree(images, ignore_errors=True)  # of an interrupted run
    os.makedirs(images)
    for scan in scans:
        for channel, file in enumerate(scan.files):
            os.symlink(os.path.abspath(file), os.path.join(images, f"{scan.name}_{channel:04d}{ending}"))


def _is_newer(path: str, files: Sequence[str]) -> bool:
    """Whether there is a file that was written after the others, which are there, too."""
    if not all(map(os.path.isfile, (path, *files))):
        return False
    return all(os.path.getmtime(path) >= os.path.getmtime(file) for file in files)


@contextmanager
def planned_again(raw_folder: str, preprocessed_folder: str) -> Iterator[None]:
    """nnUNet_raw with the dataset as planning has described it, with its labels and the number of its cases.

    nnU-Net's planners read them from there, and copy them over those of the preprocessed dataset.
    """
    before, name = os.environ["nnUNet_raw"], os.path.basename(raw_folder)
    dataset_json = read_json(os.path.join(raw_folder, "dataset.json"), "describe the dataset as nnU-Net wants it")
    with tempfile.TemporaryDirectory() as root:
        _link_images(own_scans(raw_folder, dataset_json), os.path.join(root, name), dataset_json["file_ending"])
        shutil.copyfile(os.path.join(preprocessed_folder, "dataset.json"), os.path.join(root, name, "dataset.json"))
        os.environ["nnUNet_raw"] = root
        try:
            yield
        finally:
            os.environ["nnUNet_raw"] = before


def _reader_of(scans: Sequence[Scan], dataset_json: dict[str, Any]) -> Any:
    """nnU-Net's choice, by the first image that any reader can read."""
    for scan in scans:
        with suppress(RuntimeError), redirect_stderr(StringIO()):  # it prints a traceback for every reader that cannot
            return determine_reader_writer_from_dataset_json(dataset_json, scan.files[0], verbose=False)
    raise UserError(
        f"none of the {len(scans)} images can be read, the first is {scans[0].files[0]}; expected images of the "
        f"file_ending in dataset.json, {dataset_json['file_ending']}, for one of nnU-Net's readers"
    )


def _make_masks(
    scans: Sequence[Scan],
    reader: Any,
    folder: str,
    ending: str,
    pool: Executor,
    log: Callable[[str], None],
    progress: bool,
) -> list[SetAside]:
    todo = {scan: os.path.join(folder, scan.name + ending) for scan in scans}
    todo = {scan: path for scan, path in todo.items() if not _is_newer(path, scan.files)}
    bad = []
    try:
        futures = {pool.submit(write_mask, scan, reader, path): scan for scan, path in todo.items()}
        bar = tqdm(as_completed(futures), total=len(scans), initial=len(scans) - len(todo), disable=not progress)
        for future in bar:
            if (found := future.result()) is not None:
                bad.append(found)
                log(f"bad: {found.where}: {found.reason}")
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely because the memory ran out: run the same command with a smaller "
            "-np, finished masks are kept"
        ) from None
    return bad


def _run_nnunet(
    name: str, raw_root: str, plans_name: str | None, configurations: Sequence[str], num_processes: int
) -> None:
    """nnU-Net's own command, on the dataset with masks."""
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
