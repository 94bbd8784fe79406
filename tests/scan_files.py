"""Files of scans for tests: phantoms in any format, DICOM with any header, and matching plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from pcrl_nnunet.ingest.find import find_scans
from pcrl_nnunet.ingest.scans import Scan, Target

CT, MR, ENHANCED_MR = (f"1.2.840.10008.5.1.4.1.1.{ending}" for ending in ("2", "4", "4.1"))
SHAPE = (12, 10, 8)  # (Z, Y, X)
SPACING = (0.9, 1.1, 2.5)  # mm; x, y, z
UID = "1.2.826.0.1.3680043.2.1125"


def phantom(seed: int = 0, orientation: str = "LPS") -> sitk.Image:
    """Noise of many values, so that wrong axes or flips are found; stored in the given orientation."""
    voxels = np.random.default_rng(seed).integers(-900, 900, SHAPE).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING)
    image.SetOrigin((-30.0, 20.0, 5.0))
    return sitk.DICOMOrient(image, orientation)


def write(image: sitk.Image, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), True)
    return str(path)


def write_dicom(image: sitk.Image, folder: Path, uid: str = UID, skip: tuple[int, ...] = (), ending: str = "") -> None:
    """One file per slice, without file ending, as scanners write them; names and slices have different orders."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    d, depth = image.GetDirection(), image.GetDepth()
    for z in set(range(depth)) - set(skip):
        slice_ = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        tags = {
            "0008|0060": "MR",
            "0020|000d": UID,
            "0020|000e": uid,
            "0020|0013": str(z),
            "0020|0032": "\\".join(map(str, position)),
            "0020|0037": "\\".join(map(str, (d[0], d[3], d[6], d[1], d[4], d[7]))),
        }
        for tag, value in tags.items():
            slice_.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"IM{uid[-1]}{97 * (z + 1) % 1009:04d}{ending}"))
        writer.Execute(slice_)


def target_for(channels: int = 1, reader: str = "SimpleITKIO", ending: str = ".nii.gz", **more: Any) -> Target:
    plans = {"image_reader_writer": reader, "original_median_shape_after_transp": list(SHAPE)}
    names = {str(c): "MRI" for c in range(channels)}
    return Target(plans, {"channel_names": names, "file_ending": ending}, "3d_fullres", **more)


def only_scan(folder: Path, target: Target) -> Scan:
    found = find_scans(str(folder), target)
    assert not found.set_aside
    (scan,) = found.scans
    return scan


def reasons(folder: Path, target: Target) -> list[tuple[str, bool]]:
    return [(s.reason, s.bad) for s in find_scans(str(folder), target).set_aside]


# -------------------------------------------------------------------------------------------------------------- DICOM


def volume(slices: int = 12, rows: int = 16, columns: int = 14) -> np.ndarray:
    """(Z, Y, X) uint16: ramps and an ellipsoid, so that any wrong order or mirroring is found."""
    z, y, x = np.mgrid[:slices, :rows, :columns]
    ball = ((z - 5) / 4) ** 2 + ((y - 8) / 6) ** 2 + ((x - 5) / 4) ** 2 < 1
    noise = np.random.default_rng(0).integers(0, 9, z.shape)
    return (300 + 20 * z + 5 * x + 2 * y + 400 * ball + noise).astype(np.uint16)


def item(**values: Any) -> Dataset:
    """An item of a DICOM sequence."""
    made = Dataset()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def dicom_file(path: Path, pixels: np.ndarray, **header: Any) -> Path:
    """Write a DICOM file of a CT slice, or with whatever header is given; None leaves an element out."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    values: dict[str, Any] = {
        "SOPClassUID": CT, "SOPInstanceUID": generate_uid(), "Modality": "CT", "PatientID": "p", "PatientName": "p",
        "StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3.4", "SeriesDescription": "thorax",
        "Rows": pixels.shape[-2], "Columns": pixels.shape[-1], "SamplesPerPixel": 1, "PixelRepresentation": 0,
        "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16, "BitsStored": 16, "HighBit": 15,
        "PixelSpacing": [1.5, 1.25], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
    }  # fmt: skip
    if pixels.ndim == 3:
        values["NumberOfFrames"] = len(pixels)
    for name, value in {**values, **header}.items():
        if value is not None:
            setattr(made, name, value)
    made.PixelData = pixels.astype(np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, made, enforce_file_format=True)
    return path


def dicom_series(folder: Path, voxels: np.ndarray, step: Sequence[float] = (0, 0, 2.5), **header: Any) -> list[Path]:
    """Write one file a slice, each `step` mm beyond the one before."""
    positions = [[-14 + k * step[0], -16 + k * step[1], k * step[2]] for k in range(len(voxels))]
    return [
        dicom_file(folder / f"IM{k:04d}.dcm", pixels, **{"ImagePositionPatient": positions[k], **header})
        for k, pixels in enumerate(voxels)
    ]


def multi_frame(path: Path, voxels: np.ndarray, order: Sequence[int], of_frame: Any = None, **header: Any) -> Path:
    """Write an enhanced MR file of frames in any order; `of_frame(k)` gives more functional groups of slice k."""
    per_frame = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[-14.0, -16.0, 2.5 * k])],
            **(of_frame(k) if of_frame else {}),
        )
        for k in order
    ]
    shared = item(
        PixelMeasuresSequence=[item(PixelSpacing=[1.5, 1.25], SliceThickness=2.5)],
        PlaneOrientationSequence=[item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
    )
    return dicom_file(
        path,
        voxels[list(order)],
        **{
            "SOPClassUID": ENHANCED_MR, "Modality": "MR", "PixelSpacing": None, "ImageOrientationPatient": None,
            "SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": per_frame,
        } | header,
    )  # fmt: skip
