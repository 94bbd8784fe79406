"""Patches of unlabelled cases."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy.ndimage import binary_fill_holes

from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.semi_supervised.loader import (
    Outside,
    UnlabelledDataset,
    UnlabelledLoader,
    make_unlabelled_loader,
)

Make = Callable[..., UnlabelledLoader]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes loaders of given images, with nnU-Net's augmentation or without."""

    def loader(
        images: dict[str, np.ndarray],
        patch: tuple[int, ...] = (8, 8, 8),
        masked: tuple[bool, ...] = (False,),
        augment: bool = False,
        batch_size: int = 2,
        has_ignore: bool = False,
        initial: tuple[int, ...] | None = None,
    ) -> UnlabelledLoader:
        cases = {}
        for name, image in images.items():
            blosc2.asarray(image.astype(np.float32), urlpath=str(tmp_path / f"{name}.b2nd"), mode="w")
            cases[f"unlabelled/{name}"] = Case(name, str(tmp_path / f"{name}.b2nd"))
        transforms = None
        if augment:
            transforms = nnUNetTrainer.get_training_transforms(
                patch, (-0.5, 0.5), None, tuple(range(len(patch))), False, use_mask_for_norm=list(masked)
            )
        manager = SimpleNamespace(all_labels=[1], has_ignore_label=has_ignore)
        return UnlabelledLoader(
            UnlabelledDataset(cases, masked), batch_size, initial or patch, patch, manager, transforms=transforms
        )

    return loader


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(5, 1, size=shape)


def head(shape: tuple[int, ...] = (1, 24, 24, 24)) -> np.ndarray:
    """A sphere of noise in zeros, like an image normalised inside a mask. Some voxels inside are zero, too."""
    image = noise(*shape)
    middle = np.linalg.norm(np.indices(shape[1:]) - (np.array(shape[1:]) / 2).reshape(-1, 1, 1, 1), axis=0) < 9
    image *= middle
    image[:, 12, 10:14, 10:14] = 0
    return image


def test_a_batch_is_a_patch_of_the_images(make: Make) -> None:
    images = {"a": noise(2, 20, 19, 18), "b": noise(2, 20, 19, 18, seed=1)}
    loader = make(images, patch=(5, 6, 7), masked=(False, False))
    for _ in range(5):
        batch = next(loader)
        assert sorted(batch) == ["data", "keys", "set_aside"]
        assert batch["data"].shape == (2, 2, 5, 6, 7)
        for patch, name in zip(batch["data"].numpy(), batch["keys"], strict=True):
            image = images[name.removeprefix("unlabelled/")].astype(np.float32)
            windows = np.lib.stride_tricks.sliding_window_view(image, (5, 6, 7), axis=(1, 2, 3))
            found = (windows[0] == patch[0]).all((-1, -2, -3))
            assert found.sum() == 1
            np.testing.assert_array_equal(windows[1][found][0], patch[1])  # the same place in all channels


@pytest.mark.parametrize("masked", [False, True])
def test_a_volume_smaller_than_the_patch_is_padded(make: Make, masked: bool) -> None:
    image = noise(1, 4, 5, 20)
    loader = make({"small": image}, patch=(8, 8, 8), masked=(masked,), initial=(11, 11, 11))
    patch = next(loader)["data"][0, 0].numpy()
    assert patch.shape == (11, 11, 11)
    inside = np.argwhere(patch != 0)
    low, high = inside.min(0), inside.max(0) + 1
    assert tuple(high - low) == (4, 5, 11) or (high - low)[2] < 11
    assert (high - low)[:2].tolist() == [4, 5]
    filled = next(make({"small": image}, augment=True, masked=(masked,), initial=(11, 11, 11)))["data"]
    assert filled.shape == (2, 1, 8, 8, 8)
    assert torch.isfinite(filled).all()


def test_the_outside_of_the_mask_agrees_with_nnunet() -> None:
    image = head()
    volume: Any = FakeVolume(image)
    whole = Outside(volume, [True])[(slice(None),) * 4]
    expected = np.where(binary_fill_holes((image != 0).any(0)), 0, -1)
    assert whole.dtype == np.int16
    assert not (whole != expected[None]).any()
    assert (expected[12, 10:14, 10:14] == 0).all()  # zeros in the head are not outside
    box = (slice(0, 1), slice(2, 20), slice(3, 24), slice(0, 22))
    assert not (Outside(volume, [True])[box] != expected[None][box]).any()
    assert not Outside(volume, [False])[box].any()
    assert Outside(volume, [False])[box].shape == (1, 18, 21, 22)


def test_holes_in_a_single_slice_are_not_outside() -> None:
    image = head()
    box = (slice(0, 1), slice(12, 13), slice(0, 24), slice(0, 24))
    found = Outside(FakeVolume(image), [True])[box]  # type: ignore[arg-type]
    assert not (found != np.where(binary_fill_holes(image[0, 12] != 0), 0, -1)).any()
    assert (found[0, 0, 10:14, 10:14] == 0).all()


def test_a_mask_is_found_in_the_channels_that_were_normalised_inside_it() -> None:
    image = np.concatenate([noise(1, 24, 24, 24, seed=1), head()])  # the first one has no zeros
    box = (slice(0, 1), *(slice(0, 24),) * 3)
    found = Outside(FakeVolume(image), [False, True])[box]  # type: ignore[arg-type]
    np.testing.assert_array_equal(found[0] == 0, binary_fill_holes(image[1] != 0))


class FakeVolume:
    def __init__(self, image: np.ndarray) -> None:
        self.shape, self.image = image.shape, image

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.image[index].astype(np.float32)


@pytest.mark.parametrize("patch", [(24, 24, 24), (24, 24)])
def test_augmented_images_stay_zero_outside_of_their_mask(make: Make, patch: tuple[int, ...]) -> None:
    """Noise, brightness or gamma would change the zeros without a mask."""
    np.random.seed(0)
    torch.manual_seed(0)
    share_of_zeros = {}
    for masked in (True, False):
        loader = make({"head": head((2, 24, 24, 24))}, patch=patch, masked=(masked, masked), augment=True, batch_size=1)
        steps = loader.transforms.transforms
        loader.transforms = ComposeTransforms([Without(step) for step in steps if "Spatial" not in repr(type(step))])
        shares = []
        for _ in range(12):
            image = next(loader)["data"][0, 0].numpy()
            corners = image[tuple(slice(0, 3) for _ in patch)]
            shares.append((corners == 0).mean())
        share_of_zeros[masked] = shares
    assert share_of_zeros[True] == [1.0] * 12
    assert min(share_of_zeros[False]) < 0.1


def Without(step: Any) -> Any:
    """Adds noise to every patch, because nnU-Net applies each transform to few patches."""
    if hasattr(step, "apply_probability"):
        step.apply_probability = 1.0
    return step


def test_a_dataset_with_an_ignore_label_asks_for_no_annotated_voxels(make: Make) -> None:
    assert next(make({"a": noise(1, 12, 12, 12)}, has_ignore=True))["data"].shape == (2, 1, 8, 8, 8)


def test_a_case_that_cannot_be_read_is_set_aside_by_name(make: Make, tmp_path: Path) -> None:
    images = {"good": noise(1, 12, 12, 12), "bad": noise(1, 12, 12, 12, seed=1)}
    images["bad"][0, 6, 6, 6] = np.nan
    loader = make(images, patch=(12, 12, 12), batch_size=4)
    first, later = next(loader), [next(loader) for _ in range(4)]
    (name,) = first["set_aside"]
    assert name == "unlabelled/bad"
    assert first["set_aside"][name].startswith("case bad has voxels that are not finite numbers")
    assert all(batch["set_aside"] == first["set_aside"] for batch in later)  # the first batch may be thrown away
    assert {key for batch in (first, *later) for key in batch["keys"]} == {"unlabelled/good"}
    assert all(torch.isfinite(batch["data"]).all() for batch in (first, *later))


def test_unreadable_cases_alone_end_with_one_sentence(make: Make, tmp_path: Path) -> None:
    loader = make({"a": noise(1, 12, 12, 12), "b": noise(1, 12, 12, 12)})
    next(loader)
    for name in "ab":
        (tmp_path / f"{name}.b2nd").write_bytes(b"")
    for error in (next(loader)["error"], next(loader)["error"]):
        assert re.match("no unlabelled case can be read any more; the last one: case [ab] cannot", error)


# batchgenerators ends its processes while its thread may still read from them
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("also_bad", [False, True])
def test_a_loading_process_reports_cases_that_cannot_be_read(
    make: Make, monkeypatch: pytest.MonkeyPatch, also_bad: bool
) -> None:
    """A process that ended with an exception would end the training without a reason."""
    images = {"good": noise(1, 12, 12, 12), "bad": noise(1, 12, 12, 12, seed=1)}
    for name in ("bad", *["good"] * also_bad):
        images[name][0, 6, 6, 6] = np.nan
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    batches = make_unlabelled_loader(make(images, patch=(12, 12, 12), batch_size=4), pin_memory=False)
    try:
        later = [next(batches) for _ in range(12)]  # more than are loaded in advance
    finally:
        batches._finish()
    if also_bad:
        assert all(set(batch) == {"error"} for batch in later)
    else:
        assert list(later[-1]["set_aside"]) == ["unlabelled/bad"]
        assert {key for batch in later for key in batch["keys"]} == {"unlabelled/good"}


def test_without_processes_batches_come_from_this_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    loader = make({"a": noise(1, 12, 12, 12)})
    np.random.seed(0)
    expected = next(loader)["data"]
    np.random.seed(0)
    assert torch.equal(next(make_unlabelled_loader(loader, False))["data"], expected)
