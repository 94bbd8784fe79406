"""Gaussian smoothing against scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from pcrl_nnunet.transforms import filters


@pytest.fixture(autouse=True, params=["own", "small"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here hold for the sum of shifted images and for what is done with small ones."""
    monkeypatch.setattr(filters, "SMALL", {"own": 0, "small": 2**40}[request.param])


@pytest.mark.parametrize(
    ("shape", "sigmas"),
    [((2, 13, 9, 11), (0.4, 1.0, 2.3)), ((1, 30, 21), (1.2, 0.7)), ((1, 3, 40, 5), (2.0, 2.0, 2.0))],
)
def test_smoothing_is_scipys_with_repeated_borders(shape: tuple[int, ...], sigmas: tuple[float, ...]) -> None:
    image = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    expected = ndimage.gaussian_filter(image, (0, *sigmas), mode="nearest")
    np.testing.assert_allclose(filters.gaussian(torch.from_numpy(image), sigmas), expected, atol=1e-6)


def test_zero_sigma_and_axes_of_one_voxel_leave_the_image_as_it_is() -> None:
    image = torch.randn(1, 1, 6)
    assert torch.equal(filters.gaussian(image, (3.0, 0.0)), image)


def test_reach_of_a_voxel_is_the_stated_radius() -> None:
    image = torch.zeros(1, 41)
    image[0, 20] = 1
    reached = filters.gaussian(image, (2.0,))[0].nonzero().flatten()
    assert (reached.min(), reached.max()) == (20 - filters.radius(2.0), 20 + filters.radius(2.0))
