from itertools import pairwise

import numpy as np
import pytest

from pcrl_nnunet.loading.reduced import reduced_image, reduced_slices


class Watched:
    """An image that keeps the number of voxels of the largest part that is read."""

    def __init__(self, array):
        self.array, self.shape, self.largest = array, array.shape, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.largest = max(self.largest, part.size)
        return part


def cells(length, number):
    """First and last voxels of the cells, that is all voxels that a cell touches."""
    edges = np.linspace(0, length, number + 1)
    return [slice(int(np.floor(low + 1e-9)), int(np.ceil(high - 1e-9))) for low, high in pairwise(edges)]


@pytest.mark.parametrize("shape", [(40, 21, 33), (3, 8, 9), (1, 50, 5)])
def test_each_cell_of_a_reduced_image_is_the_mean_of_its_voxels(shape):
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    size = (8, 7, 9)
    found = reduced_image(image, size)
    expected = np.empty((2, *size))
    of_axes = [cells(length, number) for length, number in zip(shape, size, strict=True)]
    for place in np.ndindex(*size):
        voxels = tuple(of_axis[i] for of_axis, i in zip(of_axes, place, strict=True))
        expected[(slice(None), *place)] = image[(slice(None), *voxels)].mean((1, 2, 3))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_large_image_is_read_part_by_part():
    image = Watched(np.zeros((1, 320, 8, 8), np.float32))
    reduced_image(image, (32, 8, 8))
    assert image.largest == 10 * 8 * 8


@pytest.mark.parametrize(("length", "indices"), [(100, [10, 30, 50, 70, 90]), (3, [0, 0, 1, 2, 2]), (1, [0] * 5)])
def test_reduced_slices_are_evenly_spaced(length, indices):
    image = np.zeros((2, length, 16, 12), np.float32)
    image += np.arange(length)[:, None, None]
    found = reduced_slices(image, (4, 4), 5)
    assert found.shape == (5, 2, 4, 4)
    assert found[:, 0, 0, 0].tolist() == indices
