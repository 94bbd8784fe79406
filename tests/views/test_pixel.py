"""Pixel augmentation: its effects and limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import ndimage

from pcrl_nnunet.views import filters
from pcrl_nnunet.views.pixel import PixelParameters, PixelTransform, apply_pixel, sample_pixel
from pcrl_nnunet.views.settings import Augmentation

ALWAYS: dict[str, Any] = dict.fromkeys(("p_noise", "p_blur", "p_gamma", "p_swap", "p_grey", "p_cutout"), 1.0)
ZERO: dict[str, Any] = {
    "noise_sd": 0.0, "blur_sigma": 0.0, "gamma": 0.0, "swap_blocks": 0, "grey": 0.0, "cutout_holes": 0,
}  # fmt: skip


def views(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def augment(images: np.ndarray, whole: bool = True, **strengths: Any) -> dict[str, Any]:
    transform = PixelTransform(Augmentation(**{**ALWAYS, **strengths}), "target", "input", whole)
    zoom = [(1.0,) * (images.ndim - 2)] * len(images)
    return transform(target=images, target_zoom=zoom, rng=np.random.default_rng(0))


@pytest.mark.parametrize("off", [ZERO, dict.fromkeys(ALWAYS, 0.0)])
@pytest.mark.parametrize("shape", [(2, 2, 8, 9, 7), (1, 3, 16, 16), (2, 1, 1, 1)])
def test_zero_strength_returns_an_equal_copy(shape: tuple[int, ...], off: dict[str, Any]) -> None:
    images = views(*shape)
    augmented = augment(images, **off)
    np.testing.assert_array_equal(augmented["input"], images)
    assert not np.shares_memory(augmented["input"], augmented["target"])


@pytest.mark.parametrize("strength", ["noise_sd", "blur_sigma", "gamma", "swap_blocks"])
def test_each_augmentation_changes_the_input_and_never_the_target(strength: str) -> None:
    images = views(2, 2, 16, 16, 8)
    before = images.copy()
    augmented = augment(images, **{**ZERO, strength: {"swap_blocks": 100, "blur_sigma": 5.0}.get(strength, 0.5)})
    assert augmented["target"] is images
    np.testing.assert_array_equal(images, before)
    for image, view in zip(augmented["input"], images, strict=True):
        assert not np.array_equal(image, view)
    assert augmented["input"].dtype == np.float32


def test_equal_parameters_give_equal_views() -> None:
    view = views(2, 12, 12, 12)
    parameters = sample_pixel(view.shape, (1.0, 1.0, 1.0), Augmentation(**ALWAYS), np.random.default_rng(0), True)
    np.testing.assert_array_equal(apply_pixel(view, parameters), apply_pixel(view, parameters))


def test_noise_is_independent_by_channel_with_sd_from_zero_to_the_limit() -> None:
    rng, sds = np.random.default_rng(0), []
    for _ in range(100):
        noise = sample_pixel((2, 12, 12, 12), (1.0,) * 3, Augmentation(**ALWAYS, noise_sd=0.4), rng, False).noise
        assert noise is not None
        sds.append(noise.std())
        assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.15
    assert 0 < min(sds) < 0.04
    assert 0.36 < max(sds) < 0.42


def test_blur_is_given_in_voxels_of_the_image() -> None:
    rng = np.random.default_rng(0)
    blurs = [sample_pixel((1, 8, 8), (0.5, 2.0), Augmentation(**ALWAYS), rng, False).blur for _ in range(100)]
    sigmas = np.array(blurs)  # (draws, 2), voxels of the view
    np.testing.assert_allclose(sigmas[:, 0] * 0.5, sigmas[:, 1] * 2.0)
    assert 1.8 < sigmas[:, 1].max() * 2.0 <= 2.0
    assert sigmas[:, 1].min() * 2.0 < 0.2


def test_blur_smooths_each_channel_by_itself() -> None:
    view = views(2, 10, 12, 9)
    expected = ndimage.gaussian_filter(view, (0, 0.8, 1.5, 2.0), mode="nearest", truncate=filters.TRUNCATE)
    np.testing.assert_allclose(apply_pixel(view, PixelParameters(blur=(0.8, 1.5, 2.0))), expected, atol=1e-6)


def test_gamma_keeps_each_channels_range_and_leaves_constant_channels() -> None:
    view = views(3, 10, 12)
    view[1] *= 100
    view[2] = -7
    changed = apply_pixel(view, PixelParameters(gamma=1.3))
    for channel in (0, 1):
        low, width = view[channel].min(), np.ptp(view[channel])
        expected = ((view[channel] - low) / width) ** 1.3 * width + low
        np.testing.assert_allclose(changed[channel], expected, rtol=1e-4, atol=1e-5 * width)
    np.testing.assert_array_equal(changed[2], view[2])


def test_gamma_exponents_are_symmetric_about_1_in_the_logarithm() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_pixel((1, 2, 2), (1.0, 1.0), Augmentation(**ALWAYS), rng, False).gamma for _ in range(300)]
    logs = np.log(np.array(drawn, dtype=float))
    assert -0.3 <= logs.min() < -0.28
    assert 0.28 < logs.max() <= 0.3
    assert abs(logs.mean()) < 0.03


def test_swap_exchanges_two_blocks_in_all_channels() -> None:
    view = views(2, 8, 8)
    swapped = apply_pixel(view, PixelParameters(swap=np.array([[[0, 1], [5, 4]]]), block=(2, 3)))
    expected = view.copy()
    expected[:, 0:2, 1:4] = view[:, 5:7, 4:7]
    expected[:, 5:7, 4:7] = view[:, 0:2, 1:4]
    np.testing.assert_array_equal(swapped, expected)


@pytest.mark.parametrize("size", [(64, 64, 32), (24, 32, 24), (3, 64, 64), (64, 64), (5, 5, 5)])
def test_swaps_cover_about_the_same_part_of_a_view_of_any_shape(size: tuple[int, ...]) -> None:
    parameters = sample_pixel((1, *size), (1.0,) * len(size), Augmentation(**ALWAYS), np.random.default_rng(0), True)
    assert parameters.swap is not None
    last = parameters.swap + parameters.block
    assert parameters.swap.min() >= 0
    assert np.all(last <= size)
    covered = 2 * len(parameters.swap) * np.prod(parameters.block) / np.prod(size)
    assert covered == pytest.approx(2 * 100 * 0.1**3, rel=0.1)


def test_blocks_are_swapped_only_in_views_that_request_it() -> None:
    images = views(1, 1, 16, 16, 16)
    strengths = {**ZERO, "swap_blocks": 100}
    np.testing.assert_array_equal(augment(images, whole=False, **strengths)["input"], images)
    assert not np.array_equal(augment(images, whole=True, **strengths)["input"], images)


def test_augmented_views_may_replace_their_sources() -> None:
    images = views(3, 1, 6, 6)
    transform = PixelTransform(Augmentation(**ALWAYS), "local", "local")
    replaced = transform(local=images, local_zoom=[(1.0, 1.0)] * 3, rng=np.random.default_rng(0))["local"]
    assert replaced.shape == images.shape
    assert not np.shares_memory(replaced, images)


def test_each_augmentation_of_2d_views_changes_the_input_and_never_the_target() -> None:
    images = views(2, 2, 28, 21)
    before = images.copy()
    for strength in ({"grey": 0.4}, {"cutout_holes": 3}):
        augmented = augment(images, **{**ZERO, **strength})
        np.testing.assert_array_equal(images, before)
        assert not np.array_equal(augmented["input"], images)


def test_grey_and_cutout_are_for_2d_and_cutout_for_global_views() -> None:
    rng = np.random.default_rng(0)
    flat, thick, local = (
        sample_pixel(shape, (1.0,) * (len(shape) - 1), Augmentation(**ALWAYS), rng, whole)
        for shape, whole in (((1, 28, 28), True), ((1, 28, 28, 28), True), ((1, 28, 28), False))
    )
    assert flat.grey is not None
    assert flat.holes is not None
    assert (thick.grey, thick.holes, local.holes) == (None, None, None)
    assert local.grey is not None


def test_grey_scales_distances_from_each_channels_minimum_and_mean() -> None:
    view = views(2, 9, 8)
    view[1] = 5 * view[1] + 3
    grey = apply_pixel(view, PixelParameters(grey=(1.2, 0.7)))
    for channel, image in zip(grey, view, strict=True):
        low, mean = image.min(), 1.2 * (image.mean() - image.min()) + image.min()
        np.testing.assert_allclose(channel, 0.7 * (1.2 * (image - low) + low - mean) + mean, rtol=1e-4, atol=1e-4)


def test_cutout_fills_its_holes_with_each_channels_mean_and_leaves_the_rest() -> None:
    view = views(2, 10, 12)
    cut = apply_pixel(view, PixelParameters(holes=np.array([[0, 1], [8, 9]]), hole=(2, 3)))
    hole = np.zeros((10, 12), bool)
    hole[0:2, 1:4] = hole[8:10, 9:12] = True
    np.testing.assert_array_equal(cut[:, ~hole], view[:, ~hole])
    for channel, image in zip(cut, view, strict=True):
        np.testing.assert_allclose(channel[hole], image.mean(), rtol=1e-5)


def test_holes_have_the_authors_size_and_reach_every_corner() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_pixel((1, 224, 112), (1.0, 1.0), Augmentation(**ALWAYS), rng, True) for _ in range(400)]
    assert {parameters.hole for parameters in drawn} == {(32, 16)}
    corners = np.concatenate([p.holes for p in drawn if p.holes is not None])
    assert len(corners) == 3 * 400
    assert corners.min() == 0
    assert np.all(corners.max(0) == (192, 96))


def test_noise_comes_before_blur() -> None:
    view, noise = views(1, 12, 12, 12), views(1, 12, 12, 12)[..., ::-1].copy()
    both = apply_pixel(view, PixelParameters(noise=noise, blur=(1.0, 1.0, 1.0)))
    np.testing.assert_allclose(both, filters.gaussian(view + noise, (1.0, 1.0, 1.0)), atol=1e-6)


def test_brightness_and_contrast_reach_their_limits_on_both_sides() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_pixel((1, 8, 8), (1.0, 1.0), Augmentation(**ALWAYS), rng, True).grey for _ in range(300)]
    factors = np.array(drawn, dtype=float)
    assert np.all(factors.min(0) < 0.62)
    assert np.all(factors.max(0) > 1.38)
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.2


def test_swapped_blocks_reach_every_corner() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_pixel((1, 20, 30, 10), (1.0,) * 3, Augmentation(**ALWAYS), rng, True) for _ in range(30)]
    corners = np.concatenate([p.swap.reshape(-1, 3) for p in drawn if p.swap is not None])
    assert corners.min() == 0
    assert np.all(corners.max(0) == np.subtract((20, 30, 10), drawn[0].block))


@pytest.mark.parametrize("name", ["swap_size", "cutout_size"])
def test_blocks_and_holes_of_zero_size_are_omitted(name: str) -> None:
    images = views(2, 1, 14, 14)
    strengths = {**ZERO, "swap_blocks": 100 * (name == "swap_size"), "cutout_holes": 3 * (name == "cutout_size")}
    np.testing.assert_array_equal(augment(images, **{**strengths, name: 0.0})["input"], images)
