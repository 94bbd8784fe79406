import numpy as np
import pytest

from pcrl_nnunet.views.cubes import cube_size, keeps_cubes, turned_cubes, turned_layers

ISOTROPIC, THICK = (1.0, 1.0, 1.0), (3.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("crop", "cube"),
    [
        ((64, 64, 32), (16, 16, 16)),  # PCRLv1's supplement
        ((40, 40, 40), (10, 10, 10)),
        ((24, 24, 24), (12, 12, 12)),
        ((8, 56, 56), (4, 14, 14)),
        ((5, 32, 32), (5, 16, 16)),
        ((1, 32, 32), (1, 16, 16)),
    ],
)
def test_cubes_have_up_to_16_voxels_and_halve_each_axis_that_can_be_cut(crop, cube):
    assert cube_size(crop) == cube


def rotations():
    """Return the 24 rotations of a cube, as signed permutations of the axes."""
    found = []
    for order in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]:
        for signs in np.ndindex(2, 2, 2):
            matrix = np.zeros((3, 3))
            matrix[range(3), order] = 1 - 2 * np.array(signs)
            if np.linalg.det(matrix) > 0:
                found.append((order, np.flatnonzero(signs)))
    return found


def rotated(cube, order, flips):
    return np.flip(cube.transpose(order), flips) if len(flips) else cube.transpose(order)


def test_each_cube_stays_in_its_place_and_is_rotated_by_itself():
    image = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)
    before = image.copy()
    turned = turned_cubes(image, (4, 4, 4), ISOTROPIC, np.random.default_rng(1))
    np.testing.assert_array_equal(image, before)
    found = []
    for corner in np.ndindex(2, 2, 2):
        inside = tuple(slice(4 * c, 4 * c + 4) for c in corner)
        same = [
            number
            for number, rotation in enumerate(rotations())
            if all((rotated(image[c][inside], *rotation) == turned[c][inside]).all() for c in range(2))
        ]
        assert len(same) == 1
        found += same
    assert len(set(found)) > 2


def test_unequal_spacings_allow_half_turns_alone():
    """The first axis then keeps its voxels together with their mirror images."""
    image = np.random.default_rng(0).normal(size=(1, 4, 8, 8))
    turned = turned_cubes(image, (2, 4, 4), THICK, np.random.default_rng(2))
    assert (turned != image).any()
    for layer in range(0, 4, 2):
        for row in range(0, 8, 4):
            for column in range(0, 8, 4):
                inside = (0, slice(layer, layer + 2), slice(row, row + 4), slice(column, column + 4))
                slices = {tuple(sorted(image[inside][z].ravel())) for z in range(2)}
                assert {tuple(sorted(turned[inside][z].ravel())) for z in range(2)} == slices


def test_layers_turn_as_a_whole():
    """With a single turned axis, each slice across this axis stays in its place and is rotated within its plane."""

    class First:
        """A generator that takes the axes in order, turns layers of the first axis, and no others."""

        def __init__(self):
            self.quarters = iter([1, 3, *[0] * 4])

        def permutation(self, number):
            return np.arange(number)

        def integers(self, number):
            assert number == 4
            return next(self.quarters)

    image = np.random.default_rng(0).normal(size=(2, 8, 8, 8))
    turned = turned_layers(image, (4, 4, 4), ISOTROPIC, First())
    np.testing.assert_array_equal(turned[:, :4], np.rot90(image[:, :4], 1, (2, 3)))
    np.testing.assert_array_equal(turned[:, 4:], np.rot90(image[:, 4:], 3, (2, 3)))


@pytest.mark.parametrize("turn", [turned_cubes, turned_layers])
def test_turns_keep_all_voxels(turn):
    image = np.random.default_rng(0).normal(size=(2, 8, 12, 12))
    turned = turn(image, (4, 6, 6), THICK, np.random.default_rng(0))
    assert (turned != image).mean() > 0.25
    for channel, before in zip(turned, image, strict=True):
        np.testing.assert_array_equal(np.sort(channel.ravel()), np.sort(before.ravel()))


def test_quarter_turns_need_equal_edges():
    assert keeps_cubes((4, 4, 4), ISOTROPIC)
    assert not keeps_cubes((2, 4, 4), ISOTROPIC)
    assert keeps_cubes((2, 4, 4), THICK)
