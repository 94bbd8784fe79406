"""Sub-crop: the part that is read, and the crops that are drawn again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from box_sets import contains

from pcrl_nnunet.views import sub_crop
from pcrl_nnunet.views.background import Background
from pcrl_nnunet.views.boxes import Box
from pcrl_nnunet.views.settings import Augmentation, ViewSettings
from pcrl_nnunet.views.spatial import resample
from pcrl_nnunet.views.sub_crop import LOCAL_TRIES, MAX_BACKGROUND, MAX_TRIES, SubCropTransform, background_of_views

VIEWS = ViewSettings(((12, 16, 12), (18, 20, 16)), ((4, 5, 4), (8, 8, 8)), (12, 16, 12), (5, 5, 5), (1.0, 1.0, 2.0))
VIEWS_2D = ViewSettings(((16, 12), (20, 16)), ((5, 4), (8, 8)), (16, 12), (5, 5), (1.0, 1.0))


class RecordedVolume:
    """An array that counts the voxels read."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape
        self.reads: list[np.ndarray] = []

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        self.reads.append(self.array[index])
        return self.reads[-1]


def draw(volume: Any, views: ViewSettings = VIEWS, seed: int = 0, **strengths: float) -> dict[str, Any]:
    transform = SubCropTransform(views, replace(Augmentation(), **strengths))  # type: ignore[arg-type]
    return transform(data=volume, rng=np.random.default_rng(seed))


def background(data: np.ndarray) -> float:
    """Return the share of background by the values of the data themselves."""
    return Background.of(data).share(data)


def noise_volume(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def skull_stripped(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """A two-channel image of an ellipsoid, z-scored with its background, and where its background is.

    The background value of one channel is the channel's minimum; neither value is 0.
    """
    distance = sum(((x - (n - 1) / 2) / (0.44 * n)) ** 2 for x, n in zip(np.indices(shape), shape, strict=True))
    outside = distance > 1
    image = 100 + 40 * np.random.default_rng(0).standard_normal((2, *shape))
    image[1] *= -1
    image[:, outside] = [[0], [-100]]
    image -= image.mean((1, 2, 3), keepdims=True)
    return (image / image.std((1, 2, 3), keepdims=True)).astype(np.float32), outside


def shares_of_local(volume: Any, outside: np.ndarray, views: ViewSettings = VIEWS, samples: int = 60) -> np.ndarray:
    """The shares of local crops that lie outside, by the truth."""
    found = []
    for seed in range(samples):
        sample = draw(volume, views, seed)
        extra = len(sample["origin"]) - len(views.spacing)
        there = outside[sample["origin"][:extra]]
        for box in sample["boxes"].local:
            found.append(there[box.shifted([-start for start in sample["origin"][extra:]]).index()[1:]].mean())
    return np.array(found)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_views_from_the_part_read_equal_views_of_the_whole_volume(seed: int, masked: bool) -> None:
    volume = skull_stripped(40, 50, 40)[0] if masked else noise_volume(2, 40, 50, 40)
    sample = draw(volume, seed=seed)
    assert sample["data"].size < volume.size
    for affine in [*sample["maps"]["target"], *sample["maps"]["local"]]:
        there = affine.shifted([-start for start in sample["origin"]])
        np.testing.assert_allclose(resample(sample["data"], affine), resample(volume, there), atol=1e-5)


@pytest.mark.parametrize("views", [VIEWS, VIEWS_2D, replace(VIEWS_2D, crops="multi_crop")])
def test_local_crops_show_more_than_background(monkeypatch: pytest.MonkeyPatch, views: ViewSettings) -> None:
    volume, outside = skull_stripped(40, 50, 40)
    after = shares_of_local(volume, outside, views)
    monkeypatch.setattr(sub_crop, "LOCAL_TRIES", 1)
    before = shares_of_local(volume, outside, views)
    assert (before > 0.99).mean() > 0.04
    assert (after > 0.99).mean() < 0.005


@pytest.mark.parametrize("views", [VIEWS, VIEWS_2D, replace(VIEWS_2D, crops="multi_crop")])
def test_a_moved_crop_keeps_size_and_map_within_the_voxels_read(
    monkeypatch: pytest.MonkeyPatch, views: ViewSettings
) -> None:
    volume, _ = skull_stripped(60, 60, 60)
    moved = 0
    for seed in range(40):
        after = draw(volume, views, seed)
        with monkeypatch.context() as patch:
            patch.setattr(sub_crop, "LOCAL_TRIES", 1)
            before = draw(volume, views, seed)
        np.testing.assert_array_equal(after["data"], before["data"])
        data, origin = after["data"], after["origin"][-len(views.spacing) :]
        ends = [start + n for start, n in zip(origin, data.shape[1:], strict=True)]
        for box, affine, old_box, old in zip(
            after["boxes"].local, after["maps"]["local"], before["boxes"].local, before["maps"]["local"], strict=True
        ):
            moved += box != old_box
            assert box.shape == old_box.shape
            assert contains(after["boxes"].bounds, box)
            np.testing.assert_array_equal(affine.matrix, old.matrix)
            np.testing.assert_allclose(affine.centre - old.centre, np.subtract(box.lower, old_box.lower))
            footprint = affine.footprint()
            for axis, (low, high) in enumerate(zip(footprint.lower, footprint.upper, strict=True)):
                assert low >= 0 or origin[axis] == 0
                assert high <= data.shape[axis + 1] or ends[axis] == 60
    assert moved > 10


def test_retries_change_nothing_without_empty_local_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, drawn = SubCropTransform(VIEWS, Augmentation()), []
    for tries in (LOCAL_TRIES, 1):
        monkeypatch.setattr(sub_crop, "LOCAL_TRIES", tries)
        rng = np.random.default_rng(0)
        sample = transform(data=noise_volume(2, 40, 50, 40), rng=rng)
        drawn.append((sample["boxes"], [m.centre.tolist() for m in sample["maps"]["local"]], rng.random()))
    assert drawn[0] == drawn[1]


def test_an_empty_local_crop_tries_a_bounded_number_of_places(monkeypatch: pytest.MonkeyPatch) -> None:
    share, judged = Background.share, []
    monkeypatch.setattr(Background, "share", lambda *given: judged.append(given[1].shape) or share(*given))
    draw(np.zeros((1, 40, 40, 40), dtype=np.float32))
    assert len(judged) == MAX_TRIES + LOCAL_TRIES * VIEWS.num_local


def test_the_views_share_of_background_matches_their_crops() -> None:
    volume, outside = skull_stripped(40, 50, 40)
    sample = draw(volume, seed=1)
    there = outside[Box.of_size(sample["origin"], sample["data"].shape[1:]).index()[1:]]
    boxes, found = sample["boxes"], background_of_views(sample)
    for kind, group in (("global", boxes.pair), ("local", boxes.local)):
        assert found[kind] == pytest.approx([there[box.index()[1:]].mean() for box in group], abs=0.01)
    assert max(found["local"]) <= MAX_BACKGROUND


def test_a_volume_is_read_once_and_hardly_beyond_the_bounds_of_the_pair() -> None:
    volume = RecordedVolume(noise_volume(1, 90, 90, 90))
    grown = []
    for seed in range(30):
        volume.reads.clear()
        sample = draw(volume, seed=seed)
        assert len(volume.reads) == 1
        grown.append(volume.reads[0].size / sample["boxes"].bounds.volume)
    assert np.median(grown) < 1.8
    assert max(grown) < 3.2


def test_without_rotation_and_scale_the_bounds_and_one_voxel_for_interpolation_are_read() -> None:
    sample = draw(noise_volume(1, 90, 90, 90), rotation_degrees=0, scale=0)
    read, bounds = np.array(sample["data"].shape[1:]), np.array(sample["boxes"].bounds.shape)
    assert np.all(read - bounds <= 2)


@pytest.mark.parametrize("shape", [(1, 1, 60, 50), (1, 3, 8, 7), (2, 1, 1, 1)])
def test_volumes_thinner_than_a_view_are_read_as_far_as_they_go(shape: tuple[int, ...]) -> None:
    sample = draw(noise_volume(*shape))
    assert all(part <= there for part, there in zip(sample["data"].shape, shape, strict=True))
    for affine in [*sample["maps"]["target"], *sample["maps"]["local"]]:
        assert np.isfinite(resample(sample["data"], affine)).all()


def test_background_is_drawn_again_until_the_pair_shows_something() -> None:
    volume = np.full((1, 80, 80, 80), -1, dtype=np.float32)
    volume[:, :, :, 40:] = noise_volume(1, 80, 80, 40)
    shares = [
        background(sample["data"][sample["boxes"].bounds.index()])
        for sample in (draw(volume, seed=seed) for seed in range(30))
    ]
    # about half of the pairs lie in the air; a sixteenth is left when three more may be drawn
    assert np.mean(np.array(shares) > 0.85) < 0.2


def test_a_volume_of_background_is_given_up_after_a_few_tries() -> None:
    volume = RecordedVolume(np.zeros((1, 40, 40, 40), dtype=np.float32))
    draw(volume)
    assert len(volume.reads) == MAX_TRIES


def test_the_pair_with_the_least_background_is_kept() -> None:
    volume = RecordedVolume(np.zeros((1, 60, 60, 60), dtype=np.float32))
    volume.array[:, ::13, ::13, ::13] = 3
    sample = draw(volume, rotation_degrees=0, scale=0)
    shares = [background(read) for read in volume.reads]
    assert len(set(shares)) > 1
    assert background(sample["data"]) == min(shares)


def test_air_clipped_values_and_zeros_outside_a_mask_are_background() -> None:
    tissue = np.random.default_rng(0).normal(0, 1, (2, 20, 20, 20)).astype(np.float32)
    assert background(tissue) < 0.05
    masked, air = tissue.copy(), tissue.copy()
    masked[:, 4:] = 0
    air[:, 4:] = -5 + 0.1 * np.random.default_rng(1).random((2, 16, 20, 20))
    assert background(masked) == pytest.approx(0.8, abs=0.05)
    assert background(air) == pytest.approx(0.8, abs=0.05)


def test_2d_views_come_from_a_slice_and_every_slice_is_drawn() -> None:
    volume = noise_volume(3, 5, 40, 44)
    slices = set()
    for seed in range(60):
        sample = draw(volume, VIEWS_2D, seed)
        z, y, x = sample["origin"]
        box = Box.of_size((y, x), sample["data"].shape[1:])
        np.testing.assert_array_equal(sample["data"], volume[:, z][box.index()])
        slices.add(z)
    assert slices == set(range(5))


@pytest.mark.parametrize(("share", "tries"), [(0.8, 1), (0.9, MAX_TRIES)])
def test_a_pair_is_drawn_again_from_85_percent_of_background_on(share: float, tries: int) -> None:
    rng = np.random.default_rng(0)
    volume = RecordedVolume(np.where(rng.random((1, 60, 60, 60)) < share, 0, 3).astype(np.float32))
    draw(volume)
    assert len(volume.reads) == tries


def test_a_voxel_counts_as_background_if_every_channel_agrees() -> None:
    volume = noise_volume(3, 20, 20, 20)
    volume[0] = 0  # a channel that shows nothing
    volume[1, 10:] = -7
    volume[2, :, 10:] = -7
    assert background(volume) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("value", [0.4, -0.4, 0.0])
def test_a_constant_is_background_even_below_it_after_resampling_overshoot(value: float) -> None:
    image = noise_volume(1, 20, 20, 20)
    image[:, 4:] = value + 1e-6 * noise_volume(1, 16, 20, 20)
    image[:, 3] = -9
    assert background(image) == pytest.approx(0.85, abs=0.001)


def test_even_tissue_is_told_from_background_by_the_whole_image() -> None:
    image = noise_volume(1, 20, 20, 20)
    image[:, 10:] = 5 + 0.01 * image[:, 10:]  # an even organ
    values = Background.of(image)
    assert values.share(image[:, 10:]) < 0.1
    assert background(image[:, 10:]) == 1  # by itself it cannot be told from air


def test_voxels_read_are_a_copy() -> None:
    volume = noise_volume(1, 9, 9, 9)  # read in one piece
    draw(volume)["data"][:] = 0
    np.testing.assert_array_equal(volume, noise_volume(1, 9, 9, 9))
