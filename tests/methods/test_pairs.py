"""The views of PCRLv2: two global ones and several local ones, augmented, and shown with their boxes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from box_sets import contains

from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.samples import Sample
from pcrl_nnunet.methods.pairs import AFTER, PairViews
from pcrl_nnunet.views.settings import Augmentation, ViewSettings
from pcrl_nnunet.views.spatial import AffineMap, resample

SIZES = ViewSettings(
    ((8, 10, 6), (10, 12, 8)), ((3, 3, 3), (5, 6, 4)), (8, 8, 8), (4, 4, 4), (1.0, 1.0, 2.0), num_local=3
)
SIZES_2D = ViewSettings(((10, 6), (12, 8)), ((3, 3), (6, 4)), (8, 8), (4, 4), (1.0, 1.0), num_local=3)
NO_PIXELS = dict.fromkeys(("p_noise", "p_blur", "p_gamma", "p_swap", "p_grey", "p_cutout"), 0.0)
CASE = Case("a", "")
VOLUME = np.random.default_rng(0).standard_normal((2, 20, 22, 18)).astype(np.float32)


def views(settings: ViewSettings = SIZES, **strengths: Any) -> PairViews:
    return PairViews(settings, Augmentation(**strengths), 2)


def sample(made: PairViews, volume: np.ndarray = VOLUME, seed: int = 3) -> Sample:
    return made(CASE, volume, np.random.default_rng(seed))


@pytest.mark.parametrize("settings", [SIZES, SIZES_2D, replace(SIZES, num_local=0)])
def test_a_sample_has_two_global_and_all_local_views(settings: ViewSettings) -> None:
    found = sample(views(settings))
    shapes = {"target": (2, 2, *settings.global_input_size), "input": (2, 2, *settings.global_input_size)}
    if settings.num_local:
        shapes["local"] = (3, 2, *settings.local_input_size)
    assert {name: array.shape for name, array in found.items()} == shapes
    assert {name: spec.shape for name, spec in views(settings).arrays.items()} == shapes
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}


def test_without_augmentation_the_input_is_the_target_in_memory_of_its_own() -> None:
    found = sample(views(**NO_PIXELS))
    np.testing.assert_array_equal(found["input"], found["target"])
    assert not np.shares_memory(found["input"], found["target"])


def test_inputs_differ_from_targets_and_the_views_of_a_sample_from_each_other() -> None:
    found = sample(views(p_noise=1.0))
    for arrays in (found["input"] != found["target"], found["local"][1:] != found["local"][:-1]):
        assert np.all(np.any(arrays, axis=(1, 2, 3, 4)))
    assert np.any(found["target"][0] != found["target"][1])


@pytest.mark.parametrize("settings", [SIZES, SIZES_2D])
def test_a_shown_view_names_the_axes_that_are_flipped(settings: ViewSettings) -> None:
    strengths = {**NO_PIXELS, "rotation_degrees": 0.0, "scale": 0.0}
    flipped, plain = (
        views(settings, **strengths, p_flip=p).show(CASE, VOLUME, np.random.default_rng(1)).views for p in (0.5, 0.0)
    )
    assert len({tuple(view.flipped or ()) for view in flipped}) > 1
    for view, other in zip(flipped, plain, strict=True):
        assert other.flipped == ()
        assert view.flipped is not None
        back = np.flip(view.images["before"], [1 + axis for axis in view.flipped])
        np.testing.assert_allclose(back, other.images["before"], atol=1e-5)


def test_local_views_are_not_swapped() -> None:
    shown = views(**{**NO_PIXELS, "p_swap": 1.0}).show(CASE, VOLUME, np.random.default_rng(0))
    for view in shown.views:
        assert np.array_equal(view.images["before"], view.images[AFTER]) == (view.kind == "local")


def test_a_shown_sample_equals_the_sample_of_the_same_generator() -> None:
    made = views()
    shown = made.show(CASE, VOLUME, np.random.default_rng(3))
    for name, array in sample(made).items():
        np.testing.assert_array_equal(shown.sample[name], array)
    after = [view.images[AFTER] for view in shown.views]
    np.testing.assert_array_equal(np.stack(after[:2]), shown.sample["input"])
    np.testing.assert_array_equal(np.stack(after[2:]), shown.sample["local"])
    assert [view.title for view in shown.views] == ["global 1", "global 2", "local 1", "local 2", "local 3"]
    assert [view.kind for view in shown.views] == ["global 1", "global 2", "local", "local", "local"]


@pytest.mark.parametrize("settings", [SIZES, SIZES_2D])
def test_a_view_lies_where_its_box_says(settings: ViewSettings) -> None:
    still = views(settings, **NO_PIXELS, p_flip=0.0, rotation_degrees=0.0, scale=0.0)
    shown = still.show(CASE, VOLUME, np.random.default_rng(3))
    assert len(shown.views) == 5
    image = VOLUME
    for index in shown.slice:
        image = image[:, index]
    for view in shown.views:
        box, size = view.box, view.images["before"].shape[1:]
        assert box is not None
        zoom = np.divide(box.shape, size)
        affine = AffineMap(np.diag(zoom), (np.array(box.lower) + box.upper - 1) / 2, size, tuple(zoom.tolist()))
        np.testing.assert_allclose(view.images["before"], resample(image, affine), atol=1e-5)
        assert shown.bounds is not None
        assert contains(shown.bounds, box)


def test_the_share_of_background_matches_the_boxes() -> None:
    """From voxel 8 of the second axis on each channel is constant; in one channel the constant is not the minimum."""
    image = VOLUME[:, :20, :20, :18].copy()
    image[0, :, 8:], image[1, :, 8:] = -3, 0.5
    made = views()
    shares = made.background(CASE, image, np.random.default_rng(5))
    boxes = [view.box for view in made.show(CASE, image, np.random.default_rng(5)).views]
    expected = [(np.arange(box.lower[1], box.upper[1]) >= 8).mean() for box in boxes if box is not None]
    assert [*shares["global"], *shares["local"]] == pytest.approx(expected, abs=0.02)
    assert max(expected) > 0
