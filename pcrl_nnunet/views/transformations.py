"""Flips and quarter turns of a batch of images, told by bits (PCRLv1: Zhou et al., ICCV 2021).

B: samples, C: channels, d: axes, *: space. An indicator has one bit for the flip of each axis. If quarter turns are
allowed, four bits follow, of which the bit of the number of quarters is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pcrl_nnunet.views.turns import planes_of_quarters

QUARTERS = 4


@dataclass(frozen=True)
class Transformations:
    """Flips of all axes, then a turn by quarters in one plane.

    Attributes:
        dim: d.
        plane: the two axes that a quarter turn exchanges; None: no turns.
    """

    dim: int
    plane: tuple[int, int] | None = None

    @property
    def bits(self) -> int:
        """Number of bits: 3 or 7 in 3D, 2 or 6 in 2D."""
        return self.dim + (QUARTERS if self.plane is not None else 0)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw an indicator (bits,) float32: each flip with probability 0.5, each number of quarters with 0.25."""
        indicator = np.zeros(self.bits, np.float32)
        indicator[: self.dim] = rng.random(self.dim) < 0.5
        if self.plane is not None:
            indicator[self.dim + rng.integers(QUARTERS)] = 1
        return indicator

    def apply(self, images: Tensor, indicator: Tensor) -> Tensor:
        """Return the transformed images (B, C, *), each by its own indicator (B, bits)."""
        on = indicator > 0.5
        for axis in range(self.dim):
            images = _where(on[:, axis], images.flip(axis + 2), images)
        return images if self.plane is None else turned(images, on[:, self.dim :].long().argmax(1), self.plane)


def turned(images: Tensor, quarters: Tensor, plane: Sequence[int]) -> Tensor:
    """Return images (B, C, *), each turned by its own number of quarters (B,), like `Turn.apply`."""
    axes = [axis + 2 for axis in plane]
    for number in range(1, QUARTERS):
        # quarters refers to the original image, and each image takes at most one of the turns
        images = _where(quarters == number, torch.rot90(images, number, axes), images)
    return images


def plane_of_quarters(spacing: Sequence[float], size: Sequence[int] | None = None) -> tuple[int, int] | None:
    """Return the plane for quarter turns: the last one whose two spacings agree, such as the axial plane.

    Args:
        spacing: mm for each axis.
        size: size of the image, voxels. If the edges in the plane differ, there is no such plane.
    """
    planes = planes_of_quarters(spacing)
    if not planes or (size is not None and len({size[axis] for axis in planes[-1]}) > 1):
        return None
    return planes[-1]


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *[1] * (one.ndim - 1)), one, other)
