"""Gaussian smoothing against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from pcrl_nnunet.views import filters


@pytest.mark.parametrize(
    ("shape", "sigmas"),
    [((2, 13, 9, 11), (0.4, 1.0, 2.3)), ((1, 30, 21), (1.2, 0.7)), ((1, 3, 40, 5), (2.0, 2.0, 2.0))],
)
@pytest.mark.usefixtures("with_and_without_numba")
def test_smoothing_equals_scipys_with_repeated_borders(shape: tuple[int, ...], sigmas: tuple[float, ...]) -> None:
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = ndimage.gaussian_filter(image, (0, *sigmas), mode="nearest", truncate=filters.TRUNCATE)
    np.testing.assert_allclose(filters.gaussian(image, sigmas), expected, atol=1e-6)


@pytest.mark.usefixtures("with_and_without_numba")
def test_zero_sigma_and_axes_of_one_voxel_leave_the_image_as_it_is() -> None:
    image = np.random.default_rng(0).standard_normal((1, 1, 6)).astype(np.float32)
    np.testing.assert_array_equal(filters.gaussian(image, (3.0, 0.0)), image)


@pytest.mark.usefixtures("with_and_without_numba")
def test_reach_of_a_voxel_is_the_stated_radius() -> None:
    image = np.zeros((1, 41), np.float32)
    image[0, 20] = 1
    (reached,) = filters.gaussian(image, (2.0,))[0].nonzero()
    assert (reached.min(), reached.max()) == (20 - filters.radius(2.0), 20 + filters.radius(2.0))
