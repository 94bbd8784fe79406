"""Our transforms beside batchgenerators' and batchgeneratorsv2's own, in the Compose of either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.transforms.abstract_transforms import Compose
from batchgenerators.transforms.noise_transforms import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from pcrl_nnunet.views import PixelTransform, SpatialViewTransform, SubCropTransform
from pcrl_nnunet.views.settings import Augmentation, ViewSettings

VIEWS = ViewSettings(((8, 10, 6), (10, 12, 8)), ((3, 3, 3),), (8, 8, 8), (8, 8, 8), (1.0, 1.0, 2.0))
STRENGTHS = Augmentation(p_noise=0.0, p_blur=0.0, p_gamma=0.0, p_swap=0.0)


class OnViews:
    """A transform of batchgeneratorsv2, which knows one image a sample, on every view of an array."""

    def __init__(self, transform: Any, name: str) -> None:
        self.transform, self.name = transform, name

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        images = [self.transform(image=torch.from_numpy(view))["image"] for view in data_dict[self.name]]
        return {**data_dict, self.name: torch.stack(images).numpy()}


@pytest.mark.parametrize("compose", [Compose, ComposeTransforms])
def test_batchgenerators_transforms_accept_our_views(compose: Callable[[list[Any]], Any]) -> None:
    ours = [
        SubCropTransform(VIEWS, STRENGTHS),
        SpatialViewTransform(),
        PixelTransform(STRENGTHS, "target", "input", whole=True),
        PixelTransform(STRENGTHS, "local", "local"),
    ]
    theirs = [
        GaussianNoiseTransform(noise_variance=(1, 1), data_key="input"),  # it takes the views for a batch
        OnViews(GaussianBlurTransform(blur_sigma=1.0), "local"),
    ]
    volume = np.random.default_rng(0).standard_normal((1, 20, 20, 20)).astype(np.float32)
    plain, more = (compose(t)(data=volume, rng=np.random.default_rng(1), case="a") for t in (ours, ours + theirs))
    assert more["case"] == "a"
    np.testing.assert_array_equal(more["target"], plain["target"])
    np.testing.assert_array_equal(plain["input"], plain["target"])
    assert np.std(more["input"] - more["target"]) == pytest.approx(1, abs=0.1)
    assert more["local"].shape == plain["local"].shape
    assert more["local"].std() < plain["local"].std()
