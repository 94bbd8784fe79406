"""Patches of unlabelled cases, by nnU-Net's loader and with nnU-Net's augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from scipy.ndimage import binary_fill_holes

from pcrl_nnunet.loading.cases import Case, CaseVolume, UnreadableCase

NOTHING = 1e-3  # intensities below it are the zeros around an image that was normalised inside a mask


def inside_mask(image: np.ndarray, masked: Sequence[bool]) -> np.ndarray:
    """Return where an image that was normalised inside a mask has its mask, (*spatial) of bool, without holes.

    Args:
        image: (C, *spatial).
        masked: for each channel, whether it was normalised inside the mask; the others are not zero outside.
    """
    found = (np.abs(image[list(masked)]) > NOTHING).any(0)
    filled = binary_fill_holes(np.atleast_1d(found.squeeze()))  # in a single slice, every hole would be open
    return np.reshape(np.asarray(filled), found.shape)


class Outside:
    """Stands in for the segmentation of a case without one: -1 outside of the image's mask, else 0.

    Some channels are normalised inside a mask. nnU-Net's augmentation keeps zero what is outside of the mask, which it
    finds by -1 in the segmentation. Read by box, as the image: shape (1, *spatial).

    Args:
        masked: for each channel, whether it was normalised inside the mask.
    """

    def __init__(self, volume: CaseVolume, masked: Sequence[bool]) -> None:
        self._volume, self._masked = volume, list(masked)
        self.shape = (1, *volume.shape[1:])
        self.ndim, self.dtype = len(self.shape), np.dtype(np.int16)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        if not any(self._masked):
            sizes = [range(*part.indices(n)) for part, n in zip(index, self.shape, strict=True)]
            return np.zeros([len(size) for size in sizes], np.int16)
        of_image = (slice(None), *index[1:])
        return np.where(inside_mask(self._volume[of_image], self._masked), 0, -1).astype(np.int16)[None]


class UnlabelledDataset:
    """Unlabelled cases as nnU-Net's loader asks for them. No file but the image is ever opened.

    Args:
        cases: by name.
        masked: for each channel, whether it was normalised inside a mask.
    """

    def __init__(self, cases: Mapping[str, Case], masked: Sequence[bool]) -> None:
        self._cases, self._masked = dict(cases), masked
        self.identifiers = sorted(cases)

    def load_case(self, identifier: str) -> tuple[CaseVolume, Outside, None, dict[str, Any]]:
        """Return the image, a stand-in for the segmentation, nothing of a cascade, and no places of classes."""
        volume = CaseVolume(self._cases[identifier])
        return volume, Outside(volume, self._masked), None, {"class_locations": None}

    def name_of(self, case: Case) -> str:
        """Return the name of a case."""
        return next(name for name, own in self._cases.items() if own == case)


class UnlabelledLoader(nnUNetDataLoader):
    """nnU-Net's loader of random patches. A case that cannot be read is set aside, and the batch says so.

    Batches have ``data`` (B, C, *patch), ``keys``, and ``set_aside``: sentences by case.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_ignore = False  # or nnU-Net would look for annotated voxels

    def generate_train_batch(self) -> dict[str, Any]:
        """Return a batch of cases that can be read. If no case is left, it has an ``error`` alone."""
        set_aside: dict[str, str] = {}
        while True:
            try:
                batch = super().generate_train_batch()
            except UnreadableCase as error:
                name = self._data.name_of(error.case)
                set_aside[name] = str(error)
                self.indices: list[str] = [other for other in self.indices if other != name]
                if not self.indices:  # a process that loads cannot raise it where a user would read it
                    return {"error": f"no unlabelled case can be read any more; the last one: {error}"}
            else:
                return {"data": batch["data"], "keys": batch["keys"], "set_aside": set_aside}


def make_unlabelled_loader(loader: UnlabelledLoader, pin_memory: bool) -> Any:
    """Return batches from as many processes as nnU-Net loads training patches with; with none, from this process.

    Args:
        pin_memory: the batches go to a GPU.
    """
    processes = get_allowed_n_proc_DA()
    if processes == 0:
        return SingleThreadedAugmenter(loader, None)
    batches = NonDetMultiThreadedAugmenter(
        data_loader=loader,
        transform=None,
        num_processes=processes,
        num_cached=max(6, processes // 2),
        seeds=None,
        pin_memory=pin_memory,
        wait_time=0.002,
    )
    next(batches)  # the processes begin here, as nnU-Net's do, and not in the middle of the training
    return batches
