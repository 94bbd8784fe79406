"""Patches of unlabelled cases, with nnU-Net's loader and augmentation."""

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

NOTHING = 1e-3  # smaller intensities are zeros around an image that was normalised inside a mask


def inside_mask(image: np.ndarray, masked: Sequence[bool]) -> np.ndarray:
    """Return the mask (*spatial) inside which an image was normalised, without holes.

    Args:
        image: (C, *spatial).
        masked: whether each channel was normalised inside the mask; other channels are not zero outside.
    """
    found = (np.abs(image[list(masked)]) > NOTHING).any(0)
    filled = binary_fill_holes(np.atleast_1d(found.squeeze()))  # every hole in a single slice would be open
    return np.reshape(np.asarray(filled), found.shape)


class Outside:
    """A stand-in for the missing segmentation of a case: -1 outside the image's mask, else 0.

    Some channels are normalised inside a mask. nnU-Net's augmentation keeps voxels outside the mask at zero, and finds
    them by -1 in the segmentation. The stand-in has shape (1, *spatial) and is read by box, like the image.

    Args:
        masked: whether each channel was normalised inside the mask.
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
    """Unlabelled cases as a dataset for nnU-Net's loader. Only the image file is ever opened.

    Args:
        cases: cases by name.
        masked: whether each channel was normalised inside a mask.
    """

    def __init__(self, cases: Mapping[str, Case], masked: Sequence[bool]) -> None:
        self._cases, self._masked = dict(cases), masked
        self.identifiers = sorted(cases)

    def load_case(self, identifier: str) -> tuple[CaseVolume, Outside, None, dict[str, Any]]:
        """Return the image, a stand-in for the segmentation, None for a cascade, and empty class locations."""
        volume = CaseVolume(self._cases[identifier])
        return volume, Outside(volume, self._masked), None, {"class_locations": None}

    def name_of(self, case: Case) -> str:
        """Return the name of a case."""
        return next(name for name, own in self._cases.items() if own == case)


class UnlabelledLoader(nnUNetDataLoader):
    """nnU-Net's loader of random patches, which sets aside unreadable cases.

    Batches have ``data`` (B, C, *patch), ``keys``, and ``set_aside``: sentences by unreadable case. Each batch has the
    sentences about all unreadable cases so far, because a batch may be thrown away when the processes start.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_ignore = False  # otherwise nnU-Net would search annotated voxels
        self.set_aside: dict[str, str] = {}

    def generate_train_batch(self) -> dict[str, Any]:
        """Return a batch of readable cases. If no case is left, the batch has only an ``error``."""
        while self.indices:
            try:
                batch = super().generate_train_batch()
            except UnreadableCase as error:
                name = self._data.name_of(error.case)
                self.set_aside[name] = str(error)
                self.indices: list[str] = [other for other in self.indices if other != name]
            else:
                return {"data": batch["data"], "keys": batch["keys"], "set_aside": dict(self.set_aside)}
        last = [*self.set_aside.values()][-1]  # in a batch, because no exception of a loading process is seen
        return {"error": f"no unlabelled case can be read any more; the last one: {last}"}


def make_unlabelled_loader(loader: UnlabelledLoader, pin_memory: bool) -> Any:
    """Return batches from nnU-Net's number of loading processes, or from this process if the number is 0.

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
    next(batches)  # start the processes here, like nnU-Net's, and not during the training
    return batches
