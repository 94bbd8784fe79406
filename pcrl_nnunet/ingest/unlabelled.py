"""Preprocessing of unlabelled scans with a dataset's plan, into a folder that nnU-Net's own training never reads.

`preprocessed` runs the plan's own preprocessor on one scan. `preprocess_scan` writes the result into one file.
`preprocess` handles all scans of `find.find_scans` in parallel, and resumes where an earlier run stopped.

Arrays are (C, X, Y, Z) float32, as nnU-Net trains on them.
"""

from __future__ import annotations

import contextlib
import filecmp
import io
import json
import os
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from tqdm import tqdm

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import write_text, writing
from pcrl_nnunet.ingest.checks import short_reason
from pcrl_nnunet.ingest.find import hashed
from pcrl_nnunet.ingest.label_maps import label_word, looks_like_labels
from pcrl_nnunet.ingest.read import read_scan
from pcrl_nnunet.ingest.scans import Found, Scan, SetAside, Target, Unusable, Voxels
from pcrl_nnunet.ingest.sizes import below_stride, check_size
from pcrl_nnunet.ingest.workers import stop
from pcrl_nnunet.loading.cases import Case, find_cases
from pcrl_nnunet.lock import locked
from pcrl_nnunet.progress import telling

MANIFEST = "cases.json"
UNLABELLED = "_unlabelled"  # ending of the folder's name
BAD_LIST = "bad_cases.txt"
MAX_BAD = 0.1  # with a larger share of bad scans, the folder is wrong and not a scan
MIN_TRIED = 10  # one bad scan among the first few says nothing about the folder
READ_BY = 2  # version of the reading code; cases of another version are made again
_FLUSH_SECONDS = 5.0


def unlabelled_folder(preprocessed_dataset_folder: str, data_identifier: str) -> str:
    """Return the folder of a configuration's unlabelled cases: beside nnU-Net's own data folder, never in it."""
    return os.path.join(preprocessed_dataset_folder, f"{data_identifier}{UNLABELLED}")


def unlabelled_cases(preprocessed_dataset_folder: str, data_identifier: str) -> list[Case]:
    """Return the unlabelled cases of a plan's configuration."""
    folder = unlabelled_folder(preprocessed_dataset_folder, data_identifier)
    there = os.path.isdir(folder) and any(name.endswith(".b2nd") for name in os.listdir(folder))
    return find_cases(folder) if there else []


# ------------------------------------------------------------------------------------------------------ preprocessing


def preprocess_scan(scan: Scan, target: Target, folder: str, scratch: str) -> dict[str, Any] | SetAside:
    """Preprocess one scan with the plan into `folder`/NAME.b2nd, which appears complete or not at all.

    Args:
        scratch: a folder on the same file system; it holds a folder NAME during the work.

    Returns:
        The case's entry in the manifest, or the reason why there is none.

    Raises:
        UserError: the file cannot be written, which is not the scan's fault.
    """
    unfinished = os.path.join(scratch, scan.name)
    os.makedirs(unfinished, exist_ok=True)
    try:
        entry: dict[str, Any] = {"sources": scan.sources, "stamp": scan.stamp()}
        twin = None if scan.own else _own_twin(scan, target.own_images)
        if twin is not None:
            raise Unusable(f"the same file as the dataset's own image {twin}", bad=False)
        voxels = preprocessed(scan, target)
    except Exception as error:  # one bad file must not stop the other scans
        return SetAside(scan.sources[0], short_reason(error), getattr(error, "bad", True))
    else:
        size = _save(voxels.data, target.configuration_manager.patch_size, scan.name, folder, unfinished)
        entry["spacing"] = [float(s) for s in voxels.properties["spacing"]]
        if scan.how != "plan":
            entry["orientation"] = target.orientation
        return {**entry, "shape": list(voxels.data.shape), "bytes": size, "notes": voxels.notes}
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def preprocessed(scan: Scan, target: Target) -> Voxels:
    """Read a scan, check it and run the plan's preprocessor.

    Returns:
        (C, X, Y, Z) float32 as nnU-Net would train on it, with nnU-Net's properties.

    Raises:
        Unusable: the file is not read correctly, is a label map, has an impossible size, or the plan's normalisation
            turns its voxels into a constant.
    """
    voxels = read_scan(scan, target.images)
    if not scan.own:
        voxels.notes += _label_notes(scan, voxels.data, target)
    check_size(voxels.data.shape[1:], voxels.properties["spacing"], scan.files, target)
    plans, configuration = target.plans_manager, target.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    with contextlib.redirect_stdout(io.StringIO()):
        data, _, properties = preprocessor.run_case_npy(
            voxels.data, None, voxels.properties, plans, configuration, target.dataset_json
        )
    if too_small := below_stride(data.shape[1:], target):
        size = " x ".join(map(str, data.shape[1:]))
        raise Unusable(f"without its empty border the case has {size} voxels, and {too_small}")
    if not np.isfinite(data).all():
        raise Unusable("voxels became NaN or infinite in preprocessing")
    if any(image.min() == image.max() for image in data):
        raise Unusable("all voxels became the same: the plan's normalisation is for other intensities")
    return Voxels(data.astype(np.float32, copy=False), properties, voxels.notes)


def _label_notes(scan: Scan, data: np.ndarray, target: Target) -> list[str]:
    """Refuse label maps, and warn about scans with a label map's name but a scan's voxels."""
    word = label_word(os.path.relpath(scan.files[0], scan.folder)) if scan.folder else ""
    why = "" if target.takes_label_maps else next(filter(None, (looks_like_labels(c, bool(word)) for c in data)), "")
    if why:
        raise Unusable(f"a label map: {why}; if it is a scan, give --label_maps_are_scans", bad=False)
    return [f"its name says '{word}', its voxels are a scan's: it is taken for a scan"] if word else []


def _own_twin(scan: Scan, own_images: dict[str, str]) -> str | None:
    """Return the dataset's own image with the same bytes, if any. Copies in other formats are found by their voxels."""
    paths_by_size = _by_size(tuple(own_images))
    for file in scan.files:
        for path in paths_by_size.get(os.path.getsize(file), ()):
            if filecmp.cmp(file, path, shallow=False):
                return os.path.basename(path)
    return None


@lru_cache(maxsize=1)
def _by_size(paths: tuple[str, ...]) -> dict[int, list[str]]:
    found = defaultdict(list)
    for path in paths:
        with contextlib.suppress(OSError):  # nnU-Net reports missing images of the dataset
            found[os.path.getsize(path)].append(path)
    return dict(found)


def _save(data: np.ndarray, patch_size: list[int], name: str, folder: str, unfinished: str) -> int:
    """Write (C, X, Y, Z) like nnU-Net's preprocessing, without labels and properties. Return the size in bytes."""
    blocks, chunks = comp_blosc2_params(data.shape, tuple(patch_size), data.itemsize)
    no_labels = np.zeros((1, 1, 1, 1), np.int16)
    try:
        truncated = os.path.join(unfinished, name)
        nnUNetDatasetBlosc2.save_case(
            data, no_labels, {}, truncated, chunks=chunks, blocks=blocks,
            chunks_seg=no_labels.shape, blocks_seg=no_labels.shape,
        )  # fmt: skip
        size = os.path.getsize(f"{truncated}.b2nd")
        os.replace(f"{truncated}.b2nd", os.path.join(folder, f"{name}.b2nd"))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot write {name}.b2nd to {folder} ({short_reason(error)}): check permissions and free space"
        ) from error
    return size


# ---------------------------------------------------------------------------------------------------------- all of it


@dataclass
class Summary:
    """The outcome of preprocessing a folder's scans."""

    made: int = 0
    already: int = 0
    set_aside: list[SetAside] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[SetAside]:
        return [s for s in self.set_aside if s.bad]

    @property
    def total(self) -> int:
        """The number of scans that should be usable."""
        return self.made + self.already + len(self.bad)


def preprocess(
    found: Found,
    target: Target,
    folder: str,
    pool: Executor,
    log: Callable[[str], None],
    progress: bool = True,
) -> Summary:
    """Preprocess the missing cases. Finished cases survive any failure, and the next run resumes from them.

    Args:
        folder: see `unlabelled_folder`; made if missing.
        log: receives a line for every bad scan as it turns up.
        progress: draw a bar on the terminal; otherwise `log` receives lines at intervals.

    Raises:
        UserError: over 10 % of the scans are bad; no scan is usable; the plan has changed since the folder's cases were
            made; a worker was killed; the folder is not writable.
    """
    if target.configuration_manager.preprocessor_class is None:
        raise UserError(f"The plan's preprocessor {target.configuration_manager.preprocessor_name} is not installed.")
    summary = Summary(set_aside=list(found.set_aside))
    total = len(found.scans) + len(summary.bad)
    with writing(folder, "check permissions and free space"):
        os.makedirs(folder, exist_ok=True)
        with locked(folder, "pcrl_nnunet_preprocess"):
            cases = _load_manifest(folder, target)
            scans = [_named_apart(scan, cases) for scan in found.scans]
            todo = [scan for scan in scans if not _is_done(scan, cases.get(scan.name), folder)]
            summary.already = len(scans) - len(todo)
            _write_manifest(folder, target, cases)  # before any case, so that the origin of every case is known
            try:
                _stop_if_too_many_bad(summary, total, folder, done=not todo)
                _preprocess_all(todo, target, folder, pool, cases, summary, total, log, progress)
            finally:
                _write_manifest(folder, target, cases)
                _write_bad_list(folder, summary.set_aside)
    if not summary.made + summary.already:
        reasons = Counter(s.reason for s in summary.set_aside).most_common(3)
        raise UserError(f"none of the scans can be used: {', '.join(f'{reason} ({n})' for reason, n in reasons)}")
    return summary


def _preprocess_all(
    todo: list[Scan],
    target: Target,
    folder: str,
    pool: Executor,
    cases: dict[str, Any],
    summary: Summary,
    total: int,
    log: Callable[[str], None],
    progress: bool,
) -> None:
    """Fill `cases` and `summary` as results come in."""
    saved, done = time.monotonic(), 0
    with (
        _scratch(folder) as scratch,
        tqdm(total=total, initial=total - len(todo), unit="scan", disable=not progress, dynamic_ncols=True) as bar,
        contextlib.nullcontext() if progress else telling(lambda: f"{done} of {len(todo)} done", log),
    ):
        try:
            futures = {pool.submit(preprocess_scan, scan, target, folder, scratch): scan for scan in todo}
            for future in as_completed(futures):
                done += 1
                scan, result = futures[future], future.result()
                if isinstance(result, SetAside):
                    summary.set_aside.append(result)
                    if result.bad:
                        log(f"bad: {result.where}: {result.reason}")
                    if cases.pop(scan.name, None):  # made from an earlier state of the same file
                        os.remove(os.path.join(folder, f"{scan.name}.b2nd"))
                else:
                    summary.made += 1
                    cases[scan.name] = result
                    summary.notes += [f"{scan.sources[0]}: {note}" for note in result["notes"]]
                bar.update()
                _stop_if_too_many_bad(summary, total, folder, done=done == len(todo))
                if time.monotonic() - saved > _FLUSH_SECONDS:
                    _write_manifest(folder, target, cases)
                    saved = time.monotonic()
        except BrokenProcessPool:
            at_work = ", ".join(sorted(os.listdir(scratch))) or "unknown"
            raise UserError(
                "A worker process was killed, most likely because the memory ran out: run the same command with a "
                f"smaller -np, finished scans are kept. In work were: {at_work}."
            ) from None
        except BaseException:
            stop(pool)  # before the scratch folder is removed
            raise


def _stop_if_too_many_bad(summary: Summary, total: int, folder: str, done: bool) -> None:
    tried = summary.made + summary.already + len(summary.bad)
    if len(summary.bad) > MAX_BAD * total and (done or tried >= MIN_TRIED):
        first = summary.bad[0]
        raise UserError(
            f"{len(summary.bad)} of {total} scans are bad, over {MAX_BAD:.0%}: mend or remove them and run again; "
            f"finished scans are kept. The first is {first.where}: {first.reason}. "
            f"All are listed in {os.path.join(folder, BAD_LIST)}."
        )


def _named_apart(scan: Scan, cases: dict[str, Any]) -> Scan:
    """Rename the scan if its name belongs to a scan of another folder. The same scan in a moved folder keeps it."""
    entry = cases.get(scan.name)
    if scan.own or entry is None or entry["sources"][0] == scan.sources[0] or entry["stamp"] == scan.stamp():
        return scan
    return replace(scan, name=hashed(scan.name, scan.sources[0]))


def _is_done(scan: Scan, entry: dict[str, Any] | None, folder: str) -> bool:
    try:
        return (
            entry is not None
            and entry["stamp"] == scan.stamp()
            and entry["bytes"] == os.path.getsize(os.path.join(folder, f"{scan.name}.b2nd"))
        )
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _scratch(folder: str) -> Iterator[str]:
    """Provide a folder for unfinished files, and remove the folders of killed runs."""
    scratch = os.path.join(folder, "unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    os.makedirs(scratch)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _load_manifest(folder: str, target: Target) -> dict[str, Any]:
    """Return the entries of the cases made so far.

    Raises:
        UserError: the cases were made with other settings than `target` has.
    """
    path = os.path.join(folder, MANIFEST)
    remedy = f"delete the folder {folder} and run again"
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        then, cases, read_by = manifest["settings"], manifest["cases"], manifest.get("read_by")
    except FileNotFoundError:
        if any(name.endswith(".b2nd") for name in os.listdir(folder)):
            raise UserError(f"{folder} has cases but no {MANIFEST} that says how they were made; {remedy}") from None
        return {}
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: {remedy}.") from None
    if read_by != READ_BY:
        raise UserError(
            f"The scans in {folder} were read by another version of pcrl_nnunet, with other checks: {remedy}."
        )
    now = target.settings()
    changed = [key for key in now if then.get(key) != now[key]]
    if changed:
        raise UserError(
            f"The cases in {folder} were made with another {' and another '.join(changed)} than the plan "
            f"{target.plans['plans_name']} has now, and must not be mixed: {remedy}."
        )
    return cases


def refuse_other_settings(folder: str, target: Target) -> None:
    """Raise `UserError` if the cases of a folder were made with other settings than `target` has."""
    _load_manifest(folder, target)


def _write_manifest(folder: str, target: Target, cases: dict[str, Any]) -> None:
    manifest = {
        "plans_name": target.plans["plans_name"],
        "configuration": target.configuration,
        "settings": target.settings(),
        "read_by": READ_BY,
        "cases": dict(sorted(cases.items())),
    }
    write_text(os.path.join(folder, MANIFEST), json.dumps(manifest, indent=1))


def _write_bad_list(folder: str, set_aside: list[SetAside]) -> None:
    lines = [f"{'bad' if s.bad else 'skipped'}\t{s.where}\t{s.reason}\n" for s in set_aside]
    write_text(os.path.join(folder, BAD_LIST), "".join(sorted(lines)))
