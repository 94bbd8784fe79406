"""Which files of any folder are one scan, and its array as the plan's own reader would return it.

Arrays are (C, Z, Y, X) as nnU-Net's readers return them, float32; spacings in mm in the same order.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from pcrl_nnunet.plans import PlannedConfiguration

VOLUME_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".gipl")
MAX_LABEL_VALUES = 8  # an image of so few different whole numbers is a segmentation
_TOMOGRAPHY = re.compile(rb"1\.2\.840\.10008\.5\.1\.4\.1\.1\.(?:2|2\.1|4|4\.1|20|128|130)\x00?\x02\x00")


@dataclass(frozen=True)
class Target:
    """What the scans are preprocessed for: one configuration of one plan.

    Attributes:
        own_images: path -> case name of the dataset's own raw images; empty where they cannot be found.
        orientation: three letters such as "RAS": scans that nnU-Net itself could not read are turned to it.
            None leaves them as stored.
    """

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    own_images: dict[str, str] = field(default_factory=dict)
    orientation: str | None = None

    @property
    def plans_manager(self) -> PlansManager:
        return PlansManager(self.plans)

    @property
    def configuration_manager(self) -> ConfigurationManager:
        return self.plans_manager.get_configuration(self.configuration)

    @property
    def reader(self) -> type[BaseReaderWriter]:
        return self.plans_manager.image_reader_writer_class

    @property
    def file_ending(self) -> str:
        return self.dataset_json["file_ending"].lower()

    @property
    def num_channels(self) -> int:
        names = self.dataset_json.get("channel_names") or self.dataset_json["modality"]  # "modality" as in nnU-Net v1
        return len(names)

    @property
    def min_slices(self) -> int:
        """A scan with fewer voxels along an axis is a localiser, unless the dataset itself is that thin (2D)."""
        return min(3, *(int(n) for n in self.plans["original_median_shape_after_transp"]))

    def settings(self) -> dict[str, Any]:
        """All that decides the preprocessed voxels; cases made with other settings must not lie in one folder."""
        configuration = self.configuration_manager.configuration
        keys = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data",
                "resampling_fn_data_kwargs")  # fmt: skip
        settings = {key: configuration[key] for key in keys}
        settings["transpose_forward"] = self.plans["transpose_forward"]
        settings["image_reader_writer"] = self.plans["image_reader_writer"]
        settings["intensities"] = self.plans_manager.foreground_intensity_properties_per_channel
        return json.loads(json.dumps(settings))


def make_target(planned: PlannedConfiguration, raw_dataset_folder: str) -> Target:
    """Look the dataset's own images up, for their orientation and to recognise copies; without them goes, too."""
    own = {file: scan.name for scan in own_scans(raw_dataset_folder, planned.dataset_json) for file in scan.files}
    target = Target(planned.plans, planned.dataset_json, planned.configuration, own)
    return replace(target, orientation=_common_orientation(list(own)[:20], target.reader))


def own_scans(raw_dataset_folder: str, dataset_json: dict[str, Any]) -> list[Scan]:
    """The images that nnU-Net trains on, as nnU-Net looks for them; none where the folder is not there."""
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
    return [Scan(case, tuple(of_case), "plan", named=True, own=True) for case, of_case in files.items()]


def _common_orientation(files: Iterable[str], reader: type[BaseReaderWriter]) -> str | None:
    """The orientation of most of a dataset's own images as their reader returns them; None if that cannot be told."""
    if issubclass(reader, (NibabelIOWithReorient, SimpleITKIOWithReorient)):
        return "RAS"
    seen: Counter[str] = Counter()
    header = sitk.ImageFileReader()
    for file in files:
        header.SetFileName(file)
        with contextlib.suppress(RuntimeError):  # a damaged image of the dataset is for nnU-Net to report
            header.ReadImageInformation()
            if len(header.GetDirection()) >= 9:
                matrix = np.reshape(header.GetDirection(), (header.GetDimension(),) * 2)[:3, :3]
                seen[sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(matrix.ravel().tolist())] += 1
    return seen.most_common(1)[0][0] if seen else None


@dataclass(frozen=True)
class Scan:
    """One scan that was found, not yet read.

    Attributes:
        name: of the case it becomes.
        files: absolute paths, one a channel or, for DICOM, the slices in order.
        how: "plan" for the plan's own reader, "itk" or "dicom" for SimpleITK.
        named: by nnU-Net's convention (case_0000): somebody called it an image of this dataset.
        own: of the dataset itself; its name is the case's.
    """

    name: str
    files: tuple[str, ...]
    how: str
    named: bool = False
    own: bool = False

    @property
    def sources(self) -> list[str]:
        """What to tell a person: the files, or the folder of a DICOM series."""
        return [os.path.dirname(self.files[0])] if self.how == "dicom" and len(self.files) > 1 else list(self.files)

    def stamp(self) -> dict[str, int]:
        """Changes when a file does; cheap enough for thousands of scans."""
        stats = [os.stat(file) for file in self.files]
        return {
            "files": len(stats),
            "bytes": sum(s.st_size for s in stats),
            "modified_ns": max(s.st_mtime_ns for s in stats),
        }


@dataclass(frozen=True)
class SetAside:
    """A scan that is not used.

    Attributes:
        bad: it should have been usable; otherwise it is intact, but nothing to learn from.
    """

    where: str
    reason: str
    bad: bool = True


class Unusable(Exception):
    """Raised while a scan is found, read or preprocessed; becomes a `SetAside`."""

    def __init__(self, reason: str, bad: bool = True) -> None:
        super().__init__(reason)
        self.bad = bad


@dataclass
class Found:
    """What a folder holds: scans, what was set aside unread, and how many other files there are an ending."""

    scans: list[Scan] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    numbered: list[str] = field(default_factory=list)  # taken for scans, might be further channels of one
    namesakes: list[str] = field(default_factory=list)  # nnU-Net names that own images of the dataset have, too


# ------------------------------------------------------------------------------------------------------------ finding


def find_scans(folder: str, target: Target, map_: Callable[..., Iterable[Any]] = map) -> Found:
    """Look through a folder and everything below it; hidden files and folders called labels... are left out.

    Args:
        folder: any folder; its files may be named in any way.
        target: what the scans are for; decides the number of channels and, in 2D, the file types.
        map_: `Executor.map` reads DICOM headers (1 ms each) in parallel.
    """
    folder = os.path.abspath(folder)
    found = Found()
    natural = issubclass(target.reader, NaturalImage2DIO)
    endings = tuple(target.reader.supported_file_endings) if natural else (target.file_ending, *VOLUME_ENDINGS)
    dicom_files: list[str] = []
    for directory, names in _walk(folder, found):
        volumes: dict[str, dict[str, str]] = defaultdict(dict)  # ending -> stem -> path
        for name in names:
            path = os.path.join(directory, name)
            ending = max((e for e in endings if name.lower().endswith(e)), key=len, default=None)
            if ending is not None:
                volumes[ending][name[: -len(ending)]] = path
            elif not natural and _is_dicom(path):
                dicom_files.append(path)
            else:
                found.ignored[os.path.splitext(name)[1].lower() or "no ending"] += 1
        for ending, stems in volumes.items():
            how = "plan" if natural or ending == target.file_ending else "itk"
            _group_channels(folder, directory, stems, how, target, found)
    _group_series(folder, list(map_(read_dicom_header, dicom_files)), target, found)
    found.scans.sort(key=lambda scan: scan.name)
    return found


def _walk(folder: str, found: Found) -> Iterator[tuple[str, list[str]]]:
    visited = set()  # links are followed, as people link to their data, but never in a circle

    def unreadable(error: OSError) -> None:
        found.set_aside.append(SetAside(str(error.filename), f"a folder that may not be read ({error.strerror})"))

    for directory, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        real = os.path.realpath(directory)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        for name in [f for f in folders if f.lower().startswith("labels")]:
            found.set_aside.append(SetAside(os.path.join(directory, name), "a folder of labels", bad=False))
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not f.lower().startswith("labels"))
        yield directory, sorted(name for name in names if not name.startswith("."))


def _is_dicom(path: str) -> bool:
    if path.lower().endswith((".dcm", ".ima")):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _group_channels(folder: str, directory: str, stems: dict[str, str], how: str, target: Target, found: Found) -> None:
    """Turn the volumes of one directory and one file type (stem -> path) into scans."""
    channels: dict[str, dict[int, str]] = defaultdict(dict)
    arbitrary: list[str] = []
    for stem in stems:
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        # A dataset of one channel: scan_0001 is the second of many scans rather than a second channel.
        if match and (target.num_channels > 1 or match[2] == "0000"):
            channels[match[1]][int(match[2])] = stem
        else:
            arbitrary.append(stem)
            if match and f"{match[1]}_0000" in stems:
                found.numbered.append(stems[stem])
    colour = how == "plan" and issubclass(target.reader, NaturalImage2DIO) and target.num_channels > 1
    for case, by_channel in channels.items():
        files = tuple(stems[by_channel[c]] for c in sorted(by_channel))
        missing = sorted(set(range(target.num_channels)) - set(by_channel))
        surplus = sorted(set(by_channel) - set(range(target.num_channels)))
        if colour and set(by_channel) == {0}:
            missing = []  # the channels are the colours of one file
        if missing or surplus:
            reason = f"channel {missing[0]:04d} is missing" if missing else f"channel {surplus[0]:04d} is one too many"
            found.set_aside.append(SetAside(files[0], f"{reason}: the dataset has {target.num_channels} channels"))
            continue
        own = case in target.own_images.values()
        if own:
            found.namesakes.append(files[0])
        plain = how == "plan" and directory == folder and not own
        name = _case_name(folder, os.path.join(directory, case), keep=plain)
        found.scans.append(Scan(name, files, how, named=True))
    for stem in arbitrary:
        path = stems[stem]
        if target.num_channels > 1 and not colour:
            found.set_aside.append(SetAside(path, _needs_channels(target)))
        else:
            found.scans.append(Scan(_case_name(folder, path, stem=os.path.join(directory, stem)), (path,), how))


def _needs_channels(target: Target) -> str:
    count = target.num_channels
    return f"the dataset has {count} channels: name the files CASE_0000 to CASE_{count - 1:04d}{target.file_ending}"


def _case_name(folder: str, path: str, stem: str | None = None, keep: bool = False) -> str:
    """A name from the path below the folder: safe in any file system, and the same in every run.

    The hash tells names apart that become equal by replacing letters; a plain nnU-Net name is kept as it is.
    """
    readable = os.path.relpath(stem or path, folder).replace(os.sep, "__")
    safe = re.sub(r"[^A-Za-z0-9_-]+", "_", readable).strip("_")[-80:]
    if keep and safe == readable and not safe.endswith("_seg"):  # X_seg.b2nd is nnU-Net's name for labels
        return safe
    return hashed(safe or "scan", os.path.relpath(path, folder))


def hashed(name: str, key: str) -> str:
    return f"{name}_{hashlib.sha1(key.encode(errors='surrogateescape')).hexdigest()[:8]}"


# -------------------------------------------------------------------------------------------------------------- DICOM


@dataclass(frozen=True)
class _Slice:
    """The header of one DICOM file. position (3,) in mm; orientation (6,): unit vectors of rows and columns."""

    file: str
    series: str
    description: str
    size: tuple[int, ...]
    colour: bool
    measured: bool  # says how large its pixels are
    position: tuple[float, ...]
    orientation: tuple[float, ...]


def read_dicom_header(file: str) -> _Slice | SetAside:
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        try:
            with open(file, "rb") as stream:
                is_scan = bool(_TOMOGRAPHY.search(stream.read(1024)))
        except OSError as error:
            return SetAside(file, short_reason(error))
        if is_scan:
            return SetAside(file, "a DICOM image that cannot be read: it is damaged or ends too early")
        return SetAside(file, "DICOM, but not an image (a report, for instance)", bad=False)

    def numbers(tag: str) -> tuple[float, ...]:
        if not reader.HasMetaDataKey(tag):
            return ()
        with contextlib.suppress(ValueError):
            return tuple(float(x) for x in reader.GetMetaData(tag).split("\\"))
        return ()

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""

    size = tuple(reader.GetSize())
    return _Slice(
        file=file,
        series=text("0020|000e"),
        description=text("0008|103e"),
        size=size,
        colour=reader.GetNumberOfComponents() > 1,
        measured=any(reader.HasMetaDataKey(tag) for tag in ("0028|0030", "0018|1164")) or (size[2:] > (1,)),
        position=numbers("0020|0032"),
        orientation=numbers("0020|0037"),
    )


def _group_series(folder: str, headers: list[_Slice | SetAside], target: Target, found: Found) -> None:
    """Stacks of slices: one directory, one series, one matrix, one direction."""
    stacks: dict[tuple[object, ...], list[_Slice]] = defaultdict(list)
    for header in headers:
        if isinstance(header, SetAside):
            found.set_aside.append(header)
            continue
        direction = tuple(round(x, 2) + 0.0 for x in header.orientation)
        one_file = header.file if header.size[2:] > (1,) else ""  # all slices in one file
        stacks[(os.path.dirname(header.file), header.series, header.size, direction, one_file)].append(header)
    for key, stack in stacks.items():
        directory = os.path.dirname(stack[0].file)
        label = f"{stack[0].description or stack[0].series or 'no series'}, {len(stack)} files"
        where = stack[0].file if len(stack) == 1 else f"{directory} ({label})"
        try:
            files = _ordered(stack, target)
        except Unusable as error:
            found.set_aside.append(SetAside(where, str(error), error.bad))
            continue
        name = _case_name(folder, directory)
        readable = "" if os.path.samefile(directory, folder) else name.rsplit("_", 1)[0]
        relative = (os.path.relpath(str(part), folder) if part else "" for part in (key[0], key[-1]))
        found.scans.append(Scan(hashed(readable or "dicom", repr((*relative, *key[1:-1]))), files, "dicom"))


def _ordered(stack: list[_Slice], target: Target) -> tuple[str, ...]:
    """The files of one stack along its normal.

    Raises:
        Unusable: when the slices are not one evenly sampled grey-scale volume.
    """
    first = stack[0]
    if target.num_channels > 1:
        raise Unusable(f"one DICOM series; {_needs_channels(target)}")
    if first.colour:
        raise Unusable("a colour image", bad=False)
    if not first.measured:
        raise Unusable("no pixel size in its DICOM header")
    if len(first.size) > 2 and first.size[2] > 1:
        return (first.file,)
    if len(stack) < target.min_slices:
        raise Unusable("fewer than 3 slices (a localiser?)", bad=False)
    if len(stack) == 1:
        return (first.file,)
    if any(len(s.position) != 3 or len(s.orientation) != 6 for s in stack):
        raise Unusable("no slice positions in its DICOM headers")
    normal = np.cross(first.orientation[:3], first.orientation[3:])
    depth = np.array([np.dot(s.position, normal) for s in stack])  # mm
    order = np.argsort(depth, kind="stable")
    steps = np.diff(depth[order])
    if steps.min() < 1e-3:
        raise Unusable("several images at one slice position (a time series?)", bad=False)
    if steps.max() - steps.min() > 0.1 * np.median(steps) + 0.01:
        raise Unusable(f"uneven slice distances, {steps.min():.3g} to {steps.max():.3g} mm: is a slice missing?")
    return tuple(stack[i].file for i in order)


# ------------------------------------------------------------------------------------------------------------ reading


def read_scan(scan: Scan, target: Target) -> tuple[np.ndarray, dict[str, Any]]:
    """Read a scan in the orientation and axis order that the plan's own reader gives.

    Returns:
        (C, Z, Y, X) float32 and properties with "spacing" in mm, in the array's order.

    Raises:
        Unusable: for an image that nothing can be learned from; others for files that cannot be read.
    """
    for file in scan.files:
        if file.lower().endswith((".nii", ".nii.gz")):
            check_nifti(file)
    if scan.how == "plan":
        data, properties = target.reader().read_images(list(scan.files))
    else:
        groups = [scan.files] if scan.how == "dicom" else [(file,) for file in scan.files]
        images = [_read_itk(files, scan.how == "dicom", target.orientation) for files in groups]
        first = images[0]
        if any(i.GetSize() != first.GetSize() or not np.allclose(i.GetSpacing(), first.GetSpacing()) for i in images):
            raise Unusable("its channels differ in size or spacing")
        data = np.stack([sitk.GetArrayFromImage(image) for image in images]).astype(np.float32, copy=False)
        properties = {"spacing": [float(s) for s in first.GetSpacing()[::-1]]}
    _check(data, properties["spacing"], scan, target)
    return data, properties


def _read_itk(files: tuple[str, ...], dicom: bool, orientation: str | None) -> sitk.Image:
    if len(files) > 1:
        series = sitk.ImageSeriesReader()
        series.SetFileNames(files)
        series.SetOutputPixelType(sitk.sitkFloat32)  # the rescaling of a later slice may need more than the first's
        image = series.Execute()
    else:
        reader = sitk.ImageFileReader()
        if dicom:
            reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(files[0])
        reader.ReadImageInformation()
        if reader.GetNumberOfComponents() > 1:
            raise Unusable("a colour or vector image", bad=False)
        image = reader.Execute()
    if image.GetDimension() == 4:
        if image.GetSize()[3] > 1:
            raise Unusable(f"a series of {image.GetSize()[3]} volumes (4D)", bad=False)
        image = image[..., 0]
    if image.GetDimension() == 2:
        return sitk.JoinSeries(image, 0.0, 999.0 * max(image.GetSpacing()))  # as nnU-Net does: thick, never resampled
    return sitk.DICOMOrient(image, orientation) if orientation else image


def check_nifti(file: str) -> None:
    """SimpleITK fills what is missing at the end of a NIfTI file with zeros, turns NaN into 0, and says nothing."""
    with open(file, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    broken = 0
    with gzip.open(file) if packed else open(file, "rb") as stream:
        start = stream.read(4)
        lengths = {int.from_bytes(start, "little"), int.from_bytes(start, "big")}
        if not lengths & {348, 540}:
            raise Unusable("not a NIfTI file, whatever its name says, or damaged")
        stream.seek(0)
        header_class = nibabel.Nifti1Header if 348 in lengths else nibabel.Nifti2Header
        header = header_class.from_fileobj(stream, check=False)
        dtype = header.get_data_dtype()
        size, needed = 0, int(np.prod(header.get_data_shape())) * dtype.itemsize  # bytes of voxels
        stream.seek(header.get_data_offset())
        while chunk := stream.read(dtype.itemsize << 20):  # to the end: this verifies the checksum, too
            size += len(chunk)
            if dtype.kind == "f":
                values = np.frombuffer(chunk, dtype, len(chunk) // dtype.itemsize)
                broken += len(values) - np.count_nonzero(np.isfinite(values))
    if size < needed:
        raise Unusable(f"the file ends too early, after {size} of {needed} bytes of voxels")
    if broken:
        raise Unusable(f"{broken} voxels are NaN or infinite")


def _check(data: np.ndarray, spacing: Iterable[float], scan: Scan, target: Target) -> None:
    """Refuse what preprocessing would let through. data (C, Z, Y, X)."""
    if data.shape[0] != target.num_channels:
        more = data.shape[0] > target.num_channels
        raise Unusable(f"{data.shape[0]} channels, the dataset has {target.num_channels}", bad=not more)
    if min(data.shape[1:]) < target.min_slices:
        raise Unusable(f"only {min(data.shape[1:])} slices (a localiser?)", bad=False)
    if not all(np.isfinite(s) and s > 0 for s in spacing):
        raise Unusable(f"its voxel size is {tuple(spacing)} mm")
    broken = data.size - np.count_nonzero(np.isfinite(data))
    if broken:
        raise Unusable(f"{broken} voxels are NaN or infinite")
    for channel, image in enumerate(data):
        if image.min() == image.max():
            which = f"channel {channel:04d}: " if data.shape[0] > 1 else ""
            raise Unusable(f"{which}all voxels are {image.flat[0]:g}: the image is empty")
    if not scan.named:
        values = np.unique(data.reshape(-1)[:: 1 + data.size // 500_000])
        if len(values) <= MAX_LABEL_VALUES and np.array_equal(values, np.round(values)):
            raise Unusable(f"only {len(values)} different values: a segmentation?", bad=False)


def short_reason(error: Exception, shouted: str = "") -> str:
    """What is wrong with a file, in one line.

    Args:
        shouted: what was printed before; some of nnU-Net's readers print the reason and raise an empty error.
    """
    text = str(error)
    if isinstance(error, Unusable):
        return text
    if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
        return "the compressed data is damaged or ends too early"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "Unable to determine ImageIO reader" in text:
        return "not an image of the type that its name says, or damaged"
    if re.search("cannot be read|Error reading", text):  # ITK's words for its more common formats
        return "damaged or ends too early"
    text = re.sub(r"^.*?(?:ITK ERROR|sitk::ERROR): (?:\w+\(0x[0-9a-f]+\): )?", "", text, flags=re.DOTALL)
    lines = (text.strip() or shouted.strip()).splitlines()
    return lines[0] if lines else type(error).__name__
