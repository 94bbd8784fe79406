"""Boxes, and the positions of views."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from box_sets import contains, intersection, iou
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcrl_nnunet.views.boxes import (
    MULTI_CROP_ASPECT,
    MULTI_CROP_GLOBAL,
    MULTI_CROP_LOCAL,
    Box,
    feasible,
    sample_inside,
    sample_pair,
    sample_shift,
    sample_view_boxes,
)
from pcrl_nnunet.views.settings import ViewSettings

PAPER_GLOBAL = ((64, 64, 32), (96, 96, 64), (96, 96, 96), (112, 112, 64))
PAPER_LOCAL = ((8, 8, 8), (16, 16, 16), (32, 32, 16), (32, 32, 32))

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def volumes_and_sizes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """A 2D or 3D volume, often thin, and crop sizes, often larger than it."""
    dim = draw(st.integers(2, 3))
    length = st.one_of(st.just(1), st.integers(1, 40))
    size = st.tuples(*[length] * dim)
    return draw(size), draw(st.lists(size, min_size=1, max_size=4))


def voxels(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*map(range, box.lower, box.upper)))


@st.composite
def two_boxes(draw: st.DrawFn) -> tuple[Box, Box]:
    lower, size = st.tuples(*[st.integers(-4, 4)] * 2), st.tuples(*[st.integers(1, 5)] * 2)
    return Box.of_size(draw(lower), draw(size)), Box.of_size(draw(lower), draw(size))


@few
@given(two_boxes())
def test_intersection_iou_and_containment_agree_with_sets_of_voxels(boxes: tuple[Box, Box]) -> None:
    a, b = boxes
    common = intersection(a, b)
    assert (voxels(common) if common else set()) == voxels(a) & voxels(b)
    assert iou(a, b) == pytest.approx(len(voxels(a) & voxels(b)) / len(voxels(a) | voxels(b)))
    assert contains(a, b) == (voxels(b) <= voxels(a))
    assert a.volume == len(voxels(a))


@few
@given(two_boxes())
def test_a_clamped_box_is_the_intersection_or_lies_in_the_outer_box(boxes: tuple[Box, Box]) -> None:
    a, outer = boxes
    assert contains(outer, a.clamp(outer))
    if intersection(a, outer):
        assert a.clamp(outer) == intersection(a, outer)


def test_union_bounds_is_the_smallest_box_around_both() -> None:
    assert Box((0, 5), (2, 6)).union_bounds(Box((1, 1), (4, 3))) == Box((0, 1), (4, 6))


def test_shifted_box_indexes_the_same_voxels_of_a_part() -> None:
    image = np.arange(2 * 6 * 7).reshape(2, 6, 7)
    region, box = Box((1, 2), (6, 7)), Box((2, 3), (4, 7))
    np.testing.assert_array_equal(image[region.index()][box.shifted(region.lower).index()], image[box.index()])


def test_empty_box_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lower < upper on every axis, got \(0, 2\) and \(3, 2\)"):
        Box((0, 2), (3, 2))


def test_smallest_size_of_the_paper_pairs_only_with_itself() -> None:
    pairs = [(a, b) for a in PAPER_GLOBAL for b in PAPER_GLOBAL if feasible(a, b, 0.3)]
    assert [b for a, b in pairs if a == PAPER_GLOBAL[0]] == [PAPER_GLOBAL[0]]
    assert Counter(a for a, _ in pairs) == dict(zip(PAPER_GLOBAL, (1, 3, 3, 3), strict=True))


def test_every_size_of_the_paper_is_drawn() -> None:
    rng = np.random.default_rng(0)
    pairs = [sample_pair((256, 256, 96), PAPER_GLOBAL, 0.3, rng) for _ in range(1600)]
    first, second = (Counter(pair[i].shape for pair in pairs) for i in (0, 1))
    # 400 of each are expected: the small size goes with itself, and the others go with each other evenly
    for size in PAPER_GLOBAL:
        assert 330 < first[size] < 470
        assert 330 < second[size] < 470


@few
@given(volumes_and_sizes(), st.floats(0, 1), st.integers(0, 2**32))
def test_pairs_lie_in_the_volume_and_reach_the_iou(
    volume: tuple[tuple[int, ...], list[tuple[int, ...]]], min_iou: float, seed: int
) -> None:
    shape, sizes = volume
    whole = Box.of_size([0] * len(shape), shape)
    fitting = {tuple(map(min, size, shape)) for size in sizes}
    for box in (pair := sample_pair(shape, sizes, min_iou, np.random.default_rng(seed))):
        assert contains(whole, box)
        assert box.shape in fitting
    assert iou(pair[0], pair[1]) >= min_iou


def test_every_pair_of_positions_with_the_iou_is_drawn() -> None:
    shape, sizes, min_iou = (5, 4), [(3, 2), (2, 3)], 0.3
    possible = {
        (a, b)
        for size_a, size_b in itertools.product(sizes, sizes)
        for a in places(shape, size_a)
        for b in places(shape, size_b)
        if iou(a, b) >= min_iou
    }
    rng = np.random.default_rng(0)
    drawn = Counter(sample_pair(shape, sizes, min_iou, rng) for _ in range(40 * len(possible)))
    assert set(drawn) == possible
    assert min(drawn.values()) > 4  # a tenth of an even share


def places(shape: tuple[int, ...], size: tuple[int, ...]) -> list[Box]:
    starts = (range(outer - inner + 1) for outer, inner in zip(shape, size, strict=True))
    return [Box.of_size(lower, size) for lower in itertools.product(*starts)]


class CountingGenerator:
    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self.rng, name)


@pytest.mark.parametrize("min_iou", [0.0, 0.3, 0.99])
def test_a_pair_takes_the_same_number_of_draws_however_rare_its_iou(min_iou: float) -> None:
    rng = CountingGenerator()
    sample_pair((256, 256, 96), PAPER_GLOBAL, min_iou, rng)  # type: ignore[arg-type]
    assert rng.calls == 2 + 3 + 1 + 3  # sizes, first box, order of axes, second box


def test_an_inside_box_reaches_every_position_and_the_outer_boxs_size() -> None:
    rng = np.random.default_rng(0)
    outer = Box((2, 3), (5, 4))
    drawn = Counter(sample_inside(outer, (2, 1), rng).lower for _ in range(400))
    assert set(drawn) == {(2, 3), (3, 3)}
    assert sample_inside(outer, (9, 9), rng) == outer


@few
@given(volumes_and_sizes(), st.integers(0, 2**32))
def test_local_boxes_lie_inside_the_bounds_of_the_pair(
    volume: tuple[tuple[int, ...], list[tuple[int, ...]]], seed: int
) -> None:
    shape, sizes = volume
    views = views_of(sizes, sizes)
    boxes = sample_view_boxes(shape, views, np.random.default_rng(seed))
    assert boxes.bounds == boxes.pair[0].union_bounds(boxes.pair[1])
    assert len(boxes.local) == views.num_local
    for box in boxes.local:
        assert contains(boxes.bounds, box)
        assert box.shape in {tuple(map(min, size, boxes.bounds.shape)) for size in sizes}


def test_local_boxes_of_all_sizes_reach_all_corners_of_the_bounds() -> None:
    rng = np.random.default_rng(0)
    reached = set()
    for _ in range(600):
        boxes = sample_view_boxes((6, 6), views_of([(4, 4)], [(1, 1), (2, 3)]), rng)
        reached |= {(box.shape, corner) for box in boxes.local for corner in corners(boxes.bounds) & voxels(box)}
        assert {box.shape for box in boxes.local} <= {(1, 1), (2, 3)}
    assert {shape for shape, _ in reached} == {(1, 1), (2, 3)}
    assert {corner for _, corner in reached} >= corners(Box((0, 0), (6, 6)))


def corners(box: Box) -> set[tuple[int, ...]]:
    return set(itertools.product(*((low, high - 1) for low, high in zip(box.lower, box.upper, strict=True))))


def views_of(global_sizes: list[tuple[int, ...]], local_sizes: list[tuple[int, ...]]) -> ViewSettings:
    dim = len(global_sizes[0])
    return ViewSettings(tuple(global_sizes), tuple(local_sizes), (8,) * dim, (4,) * dim, (1.0,) * dim)


def test_paper_sizes_fit_into_small_volumes_with_a_spread_of_overlaps() -> None:
    rng = np.random.default_rng(0)
    views = ViewSettings(PAPER_GLOBAL, PAPER_LOCAL, (64, 64, 32), (16, 16, 16), (1.0, 1.0, 1.0))
    ious = [iou(*sample_view_boxes((256, 256, 40), views, rng).pair) for _ in range(300)]
    assert min(ious) >= 0.3
    assert np.mean(np.array(ious) < 0.8) > 0.5


@few
@given(volumes_and_sizes(), st.integers(0, 2**32))
def test_multi_crops_lie_in_one_area_of_the_largest_size(
    volume: tuple[tuple[int, ...], list[tuple[int, ...]]], seed: int
) -> None:
    shape, sizes = volume
    views = replace(views_of(sizes, sizes), crops="multi_crop")
    boxes = sample_view_boxes(shape, views, np.random.default_rng(seed))
    assert len(boxes.local) == views.num_local
    assert contains(Box.of_size([0] * len(shape), shape), boxes.bounds)
    assert all(contains(boxes.bounds, box) for box in (*boxes.pair, *boxes.local))
    largest = np.minimum(np.max(sizes, axis=0), shape)
    assert np.all(boxes.bounds.shape <= largest)


@pytest.mark.parametrize("shape", [(300, 400), (150, 200, 180)])
def test_multi_crops_have_the_papers_shares_of_the_area_and_little_distortion(shape: tuple[int, ...]) -> None:
    views = replace(views_of([shape], [(4,) * len(shape)]), crops="multi_crop")
    rng = np.random.default_rng(0)
    drawn = [sample_view_boxes(shape, views, rng) for _ in range(300)]
    for crops, (low, high) in (
        ([box for boxes in drawn for box in boxes.pair], MULTI_CROP_GLOBAL),
        ([box for boxes in drawn for box in boxes.local], MULTI_CROP_LOCAL),
    ):
        shares = np.array([box.volume for box in crops]) / math.prod(shape)
        assert 0.9 * low < shares.min() < low + 0.1 * (high - low)
        assert high - 0.2 * (high - low) < shares.max() < 1.05 * high
        small = [np.divide(box.shape, shape) for box in crops if max(np.divide(box.shape, shape)) < 1]
        assert max(sides.max() / sides.min() for sides in small) < MULTI_CROP_ASPECT * 1.1
    assert min(iou(boxes.pair[0], boxes.pair[1]) for boxes in drawn) < 0.3  # unlike sub-crop's


def test_pairs_prefer_no_axis_and_overlap_as_in_rejection_sampling() -> None:
    rng, shape, size = np.random.default_rng(0), (90, 90, 90), (40, 40, 40)
    pairs = [sample_pair(shape, [size], 0.3, rng) for _ in range(1500)]
    shifts = np.mean([np.abs(np.subtract(a.lower, b.lower)) for a, b in pairs], axis=0)
    assert shifts.max() < 1.12 * shifts.min()
    rejected: list[float] = []
    while len(rejected) < 800:
        a, b = (sample_inside(Box.of_size((0, 0, 0), shape), size, rng) for _ in range(2))
        if iou(a, b) >= 0.3:
            rejected.append(iou(a, b))
    assert np.median([iou(a, b) for a, b in pairs]) == pytest.approx(np.median(rejected), abs=0.08)


def test_exactly_the_shifts_that_keep_boxes_inside_are_drawn() -> None:
    pairs = [(Box((2, 3), (4, 5)), Box((0, 3), (9, 6))), (Box((1, 2), (5, 6)), Box((0, -5), (7, 50)))]
    rng = np.random.default_rng(0)
    drawn = {sample_shift(pairs, rng) for _ in range(200)}
    allowed = {
        shift
        for shift in itertools.product(range(-10, 11), repeat=2)
        if all(contains(outer, inner.shifted(shift)) for inner, outer in pairs)
    }
    assert drawn == allowed
    assert len(allowed) == 8


def test_a_box_extends_without_limit_beyond_the_outer_edges_it_touches() -> None:
    box = Box((0, 3), (5, 8)).beyond_edges_of(Box((0, 0), (9, 8)))
    assert contains(box, Box((-(10**6), 3), (5, 10**6)))
    assert not contains(box, Box((0, 2), (5, 8)))
    assert not contains(box, Box((0, 3), (6, 8)))
