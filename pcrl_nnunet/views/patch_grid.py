"""A grid of patches of one crop: its sizes from a plan, the patches, and their neighbours above.

A crop is divided into cells, disjoint or half overlapping. A patch is a part of its cell at a random place. Sizes are
in voxels, axes in nnU-Net's order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from pcrl_nnunet.views.boxes import Box
from pcrl_nnunet.views.settings import Size


@dataclass(frozen=True)
class PatchGrid:
    """The geometry of a grid of patches.

    The rows lie along the axis with the most patches, the first of several such axes. A row has a patch in each column.

    Attributes:
        number: number of patches along each axis.
        cell_size: size of a cell, voxels.
        patch_size: size of a patch, voxels; at most a cell's.
        overlap: share of a cell that overlaps with the next cell, 0 to 0.5.
    """

    number: Size
    cell_size: Size
    patch_size: Size
    overlap: float

    @property
    def steps(self) -> Size:
        """Distance of the cells along each axis, voxels."""
        return tuple(max(1, math.ceil(cell * (1 - self.overlap))) for cell in self.cell_size)

    @property
    def crop_size(self) -> Size:
        """Size of the crop that holds all cells, voxels."""
        sizes = zip(self.number, self.steps, self.cell_size, strict=True)
        return tuple((number - 1) * step + cell for number, step, cell in sizes)

    @property
    def axis(self) -> int:
        """The axis of the rows."""
        return self.number.index(max(self.number))

    @property
    def columns(self) -> Size:
        """Number of columns along each of the other axes."""
        return tuple(number for axis, number in enumerate(self.number) if axis != self.axis)

    @property
    def rows_above(self) -> int:
        """Number of rows that are seen: half of all rows."""
        return max(self.number) // 2

    @property
    def first_below(self) -> int:
        """First predicted row. It shares no voxel with the rows above, so overlapping cells skip one row."""
        return self.rows_above + (1 if self.overlap else 0)

    @property
    def rows(self) -> tuple[int, ...]:
        """The rows that are seen, then the predicted rows."""
        return (*range(self.rows_above), *range(self.first_below, max(self.number)))

    def draw_patches(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw each patch of a crop (C, *crop size) at a place in its cell: (rows, columns, C, *patch size)."""
        free = [cell - patch for cell, patch in zip(self.cell_size, self.patch_size, strict=True)]
        patches = []
        for row, column in itertools.product(self.rows, np.ndindex(self.columns)):
            place = [*column[: self.axis], row, *column[self.axis :]]
            jitter = rng.integers(0, free, endpoint=True)
            first = [p * step + int(j) for p, step, j in zip(place, self.steps, jitter, strict=True)]
            patches.append(crop[Box.of_size(first, self.patch_size).index()])
        return np.stack(patches).reshape(len(self.rows), -1, len(crop), *self.patch_size)

    def mosaic(self, patches: np.ndarray) -> np.ndarray:
        """Return the patches of `draw_patches` beside each other, with gaps between them, for display: (C, *size)."""
        size = [number * (edge + 1) - 1 for number, edge in zip(self.number, self.patch_size, strict=True)]
        whole = np.full((patches.shape[2], *size), patches.min(), patches.dtype)
        numbered = enumerate(itertools.product(self.rows, np.ndindex(self.columns)))
        flat = patches.reshape(-1, *patches.shape[2:])
        for number, (row, column) in numbered:
            place = [*column[: self.axis], row, *column[self.axis :]]
            first = [p * (edge + 1) for p, edge in zip(place, self.patch_size, strict=True)]
            whole[Box.of_size(first, self.patch_size).index()] = flat[number]
        return whole

    def pyramids(self) -> np.ndarray:
        """Return the inverted pyramid above each column: (columns, T), numbers of patches in the rows above.

        A patch counts as row x columns + column. The pyramid ends at the column's own patch in the lowest row above.
        One row higher it is one patch wider on both sides, in all directions. Columns beyond the grid are mirrored.
        """
        last, flat = self.rows_above - 1, math.prod(self.columns)
        found = []
        for column in np.ndindex(self.columns):
            of_column = []
            for row in range(self.rows_above):
                reach = last - row
                for shift in itertools.product(range(-reach, reach + 1), repeat=len(column)):
                    there = [mirrored(c + s, number) for c, s, number in zip(column, shift, self.columns, strict=True)]
                    of_column.append(row * flat + int(np.ravel_multi_index(there, self.columns)))
            found.append(of_column)
        return np.array(found)


def mirrored(index: int, number: int) -> int:
    """Return an index within `number` places, reflected at the first and the last place."""
    if number == 1:
        return 0
    index %= 2 * (number - 1)
    return min(index, 2 * (number - 1) - index)


def smallest_cell(stride: int) -> int:
    """Return the edge of a cell whose patch exceeds the total stride by a voxel and has two places along the axis."""
    return stride + 2


def largest_number(edge: int, stride: int, overlap: float, most: int) -> int:
    """Return how many cells fit along an axis, 1 to `most`."""
    return next((n for n in range(most, 1, -1) if cell_of(edge, n, overlap) >= smallest_cell(stride)), 1)


def cell_of(edge: int, number: int, overlap: float) -> int:
    """Return the largest edge of a cell, of which `number` fit along an axis of a crop; 0: they do not fit."""
    for cell in range(edge, 0, -1):
        if (number - 1) * max(1, math.ceil(cell * (1 - overlap))) + cell <= edge:
            return cell
    return 0


def patch_of(cell: int, stride: int, jitter: float) -> int:
    """Return the edge of a patch: the cell's less a share `jitter`, but above the stride if the cell allows it."""
    return min(max(1, cell - 1), max(stride + 1, round(cell * (1 - jitter)))) if cell > stride + 1 else cell
