"""Masks of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def grid_of_blocks(size: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Return the number of blocks along each axis of a crop. The last block is cut at the crop's end."""
    return tuple(-(-length // edge) for length, edge in zip(size, block, strict=True))


def draw_masked(size: Sequence[int], block: Sequence[int], share: float, rng: np.random.Generator) -> np.ndarray:
    """Draw the mask of a crop: a share of its blocks, each with the same probability.

    Args:
        size: size of the crop, voxels.
        block: size of a block, voxels.
        share: share of masked blocks, rounded to whole blocks.
        rng: the only source of randomness.

    Returns:
        (*size) of bool.
    """
    blocks = grid_of_blocks(size, block)
    masked = np.zeros(math.prod(blocks), bool)
    masked[: round(share * len(masked))] = True
    grid = rng.permutation(masked).reshape(blocks)
    for axis, edge in enumerate(block):
        grid = grid.repeat(edge, axis)
    return np.ascontiguousarray(grid[tuple(slice(length) for length in size)])
