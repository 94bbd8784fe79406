"""The fused spatial resampling, compared with scipy and with flips, rotations and resizing."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pcrl_nnunet.views import filters
from pcrl_nnunet.views.boxes import Box, sample_inside
from pcrl_nnunet.views.settings import Augmentation
from pcrl_nnunet.views.spatial import AffineMap, SpatialViewTransform, resample, rotation, sample_map

NONE = Augmentation(p_flip=0, rotation_degrees=0, scale=0)

# Shape (C, *spatial) of the image, spacing in mm, size of the crop, size of the view.
CASES = {
    "3D, anisotropic": ((2, 12, 40, 36), (3.0, 0.7, 0.8), (7, 20, 22), (7, 16, 16)),
    "3D, shrunk": ((1, 20, 40, 36), (1.0, 1.0, 1.0), (15, 30, 30), (8, 10, 28)),
    "3D, enlarged": ((1, 20, 40, 36), (1.0, 2.0, 1.0), (4, 5, 6), (9, 9, 9)),
    "3D, one slice": ((1, 1, 40, 36), (5.0, 0.7, 0.7), (1, 20, 20), (1, 16, 16)),
    "3D, whole image": ((4, 9, 14, 11), (1.0, 1.0, 1.0), (9, 14, 11), (8, 16, 8)),
    "2D": ((3, 40, 36), (0.5, 1.0), (20, 22), (16, 16)),
    "2D, shrunk": ((1, 40, 36), (0.5, 0.5), (38, 30), (16, 12)),
    "2D, one row": ((1, 1, 36), (1.0, 1.0), (1, 22), (1, 16)),
}


def whole(shape: tuple[int, ...]) -> Box:
    return Box.of_size([0] * len(shape), shape)


def noise_image(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_scipy(image: np.ndarray, affine: AffineMap) -> np.ndarray:
    """The view, one channel and one affine function of all view indices at a time."""
    dim = len(affine.size)
    index = np.stack(np.meshgrid(*map(np.arange, affine.size), indexing="ij")).reshape(dim, -1)
    from_centre = index - (np.array(affine.size)[:, None] - 1) / 2
    coordinates = (affine.matrix @ from_centre + affine.centre[:, None]).reshape(dim, *affine.size)
    gaussian = partial(ndimage.gaussian_filter, sigma=affine.anti_alias, mode="nearest", truncate=filters.TRUNCATE)
    smooth = [gaussian(channel) for channel in image]
    return np.stack([ndimage.map_coordinates(channel, coordinates, order=1, mode="nearest") for channel in smooth])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("with_and_without_numba")
def test_views_equal_scipys_linear_interpolation(case: str) -> None:
    shape, spacing, crop, size = CASES[case]
    image, rng = noise_image(shape), np.random.default_rng(1)
    for _ in range(5):
        box = sample_inside(whole(shape[1:]), crop, rng)
        affine = sample_map(box, size, spacing, Augmentation(), rng)
        np.testing.assert_allclose(resample(image, affine), by_scipy(image, affine), atol=1e-5)


@pytest.mark.parametrize(("shape", "size"), [((2, 8, 10, 6), (12, 10, 16)), ((1, 9, 14), (18, 10))])
def test_without_strength_a_view_is_the_resized_crop(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    image = noise_image(shape)
    affine = sample_map(whole(shape[1:]), size, (2.0, 1.0, 1.0)[: len(size)], NONE, np.random.default_rng(0))
    mode = "bilinear" if len(size) == 2 else "trilinear"
    expected = torch.nn.functional.interpolate(torch.from_numpy(image)[None], size, mode=mode)[0]
    np.testing.assert_allclose(resample(image, affine), expected, atol=1e-5)


def test_without_strength_and_resizing_a_view_is_the_crop() -> None:
    image, box = noise_image((2, 12, 13, 14)), Box((3, 2, 0), (9, 12, 5))
    affine = sample_map(box, box.shape, (3.0, 1.0, 1.0), NONE, np.random.default_rng(0))
    np.testing.assert_allclose(resample(image, affine), image[box.index()], atol=1e-5)


def test_flips_mirror_the_crop_on_each_axis_by_itself() -> None:
    image, box = noise_image((1, 9, 10, 11)), Box((1, 2, 3), (7, 8, 9))
    crop, rng = image[box.index()], np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        affine = sample_map(box, box.shape, (1.0, 1.0, 1.0), replace(NONE, p_flip=0.5), rng)
        axes = tuple((np.flatnonzero(np.diag(affine.matrix) < 0) + 1).tolist())
        np.testing.assert_allclose(resample(image, affine), np.flip(crop, axes), atol=1e-5)
        seen.add(axes)
    assert len(seen) == 8


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.integers(2, 3), st.floats(0, 40), st.floats(0, 0.3), st.lists(st.floats(0.2, 6), min_size=3), st.integers(0, 99)
)
def test_a_map_combines_resize_flip_scale_and_a_limited_rotation(
    dim: int, degrees: float, scale: float, spacing: list[float], seed: int
) -> None:
    box, size, mm = Box((4, 0, 2)[:dim], (14, 5, 30)[:dim]), (8, 9, 10)[:dim], np.array(spacing[:dim])
    augmentation = Augmentation(rotation_degrees=degrees, scale=scale)
    affine = sample_map(box, size, spacing[:dim], augmentation, np.random.default_rng(seed))
    turned = affine.matrix * mm[:, None] / (mm * affine.zoom)  # a rotation, columns negated where flipped
    np.testing.assert_allclose(turned @ turned.T, np.eye(dim), atol=1e-9)
    turned = turned * np.sign(np.diag(turned))
    assert np.linalg.det(turned) == pytest.approx(1)
    cosine = (np.trace(turned) - (dim - 2)) / 2
    assert math.degrees(math.acos(min(1, cosine))) <= degrees * (1 if dim == 2 else math.sqrt(3)) + 1e-4
    ratio = np.array(affine.zoom) / (np.array(box.shape) / size)
    assert np.all(np.abs(ratio - 1) <= scale + 1e-9)
    np.testing.assert_allclose(affine.centre, (np.array(box.lower) + box.upper - 1) / 2)


def test_rotation_is_about_the_first_axis_then_the_second_then_the_third() -> None:
    angles = [0.1, -0.2, 0.3]
    expected = np.eye(3)
    for axis, angle in enumerate(angles):
        one = np.zeros(3)
        one[axis] = 1
        cross = np.cross(np.eye(3), one)  # cross @ v is one x v
        turn = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross  # Rodrigues
        expected = turn @ expected
    np.testing.assert_allclose(rotation(angles), expected, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_only_the_footprint_is_read(case: str) -> None:
    shape, spacing, crop, size = CASES[case]
    image, rng = noise_image(shape), np.random.default_rng(2)
    for _ in range(5):
        affine = sample_map(sample_inside(whole(shape[1:]), crop, rng), size, spacing, Augmentation(), rng)
        region = affine.footprint().clamp(whole(shape[1:]))
        blind = np.full_like(image, np.nan)
        blind[region.index()] = image[region.index()]
        np.testing.assert_array_equal(resample(blind, affine), resample(image, affine))


def test_fine_patterns_are_averaged_where_a_view_shrinks() -> None:
    stripes = np.tile(np.array([-1, 1], dtype=np.float32), (1, 16, 30))  # (1, 16, 60)
    affine = sample_map(whole((16, 60)), (16, 19), (1.0, 1.0), NONE, np.random.default_rng(0))
    assert affine.anti_alias[0] == 0
    assert np.abs(resample(stripes, affine)[..., 1:-1]).max() < 0.05
    assert np.abs(by_scipy(stripes, replace(affine, zoom=(1.0, 1.0)))).max() > 0.9


def test_resampling_leaves_the_image_and_shares_no_memory_with_it() -> None:
    image, box = noise_image((1, 6, 6)), Box((0, 0), (6, 6))
    before = image.copy()
    view = resample(image, sample_map(box, (6, 6), (1.0, 1.0), NONE, np.random.default_rng(0)))
    view[:] = 0
    np.testing.assert_array_equal(image, before)


def test_transform_gives_each_name_its_views_in_order() -> None:
    image, rng = noise_image((2, 10, 12)), np.random.default_rng(0)
    maps = [sample_map(Box((i, 0), (i + 6, 8)), (4, 4), (1.0, 1.0), Augmentation(), rng) for i in range(3)]
    views = SpatialViewTransform()(data=image, maps={"target": maps[:2], "local": maps[2:]}, case="a")
    names = {f"{name}{suffix}" for name in ("target", "local") for suffix in ("", "_zoom", "_flipped")}
    assert set(views) == {*names, "case"}
    assert [*views["target_flipped"], *views["local_flipped"]] == [affine.flipped for affine in maps]
    assert views["target"].shape == (2, 2, 4, 4)
    for view, affine in zip([*views["target"], *views["local"]], maps, strict=True):
        np.testing.assert_array_equal(view, resample(image, affine))


@pytest.mark.parametrize("dim", [2, 3])
def test_angles_and_scales_reach_their_limits_on_both_sides(dim: int) -> None:
    augmentation, rng = Augmentation(p_flip=0, rotation_degrees=10, scale=0.2), np.random.default_rng(0)
    box, ones = Box((0,) * dim, (10,) * dim), (1.0,) * dim
    maps = [sample_map(box, (10,) * dim, ones, augmentation, rng) for _ in range(400)]
    zooms = np.array([affine.zoom for affine in maps])
    assert np.all(zooms.min(0) < 0.82)
    assert np.all(zooms.max(0) > 1.18)
    turns = np.array([affine.matrix / affine.zoom for affine in maps])
    for i, j in [(1, 0)] if dim == 2 else [(1, 0), (2, 0), (2, 1)]:  # the sine about the third axis, to first order
        assert turns[:, i, j].min() < -0.9 * math.sin(math.radians(10))
        assert turns[:, i, j].max() > 0.9 * math.sin(math.radians(10))


def test_views_are_anti_aliased_from_one_and_a_half_image_voxels_on() -> None:
    affine = AffineMap(np.eye(2), np.zeros(2), (4, 4), (1.49, 1.51))
    assert affine.anti_alias == (0.0, pytest.approx(0.255))


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int16])
@pytest.mark.parametrize("crop", [(9, 9, 9), (20, 20, 20)])  # enlarged, and anti-aliased
@pytest.mark.usefixtures("with_and_without_numba")
def test_images_of_any_type_are_resampled_as_float32(dtype: type, crop: tuple[int, int, int]) -> None:
    image = (10 * noise_image((1, 20, 20, 20))).astype(dtype)
    affine = sample_map(Box((0, 0, 0), crop), (10, 10, 10), (1.0,) * 3, Augmentation(), np.random.default_rng(0))
    np.testing.assert_array_equal(resample(image, affine), resample(image.astype(np.float32), affine))
