"""The images of a classification: crops around points, or patches of cases. B batch, C channels, L outputs, * space."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from pcrl_nnunet.classification.targets import GEOMETRY, Drawing, Targets, to_voxels
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case, CaseVolume
from pcrl_nnunet.views.configure import MIN_BOTTLENECK_VOXELS
from pcrl_nnunet.views.sub_crop import Volume

TILE_STEP = 0.5  # of a patch, between those that cover a case; nnU-Net's


def crop_size(crop_mm: float, spacing: Sequence[float]) -> tuple[int, ...]:
    """Voxels of a crop's edges, an axis an entry."""
    return tuple(max(1, round(crop_mm / s)) for s in spacing)


def input_size(targets: Targets, crop_mm: float, configuration: Any) -> tuple[int, ...]:
    """Of the network, voxels: a patch for cases, a crop for points.

    Args:
        configuration: nnU-Net's ConfigurationManager.

    Raises:
        UserError: a crop of which the encoder leaves too little.
    """
    size = tuple(int(n) for n in configuration.patch_size)
    if targets.point is not None:
        size = crop_size(crop_mm, configuration.spacing)
    strides = configuration.network_arch_init_kwargs["strides"]
    total = [math.prod(stride[axis] for stride in strides) for axis in range(len(size))]
    left = math.prod(math.ceil(s / t) for s, t in zip(size, total, strict=True))
    if left < MIN_BOTTLENECK_VOXELS:
        raise UserError(
            f"crops of {crop_mm} mm are {'x'.join(map(str, size))} voxels, of which an encoder with total stride "
            f"{'x'.join(map(str, total))} leaves {left}; at least {MIN_BOTTLENECK_VOXELS} are needed: raise "
            f"pcrl.classify.crop_mm"
        )
    return size


def cut(volume: Volume, centre: Sequence[float], size: Sequence[int]) -> np.ndarray:
    """(C, *size) around a place of a volume (C, *spatial), zeros where it reaches beyond, as nnU-Net pads.

    In 2D the first axis of the volume is that of the slices, of which the nearest is taken.

    Args:
        centre: an axis of the volume an entry, voxels; becomes voxel n // 2 of the crop.
    """
    shape = volume.shape[1:]
    flat = len(shape) - len(size)  # 1 in 2D
    whole = (1,) * flat + tuple(size)
    lower = [math.floor(c + 0.5) - n // 2 for c, n in zip(centre, whole, strict=True)]
    if flat:
        lower[0] = min(max(lower[0], 0), shape[0] - 1)
    inside = [(max(0, low), min(low + n, limit)) for low, n, limit in zip(lower, whole, shape, strict=True)]
    crop = np.zeros((volume.shape[0], *whole), np.float32)
    if all(start < end for start, end in inside):
        destinations = [slice(start - low, end - low) for (start, end), low in zip(inside, lower, strict=True)]
        sources = [slice(start, end) for start, end in inside]
        crop[tuple([slice(None), *destinations])] = volume[tuple([slice(None), *sources])]
    return crop[:, 0] if flat else crop


def tiles(shape: Sequence[int], size: Sequence[int]) -> list[tuple[float, ...]]:
    """Centres of the patches that cover an image of this spatial shape, as `cut` takes them."""
    flat = len(shape) - len(size)
    padded = tuple(max(a, b) for a, b in zip(shape[flat:], size, strict=True))
    steps = compute_steps_for_sliding_window(padded, tuple(size), TILE_STEP)
    # a smaller image lies in the middle of its one patch
    shifts = [(n - m) // 2 if m < n else 0 for m, n in zip(shape[flat:], size, strict=True)]
    axes = [[s - shift + n // 2 for s in of_axis] for of_axis, shift, n in zip(steps, shifts, size, strict=True)]
    return list(product(*([range(shape[0])] if flat else []), *axes))


class ClassificationLoader(SlimDataLoaderBase):
    """Batches for training: ``data`` (B, C, *size), ``target`` (B, L) with NaN for unknown, ``keys``, B case names.

    Args:
        cases: by name.
        targets: with `samples`, those to draw from.
        size: of the network's input.
        read_size: what is cut before `transform` turns it and takes its middle.
        transform: nnU-Net's, of ``image`` and ``segmentation``; here there is nothing in the latter.
        jitter: voxels, how far a point may move along each axis.
        transpose: the plan's transpose_forward.
    """

    def __init__(
        self,
        cases: Mapping[str, Case],
        targets: Targets,
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
        self.cases, self.targets, self.drawing = cases, targets, Drawing(targets, samples, balanced)
        self.size, self.read_size, self.transform = size, read_size, transform
        self.jitter, self.transpose = jitter, transpose

    def generate_train_batch(self) -> dict[str, Any]:
        """Drawn by numpy's global generator, which nnU-Net's augmenters seed in every process."""
        rng = np.random.default_rng(np.random.randint(2**31))
        drawn = self.drawing(rng, self.batch_size)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            images = torch.stack([self._image(index, rng) for index in drawn])
        finally:
            torch.set_num_threads(threads)
        target = torch.from_numpy(self.targets.value[drawn].astype(np.float32))
        return {"data": images, "target": target, "keys": [str(name) for name in self.targets.case[drawn]]}

    def _image(self, index: int, rng: np.random.Generator) -> torch.Tensor:
        case = self.cases[str(self.targets.case[index])]
        volume = CaseVolume(case)
        shape = volume.shape[1:]
        if self.targets.point is None:
            centre = self._anywhere(shape, rng)
        else:
            (place,) = places(self.targets.point[[index]], case, shape, self.transpose)
            flat = len(shape) - len(self.size)
            centre = [*place[:flat], *(place[flat:] + rng.uniform(-1, 1, len(self.size)) * self.jitter)]
        image = torch.from_numpy(cut(volume, centre, self.read_size))
        nothing = torch.zeros((1, *self.read_size), dtype=torch.int16)
        turned: torch.Tensor = self.transform(image=image, segmentation=nothing)["image"]
        return turned

    def _anywhere(self, shape: Sequence[int], rng: np.random.Generator) -> list[float]:
        """The centre of a patch that lies in the image, or has it in its middle where it is larger."""
        flat = len(shape) - len(self.size)
        centre: list[float] = [float(rng.integers(n)) for n in shape[:flat]]
        for length, n in zip(shape[flat:], self.size, strict=True):
            lower = rng.integers(length - n + 1) if length >= n else -((n - length) // 2)
            centre.append(float(lower + n // 2))
        return centre


def places(points: np.ndarray, case: Case, shape: Sequence[int], transpose: Sequence[int]) -> np.ndarray:
    """(N, 3) in voxels of a case's image, of points (N, 3) in world mm."""
    return to_voxels(points, _geometry(case.path.rsplit(".", 1)[0] + ".pkl"), shape, transpose)


@cache
def _geometry(path: str) -> dict[str, Any]:
    """What `to_voxels` needs of a case's properties, read once: the file holds megabytes of label locations."""
    properties = load_pickle(path)
    return {name: properties[name] for name in GEOMETRY if name in properties}


def crops_of(
    volume: Volume, centres: Sequence[Sequence[float]], size: Sequence[int], batch: int
) -> Iterator[torch.Tensor]:
    """(at most `batch`, C, *size), in order."""
    for start in range(0, len(centres), batch):
        yield torch.from_numpy(np.stack([cut(volume, centre, size) for centre in centres[start : start + batch]]))
