"""The stored values of a DICOM file of any compression, decoded by GDCM (in SimpleITK)."""

from __future__ import annotations

import os
import tempfile

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import MultiFrameGrayscaleByteSecondaryCaptureImageStorage

from pcrl_nnunet.ingest.scans import Unusable

PIXELS = (  # the elements that GDCM needs to decode stored values
    *("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("NumberOfFrames", "PixelData"),
)


def stored_values(file: str) -> tuple[np.ndarray, float]:
    """Decode a file's stored values (frames, rows, columns), and return the sum of the possible extremes, too.

    GDCM applies one slope to all frames and inverts MONOCHROME1 in its own way, so it gets a file without these
    elements.

    Raises:
        Unusable: the voxels end too early or cannot be decoded.
    """
    header = pydicom.dcmread(file, force=True)
    if "PixelData" not in header:
        raise Unusable(f"{os.path.basename(file)} has no voxels: it is damaged or ends too early")
    syntax, frames = header.file_meta.get("TransferSyntaxUID"), int(header.get("NumberOfFrames") or 1)
    needed = frames * header.Rows * header.Columns * header.BitsAllocated // 8
    if (syntax is None or not syntax.is_compressed) and len(header.PixelData) < needed:
        got = len(header.PixelData)
        raise Unusable(f"the voxels of {os.path.basename(file)} end too early, after {got} of {needed} bytes")
    plain = Dataset()
    for name in PIXELS:
        if name in header:
            plain.add(header[name])
    plain.PhotometricInterpretation = "MONOCHROME2"
    plain.SOPClassUID = MultiFrameGrayscaleByteSecondaryCaptureImageStorage
    plain.SOPInstanceUID = header.get("SOPInstanceUID") or pydicom.uid.generate_uid()
    plain.file_meta = FileMetaDataset()
    plain.file_meta.TransferSyntaxUID = syntax or pydicom.uid.ImplicitVRLittleEndian
    with tempfile.TemporaryDirectory() as folder:
        draft = os.path.join(folder, "plain.dcm")
        plain.save_as(draft, enforce_file_format=True)
        reader = sitk.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(draft)
        try:
            values = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError as error:
            how = plain.file_meta.TransferSyntaxUID.name
            raise Unusable(f"the voxels of {os.path.basename(file)} cannot be decoded ({how})") from error
    limit = 2**header.BitsStored - 1 if header.PixelRepresentation == 0 else -1
    return values.reshape(-1, *values.shape[-2:]), float(limit)
