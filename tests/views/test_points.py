"""Points that both views of a pair show, on maps whose inverse is computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pcrl_nnunet.views import SubCropTransform
from pcrl_nnunet.views.boxes import Box, ViewBoxes
from pcrl_nnunet.views.points import PointsTransform, common_points
from pcrl_nnunet.views.settings import Augmentation, ViewSettings
from pcrl_nnunet.views.spatial import AffineMap
from pcrl_nnunet.views.sub_crop import MAX_TRIES


def plain(lower, size, zoom=1.0):
    """Return the map of an axis-parallel view whose first voxel is at `lower`."""
    centre = np.add(lower, zoom * (np.array(size) - 1) / 2)
    return AffineMap(zoom * np.eye(len(size)), centre, tuple(size), (zoom,) * len(size))


class Pairs:
    """Draws the given maps, and counts its draws."""

    def __init__(self, *maps):
        self.maps, self.draws = maps, 0

    def __call__(self, **data_dict):
        self.draws += 1
        box = Box((0, 0), (8, 8))
        boxes = ViewBoxes((box, Box((12, 12), (20, 20))), box, ())
        return {**data_dict, "maps": {"target": list(self.maps)}, "boxes": boxes}


def drawn(pairs, number=10):
    image = np.zeros((1, 30, 30), np.float32)
    return PointsTransform(pairs, number)(data=image, rng=np.random.default_rng(0))


def test_indices_and_positions_are_inverse_and_a_quarter_turn_is_as_by_hand():
    turned = AffineMap(np.array([[0.0, -2.0], [2.0, 0.0]]), np.array([10.0, 20.0]), (5, 3), (2.0, 2.0))
    # the index (4, 1) is 2 steps along the first axis from the centre (2, 1)
    np.testing.assert_allclose(turned.positions(np.array([[2.0, 1.0], [4.0, 1.0]])), [[10, 20], [10, 24]])
    index = np.random.default_rng(0).random((7, 2))
    np.testing.assert_allclose(turned.indices(turned.positions(index)), index)


def test_common_points_fill_the_overlap_and_nothing_else():
    found = common_points(plain((2, 3), (10, 10)), plain((7, 8), (6, 6), 2.0), (30, 30), 500, np.random.default_rng(0))
    assert len(found) == 500
    np.testing.assert_allclose(found.min(0), (7, 8), atol=0.1)
    np.testing.assert_allclose(found.max(0), (11, 12), atol=0.1)
    assert np.histogram2d(*found.T, bins=2)[0].min() > 90


def test_points_lie_inside_the_image_where_views_reach_beyond_it():
    view = plain((-5, -5), (20, 20))
    found = common_points(view, view, (10, 12), 200, np.random.default_rng(0))
    assert (found >= 0).all()
    assert (found <= (9, 11)).all()


def test_an_axis_of_one_voxel_has_points():
    view = AffineMap(np.diag([1 / 8, 1.0]), np.array([0.0, 4.5]), (8, 10), (1 / 8, 1.0))
    assert len(common_points(view, view, (1, 10), 50, np.random.default_rng(0))) == 50
    assert len(common_points(plain((0, 0), (1, 10)), view, (1, 10), 50, np.random.default_rng(0))) == 50


def test_a_pair_with_too_little_overlap_is_drawn_anew_and_then_a_view_is_taken_twice():
    pairs = Pairs(plain((0, 0), (8, 8)), plain((12, 12), (8, 8)))
    made = drawn(pairs)
    assert pairs.draws == MAX_TRIES
    one, two = made["maps"]["target"]
    assert one is two
    assert made["boxes"].pair[0] == made["boxes"].pair[1]
    np.testing.assert_array_equal(made["points"][0], made["points"][1])
    assert len(np.unique(made["points"][0], axis=0)) == 10


def test_a_pair_with_enough_overlap_is_drawn_once():
    pairs = Pairs(plain((0, 0), (8, 8)), plain((2, 3), (8, 8)))
    points = drawn(pairs)["points"]
    assert pairs.draws == 1
    assert points.dtype == np.float32
    np.testing.assert_allclose(points[0] - points[1], np.broadcast_to((2, 3), (10, 2)), atol=1e-5)


@pytest.mark.parametrize("degrees", [10.0, 180.0])
def test_pairs_of_an_iou_of_a_third_have_enough_points_at_once(degrees):
    views = ViewSettings(((20, 24),), ((5, 5),), (16, 16), (5, 5), (1.0, 1.0), num_local=0, min_iou=1 / 3)
    transform = SubCropTransform(views, Augmentation(rotation_degrees=degrees))
    shares = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        made = transform(data=np.random.default_rng(0).normal(size=(1, 50, 50)), rng=rng)
        found = common_points(*made["maps"]["target"], made["data"].shape[1:], 1000, rng)
        shares.append(len(found) / 1000)
    assert min(shares) == 1
