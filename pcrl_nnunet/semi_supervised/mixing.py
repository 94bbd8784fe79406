"""Patches that are pasted into each other, with their labels. Pure functions; random numbers come in.

B patches of C channels, shape (B, C, *patch); boxes and parts are (B, 1, *patch) of bool. Labels are nnU-Net's targets:
(B, 1, *patch) of int16, or (B, R, *patch) of bool for R regions, after which a channel marks ignored voxels where the
dataset has an ignore label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate


def random_boxes(rng: np.random.Generator, number: int, patch: Sequence[int], share: float) -> Tensor:
    """Return masks that are true in one random box each, (B, 1, *patch).

    Args:
        share: the box's edge as a share of the patch's, along each axis.
    """
    boxes = torch.zeros(number, 1, *patch, dtype=torch.bool)
    for box in boxes[:, 0]:
        edges = [max(1, round(share * n)) for n in patch]
        starts = [int(rng.integers(0, n - edge + 1)) for n, edge in zip(patch, edges, strict=True)]
        box[tuple(slice(start, start + edge) for start, edge in zip(starts, edges, strict=True))] = True
    return boxes


def labelled_parts(boxes: Tensor, around: int) -> Tensor:
    """Return where the labelled patches show: the two directions of bidirectional copy-paste.

    Args:
        around: number of first samples in which they show around the box; in the others they show in the box.
    """
    outside = torch.arange(len(boxes), device=boxes.device) < around
    return boxes ^ outside.view(-1, *[1] * (boxes.ndim - 1))


def paste(here: Tensor, elsewhere: Tensor, part: Tensor) -> Tensor:
    """Return patches that show `here` in the part, and `elsewhere` around the part."""
    return torch.where(part, here, elsewhere)


def with_ignored(labels: Tensor, part: Tensor, ignored: int) -> Tensor:
    """Return labels of which only the part counts in the loss.

    Args:
        labels: label maps, or regions with a last channel for ignored voxels.
        ignored: value of ignored voxels in label maps.
    """
    if labels.dtype == torch.bool:
        return torch.cat([labels[:, :-1], labels[:, -1:] | ~part], 1)
    return torch.where(part, labels, ignored)


def at_scales(labels: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return labels at the sizes of nnU-Net's deep supervision, as its `DownsampleSegForDSTransform` does.

    Args:
        like: targets that have the wanted sizes.
    """
    sizes = [target.shape[2:] for target in like]
    return [
        labels if size == labels.shape[2:] else interpolate(labels.float(), size, mode="nearest-exact").to(labels.dtype)
        for size in sizes
    ]
