import numpy as np
import pytest

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.settings import replaced
from pcrl_nnunet.views import kernels
from pcrl_nnunet.views.corruption import (
    Corruption,
    Strengths,
    along,
    corrupt,
    corrupt_once,
    draw_curve,
    draw_windows,
    robust_ranges,
)

SIZES = pytest.mark.parametrize("size", [(12, 20, 16), (1, 24, 24), (40, 30)])
NOTHING = {"p_shuffle": 0.0, "p_curve": 0.0, "p_paint": 0.0}


def test_the_defaults_are_the_strengths_of_the_authors_code():
    assert Corruption() == Corruption(
        p_shuffle=0.5, shuffled_windows=10_000, shuffled_size=0.1, p_curve=0.9, p_inverted=0.5, p_paint=0.9, p_inner=0.2
    )


def image_of(size, channels=2, seed=0):
    return np.random.default_rng(seed).normal(size=(channels, *size)).astype(np.float32)


def slow_shuffle(image, corners, sizes, uniform):
    """Fisher and Yates' shuffle of each window; windows read the original image, and later windows overwrite."""
    shuffled, drawn = image.copy(), 0
    for corner, size in zip(corners, sizes, strict=True):
        window = (slice(None), *(slice(c, c + s) for c, s in zip(corner, size, strict=True)))
        voxels = image[window].reshape(len(image), -1).T
        numbers = uniform[drawn : drawn + len(voxels)]
        drawn += len(voxels)
        order = list(range(len(voxels)))
        for last in reversed(range(1, len(voxels))):
            other = int(numbers[last] * (last + 1))
            order[last], order[other] = order[other], order[last]
        shuffled[window] = voxels[order].T.reshape(len(image), *size)
    return shuffled


def slow_curve(rng, p_inverted):
    """A cubic Bezier curve from (0, 0) to (1, 1), or the same curve upside down, as a function."""
    (x1, x2), (y1, y2) = rng.random((2, 2))
    t = np.linspace(0, 1, 100_001)
    x = 3 * (1 - t) ** 2 * t * x1 + 3 * (1 - t) * t**2 * x2 + t**3
    y = 3 * (1 - t) ** 2 * t * y1 + 3 * (1 - t) * t**2 * y2 + t**3
    falls = rng.random() < p_inverted
    return lambda u: 1 - np.interp(u, x, y) if falls else np.interp(u, x, y)


def slow_painted(size, inner, rng):
    """One to five blocks of 1/6 to 1/3 of an axis; or all but one to five blocks of 3/7 to 4/7."""
    low, high = (1 / 6, 1 / 3) if inner else (3 / 7, 4 / 7)
    covered = np.zeros(size, bool)
    for block in range(5):
        if block and rng.random() >= 0.95:
            break
        edges = [max(1, round(length * rng.uniform(low, high))) for length in size]
        first = [int(rng.integers(0, length - edge + 1)) for length, edge in zip(size, edges, strict=True)]
        for place in np.ndindex(*size):
            covered[place] |= all(f <= p < f + e for p, f, e in zip(place, first, edges, strict=True))
    return covered if inner else ~covered


def slow_corrupt(image, corruption, rng):
    ranges = [np.quantile(channel, (0.005, 0.995)) for channel in image]
    corrupted = image.copy()
    if rng.random() < corruption.p_shuffle:
        corners, sizes = draw_windows(image.shape[1:], corruption, rng)
        corrupted = slow_shuffle(corrupted, corners, sizes, rng.random(sum(np.prod(size) for size in sizes)))
    if rng.random() < corruption.p_curve:
        curve = slow_curve(rng, corruption.p_inverted)
        for channel, (low, high) in zip(corrupted, ranges, strict=True):
            channel[:] = low + (high - low) * curve(np.clip((channel - low) / (high - low), 0, 1))
    if rng.random() < corruption.p_paint:
        noise = rng.random(image.shape, dtype=np.float32)
        painted = slow_painted(image.shape[1:], rng.random() < corruption.p_inner, rng)
        for channel, of_channel, (low, high) in zip(corrupted, noise, ranges, strict=True):
            channel[painted] = low + (high - low) * of_channel[painted]
    return corrupted


@SIZES
def test_corruption_agrees_with_the_slow_version(size):
    image = image_of(size)
    for seed in range(12):
        corruption = Corruption(shuffled_windows=300, p_inner=0.5)
        expected = slow_corrupt(image, corruption, np.random.default_rng(seed))
        got = corrupt(image, corruption, np.random.default_rng(seed))
        np.testing.assert_allclose(got, expected, atol=0.01)  # the curve is a table of 1024 points


@pytest.mark.parametrize(("name", "share"), [("p_shuffle", 0.5), ("p_curve", 0.9), ("p_paint", 0.9)])
def test_each_part_has_the_papers_probability(name, share):
    rng, image = np.random.default_rng(0), image_of((20, 20), 1)
    alone = Corruption(**{**NOTHING, name: getattr(Corruption(), name)})
    changed = np.mean([(corrupt(image, alone, rng) != image).any() for _ in range(600)])
    assert changed == pytest.approx(share, abs=5 * (share * (1 - share) / 600) ** 0.5)


def test_a_fifth_of_the_paintings_cover_inner_blocks():
    rng, image = np.random.default_rng(0), image_of((30, 30, 30), 1)
    paint = Corruption(**{**NOTHING, "p_paint": 1.0})
    # five blocks inside cover 5/27 at most; five blocks of at most 4/7 of an axis leave more than that uncovered
    inner = [(corrupt(image, paint, rng) != image).mean() <= 5 / 27 for _ in range(400)]
    assert np.mean(inner) == pytest.approx(0.2, abs=5 * (0.2 * 0.8 / 400) ** 0.5)


@SIZES
@pytest.mark.parametrize("compiled", [True, False])
def test_shuffling_equals_the_slow_version(size, compiled, monkeypatch):
    if compiled and not kernels.compiled:
        pytest.skip("numba is not installed")
    if not compiled:
        monkeypatch.setattr(kernels, "_shuffle", kernels._shuffle_by_numpy)
    rng, image = np.random.default_rng(1), image_of(size)
    corners, sizes = draw_windows(size, Corruption(shuffled_windows=200, shuffled_size=0.3), rng)
    uniform = rng.random(int(sizes.prod(1).sum()))
    expected = slow_shuffle(image, corners, sizes, uniform)
    got = kernels.shuffle_windows(image, corners, sizes, uniform)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(image, image_of(size))
    assert (got != image).any()


def test_a_window_keeps_its_voxels_and_all_orders_are_equally_likely():
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


def test_windows_cover_the_same_share_in_2d_and_3d():
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


def test_intensities_follow_the_curve_and_beyond_the_range_its_ends():
    curve = draw_curve(1.0, np.random.default_rng(0))
    channel = np.linspace(-3, 5, 1000, dtype=np.float32)
    expected = -1 + 4 * np.interp((channel + 1) / 4, np.linspace(0, 1, len(curve)), curve)
    np.testing.assert_allclose(along(curve, channel, -1.0, 3.0), expected, atol=1e-5)
    np.testing.assert_array_equal(along(curve, channel, 2.0, 2.0), channel)


def test_painted_voxels_are_noise_within_the_crops_own_range():
    image = image_of((30, 30, 30), 1) * 10 + 100
    painted = corrupt(image, Corruption(**{**NOTHING, "p_paint": 1.0}), np.random.default_rng(0))
    noise = painted[painted != image]
    ((low, high),) = robust_ranges(image)
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


def test_corruption_without_parts_returns_a_copy_and_constants_stay_finite():
    image = image_of((8, 8, 8))
    same = corrupt(image, Corruption(**NOTHING), np.random.default_rng(0))
    np.testing.assert_array_equal(same, image)
    assert not np.shares_memory(same, image)
    constant = np.full((1, 8, 8), 3, np.float32)
    for seed in range(20):
        np.testing.assert_array_equal(corrupt(constant, Corruption(), np.random.default_rng(seed)), constant)


@pytest.mark.parametrize("size", [(128, 128, 64), (256, 256, 64), (64, 128, 128), (7, 500)])
def test_the_range_covers_the_whole_crop(size):
    """Intensities change along one axis only, so that a part of the planes would not suffice."""
    for axis in range(len(size)):
        shape = [length if a == axis else 1 for a, length in enumerate(size)]
        image = np.broadcast_to(np.linspace(0, 1, size[axis], dtype=np.float32).reshape(shape), size)[None]
        ((low, high),) = robust_ranges(image)
        expected = np.quantile(image, (0.005, 0.995))
        np.testing.assert_allclose((low, high), expected, atol=0.06)


@pytest.mark.parametrize(
    "given", [{"p_paint": 1.5}, {"shuffled_size": 0.0}, {"shuffled_windows": 0}, {"p_inner": -0.1}]
)
def test_strengths_out_of_range_are_named_with_their_place(given):
    ((name, value),) = given.items()
    with pytest.raises(UserError, match=f"here.corruption.{name} is {value}; expected"):
        replaced(Corruption(), "here.corruption", given)


def test_corrupt_once_uses_exactly_one_of_four_ways_equally_often():
    image = image_of((24, 24, 24), channels=1)
    found = {"shuffling": 0, "curve": 0, "inner painting": 0, "outer painting": 0}
    order = np.argsort(image, axis=None)
    for seed in range(200):
        corrupted = corrupt_once(image, Strengths(), np.random.default_rng(seed))
        assert corrupted.dtype == np.float32
        assert not np.shares_memory(corrupted, image)
        steps = np.diff(corrupted.ravel()[order])
        if (steps >= -1e-5).all() or (steps <= 1e-5).all():
            found["curve"] += 1
        elif np.isin(corrupted, image).all():
            found["shuffling"] += 1
        else:  # at most five blocks of (1/3)^3 inside
            found["inner painting" if (corrupted != image).mean() < 0.19 else "outer painting"] += 1
    assert all(abs(number - 50) < 30 for number in found.values()), found  # 5 sd
