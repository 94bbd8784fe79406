"""The search for scans in any folder, whatever their names: it groups files into scans and sets others aside."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest import dicom
from pcrl_nnunet.ingest.checks import header_of
from pcrl_nnunet.ingest.scans import VOLUME_ENDINGS, Found, ImageFormat, Scan, SetAside, Target, Unusable
from pcrl_nnunet.plans import PlannedConfiguration

# Images that a dataset may not take. The user hears of them; they do not count as "other files".
IMAGE_ENDINGS = (*VOLUME_ENDINGS, ".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".gif", ".webp", ".img", ".hdr")
_LABELS_FOLDER = re.compile(r"labels(Tr|Ts|Va|Pr)?[A-Za-z]{0,2}")  # nnU-Net's names of folders with labels


def make_target(planned: PlannedConfiguration, raw_dataset_folder: str) -> Target:
    """Make the target. The dataset's own images are optional: they give the orientation and reveal copies."""
    own = {file: scan.name for scan in own_scans(raw_dataset_folder, planned.dataset_json) for file in scan.files}
    target = Target(planned.plans, planned.dataset_json, planned.configuration, own)
    return replace(target, orientation=_common_orientation(list(own)[:20], target.images.reader))


def own_scans(raw_dataset_folder: str, dataset_json: dict[str, Any]) -> list[Scan]:
    """Return the images that nnU-Net trains on, found as nnU-Net finds them; empty without the folder."""
    root = os.path.abspath(raw_dataset_folder)
    files: dict[str, list[str]] = defaultdict(list)
    if "dataset" in dataset_json:
        for case, entry in dataset_json["dataset"].items():
            files[case] = [os.path.join(root, os.path.expandvars(image)) for image in entry["images"]]
    else:
        folder = os.path.join(root, "imagesTr")
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            if match := re.fullmatch(rf"(.+)_\d{{4}}{re.escape(dataset_json['file_ending'])}", name):
                files[match[1]].append(os.path.join(folder, name))
    return [Scan(case, tuple(of_case), "plan", own=True) for case, of_case in files.items()]


def reader_of(scans: Sequence[Scan], dataset_json: dict[str, Any]) -> type[BaseReaderWriter]:
    """Return nnU-Net's reader for the first readable image, or raise `UserError` if no image is readable."""
    for scan in scans:
        with contextlib.suppress(RuntimeError), contextlib.redirect_stderr(io.StringIO()):  # nnU-Net prints tracebacks
            return determine_reader_writer_from_dataset_json(dataset_json, scan.files[0], verbose=False)
    raise UserError(
        f"none of the {len(scans)} images can be read, the first is {scans[0].files[0]}; expected images of the "
        f"file_ending in dataset.json, {dataset_json['file_ending']}, for one of nnU-Net's readers"
    )


def left_over(folder: str, file_ending: str) -> list[SetAside]:
    """Return a folder's images that nnU-Net does not see: with another ending, or without a channel's number."""
    found = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if name.startswith(".") or not os.path.isfile(path):
            continue
        if name.endswith(file_ending):
            if not re.search(rf"_\d{{4}}{re.escape(file_ending)}$", name):
                expected = f"{name.removesuffix(file_ending)}_0000{file_ending}"
                found.append(SetAside(path, f"no channel's number in its name; expected {expected}"))
        elif name.lower().endswith(IMAGE_ENDINGS) or dicom.is_dicom(path):
            found.append(SetAside(path, f"another ending than the dataset's {file_ending}; convert it to that format"))
    return found


def misnumbered(scan: Scan, images: ImageFormat) -> str:
    """Describe the channels of a scan with nnU-Net's names if they differ from the dataset's; else empty."""
    found = [re.search(r"_(\d{4})$", file[: -len(images.file_ending)]) for file in scan.files]
    numbers = [match[1] for match in found if match]
    expected = [f"{channel:04d}" for channel in range(images.num_channels)]
    if len(numbers) < len(scan.files) or numbers == expected or numbers == ["0000"]:  # one file may have all channels
        return ""
    return f"channels {', '.join(numbers)}; expected {', '.join(expected)}"


def _common_orientation(files: Iterable[str], reader: type[BaseReaderWriter]) -> str | None:
    """Return the orientation of most of a dataset's own images after reading; None if it is unknown."""
    if issubclass(reader, (NibabelIOWithReorient, SimpleITKIOWithReorient)):
        return "RAS"
    seen: Counter[str] = Counter()
    for file in files:
        with contextlib.suppress(Unusable):  # nnU-Net reports damaged images of the dataset
            header = header_of(file)
            if len(header.GetDirection()) >= 9:
                matrix = np.reshape(header.GetDirection(), (header.GetDimension(),) * 2)[:3, :3]
                seen[sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(matrix.ravel().tolist())] += 1
    return seen.most_common(1)[0][0] if seen else None


# ------------------------------------------------------------------------------------------------------------ finding


def find_scans(folder: str, target: Target, map_: Callable[..., Iterable[Any]] = map) -> Found:
    """Search a folder and everything below it, except hidden files and nnU-Net's folders of labels.

    Args:
        folder: any folder, with files of any name.
        target: the plan that the scans are for. It sets the number of channels and the file types.
        map_: pass `Executor.map` to read DICOM headers (1 ms each) in parallel.
    """
    folder, images, found = os.path.abspath(folder), target.images, Found()
    endings = _endings(images)
    dicom_files: list[str] = []
    refused: dict[str, list[str]] = defaultdict(list)  # ending -> images that the dataset does not take
    for directory, names in _walk(folder, found):
        volumes: dict[str, dict[str, str]] = defaultdict(dict)  # ending -> stem -> path
        for name in names:
            path = os.path.join(directory, name)
            ending = max((e for e in endings if name.lower().endswith(e)), key=len, default=None)
            other = max((e for e in IMAGE_ENDINGS if name.lower().endswith(e)), key=len, default=None)
            if ending is not None:
                volumes[ending][name[: -len(ending)]] = path
            elif dicom.is_dicom(path):
                (refused["DICOM"] if images.is_2d else dicom_files).append(path)
            elif other is not None:
                refused[other].append(path)
            else:
                found.ignored[os.path.splitext(name)[1].lower() or "no ending"] += 1
        for ending, stems in volumes.items():
            _group_channels(folder, directory, stems, _how(ending, images), target, found)
    for kind, paths in refused.items():
        found.ignored[kind] += len(paths)
        found.notes.append(
            f"{len(paths)} {kind} files, such as {paths[0]}, are left out: the dataset takes {images.wanted}"
        )
    _group_series(folder, list(map_(dicom.read_frames, dicom_files)), target, found)
    found.scans.sort(key=lambda scan: scan.name)
    return found


def _endings(images: ImageFormat) -> tuple[str, ...]:
    if images.is_2d:
        return tuple(images.reader.supported_file_endings)
    own = images.reader.supported_file_endings if issubclass(images.reader, Tiff3DIO) else ()
    return (images.file_ending, *own, *VOLUME_ENDINGS)


def _how(ending: str, images: ImageFormat) -> str:
    by_plan = (images.file_ending, *(images.reader.supported_file_endings if ending not in VOLUME_ENDINGS else ()))
    return "plan" if ending in by_plan else "itk"


def _walk(folder: str, found: Found) -> Iterator[tuple[str, list[str]]]:
    visited = set()  # links are followed, because people link to their data, but never in a circle

    def unreadable(error: OSError) -> None:
        found.set_aside.append(SetAside(str(error.filename), f"a folder that may not be read ({error.strerror})"))

    for directory, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(directory)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        labels = [name for name in folders if _LABELS_FOLDER.fullmatch(name)]
        found.set_aside += [SetAside(os.path.join(directory, name), "a folder of labels", bad=False) for name in labels]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in labels)
        yield directory, sorted(name for name in names if not name.startswith("."))


def _group_channels(folder: str, directory: str, stems: dict[str, str], how: str, target: Target, found: Found) -> None:
    """Turn the volumes of one directory and one file type (stem -> path) into scans."""
    images, count = target.images, target.images.num_channels
    channels: dict[str, dict[int, str]] = defaultdict(dict)
    arbitrary: list[str] = []
    numbered, namesakes = [], []
    for stem in stems:
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        # In a dataset of one channel, scan_0001 is the second scan and not a second channel.
        if match and (count > 1 or match[2] == "0000"):
            channels[match[1]][int(match[2])] = stem
        else:
            arbitrary.append(stem)
            if match and f"{match[1]}_0000" in stems:
                numbered.append(stems[stem])
    colour = how == "plan" and images.is_2d and count > 1
    for case, by_channel in channels.items():
        files = tuple(stems[by_channel[c]] for c in sorted(by_channel))
        missing = sorted(set(range(count)) - set(by_channel))
        surplus = sorted(set(by_channel) - set(range(count)))
        if colour and set(by_channel) == {0}:
            missing = []  # the channels are the colours of one file
        if missing or surplus:
            reason = f"channel {missing[0]:04d} is missing" if missing else f"channel {surplus[0]:04d} is one too many"
            found.set_aside.append(SetAside(files[0], f"{reason}: the dataset has {count} channels"))
            continue
        own = case in target.own_images.values()
        if own:
            namesakes.append(files[0])
        plain = how == "plan" and directory == folder and not own
        name = _case_name(folder, os.path.join(directory, case), keep=plain)
        found.scans.append(Scan(name, files, how, folder=folder))
    for stem in arbitrary:
        path = stems[stem]
        if count > 1 and not colour:
            found.set_aside.append(SetAside(path, _needs_channels(images)))
        else:
            name = _case_name(folder, path, stem=os.path.join(directory, stem))
            found.scans.append(Scan(name, (path,), how, folder=folder))
    if numbered:
        found.notes.append(
            f"{_such_as(numbered)} numbered like further channels; the dataset has one channel, so each file is taken "
            f"for a scan of its own"
        )
    if namesakes:
        found.notes.append(
            f"{_such_as(namesakes)} named like labelled cases of the dataset; if they show the same people, scores on "
            f"validation cases will be too good"
        )


def _such_as(paths: Sequence[str]) -> str:
    return f"{paths[0]} and {len(paths) - 1} more files are" if len(paths) > 1 else f"{paths[0]} is"


def _needs_channels(images: ImageFormat) -> str:
    count = images.num_channels
    return f"the dataset has {count} channels: name the files CASE_0000 to CASE_{count - 1:04d}{images.file_ending}"


def _case_name(folder: str, path: str, stem: str | None = None, keep: bool = False) -> str:
    """Make a name from the path below the folder that is safe in any file system and the same in every run.

    The hash distinguishes names that become equal when letters are replaced. A plain nnU-Net name stays as it is.
    """
    readable = os.path.relpath(stem or path, folder).replace(os.sep, "__")
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", readable).strip("_")[-80:]
    if keep and safe == readable and not safe.endswith("_seg"):  # X_seg.b2nd is nnU-Net's name for labels
        return safe
    return hashed(safe or "scan", os.path.relpath(path, folder))


def hashed(name: str, key: str) -> str:
    """Append a short hash of a key to a name."""
    return f"{name}_{hashlib.sha1(key.encode(errors='surrogateescape')).hexdigest()[:8]}"


# -------------------------------------------------------------------------------------------------------------- DICOM

Stack = list[dicom.Frame]


def _group_series(folder: str, headers: list[Stack | SetAside], target: Target, found: Found) -> None:
    """Turn DICOM frames into scans: one patient, one series, one matrix, one direction."""
    series: dict[tuple[object, ...], list[Stack]] = defaultdict(list)  # a stack for each direction
    headers = _without_copies(headers, found)
    damaged = _set_aside_files([header for header in headers if isinstance(header, SetAside)], found)
    for header in headers:
        for frame in () if isinstance(header, SetAside) else header:
            one_file = frame.file if frame.multi else ""  # the frames of a file belong together
            stacks = series[(frame.patient, frame.series, frame.size, one_file)]
            alike = next((stack for stack in stacks if frame.multi or dicom.same_direction(stack[0], frame)), None)
            if alike is None:
                stacks.append(alike := [])
            alike.append(frame)
    for key, of_series in series.items():
        for stack in (stack for frames in of_series for stack in _stacks(frames)):
            directory = os.path.dirname(stack[0].file)
            files = dict.fromkeys(frame.file for frame in stack)
            try:
                if target.images.num_channels > 1:
                    raise Unusable(f"one DICOM series; {_needs_channels(target.images)}")
                ordered = dicom.ordered(stack, target.images.min_slices)
            except Unusable as error:
                label = f"{stack[0].description or stack[0].series or 'no series'}, {len(files)} files"
                where = stack[0].file if len(files) == 1 else f"{directory} ({label})"
                found.set_aside.append(SetAside(where, str(error), error.bad))
                continue
            readable = "" if os.path.samefile(directory, folder) else _case_name(folder, directory).rsplit("_", 1)[0]
            relative = [os.path.relpath(str(part), folder) if part else "" for part in (directory, key[-1])]
            direction = [round(x, 3) + 0.0 for x in stack[0].orientation]
            name = hashed(readable or "dicom", repr((*relative, *key[:-1], direction)))
            in_order = tuple(dict.fromkeys(frame.file for frame in ordered))
            found.scans.append(Scan(name, in_order, "dicom", folder=folder))
            if directory in damaged:
                found.notes.append(
                    f"{damaged[directory]} may be a part of the scan {directory}, which is used without it"
                )


def _set_aside_files(refused: list[SetAside], found: Found) -> dict[str, str]:
    """Report DICOM files that are not slices, once for each folder and reason. Return a damaged file of each folder."""
    groups: dict[tuple[str, str, bool], list[str]] = defaultdict(list)
    for one in refused:
        groups[os.path.dirname(one.where), one.reason, one.bad].append(one.where)
    for (_, reason, bad), files in groups.items():
        more = f" (and {len(files) - 1} more files of its folder)" if len(files) > 1 else ""
        found.set_aside.append(SetAside(files[0], reason + more, bad))
    return {directory: files[0] for (directory, _, bad), files in groups.items() if bad}


def _stacks(frames: Stack) -> list[Stack]:
    """Split a series by folder, unless all of its positions differ, as in one volume."""
    by_folder: dict[str, Stack] = defaultdict(list)
    for frame in frames:
        by_folder[os.path.dirname(frame.file)].append(frame)
    positions = {tuple(np.round(frame.position, 3)) for frame in frames}
    together = bool(frames[0].series) and len(positions) == len(frames)
    return [frames] if together else list(by_folder.values())


def _without_copies(headers: list[Stack | SetAside], found: Found) -> list[Stack | SetAside]:
    """Drop duplicate files, which have the same SOP instance, place and voxels."""
    first: dict[str, Stack] = {}
    kept: list[Stack | SetAside] = []
    copies = []
    for header in headers:
        if isinstance(header, SetAside) or not header[0].instance:
            kept.append(header)
            continue
        known = first.setdefault(header[0].instance, header)
        if known is header or not dicom.same_image(known, header):
            kept.append(header)
        else:
            copies.append(header[0].file)
    if copies:
        found.notes.append(f"{_such_as(copies)} there twice (the same SOP instance): counted once")
    return kept
