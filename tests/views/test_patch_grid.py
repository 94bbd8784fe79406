"""Grids of patches: sizes, places, and the pyramids above the columns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pcrl_nnunet.views.patch_grid import PatchGrid, cell_of, largest_number, mirrored, patch_of

GRIDS = [
    PatchGrid((4, 4, 4), (6, 6, 6), (5, 5, 5), 0.0),
    PatchGrid((7, 5), (8, 7), (6, 6), 0.5),
    PatchGrid((2, 5, 3), (4, 6, 6), (3, 5, 4), 0.0),
    PatchGrid((1, 3, 1), (3, 5, 4), (3, 4, 4), 0.0),
]
ON_ALL_GRIDS = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid.number)))


def numbered(grid: PatchGrid) -> np.ndarray:
    """Return a crop whose channels are the coordinates of its voxels."""
    return np.stack(np.meshgrid(*map(np.arange, grid.crop_size), indexing="ij")).astype(np.float32)


@ON_ALL_GRIDS
def test_each_patch_lies_in_its_cell_and_reaches_all_places(grid: PatchGrid) -> None:
    crop, found = numbered(grid), set()
    for seed in range(30):
        patches = grid.draw_patches(crop, np.random.default_rng(seed))
        others = np.ndindex(grid.columns)
        places = [(row, column) for row, column in itertools.product(grid.rows, others)]
        for patch, (row, column) in zip(patches.reshape(-1, *patches.shape[2:]), places, strict=True):
            place = np.insert(np.array(column), grid.axis, row)
            lowest = place * grid.steps
            first = patch.reshape(len(patch), -1)[:, 0]
            last = patch.reshape(len(patch), -1)[:, -1]
            assert (first >= lowest).all()
            assert (last < lowest + grid.cell_size).all()
            assert (last - first + 1 == grid.patch_size).all()
            found.add(tuple(first - lowest))
    free = [cell - patch + 1 for cell, patch in zip(grid.cell_size, grid.patch_size, strict=True)]
    assert len(found) == np.prod(free)


@ON_ALL_GRIDS
def test_rows_above_and_below_share_no_voxel(grid: PatchGrid) -> None:
    end = (grid.rows_above - 1) * grid.steps[grid.axis] + grid.cell_size[grid.axis]
    assert grid.first_below * grid.steps[grid.axis] >= end
    assert grid.rows_above >= 1
    assert grid.rows[-1] == max(grid.number) - 1
    assert len(grid.rows) > grid.rows_above


def test_a_pyramid_is_one_patch_wider_in_each_row_upwards() -> None:
    grid = GRIDS[0]  # two rows above, 4 x 4 columns
    pyramids = grid.pyramids()
    assert pyramids.shape == (16, 9 + 1)
    above = [4 * y + x for y in (0, 1, 2) for x in (1, 2, 3)]
    assert pyramids[4 * 1 + 2].tolist() == [*above, 16 + 4 * 1 + 2]
    mirrored_at_the_corner = [4 * y + x for y in (1, 0, 1) for x in (1, 0, 1)]
    assert pyramids[0].tolist() == [*mirrored_at_the_corner, 16]
    flat = GRIDS[1].pyramids()  # 3 rows above, 5 columns
    assert flat[2].tolist() == [0, 1, 2, 3, 4, 5 + 1, 5 + 2, 5 + 3, 10 + 2]
    assert flat[0].tolist() == [2, 1, 0, 1, 2, 5 + 1, 5 + 0, 5 + 1, 10 + 0]
    assert GRIDS[3].pyramids().tolist() == [[0]]


def test_places_are_mirrored_at_the_ends() -> None:
    assert [mirrored(index, 3) for index in range(-4, 6)] == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1]
    assert [mirrored(index, 1) for index in (-2, 0, 3)] == [0, 0, 0]


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5])
def test_the_cell_is_the_largest_that_fits(overlap: float) -> None:
    for edge, number in itertools.product((5, 16, 37, 64), (1, 2, 3, 7)):
        cell = cell_of(edge, number, overlap)
        if cell:
            assert PatchGrid((number,), (cell,), (1,), overlap).crop_size[0] <= edge
        assert PatchGrid((number,), (cell + 1,), (1,), overlap).crop_size[0] > edge


def test_a_patch_exceeds_the_stride_and_has_two_places() -> None:
    for edge, stride in itertools.product((32, 40, 128), (4, 8, 16)):
        number = largest_number(edge, stride, 0.0, 4)
        cell = cell_of(edge, number, 0.0)
        assert stride < patch_of(cell, stride, 1 / 8) < cell
    assert largest_number(9, 8, 0.0, 4) == 1
    assert patch_of(8, 8, 1 / 8) == 8


@ON_ALL_GRIDS
def test_the_mosaic_has_every_patch_at_its_place(grid: PatchGrid) -> None:
    patches = grid.draw_patches(numbered(grid), np.random.default_rng(0)) + 1
    mosaic = grid.mosaic(patches)
    assert mosaic.shape[1:] == tuple(n * (p + 1) - 1 for n, p in zip(grid.number, grid.patch_size, strict=True))
    corner = tuple(slice(size) for size in grid.patch_size)
    np.testing.assert_array_equal(mosaic[(slice(None), *corner)], patches[0, 0])
    ends = tuple(slice(-size, None) for size in grid.patch_size)
    np.testing.assert_array_equal(mosaic[(slice(None), *ends)], patches[-1, -1])
