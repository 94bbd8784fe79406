import numpy as np
import pytest

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.views import kernels
from pcrl_nnunet.views.corruption import (
    Corruption,
    along,
    corrupt,
    draw_curve,
    draw_painted,
    draw_windows,
    robust_range,
)

SIZES = pytest.mark.parametrize("size", [(12, 20, 16), (1, 24, 24), (40, 30)])
NOTHING = {"p_shuffle": 0.0, "p_curve": 0.0, "p_paint": 0.0}


def image_of(size, channels=2, seed=0):
    return np.random.default_rng(seed).normal(size=(channels, *size)).astype(np.float32)


def slow_shuffle(image, corners, sizes, uniform):
    """Fisher and Yates in each window, from the image's own voxels; the last window's voxels stay."""
    shuffled, numbers = image.copy(), iter(uniform)
    for corner, size in zip(corners, sizes, strict=True):
        window = (slice(None), *(slice(c, c + s) for c, s in zip(corner, size, strict=True)))
        voxels = list(image[window].reshape(len(image), -1).T)
        for last in range(len(voxels) - 1, -1, -1):
            other = int(next(numbers) * (last + 1))
            voxels[last], voxels[other] = voxels[other], voxels[last]
        shuffled[window] = np.array(voxels).T.reshape(len(image), *size)
    return shuffled


@SIZES
@pytest.mark.parametrize("compiled", [True, False])
def test_shuffling_is_that_of_the_slow_version(size, compiled, monkeypatch):
    if compiled and not kernels.compiled:
        pytest.skip("numba is not installed")
    if not compiled:
        monkeypatch.setattr(kernels, "_shuffle", getattr(kernels._shuffle, "py_func", kernels._shuffle))
    rng, image = np.random.default_rng(1), image_of(size)
    corners, sizes = draw_windows(size, Corruption(shuffled_windows=200, shuffled_size=0.3), rng)
    uniform = rng.random(int(sizes.prod(1).sum()))
    expected = slow_shuffle(image, corners, sizes, uniform)
    got = kernels.shuffle_windows(image, corners, sizes, uniform)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(image, image_of(size))
    assert (got != image).any()


def test_one_window_keeps_its_voxels_and_all_orders_are_as_likely():
    rng, image = np.random.default_rng(0), np.arange(3, dtype=np.float32)[None, None]
    corner, size = np.zeros((1, 2), int), np.array([[1, 3]])
    orders, counts = np.unique(
        [kernels.shuffle_windows(image, corner, size, rng.random(3)).ravel() for _ in range(3000)],
        axis=0,
        return_counts=True,
    )
    assert len(orders) == 6
    assert np.abs(counts - 500).max() < 110  # 5 sd


@SIZES
def test_windows_lie_in_the_image_and_reach_a_tenth_of_an_axis(size):
    corners, sizes = draw_windows(size, Corruption(), np.random.default_rng(0))
    assert (corners >= 0).all()
    assert (corners + sizes <= size).all()
    np.testing.assert_array_equal(sizes.max(0), [max(1, length // 10) for length in size])
    np.testing.assert_array_equal(sizes.min(0), 1)


def test_in_2d_windows_cover_as_large_a_share_as_in_3d():
    rng = np.random.default_rng(0)
    covered = [draw_windows(size, Corruption(), rng)[1].prod(1).sum() / np.prod(size) for size in [(60,) * 3, (60, 60)]]
    assert covered[0] == pytest.approx(covered[1], rel=0.2)


def test_a_curve_is_the_bezier_curve_of_two_random_points():
    a = np.random.default_rng(3).random((2, 2))
    t = np.linspace(0, 1, 200_001)
    bernstein = [3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3]
    x, y = (points[0] * bernstein[0] + points[1] * bernstein[1] + bernstein[2] for points in a)
    places = np.linspace(0, 1, 1024)
    expected = np.interp(places, x, y)
    for p_inverted, curve in ((0.0, expected), (1.0, 1 - expected)):
        got = draw_curve(p_inverted, np.random.default_rng(3))
        np.testing.assert_allclose(got, curve, atol=2e-3)


def test_curves_are_monotonic_from_end_to_end_and_half_of_them_fall():
    rng = np.random.default_rng(0)
    curves = [draw_curve(0.5, rng) for _ in range(400)]
    rising = [bool((np.diff(curve) >= 0).all()) for curve in curves]
    assert all(up or (np.diff(curve) <= 0).all() for up, curve in zip(rising, curves, strict=True))
    assert all({round(float(curve[0]), 6), round(float(curve[-1]), 6)} == {0.0, 1.0} for curve in curves)
    assert 150 < sum(rising) < 250


def test_intensities_follow_the_curve_within_the_range_and_its_ends_beyond():
    curve = draw_curve(1.0, np.random.default_rng(0))
    channel = np.linspace(-3, 5, 1000, dtype=np.float32)
    expected = -1 + 4 * np.interp((channel + 1) / 4, np.linspace(0, 1, len(curve)), curve)
    np.testing.assert_allclose(along(curve, channel, -1.0, 3.0), expected, atol=1e-5)
    np.testing.assert_array_equal(along(curve, channel, 2.0, 2.0), channel)


@SIZES
def test_inner_painting_covers_one_to_five_blocks_of_a_sixth_to_a_third(size):
    rng = np.random.default_rng(0)
    shares = [draw_painted(size, True, rng).mean() for _ in range(200)]
    edges = [[max(1, round(length * share)) / length for length in size] for share in (1 / 6, 1 / 3)]
    assert min(shares) >= np.prod(edges[0]) - 1e-9
    assert max(shares) <= 5 * np.prod(edges[1]) + 1e-9


@SIZES
def test_outer_painting_leaves_blocks_of_three_to_four_sevenths(size):
    rng = np.random.default_rng(0)
    left = [1 - draw_painted(size, False, rng).mean() for _ in range(200)]
    smallest = np.prod([max(1, round(length * 3 / 7)) / length for length in size])
    assert min(left) >= smallest - 1e-9
    assert max(left) < 1 or 1 in size


def test_what_is_painted_is_noise_of_the_crops_own_range():
    image = image_of((30, 30, 30), 1) * 10 + 100
    painted = corrupt(image, Corruption(**{**NOTHING, "p_paint": 1.0}), np.random.default_rng(0))
    noise = painted[painted != image]
    low, high = robust_range(image[0])
    assert low - 1e-3 <= noise.min() < low + 1
    assert high - 1 < noise.max() <= high + 1e-3
    assert noise.std() == pytest.approx((high - low) / 12**0.5, rel=0.02)


@SIZES
def test_channels_are_shuffled_and_painted_at_the_same_places(size):
    image = np.repeat(np.arange(np.prod(size), dtype=np.float32).reshape(1, *size), 2, 0)
    shuffled = corrupt(image, Corruption(**{**NOTHING, "p_shuffle": 1.0}), np.random.default_rng(0))
    np.testing.assert_array_equal(shuffled[0], shuffled[1])
    painted = corrupt(image, Corruption(**{**NOTHING, "p_paint": 1.0}), np.random.default_rng(0)) != image
    np.testing.assert_array_equal(painted[0], painted[1])


def test_no_part_leaves_a_copy_and_a_constant_stays_finite():
    image = image_of((8, 8, 8))
    same = corrupt(image, Corruption(**NOTHING), np.random.default_rng(0))
    np.testing.assert_array_equal(same, image)
    assert not np.shares_memory(same, image)
    constant = np.full((1, 8, 8), 3, np.float32)
    for seed in range(20):
        np.testing.assert_array_equal(corrupt(constant, Corruption(), np.random.default_rng(seed)), constant)


def test_each_part_is_drawn_with_its_probability():
    rng, image = np.random.default_rng(0), image_of((10, 10), 1)
    changed = [(corrupt(image, Corruption(**{**NOTHING, "p_paint": 0.9}), rng) != image).any() for _ in range(500)]
    assert 420 < sum(changed) < 480


@pytest.mark.parametrize("given", [{"p_paint": 1.5}, {"shuffled_size": -0.1}, {"shuffled_windows": -1}])
def test_strengths_out_of_range_are_named(given):
    (name,) = given
    with pytest.raises(UserError, match=f"corruption.{name} is {given[name]}; expected"):
        Corruption(**given)
