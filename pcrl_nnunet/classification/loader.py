"""Batches for the training of a classification. B: batch, C: channels, L: outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase

from pcrl_nnunet.classification.drawing import Drawing
from pcrl_nnunet.classification.label_table import LabelTable
from pcrl_nnunet.classification.patches import cut
from pcrl_nnunet.classification.world import places
from pcrl_nnunet.loading.cases import Case, CaseVolume


class ClassificationLoader(SlimDataLoaderBase):
    """Batches in the form that nnU-Net's trainers expect.

    ``data`` is (B, C, *size), ``target`` is (B, L) with NaN for unknown labels, ``keys`` holds B names of cases.

    Args:
        cases: cases by name.
        samples: indices of the table's samples to draw from.
        size: the network's input, voxels.
        read_size: size of the patch that `transform` rotates and crops to its middle.
        transform: nnU-Net's transform of ``image`` and ``segmentation``; the segmentation is empty here.
        balanced: see `Drawing`.
        jitter: the largest shift of a point along each axis, voxels.
        transpose: the plan's transpose_forward.
    """

    def __init__(
        self,
        cases: Mapping[str, Case],
        table: LabelTable,
        samples: np.ndarray,
        batch_size: int,
        size: Sequence[int],
        read_size: Sequence[int],
        transform: Callable[..., dict[str, Any]],
        balanced: bool,
        transpose: Sequence[int],
        jitter: Sequence[float] = (),
    ) -> None:
        super().__init__(None, batch_size)
        self.cases, self.table, self.drawing = cases, table, Drawing(table, samples, balanced)
        self.size, self.read_size, self.transform = size, read_size, transform
        self.jitter, self.transpose = jitter, transpose

    def generate_train_batch(self) -> dict[str, Any]:
        """Draw a batch with numpy's global generator, which nnU-Net's augmenters seed in every process."""
        rng = np.random.default_rng(np.random.randint(2**31))
        drawn = self.drawing(rng, self.batch_size)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            images = torch.stack([self._image(index, rng) for index in drawn])
        finally:
            torch.set_num_threads(threads)
        target = torch.from_numpy(self.table.value[drawn].astype(np.float32))
        return {"data": images, "target": target, "keys": [str(name) for name in self.table.case[drawn]]}

    def _image(self, index: int, rng: np.random.Generator) -> torch.Tensor:
        case = self.cases[str(self.table.case[index])]
        volume = CaseVolume(case)
        shape = volume.shape[1:]
        if self.table.point is None:
            centre = self._anywhere(shape, rng)
        else:
            (place,) = places(self.table.point[[index]], case, shape, self.transpose)
            flat = len(shape) - len(self.size)
            centre = [*place[:flat], *(place[flat:] + rng.uniform(-1, 1, len(self.size)) * self.jitter)]
        image = torch.from_numpy(cut(volume, centre, self.read_size))
        nothing = torch.zeros((1, *self.read_size), dtype=torch.int16)
        return self.transform(image=image, segmentation=nothing)["image"]

    def _anywhere(self, shape: Sequence[int], rng: np.random.Generator) -> list[float]:
        """Draw the centre of a patch within the image. Along an axis where the patch is larger it covers the image."""
        flat = len(shape) - len(self.size)
        centre: list[float] = [float(rng.integers(n)) for n in shape[:flat]]
        for length, n in zip(shape[flat:], self.size, strict=True):
            lower = rng.integers(length - n + 1) if length >= n else -((n - length) // 2)
            centre.append(float(lower + n // 2))
        return centre
