"""One vector a case, from all stages of an encoder.

C: image channels, D: length of a vector, *: space.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from pcrl_nnunet.features.windows import windows_of
from pcrl_nnunet.views.sub_crop import Volume

WINDOWS_AT_ONCE = 4


def embedding(encoder: nn.Module, volume: Volume, patch_size: Sequence[int], device: torch.device) -> np.ndarray:
    """Return the vector (D,) of a case: means, then maxima, of the channels of every stage, from fine to coarse.

    Windows of the patch size cover the case. Only the windows at work are in memory. A mean is the mean over all
    windows, a maximum the largest of all windows. Instance norm is computed within a window, as in nnU-Net's training.

    Args:
        encoder: returns the features of all stages, such as the encoder of nnU-Net's U-Nets.
        volume: (C, *), read by slicing. With a patch of two axes, slices along the first axis are windows.
        patch_size: size of the windows, voxels.
        device: where the encoder is.
    """
    means: list[Tensor] = []
    maxima: list[Tensor] = []
    windows, number = windows_of(volume, patch_size), 0
    while batch := list(itertools.islice(windows, WINDOWS_AT_ONCE)):
        with torch.no_grad(), precision(device):
            features = encoder(torch.from_numpy(np.stack(batch)).to(device))
        flat = [feature.float().flatten(2) for feature in features]
        sums = [feature.mean(2).sum(0) for feature in flat]
        largest = [feature.amax((0, 2)) for feature in flat]
        means = [a + b for a, b in zip(means, sums, strict=True)] if number else sums
        maxima = [torch.maximum(a, b) for a, b in zip(maxima, largest, strict=True)] if number else largest
        number += len(batch)
    parts = [part for mean, maximum in zip(means, maxima, strict=True) for part in (mean / number, maximum)]
    return torch.cat(parts).cpu().numpy()


def columns(widths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the stage (D,) and the pooling (D,), ``mean`` or ``maximum``, of each entry of a vector.

    Args:
        widths: number of channels of each stage.
    """
    stages = [stage for stage, width in enumerate(widths) for _ in range(2 * width)]
    poolings = [pooling for width in widths for pooling in ("mean", "maximum") for _ in range(width)]
    return np.array(stages), np.array(poolings)


def precision(device: torch.device) -> AbstractContextManager[None]:
    """Return nnU-Net's precision on a device: mixed on a GPU, full on a CPU."""
    return torch.autocast("cuda") if device.type == "cuda" else nullcontext()
