"""Preprocessed nnU-Net cases, read by box. C: channels."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from typing import Any

import blosc2
import numpy as np

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import is_draft, whole
from pcrl_nnunet.plans import preprocessing_command
from pcrl_nnunet.views.boxes import Box

SUFFIXES = (".b2nd", ".npy", ".npz")  # an unpacked .npy is faster than its .npz


@dataclass(frozen=True)
class Case:
    """A preprocessed image on disk: (C, *spatial), as nnU-Net's preprocessing wrote it.

    Attributes:
        weight: relative frequency of the case among samples.
    """

    name: str
    path: str
    weight: float = 1.0

    def full_name(self, dataset: str) -> str:
        """Return the name with the dataset before it. A case of another than the training's dataset has its own."""
        return self.name if "/" in self.name else f"{dataset}/{self.name}"


def find_cases(folder: str, segmentations: bool = False) -> list[Case]:
    """Return the images in a folder of preprocessed data, sorted by name. Properties are ignored.

    Args:
        folder: folder of a configuration's data.
        segmentations: include segmentations, named with their ending _seg.

    Raises:
        UserError: there are no images.
    """
    files = [file for file in os.listdir(folder) if not is_draft(file)] if os.path.isdir(folder) else []
    found: dict[str, Case] = {}
    for suffix in SUFFIXES:
        for name in (file.removesuffix(suffix) for file in files if file.endswith(suffix)):
            if segmentations or not name.endswith("_seg"):
                found.setdefault(name, Case(name, os.path.join(folder, name + suffix)))
    if not found:
        raise UserError(f"no preprocessed images in {folder}: run {preprocessing_command(folder)} first")
    return [found[name] for name in sorted(found)]


def evenly_spaced(number: int, most: int) -> list[int]:
    """Return the indices of at most `most` of a number of things, evenly spaced, with the first and the last."""
    indices: list[int] = np.unique(np.linspace(0, number - 1, min(most, number)).round()).astype(int).tolist()
    return indices


class UnreadableCase(UserError):
    """A case that cannot be read, or has voxels that are not finite."""

    def __init__(self, case: Case, message: str) -> None:
        super().__init__(message)
        self.case = case

    def __reduce__(self) -> tuple[Any, ...]:
        """Make the error picklable, to return from another process."""
        return type(self), (self.case, str(self))


class CaseVolume:
    """An opened case with a `shape`. Slicing reads only the requested part (a whole image from .npz).

    Raises:
        UnreadableCase: on opening or slicing, if the file is missing or damaged or has voxels that are not finite.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        try:
            self._array = _open(case.path)
            self.shape: tuple[int, ...] = tuple(self._array.shape)
            self._bytes = os.path.getsize(case.path)
        except Exception as error:  # blosc2 raises RuntimeError, numpy ValueError, OSError, EOFError, BadZipFile
            raise _unreadable(self.case, error) from error

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        try:
            # a memory map of a file that was truncated later would end the process with a bus error
            if os.path.getsize(self.case.path) < self._bytes:
                raise OSError("the file has become shorter")
            data = np.asarray(self._array[index], dtype=np.float32)
        except Exception as error:
            raise _unreadable(self.case, error) from error
        # NaN or infinity in an array makes its sum NaN or infinite; checking each voxel takes longer
        if not np.isfinite(data.sum()) and not np.isfinite(data).all():
            raise UnreadableCase(
                self.case,
                f"case {self.case.name} has voxels that are not finite numbers (NaN or infinity) in {self.case.path}: "
                f"repair or remove the image and preprocess it again",
            )
        return data


def _unreadable(case: Case, error: Exception) -> UnreadableCase:
    reason = "the file is missing" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
    message = f"case {case.name} cannot be read from {case.path} ({reason}): preprocess the image again"
    return UnreadableCase(case, message)


def _open(path: str) -> Any:
    if path.endswith(".b2nd"):
        # a memory map, as in nnU-Net, halves the time to read a box
        mapped = {} if os.name == "nt" else {"mmap_mode": "r"}
        return blosc2.open(urlpath=path, mode="r", dparams={"nthreads": 1}, **mapped)
    if path.endswith(".npy"):
        return np.load(path, mmap_mode="r")
    with open(path, "rb") as file, np.load(file) as archive:  # numpy leaves a damaged file open
        return archive["data"]


def unpack(case: Case) -> Case:
    """Return the case as .npy, unpacked beside its .npz if necessary: boxes can be read from .npy.

    Like nnU-Net's `unpack_dataset`, but a file appears complete or not at all, whatever ends the process.
    """
    if not case.path.endswith(".npz"):
        return case
    path = f"{case.path.removesuffix('.npz')}.npy"
    if not os.path.isfile(path):
        try:
            with np.load(case.path) as archive, whole(path) as draft:
                np.save(draft, archive["data"])
        except Exception as error:
            raise _unreadable(case, error) from error
    return replace(case, path=path)


def fingerprint(case: Case) -> str:
    """Return the sha256 of shape and central 64 voxels of each axis, which identifies a case by a small read."""
    volume = CaseVolume(case)
    shape = volume.shape[1:]
    centre = Box(tuple(max(0, n // 2 - 32) for n in shape), tuple(min(n, n // 2 + 32) for n in shape))
    digest = hashlib.sha256(str(volume.shape).encode())
    digest.update(volume[centre.index()].tobytes())
    return digest.hexdigest()
