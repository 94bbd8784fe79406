"""Label maps are told from scans by their voxels; names alone only warn."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from pcrl_nnunet.ingest.label_maps import label_word, looks_like_labels

SHAPE = (24, 32, 28)
RNG = np.random.default_rng(0)


def parcels(number: int) -> np.ndarray:
    """A label map like a brain atlas: every voxel has the number of its nearest random point."""
    points = RNG.random((number, 3)) * SHAPE
    grid = np.stack(np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]], axis=-1)
    return np.stack([((grid - p) ** 2).sum(-1) for p in points]).argmin(0).astype(np.float32)


def scan(values: float) -> np.ndarray:
    """Smooth anatomy with noise, in the given number of whole numbers."""
    smooth = gaussian_filter(RNG.normal(size=SHAPE), 3)
    noisy = smooth / smooth.std() + RNG.normal(size=SHAPE) / 5
    return np.round(values * (noisy - noisy.min()) / np.ptp(noisy)).astype(np.float32)


@pytest.mark.parametrize("number", [2, 9, 40, 100])
def test_flat_regions_of_few_whole_numbers_are_a_label_map(number: int) -> None:
    assert looks_like_labels(parcels(number))


def test_one_organ_in_empty_space_is_a_label_map() -> None:
    image = np.zeros(SHAPE, np.float32)
    image[5:12, 8:20, 6:18] = 1
    assert "only 2 different values: 0, 1" in looks_like_labels(image)


@pytest.mark.parametrize("values", [30, 255, 4000])
@pytest.mark.parametrize("named", [False, True])
def test_whole_number_scans_do_not_look_like_label_maps(values: float, named: bool) -> None:
    assert not looks_like_labels(scan(values), named)


def test_clipped_and_masked_scans_do_not_look_like_label_maps() -> None:
    image = np.clip(scan(255), 90, 160)  # air and bone are flat
    image[:, :8] = image[:, -8:] = 0  # as around a brain after skull stripping
    assert not looks_like_labels(image, named=True)


def test_labels_that_a_program_has_scaled_are_a_label_map() -> None:
    assert looks_like_labels(parcels(70) / np.float32(3))
    assert looks_like_labels((parcels(2) * np.float32(0.99999)).astype(np.float32))


def test_thin_labels_are_a_label_map() -> None:
    """Vessels of one voxel: their neighbours are background, but along a vessel they agree."""
    image = np.zeros(SHAPE, np.float32)
    for label in range(1, 14):
        image[RNG.integers(SHAPE[0]), RNG.integers(SHAPE[1])] = label
    assert looks_like_labels(image)


def test_a_name_makes_frayed_labels_a_label_map() -> None:
    image = parcels(20)
    frayed = RNG.random(SHAPE) < 0.14
    image[frayed] = RNG.integers(0, 20, np.count_nonzero(frayed))
    assert looks_like_labels(image, named=True)
    assert not looks_like_labels(image)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("label/label0001.nii.gz", "label"),
        ("p1/T1_seg.nii.gz", "seg"),
        ("sub-01/aseg.mgz", "aseg"),
        ("brain-mask.nii", "mask"),
        ("unlabelled_001.nii.gz", ""),
        ("masked_brain.nii.gz", ""),
        ("segovia/scan.nii.gz", ""),
    ],
)
def test_label_words_count_only_as_whole_parts_of_a_name(path: str, word: str) -> None:
    assert label_word(path) == word
