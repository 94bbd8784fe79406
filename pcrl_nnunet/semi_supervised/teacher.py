"""The teacher: a moving average of the student, and its pseudo-labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cc3d
import numpy as np
import torch
from scipy.ndimage import find_objects
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class Teacher:
    """A moving average of a network's weights, in evaluation mode and without gradients.

    The momentum of update t is min(1 - 1 / (t + 1), momentum) (Tarvainen & Valpola 2017, with its ramp).

    Args:
        student: the plan's network, without wrappers.
        momentum: upper limit of the momentum.
    """

    def __init__(self, student: nn.Module, momentum: float) -> None:
        def average(averaged: Sequence[Tensor], current: Sequence[Tensor], updates: Tensor | int) -> None:
            share = 1 - min(1 - 1 / (int(updates) + 1), momentum)
            floats = [(a, c) for a, c in zip(averaged, current, strict=True) if a.is_floating_point()]
            if floats:  # batch norms' counters form a separate group
                torch._foreach_lerp_([a for a, _ in floats], [c for _, c in floats], share)

        self.average = AveragedModel(student, multi_avg_fn=average, use_buffers=True).requires_grad_(False).eval()
        network: Any = self.average.module
        network.decoder.deep_supervision = False
        self.all_finite = torch.ones((), dtype=torch.bool, device=next(student.parameters()).device)  # so far

    def update(self, student: nn.Module) -> None:
        """Move the weights towards the student's."""
        with torch.no_grad():
            self.average.update_parameters(student)

    @torch.no_grad()
    def labels(self, images: Tensor, regions: bool) -> Tensor:
        """Predict the labels of patches: (B, 1, *patch) of int16, or (B, R, *patch) of bool for regions.

        Args:
            images: (B, C, *patch).
        """
        logits: Tensor = self.average(images)
        self.all_finite &= logits.isfinite().all()
        return logits.sigmoid() > 0.5 if regions else logits.argmax(1, keepdim=True).to(torch.int16)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the number of updates."""
        return self.average.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the weights and the number of updates from a checkpoint."""
        self.average.load_state_dict(dict(state))


def keep_largest_pieces(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Keep the largest piece of each class in each patch; other pieces become background.

    Pieces are connected by faces, edges or corners.

    Args:
        labels: (B, 1, *patch) label maps, or (B, R, *patch) regions of bool.
        classes: values of a label map, or channels of regions.
    """
    if not classes:
        return labels
    kept = labels.cpu().numpy().copy()
    if kept.dtype == bool:
        for region in classes:  # regions overlap
            kept[:, region] = _largest(kept[:, region].astype(np.uint8), [1])
    else:
        kept[:, 0] = _largest(kept[:, 0], classes)
    return torch.from_numpy(kept).to(labels.device)


def _largest(labels: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Keep the largest pieces of the classes in label maps (B, *patch), with one search for all.

    The search looks only into the box that holds the classes in all patches.
    """
    count = 1 + int(labels.max())
    has_class = np.zeros(count, bool)
    has_class[[number for number in classes if number < count]] = True
    shown = has_class[labels].any(0)  # (*patch)
    if not shown.any():
        return labels
    box = (slice(None), *find_objects(shown.astype(np.uint8))[0])
    kept = labels.copy()
    kept[box] = _largest_in(labels[box], classes, count)
    return kept


def _largest_in(labels: np.ndarray, classes: Sequence[int], count: int) -> np.ndarray:
    """Keep the largest pieces in a box of label maps.

    Args:
        count: number of the values of labels.
    """
    patches = np.arange(len(labels), dtype=np.uint32).reshape(-1, *[1] * (labels.ndim - 1))
    # a value for each class of each patch: pieces of different values are never connected
    values = np.where(np.isin(labels, classes), labels + count * patches, 0).astype(np.uint32)
    stacked = values.reshape(-1, *values.shape[-2:])
    pieces = cc3d.connected_components(stacked, connectivity=26)
    sizes = np.bincount(pieces.ravel())
    value_of = np.zeros(len(sizes), np.uint32)
    value_of[pieces.ravel()] = stacked.ravel()
    largest: dict[int, int] = {}
    for piece in range(1, len(sizes)):
        best = largest.setdefault(int(value_of[piece]), piece)
        if sizes[piece] > sizes[best]:
            largest[int(value_of[piece])] = piece
    is_surplus = np.ones(len(sizes), bool)
    is_surplus[[0, *largest.values()]] = False
    return np.where(is_surplus[pieces].reshape(labels.shape), 0, labels).astype(labels.dtype)
