"""The only way from a file to voxels, shared by unlabelled scans, maskless datasets, classification and converters."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from pcrl_nnunet.ingest import dicom
from pcrl_nnunet.ingest.checks import affine_of, check_file, check_grids, check_same_grid, check_voxels, short_reason
from pcrl_nnunet.ingest.scans import ImageFormat, Scan, Unusable, Voxels


def read_scan(scan: Scan, images: ImageFormat) -> Voxels:
    """Read a scan in the orientation and axis order of the dataset's own reader.

    Raises:
        Unusable: the file cannot be read correctly, or nothing can be learned from its voxels.
    """
    try:
        if scan.how == "plan":
            voxels = _read_as_planned(scan.files, images)
        elif scan.how == "dicom":
            image, notes = dicom.read_volume(scan.files, images.min_slices)
            voxels = _stacked([_turned(image, images.orientation)])
            voxels.notes += notes
        else:
            voxels = _stacked([_turned(read_image(file), images.orientation) for file in scan.files])
    except (Unusable, MemoryError):
        raise
    except Exception as error:  # a damaged file may raise anything
        raise Unusable(short_reason(error)) from error
    check_voxels(voxels.data, voxels.properties["spacing"], images)
    return voxels


def read_image(file: str) -> sitk.Image:
    """Read a file with SimpleITK, and drop a fourth axis of length one.

    Raises:
        Unusable: see `check_file`; or the file holds several volumes.
    """
    check_file(file)
    with _alone([file]) as (path,):
        image = sitk.ReadImage(path)
    if image.GetDimension() == 4:
        if image.GetSize()[3] > 1:
            raise Unusable(f"a series of {image.GetSize()[3]} volumes (4D); expected one volume", bad=False)
        image = image[..., 0]
    return image


def _read_as_planned(files: Sequence[str], images: ImageFormat) -> Voxels:
    """Read with the plan's own reader, and turn its output into notes."""
    for file in files:
        check_file(file)
    check_grids(files, images)
    printed = io.StringIO()
    handler = logging.StreamHandler(printed)  # tifffile logs the parts that it skips
    logging.getLogger("tifffile").addHandler(handler)
    try:
        with contextlib.redirect_stdout(printed), _with_spacing(files, images) as paths, _alone(paths) as alone:
            data, properties = images.reader().read_images(alone)
    except Exception as error:
        reason = short_reason(error, printed.getvalue())
        raise Unusable(re.sub(r"; File: \S+|! File: \S+", "", reason)) from error  # the path may belong to a link
    finally:
        logging.getLogger("tifffile").removeHandler(handler)
    if damage := re.search(r"invalid page offset|corrupted|failed to reshape", printed.getvalue()):
        raise Unusable(f"a TIFF file that is damaged or ends too early ({damage[0]})")
    said = " ".join(printed.getvalue().split())
    return Voxels(data, properties, [f"nnU-Net's reader says: {said}"] if said else [])


def _stacked(channels: Sequence[sitk.Image]) -> Voxels:
    first = channels[0]
    for channel, image in enumerate(channels[1:], start=1):
        check_same_grid(first.GetSize(), affine_of(first), image.GetSize(), affine_of(image), channel)
    data = np.stack([sitk.GetArrayFromImage(image) for image in channels]).astype(np.float32, copy=False)
    return Voxels(data, {"spacing": [float(s) for s in first.GetSpacing()[::-1]]})


def _turned(image: sitk.Image, orientation: str | None) -> sitk.Image:
    """Turn a 2D image into a volume of one thick slice, like nnU-Net, and reorient a volume."""
    if image.GetDimension() == 2:
        return sitk.JoinSeries(image, 0.0, dicom.ONE_SLICE * max(image.GetSpacing()))
    return sitk.DICOMOrient(image, orientation) if orientation else image


@contextlib.contextmanager
def _alone(files: Sequence[str]) -> Iterator[list[str]]:
    """Yield paths without neighbouring files: for X.nii.gz beside X.nii, ITK reads the voxels of X.nii."""
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, file in enumerate(files):
            if file.lower().endswith(".nii.gz") and os.path.exists(file[: -len(".gz")]):
                path = os.path.join(folder, f"{number}.nii.gz")
                os.symlink(os.path.abspath(file), path)
                file = path
            paths.append(file)
        yield paths


@contextlib.contextmanager
def _with_spacing(files: Sequence[str], images: ImageFormat) -> Iterator[Sequence[str]]:
    """Yield paths at which nnU-Net's TIFF reader finds the json with the spacing, for any file name.

    The reader cuts five letters (_0000) off any name. If it then finds no file, it assumes 1 mm.
    """
    path, ending = spacing_file(files, images), os.path.splitext(files[0])[1]
    if path is None or path == f"{files[0][: -len(ending) - len('_0000')]}.json":
        yield files
        return
    with tempfile.TemporaryDirectory() as folder:
        links = [os.path.join(folder, f"scan_{number:04d}{ending}") for number in range(len(files))]
        for file, link in zip(files, links, strict=True):
            os.symlink(os.path.abspath(file), link)
        os.symlink(os.path.abspath(path), os.path.join(folder, "scan.json"))
        yield links


def spacing_file(files: Sequence[str], images: ImageFormat) -> str | None:
    """Return the json with the spacing of a 3D TIFF; None for formats that contain their spacing.

    Raises:
        Unusable: there is no json, or it does not hold three lengths.
    """
    if not issubclass(images.reader, Tiff3DIO):
        return None
    stem = os.path.splitext(files[0])[0]
    tried = [f"{name}.json" for name in dict.fromkeys((re.sub(r"_\d{4}$", "", stem), stem))]
    path = next((name for name in tried if os.path.isfile(name)), None)
    if path is None:
        raise Unusable(
            f"no file with its spacing; put {os.path.basename(tried[-1])} beside it: "
            '{"spacing": [Z, Y, X]}, the distances of voxels in mm'
        )
    try:
        spacing = [float(n) for n in load_json(path)["spacing"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Unusable(f"{path} has no spacing ({type(error).__name__}: {error})") from error
    if len(spacing) != 3 or not all(np.isfinite(n) and n > 0 for n in spacing):
        raise Unusable(f"{path} says a spacing of {spacing}; expected three distances in mm")
    return path
