import pickle

import blosc2
import numpy as np
import pytest

from pcrl_nnunet.classification.label_table import LabelTable
from pcrl_nnunet.classification.loader import ClassificationLoader
from pcrl_nnunet.classification.patches import cut, fitting_batch, tiles, voxels_of
from pcrl_nnunet.loading.cases import Case


def image(*shape):
    return np.arange(1, 2 * np.prod(shape) + 1, dtype=np.float32).reshape(2, *shape)


@pytest.mark.parametrize("size", [(3, 3, 3), (4, 4, 4), (1, 5, 2)])
def test_a_patch_has_its_place_in_the_middle(size):
    volume = image(9, 9, 9)
    patch = cut(volume, (4.2, 4.4, 3.6), size)
    assert patch.shape == (2, *size)
    assert patch[(0, *(n // 2 for n in size))] == volume[0, 4, 4, 4]
    start = [4 - n // 2 for n in size]
    np.testing.assert_array_equal(
        patch, volume[(slice(None), *(slice(s, s + n) for s, n in zip(start, size, strict=True)))]
    )


@pytest.mark.parametrize("centre", [(0, 4, 4), (8, 8, 8), (-1, 4, 9)])
def test_a_patch_has_zeros_beyond_the_image(centre):
    volume = image(9, 9, 9)
    padded = np.pad(volume, ((0, 0), (10, 10), (10, 10), (10, 10)))
    expected = padded[(slice(None), *(slice(c + 10 - 2, c + 10 + 3) for c in centre))]
    np.testing.assert_array_equal(cut(volume, centre, (5, 5, 5)), expected)


def test_a_patch_wholly_outside_is_zero():
    assert not cut(image(9, 9, 9), (40, 4, 4), (5, 5, 5)).any()


def test_in_2d_the_nearest_slice_is_taken():
    volume = image(3, 9, 9)
    np.testing.assert_array_equal(cut(volume, (1.4, 4, 4), (3, 3)), volume[:, 1, 3:6, 3:6])
    np.testing.assert_array_equal(cut(volume, (7, 4, 4), (3, 3)), volume[:, 2, 3:6, 3:6])


@pytest.mark.parametrize("shape", [(5, 9, 12), (1, 30, 7)])
@pytest.mark.parametrize("size", [(4, 6, 8), (6, 8)])
def test_tiles_cover_every_voxel_and_lie_inside_where_they_can(shape, size):
    covered = np.zeros(shape, int)
    volume = np.stack([np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape)])
    for centre in tiles(shape, size):
        patch = cut(volume, centre, size)
        inside = patch[patch > 0].astype(int) - 1
        np.add.at(covered.ravel(), inside, 1)
        room = np.prod([min(n, m) for n, m in zip(size, shape[-len(size) :], strict=True)])
        assert len(inside) == room  # a patch exceeds no edge while the other side has room
    assert (covered > 0).all()


def test_a_smaller_image_lies_in_the_middle_of_its_patch():
    volume = image(4, 4, 4)
    (centre,) = tiles((4, 4, 4), (8, 8, 8))
    patch = cut(volume, centre, (8, 8, 8))
    np.testing.assert_array_equal(patch[:, 2:6, 2:6, 2:6], volume)


def test_millimetres_become_voxels_of_each_axis():
    assert voxels_of(40.0, (2.5, 0.8, 0.8)) == (16, 50, 50)
    assert voxels_of(1.0, (5.0, 1.0)) == (1, 1)


def test_the_batch_has_the_voxels_of_the_plans():
    assert fitting_batch((40, 56, 40), 9, (40, 56, 40)) == 9
    assert fitting_batch((40, 56, 40), 9, (20, 28, 20)) == 32
    assert fitting_batch((40, 56, 40), 1, (40, 56, 40)) == 2


@pytest.fixture
def point_in_an_image_of_places(tmp_path):
    """A loader of one point at 9 7 8 (Z Y X); the three channels of its image hold each voxel's position."""
    image = np.indices((18, 16, 20)).astype(np.float32)
    blosc2.asarray(image, urlpath=str(tmp_path / "c.b2nd"))
    geometry = {"origin": (0.0,) * 3, "spacing": (1.0,) * 3, "direction": tuple(np.eye(3).ravel())}
    properties = {"sitk_stuff": geometry, "bbox_used_for_cropping": [[0, n] for n in image.shape[1:]]}
    properties["shape_after_cropping_and_before_resampling"] = image.shape[1:]
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(properties))
    labels = LabelTable(
        "candidates", ("class",), False, np.array(["c"]), np.array([[8.0, 7.0, 9.0]]), np.ones((1, 1)), {}
    )

    def loader(size, jitter):
        cases = {"c": Case("c", str(tmp_path / "c.b2nd"))}
        batch = 60
        return ClassificationLoader(
            cases, labels, np.array([0]), batch, size, size, lambda **given: given, False, (0, 1, 2), jitter
        )

    return loader


@pytest.mark.parametrize("jitter", [(2.0, 0.0, 3.0), (0.0, 0.0, 0.0)])
def test_patches_move_around_their_point_by_at_most_the_jitter(point_in_an_image_of_places, jitter):
    images = next(point_in_an_image_of_places((4, 6, 4), jitter))["data"].numpy()
    middle = images[:, :, 2, 3, 2] - [9, 7, 8]
    assert (np.abs(middle) <= np.array(jitter) + 0.5).all()
    assert (np.abs(middle).max(0) >= np.floor(np.array(jitter))).all()
    assert ((middle.min(0) < 0) == (np.array(jitter) > 0)).all()  # exceeds both sides


def test_in_2d_a_patch_moves_within_the_slice_of_its_point(point_in_an_image_of_places):
    images = next(point_in_an_image_of_places((6, 4), (2.0, 2.0)))["data"].numpy()
    assert images.shape == (60, 3, 6, 4)
    assert (images[:, 0] == 9).all()
    assert len(np.unique(images[:, 1, 3, 2])) > 2
