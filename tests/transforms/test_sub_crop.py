"""Sub-crop: what is read, and what is drawn again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pcrl_nnunet.boxes import Box
from pcrl_nnunet.config import Augmentation, Views
from pcrl_nnunet.transforms import sub_crop
from pcrl_nnunet.transforms.spatial import resample
from pcrl_nnunet.transforms.sub_crop import MAX_TRIES, SubCropTransform, background

VIEWS = Views(((12, 16, 12), (18, 20, 16)), ((4, 5, 4), (8, 8, 8)), (12, 16, 12), (5, 5, 5), (1.0, 1.0, 2.0))
VIEWS_2D = Views(((16, 12), (20, 16)), ((5, 4), (8, 8)), (16, 12), (5, 5), (1.0, 1.0))


class RecordedVolume:
    """An array that counts what is read of it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape
        self.reads: list[np.ndarray] = []

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        self.reads.append(self.array[index])
        return self.reads[-1]


def draw(volume: Any, views: Views = VIEWS, seed: int = 0, **strengths: float) -> dict[str, Any]:
    transform = SubCropTransform(views, replace(Augmentation(), **strengths))  # type: ignore[arg-type]
    return transform(data=volume, rng=np.random.default_rng(seed))


def noise_volume(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_views_of_the_part_that_is_read_are_those_of_the_whole_volume(seed: int) -> None:
    volume = noise_volume(2, 40, 50, 40)
    sample = draw(volume, seed=seed)
    assert sample["data"].size < volume.size
    for affine in [*sample["maps"]["target"], *sample["maps"]["local"]]:
        there = affine.shifted([-start for start in sample["origin"]])
        np.testing.assert_allclose(resample(sample["data"], affine), resample(volume, there), atol=1e-5)


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


def test_background_is_judged_on_the_first_channel_of_the_box_around_the_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = noise_volume(2, 60, 60, 60)
    volume[1] = 0
    judged: list[np.ndarray] = []

    def recording(data: np.ndarray) -> float:
        judged.append(data)
        return background(data)

    monkeypatch.setattr(sub_crop, "background", recording)
    sample = draw(volume)
    assert [data.shape[1:] for data in judged] == [sample["boxes"].bounds.shape]
    assert background(volume) < 0.5 < background(volume[1:])


@pytest.mark.parametrize("shape", [(2, 1, 20, 20, 20), (1, 20, 20)])
def test_data_that_is_no_single_sample_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"data has {len(shape) - 1} spatial axes and the views have 3; expected one"):
        draw(np.zeros(shape, dtype=np.float32))
