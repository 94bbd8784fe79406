"""Volumes from DICOM files. Files that cannot form a volume by their headers are refused.

A frame is one image of a file. A series of single-frame files and one multi-frame file go through the same checks.
pydicom reads headers, `dicom_voxels` reads voxels. Positions are mm in the patient's coordinates (LPS).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID
from scipy.ndimage import shift

from pcrl_nnunet.ingest.dicom_voxels import stored_values
from pcrl_nnunet.ingest.scans import SetAside, Unusable

_STORAGE = "1.2.840.10008.5.1.4.1.1."
# The SOP classes whose frames are slices of a volume: CT, MR, nuclear medicine, PET.
VOLUMES = frozenset(_STORAGE + ending for ending in ("2", "2.1", "2.2", "4", "4.1", "4.4", "20", "128", "128.1", "130"))
MODALITIES = frozenset({"CT", "MR", "NM", "PT", ""})  # modalities of these SOP classes
NO_SLICES = {  # by ImageType
    **dict.fromkeys(("LOCALIZER", "SCOUT", "TOPOGRAM"), "a localiser"),
    "SCREEN SAVE": "a secondary capture",
}
IN_UNITS = frozenset({"CT", "PT"})  # stored values become HU or Bq/ml; MONOCHROME1 concerns only their display
UNEVEN = 0.1  # share of the median distance of slices
STRAIGHT = 0.1  # pixels of sideways drift that rounded positions explain
TILT = 1.0  # degrees
SKEW = 0.01  # cosine between rows and columns
ONE_SLICE = 999.0  # times the pixel size: nnU-Net's thickness of a single slice
NEEDED = ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")


@dataclass(frozen=True)
class Frame:
    """One image of a DICOM file. position (3,) mm; orientation (6,): unit vectors along rows and columns."""

    file: str
    number: int  # index in its file
    instance: str  # SOP instance UID
    patient: str
    series: str
    description: str
    modality: str
    size: tuple[int, int]  # rows, columns
    pixel_size: tuple[float, ...]  # mm, between rows and between columns
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    slope: float
    intercept: float
    inverted: bool  # MONOCHROME1: small values are bright
    tilt: float  # degrees, of the gantry
    context: tuple[str, ...]  # stack, time point and echo, if the header has them
    multi: bool  # one of several frames of its file


# ------------------------------------------------------------------------------------------------------------ headers


def is_dicom(path: str) -> bool:
    """Tell DICOM files by their ending or their first bytes."""
    if path.lower().endswith((".dcm", ".ima")):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_frames(file: str) -> list[Frame] | SetAside:
    """Read a file's header without voxels, and return its frames or the reason why they are not slices."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns about odd values; the important ones are checked below
            header = pydicom.dcmread(file, stop_before_pixels=True, force=file.lower().endswith((".dcm", ".ima")))
            return _no_volume(header, file) or list(_frames(header, file))
    except Unusable as error:
        return SetAside(file, str(error), error.bad)
    except OSError as error:
        return SetAside(file, error.strerror or str(error))
    except InvalidDicomError:
        return SetAside(file, "not a DICOM file, whatever its name says, or damaged")
    except Exception as error:  # a damaged header raises any error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return SetAside(file, f"a DICOM header that cannot be read ({reason})")


def _no_volume(header: Dataset, file: str) -> SetAside | None:
    """Refuse files that are not slices of a volume, by SOP class, modality and image type."""
    sop_class, modality = str(header.get("SOPClassUID", "")), str(header.get("Modality", ""))
    name = UID(sop_class).name.removesuffix(" Storage") if sop_class else "an unknown kind"
    if "Rows" not in header or "Columns" not in header:
        if sop_class in VOLUMES:
            return SetAside(file, "a DICOM image that cannot be read: it is damaged or ends too early")
        if not sop_class:
            return SetAside(file, "not a DICOM file, whatever its name says, or damaged")
        return SetAside(file, f"DICOM, but not an image ({name})", bad=False)
    if sop_class not in VOLUMES or modality not in MODALITIES:
        return SetAside(
            file, f"a DICOM image that is no volume ({name}, modality {modality or 'not stated'})", bad=False
        )
    kinds = {str(kind).upper() for kind in _several(header.get("ImageType"))}
    for groups in _functional_groups(header):
        for sequence in ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence"):
            kinds |= {
                str(kind).upper() for item in groups.get(sequence, ()) for kind in _several(item.get("FrameType"))
            }
    for kind, said in NO_SLICES.items():
        if kind in kinds:
            return SetAside(file, f"{said} (its ImageType says {kind})", bad=False)
    if header.get("SamplesPerPixel", 1) != 1 or header.get("PhotometricInterpretation") == "PALETTE COLOR":
        return SetAside(file, "a colour image", bad=False)
    return None


def _functional_groups(header: Dataset) -> list[Dataset]:
    """Return the shared functional groups and the groups of each frame."""
    return [*header.get("SharedFunctionalGroupsSequence", ()), *header.get("PerFrameFunctionalGroupsSequence", ())]


def _frames(header: Dataset, file: str) -> Iterator[Frame]:
    missing = [name for name in NEEDED if name not in header]
    if missing:
        raise Unusable(f"no {', '.join(missing)} in its DICOM header")
    if header.HighBit != header.BitsStored - 1:
        raise Unusable(f"{header.BitsStored} bits up to bit {header.HighBit}; expected the highest to be the last one")
    number = int(header.get("NumberOfFrames") or 1)
    shared = next(iter(header.get("SharedFunctionalGroupsSequence", ())), Dataset())
    of_frames = list(header.get("PerFrameFunctionalGroupsSequence", ()))
    if number > 1 and len(of_frames) not in (0, number):
        raise Unusable(f"{number} frames, and its header describes {len(of_frames)}")
    for index in range(number):
        groups = [of_frames[index]] if of_frames else []
        places = [item for group in (*groups, shared) for sequence in _SEQUENCES for item in group.get(sequence, ())]
        places.append(header if number == 1 else _without_place(header))
        if any(place.get("ModalityLUTSequence") for place in (*places, header)):
            raise Unusable("its intensities are given by a look-up table; expected a slope and an intercept")
        slope, intercept = _first(places, "RescaleSlope") or (1.0,), _first(places, "RescaleIntercept") or (0.0,)
        if not np.isfinite([*slope, *intercept]).all() or slope[0] == 0:
            raise Unusable(f"its header says that intensities are {slope[0]:g} x + {intercept[0]:g}")
        yield Frame(
            file=file,
            number=index,
            instance=str(header.get("SOPInstanceUID", "")),
            patient=str(header.get("PatientID", "")),
            series=str(header.get("SeriesInstanceUID", "")),
            description=str(header.get("SeriesDescription", "")),
            modality=str(header.get("Modality", "")),
            size=(int(header.Rows), int(header.Columns)),
            pixel_size=_first(places, "PixelSpacing") or _first(places, "ImagerPixelSpacing"),
            position=_first(places, "ImagePositionPatient"),
            orientation=_first(places, "ImageOrientationPatient"),
            slope=slope[0],
            intercept=intercept[0],
            inverted=header.get("PhotometricInterpretation") == "MONOCHROME1",
            tilt=(_first([header], "GantryDetectorTilt") or (0.0,))[0],
            context=_context(places),
            multi=number > 1,
        )


def _context(places: Sequence[Dataset]) -> tuple[str, ...]:
    """Return stack, time point and echo, with the echo time rounded to a tenth of a millisecond."""
    found = {key: place.get(key) for place in reversed(places) for key in _CONTEXT if place.get(key) is not None}
    return tuple(f"{value:.1f}" if isinstance(value, float) else str(value) for value in found.values())


_SEQUENCES = (  # functional groups, which hold a multi-frame file's elements that a single frame has at the top
    *("PixelMeasuresSequence", "PlanePositionSequence", "PlaneOrientationSequence"),
    *("PixelValueTransformationSequence", "FrameContentSequence", "MREchoSequence"),
)
_CONTEXT = ("StackID", "TemporalPositionIndex", "TemporalPositionIdentifier", "EffectiveEchoTime", "EchoTime")


def _without_place(header: Dataset) -> Dataset:
    """Return the top level of a multi-frame header without positions, which differ between frames."""
    return Dataset({key: value for key, value in header.items() if key != 0x00200032})


def _first(places: Sequence[Dataset], name: str) -> tuple[float, ...]:
    """Return the numbers of the first place that has this element; empty if no place has it.

    Raises:
        Unusable: the element exists but is not a number.
    """
    for place in places:
        if name in place:
            try:
                numbers = tuple(float(number) for number in _several(place.get(name)))
            except (TypeError, ValueError) as error:
                raise Unusable(f"{name} in its DICOM header is no number ({error})") from None
            if numbers:
                return numbers
    return ()


def _several(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, (str, int, float)) else list(value)


# ------------------------------------------------------------------------------------------------------------- stacks


def same_image(one: Sequence[Frame], other: Sequence[Frame]) -> bool:
    """Tell whether two files of one SOP instance hold the same image: anonymised files may share a UID."""
    if list(map(_place, one)) != list(map(_place, other)):
        return False
    try:
        return np.array_equal(stored_values(one[0].file)[0], stored_values(other[0].file)[0])
    except Unusable:  # a damaged copy is reported when it is read
        return False


def same_direction(one: Frame, other: Frame) -> bool:
    """Tell whether the directions of two images agree, up to rounding, as in slices of one stack."""
    if len(one.orientation) != len(other.orientation):
        return False
    return not one.orientation or bool(np.abs(np.subtract(one.orientation, other.orientation)).max() < SKEW)


def _place(frame: Frame) -> tuple[Any, ...]:
    return (frame.size, frame.position, frame.orientation, frame.pixel_size, frame.slope, frame.intercept)


def ordered(frames: Sequence[Frame], min_slices: int) -> list[Frame]:
    """Sort the frames of one stack along its normal.

    Raises:
        Unusable: the frames do not form an evenly sampled grey-scale volume.
    """
    first = frames[0]
    if not all(len(f.pixel_size) == 2 and np.isfinite(f.pixel_size).all() and min(f.pixel_size) > 0 for f in frames):
        raise Unusable("no pixel size in its DICOM header")
    if len(frames) < min_slices:
        raise Unusable(f"fewer than {min_slices} slices (a localiser?)", bad=False)
    if any(frame.inverted and frame.modality in IN_UNITS for frame in frames):
        raise Unusable(f"MONOCHROME1 in {first.modality}: whether its values are inverted cannot be told")
    if len({frame.context for frame in frames}) > 1:
        raise Unusable("images of several stacks, time points or echoes", bad=False)
    if len(frames) == 1:
        return [first]
    if any(len(f.position) != 3 or len(f.orientation) != 6 for f in frames):
        raise Unusable("no slice positions in its DICOM header")
    if not np.isfinite([(*f.position, *f.orientation) for f in frames]).all():
        raise Unusable("slice positions that are not finite in its DICOM header")
    rows, columns = (np.array(first.orientation[part]) for part in (slice(3), slice(3, 6)))
    if abs(rows @ columns) > SKEW or not np.allclose([rows @ rows, columns @ columns], 1, atol=SKEW):
        raise Unusable(
            f"directions {list(first.orientation)} in its DICOM header; expected two unit vectors at right angles"
        )
    if len({frame.inverted for frame in frames}) > 1:
        raise Unusable("MONOCHROME1 in some of its images and MONOCHROME2 in others")
    for what, unit, values in (("directions", "", "orientation"), ("pixel sizes", " mm", "pixel_size")):
        different = np.ptp([getattr(f, values) for f in frames], axis=0).max()
        if different > 1e-2:
            raise Unusable(f"images of several {what}, which differ by {different:.3g}{unit}")
    depth = np.array([np.dot(f.position, _normal(first)) for f in frames])  # mm
    order = np.argsort(depth, kind="stable")
    steps = np.diff(depth[order])
    if steps.min() < 1e-3:
        raise Unusable("several images at one slice position (a time series, echoes or stacks?)", bad=False)
    if steps.max() - steps.min() > UNEVEN * np.median(steps) + 0.01:
        raise Unusable(f"uneven slice distances, {steps.min():.3g} to {steps.max():.3g} mm: is a slice missing?")
    in_order = [frames[i] for i in order]
    drift = _drift(in_order)
    far, line = np.abs(drift).max(), np.linspace(0, 1, len(drift))[:, None] * drift[-1]
    if np.abs(drift - line).max() > 1 or far > 2 * max(first.size):
        raise Unusable(f"slices that lie up to {far:.3g} pixels beside the first, and not on a line with it")
    upright = np.abs(_normal(first)).max() > np.cos(np.deg2rad(TILT)) and np.abs(drift).max() < STRAIGHT
    if upright and any(abs(f.tilt) > TILT for f in frames):
        raise Unusable(f"a gantry tilt of {first.tilt:g} degrees, and positions without a tilt: one of them is wrong")
    return in_order


def _normal(frame: Frame) -> np.ndarray:
    normal = np.cross(frame.orientation[:3], frame.orientation[3:])
    return np.asarray(normal / np.linalg.norm(normal))


def _drift(frames: Sequence[Frame]) -> np.ndarray:
    """Return (N, 2): each frame's distance from the first frame's normal, in pixels along rows and columns."""
    first = frames[0]
    moved = np.array([frame.position for frame in frames]) - first.position
    along_rows, along_columns = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    return np.stack([moved @ along_columns / first.pixel_size[0], moved @ along_rows / first.pixel_size[1]], axis=1)


# ------------------------------------------------------------------------------------------------------------- voxels


def read_volume(files: Sequence[str], min_slices: int) -> tuple[sitk.Image, list[str]]:
    """Read the frames of one stack, from one file or several, as a volume with a straight grid.

    Slices that drift sideways (a gantry tilt) are shifted back by linear interpolation. Voxels that no slice covers get
    the smallest value.

    Returns:
        the volume in float32, and notes on the changes.

    Raises:
        Unusable: see `ordered`; or a file cannot be decoded.
    """
    frames: list[Frame] = []
    for file in files:
        found = read_frames(file)
        if isinstance(found, SetAside):
            raise Unusable(found.reason, found.bad)
        frames += found
    frames = ordered(frames, min_slices)
    volume, first, notes = _decoded(frames), frames[0], []
    in_plane, origin = np.array(first.pixel_size), np.array(first.position or (0, 0, 0))
    step = ONE_SLICE * in_plane.max()
    if len(frames) > 1:
        rows, columns, normal = np.array(first.orientation[:3]), np.array(first.orientation[3:]), _normal(first)
        step = (np.array(frames[-1].position) - first.position) @ normal / (len(frames) - 1)
        drift = _drift(frames)
        if np.abs(drift).max() > STRAIGHT:
            far = np.linalg.norm(drift * in_plane, axis=1).max()
            notes.append(f"its slices drift sideways by {far:.3g} mm (gantry tilt?): shifted back")
            volume, moved = _straightened(volume, drift)
            origin = origin + np.stack([columns, rows], axis=1) @ (moved * in_plane)
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing([float(in_plane[1]), float(in_plane[0]), float(step)])
    if len(frames) > 1:
        image.SetDirection(np.stack([rows, columns, normal], axis=1).ravel().tolist())
        image.SetOrigin(origin.tolist())
    return image, notes


def _decoded(frames: Sequence[Frame]) -> np.ndarray:
    """Decode the frames' values (Z, Y, X) in float32, scaled by each frame's own slope."""
    in_one_file = {frames[0].file: stored_values(frames[0].file)} if frames[0].multi else {}  # decoded once
    slices = []
    for frame in frames:
        values, limit = in_one_file.get(frame.file) or stored_values(frame.file)
        stored = values[frame.number].astype(np.float32)
        slices.append(frame.slope * (limit - stored if frame.inverted else stored) + frame.intercept)
    return np.stack(slices)


def _straightened(volume: np.ndarray, drift: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shift slices (Z, Y, X) to their true positions, in a grid that holds them all.

    Args:
        drift: (Z, 2) pixels, in rows and columns.

    Returns:
        the volume, and pixels from the first slice's first voxel to the grid's, in rows and columns.
    """
    low, high = np.floor(drift.min(0)).astype(int), np.ceil(drift.max(0)).astype(int)
    size = np.array(volume.shape[1:]) + high - low
    air = float(volume.min())
    straight = np.full((len(volume), *size), air, np.float32)
    for to, slice_, moved in zip(straight, volume, drift - low, strict=True):
        to[: slice_.shape[0], : slice_.shape[1]] = slice_
        to[...] = shift(to, moved, order=1, mode="constant", cval=air)
    return straight, low
