"""The types that search, reading and preprocessing share: scans, the plan that they are for, scans set aside.

Arrays are (C, Z, Y, X) float32, as nnU-Net's readers return them. Spacings are mm in the same order.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from pcrl_nnunet.plans import channel_names

VOLUME_ENDINGS = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr", ".gipl")
MIN_SLICES = 3  # a volume with fewer voxels along an axis is a localiser


@dataclass(frozen=True)
class ImageFormat:
    """The format of a dataset's images.

    Attributes:
        reader: nnU-Net's reader of the dataset's own files.
        file_ending: ending of the dataset's own files, in lower case.
        num_channels: number of channels of a case.
        min_slices: a scan with fewer voxels along an axis is not a volume.
        orientation: three letters such as "RAS". Files that nnU-Net's reader cannot read are reoriented to it.
            None: they keep their orientation.
    """

    reader: type[BaseReaderWriter]
    file_ending: str
    num_channels: int
    min_slices: int = 1
    orientation: str | None = None

    @classmethod
    def of(cls, reader: type[BaseReaderWriter], dataset_json: dict[str, Any], **more: Any) -> ImageFormat:
        """Make the format from a dataset.json."""
        return cls(reader, dataset_json["file_ending"].lower(), len(channel_names(dataset_json)), **more)

    @property
    def is_2d(self) -> bool:
        """True if the dataset has photographs or radiographs (PNG, BMP, TIFF) instead of volumes."""
        return issubclass(self.reader, NaturalImage2DIO)

    @property
    def wanted(self) -> str:
        """The names of file types that the dataset takes, for a message."""
        if self.is_2d:
            return f"2D images ({', '.join(self.reader.supported_file_endings)})"
        endings = dict.fromkeys((self.file_ending, *VOLUME_ENDINGS))
        return f"volumes ({', '.join(endings)}, DICOM series)"


@dataclass(frozen=True)
class Target:
    """The configuration of a plan that scans are preprocessed for.

    Attributes:
        own_images: case name by path of the dataset's own raw images; empty if they cannot be found.
        orientation: see `ImageFormat`.
        takes_label_maps: the user says that images which look like label maps are scans.
    """

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    own_images: dict[str, str] = field(default_factory=dict)
    orientation: str | None = None
    takes_label_maps: bool = False

    @property
    def plans_manager(self) -> PlansManager:
        return PlansManager(self.plans)

    @property
    def configuration_manager(self) -> ConfigurationManager:
        return self.plans_manager.get_configuration(self.configuration)

    @property
    def images(self) -> ImageFormat:
        """The format of the dataset's images. A dataset of thin volumes takes equally thin scans."""
        thinnest = min(int(n) for n in self.plans["original_median_shape_after_transp"])
        return ImageFormat.of(
            self.plans_manager.image_reader_writer_class,
            self.dataset_json,
            min_slices=min(MIN_SLICES, thinnest),
            orientation=self.orientation,
        )

    def settings(self) -> dict[str, Any]:
        """The settings that determine preprocessed voxels. Cases with other settings must not share a folder."""
        configuration = self.configuration_manager.configuration
        keys = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data",
                "resampling_fn_data_kwargs")  # fmt: skip
        settings = {key: configuration[key] for key in keys}
        settings["transpose_forward"] = self.plans["transpose_forward"]
        settings["image_reader_writer"] = self.plans["image_reader_writer"]
        settings["intensities"] = self.plans_manager.foreground_intensity_properties_per_channel
        return json.loads(json.dumps(settings))


@dataclass(frozen=True)
class Scan:
    """A scan that was found but not yet read.

    Attributes:
        name: name of the scan's case.
        files: absolute paths, one for each channel or, for DICOM, one for each slice.
        how: "plan" for the plan's own reader, "itk" or "dicom" for SimpleITK.
        own: an image of the dataset itself; the scan has the case's name.
        folder: the folder that was searched; empty for own images.
    """

    name: str
    files: tuple[str, ...]
    how: str
    own: bool = False
    folder: str = ""

    @property
    def sources(self) -> list[str]:
        """The scan's files, or the folder of a DICOM series, for a message."""
        return [os.path.dirname(self.files[0])] if self.how == "dicom" and len(self.files) > 1 else list(self.files)

    def stamp(self) -> dict[str, int]:
        """Return a fingerprint of the scan's files that is cheap enough for thousands of scans."""
        stats = [os.stat(file) for file in self.files]
        return {
            "files": len(stats),
            "bytes": sum(s.st_size for s in stats),
            "modified_ns": max(s.st_mtime_ns for s in stats),
        }


@dataclass
class Voxels:
    """A scan that was read.

    Attributes:
        data: (C, Z, Y, X) float32.
        properties: the properties of nnU-Net's readers; "spacing" in mm, in the array's order.
        notes: sentences for the user: the reader's warnings and changes of voxels.
    """

    data: np.ndarray
    properties: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SetAside:
    """A scan that is not used.

    Attributes:
        bad: the scan should have been usable; otherwise it is intact, but nothing can be learned from it.
    """

    where: str
    reason: str
    bad: bool = True


class Unusable(Exception):
    """The reason why a scan cannot be found, read or preprocessed. It becomes a `SetAside`."""

    def __init__(self, reason: str, bad: bool = True) -> None:
        super().__init__(reason)
        self.bad = bad


@dataclass
class Found:
    """The content of a folder: scans, files set aside unread, and the number of other files by ending."""

    scans: list[Scan] = field(default_factory=list)
    set_aside: list[SetAside] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
