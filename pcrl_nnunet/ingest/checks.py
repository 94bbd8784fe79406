"""Checks of every image file, before and after it is read.

The readers (ITK, nibabel, tifffile) sometimes fill, cut or replace voxels without an error. Each check here catches one
of these cases. `Unusable` says what came; the caller adds the file's name.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from itertools import product

import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from nibabel.orientations import inv_ornt_aff, io_orientation
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIOWithReorient
from PIL import Image

from pcrl_nnunet.ingest.scans import ImageFormat, Unusable

GIPL_HEADER = 256  # bytes
MAX_SPACINGS_APART = 0.05  # relative difference of pixdim and sform in one NIfTI header
MAX_SHIFT = 0.5  # voxels between channels: farther apart, they show different tissue
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_BEGINNINGS = {  # first bytes of files, whose names may be misleading
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"PK\x03\x04": "a zip archive",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"II*\x00": "a TIFF image",
    b"MM\x00*": "a TIFF image",
    b"NRRD": "an NRRD file",
    b"ObjectType": "a MetaImage",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"%PDF": "a PDF document",
    b"version https://git-lfs": "a pointer of Git LFS without the file",
}


def kind_of(file: str) -> str:
    """Name a file's kind by its first bytes, for a message."""
    with open(file, "rb") as stream:
        start = stream.read(352)
    if start.startswith(b"\x1f\x8b"):
        with contextlib.suppress(EOFError, OSError, zlib.error), gzip.open(file) as unpacked:
            start = unpacked.read(352)
    if not start:
        return "an empty file"
    if start[128:132] == b"DICM":
        return "a DICOM file"
    if start[344:348] in (b"n+1\0", b"ni1\0") or start[4:8] == b"n+2\0":
        return "a NIfTI file"
    return next((kind for begin, kind in _BEGINNINGS.items() if start.startswith(begin)), "of another kind, or damaged")


def check_file(file: str) -> None:
    """Check a file before a reader opens it.

    Raises:
        Unusable: the file ends too early, has the wrong ending, or its values are not plain grey-scale numbers.
    """
    name = file.lower()
    if name.endswith((".nii", ".nii.gz")):
        _check_nifti(file)
    if name.endswith((".mha", ".mhd")):
        _check_meta_image(file)
    if name.endswith((".tif", ".tiff")):
        _check_tiff(file)
    if name.endswith(".png"):
        _check_png(file)
    if name.endswith((".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".gipl")):
        _check_itk_header(file)


def header_of(file: str) -> sitk.ImageFileReader:
    """Read a header with SimpleITK, or raise `Unusable`."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        ending = re.search(r"(\.\w+(?:\.gz)?)$", file.lower())
        expected = f"expected a whole file of the kind that {ending[1] if ending else 'its name'} says"
        raise Unusable(f"{kind_of(file)} that ITK cannot read ({itk_reason(error)}); {expected}") from error
    return reader


def _check_itk_header(file: str) -> None:
    header = header_of(file)
    components, pixel = header.GetNumberOfComponents(), sitk.GetPixelIDValueAsString(header.GetPixelID())
    if "complex" in pixel:
        raise Unusable(f"complex numbers ({pixel}); expected real ones: store magnitude or phase as an image")
    if components > 1:
        raise Unusable(f"a colour or vector image with {components} values a voxel; expected one", bad=False)
    if file.lower().endswith(".gipl"):  # ITK leaves memory uninitialised for missing voxels
        item = sitk.Image([1] * header.GetDimension(), header.GetPixelID()).GetSizeOfPixelComponent()
        needed, size = int(np.prod(header.GetSize())) * item, os.path.getsize(file) - GIPL_HEADER
        if size < needed:
            raise Unusable(f"the file ends too early, after {size} of {needed} bytes of voxels")


def _check_nifti(file: str) -> None:
    """Refuse missing voxels and NaN, which ITK silently replaces by zeros."""
    with open(file, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(file) if packed else open(file, "rb") as stream:
            start = stream.read(4)
            lengths = {int.from_bytes(start, "little"), int.from_bytes(start, "big")}
            if not lengths & {348, 540}:
                raise Unusable(f"not a NIfTI file, whatever its name says, but {kind_of(file)}")
            stream.seek(0)
            header_class = nibabel.Nifti1Header if 348 in lengths else nibabel.Nifti2Header
            header = header_class.from_fileobj(stream, check=False)
            _check_nifti_header(header)
            dtype = header.get_data_dtype()
            broken, size, needed = 0, 0, int(np.prod(header.get_data_shape(), dtype=object)) * dtype.itemsize
            stream.seek(header.get_data_offset())
            while chunk := stream.read(dtype.itemsize << 20):  # reading to the end verifies the checksum
                size += len(chunk)
                if dtype.kind == "f":
                    values = np.frombuffer(chunk, dtype, len(chunk) // dtype.itemsize)
                    broken += len(values) - np.count_nonzero(np.isfinite(values))
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise Unusable("the compressed data is damaged or ends too early") from None
    if size < needed:
        raise Unusable(f"the file ends too early, after {size} of {needed} bytes of voxels")
    if broken:
        raise Unusable(f"{broken} voxels are NaN or infinite")


def _check_nifti_header(header: nibabel.Nifti1Header) -> None:
    try:
        dtype, shape = header.get_data_dtype(), header.get_data_shape()
    except nibabel.spatialimages.HeaderDataError as error:
        raise Unusable(f"a damaged NIfTI header ({error})") from error
    if dtype.kind == "c":
        raise Unusable("complex numbers; expected real ones: store magnitude or phase as an image")
    if dtype.names is not None:
        raise Unusable(f"a colour image ({''.join(dtype.names)} in each voxel); expected one value a voxel", bad=False)
    spacing = [float(n) for n in header["pixdim"][1 : 1 + min(3, len(shape))]]
    if any(not np.isfinite(n) or n <= 0 for n in spacing):
        raise Unusable(f"its header says a voxel size of {' x '.join(f'{n:g}' for n in spacing)}")
    if header["sform_code"] > 0 and len(spacing) == 3:
        columns = np.linalg.norm(header.get_sform()[:3, :3], axis=0)
        if not np.allclose(columns, spacing, rtol=MAX_SPACINGS_APART):
            raise Unusable(f"its header says two voxel sizes, {_mm(spacing)} (pixdim) and {_mm(columns)} (sform)")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    # NaN and 0 mean "none". ITK ignores an infinite slope and reads an intercept of NaN as 0.
    if np.isinf(slope) or (np.isfinite(slope) and slope != 0 and not np.isfinite(intercept)):
        raise Unusable(f"its header says that intensities are {slope:g} x + {intercept:g}")


def _check_meta_image(file: str) -> None:
    """Refuse missing, too few and damaged voxels, whose errors in ITK are vague."""
    fields: dict[str, str] = {}
    with open(file, "rb") as stream:
        while "ElementDataFile" not in fields and (line := stream.readline(1 << 16)):
            key, _, value = line.decode("latin-1").partition("=")
            fields[key.strip()] = value.strip()
        start = stream.tell()
    if "ElementDataFile" not in fields:
        raise Unusable(f"{kind_of(file)}, or a MetaImage header that ends too early; expected a whole MetaImage")
    where = fields["ElementDataFile"]
    if where.startswith("LIST") or "%" in where or fields.get("HeaderSize", "0") != "0":  # ITK resolves these
        return
    voxels = file if where == "LOCAL" else os.path.join(os.path.dirname(file), where)
    start = start if where == "LOCAL" else 0
    if not os.path.isfile(voxels):
        raise Unusable(f"its voxels, {where}, are missing")
    header = header_of(file)
    item = sitk.Image([1] * header.GetDimension(), header.GetPixelID(), max(1, header.GetNumberOfComponents()))
    needed = int(np.prod(header.GetSize())) * item.GetSizeOfPixelComponent() * max(1, header.GetNumberOfComponents())
    which = "voxels" if where == "LOCAL" else f"voxels, {where},"
    if fields.get("CompressedData", "").lower() != "true":
        size = os.path.getsize(voxels) - start
        if size < needed:
            raise Unusable(f"its {which} end too early, after {size} of {needed} bytes")
        return
    unpacker, size = zlib.decompressobj(wbits=47), 0  # zlib or gzip; verifies the checksum at the end
    with open(voxels, "rb") as stream:
        stream.seek(start)
        while chunk := stream.read(1 << 20):
            try:
                size += len(unpacker.decompress(chunk))
            except zlib.error:
                raise Unusable(f"its compressed {which} are damaged") from None
    if size < needed or not unpacker.eof:
        raise Unusable(f"its compressed {which} end too early")


def _check_tiff(file: str) -> None:
    """Refuse pages that differ, which tifffile drops or fills, and complex numbers, which NumPy makes real."""
    with tifffile.TiffFile(file) as tiff:
        kinds = {(page.shape, str(page.dtype)) for page in tiff.pages}
        if len(kinds) > 1 or len(tiff.series) > 1:
            listed = " and ".join(f"{_x(shape)} of {dtype}" for shape, dtype in sorted(kinds)[:3])
            raise Unusable(f"a TIFF of different pages ({listed}); expected pages of one size and number type")
        dtype = tiff.series[0].dtype
        if dtype is None or dtype.kind not in "buif":
            raise Unusable(f"a TIFF of {dtype}; expected real numbers")


def _check_png(file: str) -> None:
    with Image.open(file) as image:
        if image.mode in ("LA", "PA"):
            raise Unusable(f"grey with transparency (mode {image.mode}); expected grey values alone")


def check_grids(files: Sequence[str], images: ImageFormat) -> None:
    """Refuse channels whose voxels do not coincide after reading.

    nnU-Net's readers stop if shape or spacing differ, but only warn if origin or direction differ.

    Raises:
        Unusable: the channel, and how its grid differs.
    """
    # 2D images and TIFFs have no position in space
    if len(files) < 2 or images.is_2d or images.file_ending in (".tif", ".tiff"):
        return
    reorients = issubclass(images.reader, (NibabelIOWithReorient, SimpleITKIOWithReorient))
    (shape, affine), *others = [_grid(header_of(file), reorients) for file in files]
    for channel, (other_shape, other_affine) in enumerate(others, start=1):
        check_same_grid(shape, affine, other_shape, other_affine, channel)


def check_same_grid(
    shape: Sequence[int], affine: np.ndarray, other_shape: Sequence[int], other_affine: np.ndarray, channel: int
) -> None:
    """Compare the shapes of two grids and the positions of their corners in the world.

    Args:
        shape: voxels of channel 0000.
        affine: (4, 4), voxels of channel 0000 to mm.
        other_shape, other_affine: the same for the other channel.

    Raises:
        Unusable: the shapes differ, or a corner lies over half a voxel away.
    """
    which = f"channel {channel:04d} is on another grid than channel 0000"
    if tuple(shape) != tuple(other_shape):
        raise Unusable(f"{which}: {_x(other_shape)} voxels instead of {_x(shape)}")
    spacing, other_spacing = (np.linalg.norm(a[:3, :3], axis=0) for a in (affine, other_affine))
    if not np.allclose(spacing, other_spacing, rtol=1e-4):  # nnU-Net's readers stop at 1e-5
        raise Unusable(f"{which}: voxels of {_mm(other_spacing)} instead of {_mm(spacing)}")
    corners = np.array([[*corner, 1] for corner in product(*((0, n - 1) for n in shape))]).T
    apart = np.linalg.norm(((other_affine - affine) @ corners)[:3], axis=0).max()  # mm
    if apart > MAX_SHIFT * np.linalg.norm(affine[:3, :3], axis=0).min():
        codes = ["".join(nibabel.aff2axcodes(a)) for a in (other_affine, affine)]
        how = f"stored as {codes[0]} instead of {codes[1]}" if codes[0] != codes[1] else "shifted or turned"
        raise Unusable(f"{which}: {how}, by up to {apart:.3g} mm; resample it to the grid of channel 0000")


def affine_of(image: sitk.Image | sitk.ImageFileReader) -> np.ndarray:
    """Return the affine (4, 4), voxels to mm in RAS, of a 3D image or header of SimpleITK."""
    dimension = len(image.GetSize())
    used = min(3, dimension)
    affine = np.eye(4)
    direction = np.reshape(image.GetDirection(), (dimension, dimension))[:used, :used]
    affine[:used, :used] = direction * np.array(image.GetSpacing()[:used])
    affine[:used, 3] = image.GetOrigin()[:used]
    return np.asarray(_LPS_TO_RAS @ affine)


def _grid(header: sitk.ImageFileReader, reorients: bool) -> tuple[tuple[int, ...], np.ndarray]:
    shape, affine = (*header.GetSize()[:3], 1)[:3], affine_of(header)
    if reorients:
        turned = io_orientation(affine)
        affine = affine @ inv_ornt_aff(turned, shape)
        shape = tuple(shape[int(axis)] for axis in np.argsort(turned[:, 0]))
    return shape, affine


def check_voxels(data: np.ndarray, spacing: Sequence[float], images: ImageFormat) -> None:
    """Refuse bad images that preprocessing would accept.

    Args:
        data: (C, Z, Y, X).
        spacing: mm, in the array's order.

    Raises:
        Unusable: another number of channels, too few slices, an impossible voxel size, voxels that are not finite, or
            an empty channel.
    """
    if data.shape[0] != images.num_channels:
        more = data.shape[0] > images.num_channels
        raise Unusable(f"{data.shape[0]} channels, the dataset has {images.num_channels}", bad=not more)
    if min(data.shape[1:]) < images.min_slices:
        raise Unusable(f"only {min(data.shape[1:])} slices (a localiser?)", bad=False)
    if not all(np.isfinite(s) and s > 0 for s in spacing):
        raise Unusable(f"its voxel size is {' x '.join(f'{s:g}' for s in spacing)} mm")
    check_intensities(data)


def check_intensities(data: np.ndarray) -> None:
    """Refuse voxels (C, ...) that are not finite, and channels with a single value."""
    broken = data.size - np.count_nonzero(np.isfinite(data))
    if broken:
        raise Unusable(f"{broken} voxels are NaN or infinite")
    for channel, image in enumerate(data):
        if image.min() == image.max():
            which = f"channel {channel:04d}: " if data.shape[0] > 1 else ""
            raise Unusable(f"{which}all voxels are {image.flat[0]:g}: the image is empty")


def short_reason(error: Exception, shouted: str = "") -> str:
    """Describe in one line what is wrong with a file.

    Args:
        shouted: the reader's output; some of nnU-Net's readers print the reason and raise an empty error.
    """
    text = str(error)
    if isinstance(error, Unusable):
        return text
    if isinstance(error, MemoryError):
        return "not enough memory for it"
    if isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)):
        return "the compressed data is damaged or ends too early"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "Unable to determine ImageIO reader" in text:
        return "not an image of the type that its name says, or damaged"
    if re.search("cannot be read|Error reading|truncated|failed to read", text):  # ITK, Pillow, tifffile
        return "damaged or ends too early"
    return itk_reason(error) or (shouted.strip().splitlines() or [type(error).__name__])[0]


def itk_reason(error: Exception) -> str:
    """Return the first line of an error, without locations in ITK's source."""
    text = re.sub(r"^.*?(?:ITK ERROR|sitk::ERROR): (?:\w+\(0x[0-9a-f]+\): )?", "", str(error), flags=re.DOTALL)
    return next(iter(text.strip().splitlines()), "")


def _mm(spacing: Iterable[float]) -> str:
    return f"{' x '.join(f'{n:g}' for n in spacing)} mm"


def _x(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
