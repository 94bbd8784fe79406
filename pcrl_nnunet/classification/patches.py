"""Patches of images, around points or covering a case. C: channels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from pcrl_nnunet.classification.label_table import LabelTable
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.views.configure import MIN_BOTTLENECK_VOXELS
from pcrl_nnunet.views.sub_crop import Volume

TILE_STEP = 0.5  # distance of patches that cover a case, in patches; nnU-Net's value

MAX_BATCH = 32  # the paper's value


def fitting_batch(patch_size: Sequence[int], batch_size: int, size: Sequence[int]) -> int:
    """Return the batch size, 2 to 32, with as many voxels as the plan's batch of patches."""
    return max(2, min(MAX_BATCH, math.prod(patch_size) * batch_size // math.prod(size)))


def voxels_of(patch_mm: float, spacing: Sequence[float]) -> tuple[int, ...]:
    """Return the edges of a patch around a point, in voxels."""
    return tuple(max(1, round(patch_mm / s)) for s in spacing)


def input_size(table: LabelTable, patch_mm: float, configuration: Any) -> tuple[int, ...]:
    """Return the network's input size in voxels: the plan's patch for cases, a patch of `patch_mm` for points.

    Args:
        configuration: nnU-Net's ConfigurationManager.

    Raises:
        UserError: the encoder leaves too few voxels of a patch.
    """
    size = tuple(int(n) for n in configuration.patch_size)
    if table.point is not None:
        size = voxels_of(patch_mm, configuration.spacing)
    strides = configuration.network_arch_init_kwargs["strides"]
    total = [math.prod(stride[axis] for stride in strides) for axis in range(len(size))]
    left = math.prod(math.ceil(s / t) for s, t in zip(size, total, strict=True))
    if left < MIN_BOTTLENECK_VOXELS:
        raise UserError(
            f"patches of {patch_mm} mm are {'x'.join(map(str, size))} voxels, and an encoder with total stride "
            f"{'x'.join(map(str, total))} leaves {left}; at least {MIN_BOTTLENECK_VOXELS} are needed: raise "
            f"pcrl.classify.patch_mm"
        )
    return size


def cut(volume: Volume, centre: Sequence[float], size: Sequence[int]) -> np.ndarray:
    """Cut (C, *size) around a place of a volume (C, *spatial), padded with zeros like nnU-Net's patches.

    In 2D the volume's first axis counts slices, and the nearest slice is used.

    Args:
        centre: voxels, a coordinate for each axis of the volume; it becomes voxel n // 2 of the patch.
    """
    shape = volume.shape[1:]
    flat = len(shape) - len(size)  # 1 in 2D
    whole = (1,) * flat + tuple(size)
    lower = [math.floor(c + 0.5) - n // 2 for c, n in zip(centre, whole, strict=True)]
    if flat:
        lower[0] = min(max(lower[0], 0), shape[0] - 1)
    inside = [(max(0, low), min(low + n, limit)) for low, n, limit in zip(lower, whole, shape, strict=True)]
    patch = np.zeros((volume.shape[0], *whole), np.float32)
    if all(start < end for start, end in inside):
        destinations = [slice(start - low, end - low) for (start, end), low in zip(inside, lower, strict=True)]
        sources = [slice(start, end) for start, end in inside]
        patch[tuple([slice(None), *destinations])] = volume[tuple([slice(None), *sources])]
    return patch[:, 0] if flat else patch


def tiles(shape: Sequence[int], size: Sequence[int]) -> list[tuple[float, ...]]:
    """Return the centres, for `cut`, of the patches that cover an image of this spatial shape."""
    flat = len(shape) - len(size)
    padded = tuple(max(a, b) for a, b in zip(shape[flat:], size, strict=True))
    steps = compute_steps_for_sliding_window(padded, tuple(size), TILE_STEP)
    # a smaller image lies in the middle of its only patch
    shifts = [(n - m) // 2 if m < n else 0 for m, n in zip(shape[flat:], size, strict=True)]
    axes = [[s - shift + n // 2 for s in of_axis] for of_axis, shift, n in zip(steps, shifts, size, strict=True)]
    return list(product(*([range(shape[0])] if flat else []), *axes))


def patches_of(
    volume: Volume, centres: Sequence[Sequence[float]], size: Sequence[int], batch: int
) -> Iterator[torch.Tensor]:
    """Yield batches of patches (at most `batch`, C, *size) in the order of the centres."""
    for start in range(0, len(centres), batch):
        yield torch.from_numpy(np.stack([cut(volume, centre, size) for centre in centres[start : start + batch]]))
