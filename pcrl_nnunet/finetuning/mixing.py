"""Pasting of patches into each other, with their labels. Pure functions; randomness comes in as an argument.

Patches are (B, C, *patch), boxes and parts (B, 1, *patch) of bool. Labels are nnU-Net's targets: (B, 1, *patch) of
int16, or (B, R, *patch) of bool for R regions. If the dataset has an ignore label, a last channel of the regions marks
ignored voxels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pcrl_nnunet.views.boxes import Box, sample_inside


def random_boxes(rng: np.random.Generator, number: int, patch: Sequence[int], share: float) -> Tensor:
    """Draw masks (B, 1, *patch), each true in one random box.

    Args:
        share: the box's edge as a share of the patch's edge, along each axis. Of two or more voxels, one at least
            stays outside.
    """
    boxes = torch.zeros(number, 1, *patch, dtype=torch.bool)
    whole, edges = Box.of_size([0] * len(patch), patch), tuple(max(1, min(n - 1, round(share * n))) for n in patch)
    for box in boxes:
        box[sample_inside(whole, edges, rng).index()] = True
    return boxes


def labelled_parts(boxes: Tensor, around: int) -> Tensor:
    """Return masks of the labelled patches: the two directions of bidirectional copy-paste.

    Args:
        around: number of first samples whose labelled patch lies around the box; in the other samples it fills the box.
    """
    outside = torch.arange(len(boxes), device=boxes.device) < around
    return boxes ^ outside.view(-1, *[1] * (boxes.ndim - 1))


def paste(here: Tensor, elsewhere: Tensor, part: Tensor) -> Tensor:
    """Return patches with `here` in the part and `elsewhere` around it."""
    return torch.where(part, here, elsewhere)


def with_ignored(labels: Tensor, part: Tensor, ignored: int) -> Tensor:
    """Return labels in which only the part counts in the loss.

    Args:
        labels: label maps, or regions with a last channel for ignored voxels.
        ignored: value of ignored voxels in label maps.
    """
    if labels.dtype == torch.bool:
        return torch.cat([labels[:, :-1], labels[:, -1:] | ~part], 1)
    return torch.where(part, labels, ignored)


def at_scales(labels: Tensor, like: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Downsample labels to the sizes of nnU-Net's deep supervision, like its `DownsampleSegForDSTransform`.

    Args:
        like: targets of the wanted sizes. A single target stands for no deep supervision.
    """
    if isinstance(like, Tensor):
        return labels
    sizes = [target.shape[2:] for target in like]
    return [
        labels if size == labels.shape[2:] else interpolate(labels.float(), size, mode="nearest-exact").to(labels.dtype)
        for size in sizes
    ]
