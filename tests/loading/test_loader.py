"""Cases on disk, and batches that do not depend on who makes them."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import sleep
from typing import Any

import blosc2
import numpy as np
import pytest
import torch

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading import cases as cases_module
from pcrl_nnunet.loading import loader as data
from pcrl_nnunet.loading.cases import Case, CaseVolume, find_cases
from pcrl_nnunet.loading.loader import ViewLoader, make_loader
from pcrl_nnunet.views import sub_crop
from pcrl_nnunet.views.boxes import Box
from pcrl_nnunet.views.settings import Augmentation, ViewSettings
from pcrl_nnunet.views.spatial import AffineMap, resample
from pcrl_nnunet.views.sub_crop import MAX_BACKGROUND, SubCropTransform, background, read_window

VIEWS = ViewSettings(
    ((8, 10, 6), (10, 12, 8)), ((3, 3, 3), (5, 6, 4)), (8, 8, 8), (4, 4, 4), (1.0, 1.0, 2.0), num_local=3
)
VIEWS_2D = ViewSettings(((10, 6), (12, 8)), ((3, 3), (6, 4)), (8, 8), (4, 4), (1.0, 1.0), num_local=3)


def write(path: Path, array: np.ndarray) -> np.ndarray:
    blosc2.asarray(array, chunks=(1, *(max(1, n // 2) for n in array.shape[1:])), urlpath=str(path), mode="w")
    return array


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three cases of different shapes with two channels, as nnU-Net names them."""
    rng = np.random.default_rng(0)
    for name, shape in (("b", (2, 12, 14, 9)), ("a", (2, 20, 8, 10)), ("c", (2, 3, 30, 30))):
        write(tmp_path / f"{name}.b2nd", rng.standard_normal(shape).astype(np.float32))
        write(tmp_path / f"{name}_seg.b2nd", np.zeros((1, *shape[1:]), dtype=np.int8))
        (tmp_path / f"{name}.pkl").write_bytes(b"not to be read")
    return tmp_path


@pytest.fixture
def half_empty(tmp_path: Path) -> Path:
    """A case whose background has a constant in each of two channels, one of them no minimum."""
    image = np.random.default_rng(0).standard_normal((2, 20, 20, 20)).astype(np.float32)
    image[0, :, 8:], image[1, :, 8:] = -3, 0.5
    write(tmp_path / "a.b2nd", image)
    return tmp_path


def batches(folder: Path, steps: int, **arguments: Any) -> list[dict[str, Any]]:
    given = {"views": VIEWS, "augmentation": Augmentation(), "batch_size": 2, "seed": 5}
    loader = make_loader(find_cases(str(folder)), **{**given, **arguments})
    try:
        return [kept(next(loader)) for _ in range(steps)]
    finally:
        loader.close()


def kept(batch: dict[str, Any]) -> dict[str, Any]:
    """A copy: workers write into a batch's memory again."""
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in batch.items()}


def read_box(case: Case, box: Box) -> np.ndarray:
    return CaseVolume(case)[box.index()]


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["cases"] == second["cases"]
    for name in ("target", "input", "local"):
        np.testing.assert_array_equal(first[name], second[name])


def test_cases_are_the_images_in_order_of_name(folder: Path) -> None:
    assert [case.name for case in find_cases(str(folder))] == ["a", "b", "c"]
    assert find_cases(str(folder))[0].path == str(folder / "a.b2nd")


def test_cases_are_found_and_batches_the_same_without_segmentations_and_properties(folder: Path) -> None:
    (before,) = batches(folder, 1)
    for file in [*folder.glob("*_seg.b2nd"), *folder.glob("*.pkl")]:
        file.unlink()
    (after,) = batches(folder, 1)
    assert_equal(before, after)


@pytest.mark.parametrize("name", ["", "missing"])
def test_a_folder_without_cases_says_what_to_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no preprocessed images in .*: run nnUNetv2_preprocess"):
        find_cases(str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".b2nd", ".npy", ".npz"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_box_is_read_from_each_of_nnunets_formats(tmp_path: Path, suffix: str, dtype: type) -> None:
    path = tmp_path / f"x{suffix}"
    array: np.ndarray = np.random.default_rng(0).standard_normal((2, 9, 10, 11)).astype(dtype)
    if suffix == ".b2nd":
        write(path, array)
    elif suffix == ".npy":
        np.save(path, array)
    else:
        np.savez_compressed(path, data=array, seg=np.zeros(3))
    box, (case,) = Box((1, 0, 5), (4, 10, 6)), find_cases(str(tmp_path))
    read = read_box(case, box)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, array[box.index()].astype(np.float32))


def test_an_unpacked_array_is_preferred_to_its_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 2, 2, 2)))
    np.savez(tmp_path / "x.npz", data=np.zeros((1, 2, 2, 2)))
    assert find_cases(str(tmp_path)) == [Case("x", str(tmp_path / "x.npy"))]


def test_an_archive_is_unpacked_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, labels = np.random.default_rng(0).standard_normal((1, 4, 5, 6)), np.ones((1, 4, 5, 6), np.int8)
    np.savez(tmp_path / "x.npz", data=image, seg=labels)
    (case,) = find_cases(str(tmp_path))

    def killed(path: str, array: np.ndarray) -> None:
        Path(path).write_bytes(b"half")
        monkeypatch.setattr(cases_module.os, "remove", lambda path: None)  # nothing is done any more
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cases_module.np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            cases_module.unpack(case, segmentation=True)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert find_cases(str(tmp_path)) == [case]
    unpacked = cases_module.unpack(case, segmentation=True)
    assert unpacked == Case("x", str(tmp_path / "x.npy")) == cases_module.unpack(unpacked)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), image)
    np.testing.assert_array_equal(np.load(tmp_path / "x_seg.npy"), labels)
    (tmp_path / "y.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"case y cannot be read from .*y\.npz .*: preprocess the image again"):
        cases_module.unpack(Case("y", str(tmp_path / "y.npz")))


def test_only_the_box_is_read_from_disk(tmp_path: Path) -> None:
    array = write(tmp_path / "x.b2nd", np.random.default_rng(0).standard_normal((1, 64, 64, 64)).astype(np.float32))
    volume = CaseVolume(Case("x", str(tmp_path / "x.b2nd")))
    content = bytearray((tmp_path / "x.b2nd").read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(content) // 4] = bytes(len(content) // 4)  # of other chunks, in place
    with open(tmp_path / "x.b2nd", "r+b") as file:
        file.write(content)
    box, whole = Box((0, 0, 0), (20, 20, 20)), Box((0, 0, 0), (64, 64, 64))
    np.testing.assert_array_equal(volume[box.index()], array[box.index()])
    with pytest.raises((UserError, AssertionError)):  # the damage is there, but not in this box
        np.testing.assert_array_equal(volume[whole.index()], array)


@pytest.mark.parametrize("suffix", [".b2nd", ".npy", ".npz"])
@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_truncated_case_is_named(tmp_path: Path, suffix: str, left: float) -> None:
    path = tmp_path / f"case_7{suffix}"
    array = np.random.default_rng(0).standard_normal((1, 30, 30, 30)).astype(np.float32)
    if suffix == ".b2nd":
        write(path, array)
    elif suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, data=array)
    os.truncate(path, int(left * path.stat().st_size))
    with pytest.raises(UserError, match=rf"case case_7 cannot be read from .*case_7\{suffix} \(.*preprocess the image"):
        read_box(Case("case_7", str(path)), Box((0, 0, 0), (30, 30, 30)))


@pytest.mark.parametrize("suffix", [".b2nd", ".npy"])
def test_a_case_truncated_while_it_is_open_is_named(tmp_path: Path, suffix: str) -> None:
    array = np.random.default_rng(0).standard_normal((1, 64, 64, 64)).astype(np.float32)
    if suffix == ".npy":
        np.save(tmp_path / "x.npy", array)
    else:
        write(tmp_path / "x.b2nd", array)
    volume = CaseVolume(Case("x", str(tmp_path / f"x{suffix}")))
    os.truncate(tmp_path / f"x{suffix}", 2000)
    with pytest.raises(UserError, match="case x cannot be read"):
        volume[Box((0, 0, 0), (64, 64, 64)).index()]


def test_a_case_that_vanished_is_named(folder: Path) -> None:
    cases = find_cases(str(folder))
    (folder / "b.b2nd").unlink()
    with pytest.raises(UserError, match=r"case b cannot be read from .*b\.b2nd \(the file is missing\)"):
        CaseVolume(cases[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_case_with_voxels_that_are_not_finite_is_named(tmp_path: Path, value: float) -> None:
    array = np.zeros((1, 6, 6, 6), dtype=np.float32)
    array[0, 3, 3, 3] = value
    write(tmp_path / "x.b2nd", array)
    with pytest.raises(UserError, match=r"case x has voxels that are not finite numbers \(NaN or infinity\)"):
        read_box(Case("x", str(tmp_path / "x.b2nd")), Box((0, 0, 0), (6, 6, 6)))
    np.testing.assert_array_equal(read_box(Case("x", str(tmp_path / "x.b2nd")), Box((0, 0, 0), (6, 6, 3))), 0)


def test_a_batch_has_two_global_and_all_local_views_of_each_sample(folder: Path) -> None:
    (batch,) = batches(folder, 1, batch_size=4)
    assert set(batch) == {"target", "input", "local", "cases"}
    assert batch["target"].shape == batch["input"].shape == (4, 2, 2, 8, 8, 8)
    assert batch["local"].shape == (4, 3, 2, 4, 4, 4)
    assert {batch[name].dtype for name in ("target", "input", "local")} == {np.dtype(np.float32)}
    assert set(batch["cases"]) <= {"a", "b", "c"}


def test_2d_views_of_volumes_have_two_axes(folder: Path) -> None:
    (batch,) = batches(folder, 1, views=VIEWS_2D, batch_size=3)
    assert batch["target"].shape == (3, 2, 2, 8, 8)
    assert batch["local"].shape == (3, 3, 2, 4, 4)


def test_without_augmentation_the_input_is_the_target_in_memory_of_its_own(folder: Path) -> None:
    none = replace(Augmentation(), p_noise=0.0, p_blur=0.0, p_gamma=0.0, p_swap=0.0)
    (batch,) = batches(folder, 1, augmentation=none)
    np.testing.assert_array_equal(batch["input"], batch["target"])
    assert not np.shares_memory(batch["input"], batch["target"])


def test_inputs_differ_from_targets_and_the_views_of_a_sample_from_each_other(folder: Path) -> None:
    always = replace(Augmentation(), p_noise=1.0)
    (batch,) = batches(folder, 1, augmentation=always)
    assert np.all(np.any(batch["input"] != batch["target"], axis=(2, 3, 4, 5)))
    assert np.all(np.any(batch["local"][:, 1:] != batch["local"][:, :-1], axis=(2, 3, 4, 5)))
    assert np.any(batch["target"][:, 0] != batch["target"][:, 1])


def test_batches_are_the_same_bit_for_bit_with_0_1_and_3_workers(folder: Path) -> None:
    expected = batches(folder, 5)
    for num_workers in (1, 3):
        for first, second in zip(expected, batches(folder, 5, num_workers=num_workers), strict=True):
            assert_equal(first, second)


@pytest.mark.parametrize("pairs", [1, 2])
def test_local_views_that_move_are_the_same_bit_for_bit_whoever_makes_them(
    half_empty: Path, monkeypatch: pytest.MonkeyPatch, pairs: int
) -> None:
    views = replace(VIEWS, pairs_per_read=pairs)
    expected = batches(half_empty, 4, views=views)
    for num_workers in (1, 3):
        for first, second in zip(expected, batches(half_empty, 4, views=views, num_workers=num_workers), strict=True):
            assert_equal(first, second)
    assert_equal(expected[3], batches(half_empty, 1, views=views, first_step=3)[0])
    monkeypatch.setattr(sub_crop, "LOCAL_TRIES", 1)
    unmoved = batches(half_empty, 4, views=views)
    assert any((first["local"] != second["local"]).any() for first, second in zip(expected, unmoved, strict=True))


def test_the_share_of_background_is_said_of_the_views_that_a_training_draws(half_empty: Path) -> None:
    loader = ViewLoader(find_cases(str(half_empty)), VIEWS, Augmentation(), 2, 5)
    shares = loader.background(48)
    assert shares["global"].shape == (48, 2)
    assert shares["local"].shape == (48, 3)
    first = loader.sample(0, 0)["boxes"].pair[0]  # from voxel 8 of axis 1 on there is background
    lower = first.lower[1] + loader.transform.transforms[0](**loader._source(0, 0))["origin"][1]
    outside = np.arange(lower, lower + first.shape[1]) >= 8
    assert shares["global"][0, 0] == pytest.approx(outside.mean())
    means = [round(100 * shares[kind].mean()) for kind in ("global", "local")]
    empty = [round(100 * (shares[kind] > MAX_BACKGROUND).mean()) for kind in ("global", "local")]
    assert loader.background_line() == (
        "global views {} %, local views {} % (means of 48 pairs; over 85 % in {} % and {} % of the views)"
    ).format(*means, *empty)
    assert "local" not in ViewLoader(loader.cases, replace(VIEWS, num_local=0), Augmentation(), 2, 5).background_line()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere multiprocessing's own memory is taken")
def test_workers_do_without_a_shared_memory_file_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where /dev/shm is too small."""
    tried: list[str] = []
    reserve = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        tried.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if tried[-1].startswith("/dev/shm"):
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, offset, length)

    monkeypatch.setattr(data.os, "posix_fallocate", full)
    for first, second in zip(batches(folder, 5), batches(folder, 5, num_workers=2), strict=True):
        assert_equal(first, second)
    assert [path.startswith("/dev/shm") for path in tried] == 3 * [True, False]  # target, input, local


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere multiprocessing's own memory is taken")
def test_where_there_is_no_room_at_all_for_shared_memory_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for 3 MB .*\(/dev/shm: No space .*; /.*: No space .*\); make room"):
        data.shared_memory(3 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere multiprocessing's own memory is taken")
def test_shared_memory_is_reserved_before_it_is_written(tmp_path: Path) -> None:
    """Python's own looks at what is free: several trainings that start at once then share what one may have."""
    before = shutil.disk_usage("/dev/shm").free
    memory = data.shared_memory(1 << 24)
    assert before - shutil.disk_usage("/dev/shm").free > 1 << 23  # nothing has been written yet
    array = np.frombuffer(memory.buffer, np.float32)
    assert len(array) == 1 << 22
    assert not array.any()


@pytest.mark.parametrize("slots", [None, 1])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, slots: int | None
) -> None:
    """Workers run ahead as far as they can, and use all their memory again; with less of it they wait."""
    if slots:
        monkeypatch.setattr(data.math, "ceil", lambda _: slots - 1 - data.CACHED)
    loader = make_loader(find_cases(str(folder)), VIEWS, Augmentation(), 2, 5, num_workers=num_workers)
    assert loader._worker is not None
    assert loader._worker.slots == (slots or {1: 8, 3: 5}[num_workers])
    try:
        for expected in batches(folder, 30):
            batch = next(loader)
            sleep(0.05)
            assert_equal(expected, batch)
    finally:
        loader.close()
    assert list(loader) == []


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_do_not_wait_for_memory(folder: Path, num_workers: int) -> None:
    """They make as many batches ahead as batchgenerators holds: 2 a queue, 1 in each hand, its own queue."""
    loader = make_loader(find_cases(str(folder)), VIEWS, Augmentation(), 2, 5, num_workers=num_workers)
    worker = loader._worker
    assert worker is not None
    try:
        next(loader)
        sleep(2)
        filled = sum(worker.memory((i, j))["target"].any() for i in range(num_workers) for j in range(worker.slots))
    finally:
        loader.close()
    assert filled >= 1 + 3 * num_workers + max(3, num_workers) + 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_that_starts_later_continues_the_sequence(folder: Path, num_workers: int) -> None:
    for first, second in zip(
        batches(folder, 5)[3:], batches(folder, 2, first_step=3, num_workers=num_workers), strict=True
    ):
        assert_equal(first, second)


@pytest.mark.parametrize("pairs", [1, 2])
def test_a_sample_is_a_function_of_seed_step_and_index(folder: Path, pairs: int) -> None:
    cases = find_cases(str(folder))

    def targets(seed: int = 0, step: int = 0, index: int = 0) -> bytes:
        loader = ViewLoader(cases, replace(VIEWS, pairs_per_read=pairs), Augmentation(), 2, seed)
        return loader.sample(step, index)["target"].tobytes()

    assert targets(1, 2, 3) == targets(1, 2, 3)
    assert len({targets(), targets(seed=1), targets(step=1), targets(index=1)}) == 4


@pytest.mark.parametrize("pairs", [1, 2])
def test_processes_that_share_a_batch_make_what_one_makes(folder: Path, pairs: int) -> None:
    cases, views = find_cases(str(folder)), replace(VIEWS, pairs_per_read=pairs)

    def batch(size: int, first_sample: int = 0) -> dict[str, Any]:
        loader = ViewLoader(cases, views, Augmentation(), size, 0, first_sample, first_step=3)
        return loader.generate_train_batch()

    whole, parts = batch(5), [batch(3), batch(2, first_sample=3)]  # a shared read lies across the border
    for name in ("input", "target", "local"):
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))
    assert whole["cases"] == [case for part in parts for case in part["cases"]]


def test_cases_of_shared_reads_depend_on_seed_and_step(folder: Path) -> None:
    def names(seed: int = 0, first_step: int = 0) -> tuple[str, ...]:
        views = replace(VIEWS, pairs_per_read=2)
        loader = ViewLoader(find_cases(str(folder)), views, Augmentation(), 40, seed, first_step=first_step)
        return tuple(loader.generate_train_batch()["cases"])

    assert len({names(), names(seed=1), names(first_step=1)}) == 3


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("suffix", [".b2nd", ".npy"])
def test_transforms_that_write_into_the_data_change_neither_source_nor_other_samples(
    tmp_path: Path, suffix: str, pairs: int
) -> None:
    image = np.random.default_rng(0).standard_normal((1, 9, 9, 9)).astype(np.float32)  # read in one piece
    if suffix == ".npy":
        np.save(tmp_path / "x.npy", image)
    else:
        write(tmp_path / "x.b2nd", image)
    loader = ViewLoader(find_cases(str(tmp_path)), replace(VIEWS, pairs_per_read=pairs), Augmentation(), 2, 0)

    def zero(**data_dict: Any) -> dict[str, Any]:
        data_dict["data"][:] = 0
        return data_dict

    plain = loader.sample(0, 1)["target"]
    loader.transform.transforms.insert(1, zero)
    assert not loader.sample(0, 0)["target"].any()
    del loader.transform.transforms[1]
    np.testing.assert_array_equal(loader.sample(0, 1)["target"], plain)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_views_without_local_ones_make_batches_without(folder: Path, num_workers: int) -> None:
    (batch,) = batches(folder, 1, views=replace(VIEWS, num_local=0), num_workers=num_workers)
    assert set(batch) == {"target", "input", "cases"}
    assert batch["input"].shape == (2, 2, 2, 8, 8, 8)


def test_local_views_are_not_swapped(folder: Path) -> None:
    swap = replace(Augmentation(), p_noise=0, p_blur=0, p_gamma=0, p_swap=1.0)
    loader = ViewLoader(find_cases(str(folder)), VIEWS, swap, 1, 0)
    sample, before = loader.sample_in_steps(loader.cases[0], np.random.default_rng(0))
    np.testing.assert_array_equal(sample["local"], before[2:])
    assert np.any(sample["input"] != before[:2])


def test_a_batch_is_made_by_one_thread(folder: Path) -> None:
    loader = ViewLoader(find_cases(str(folder)), VIEWS, Augmentation(), 1, 0)
    seen = []

    def count(**data_dict: Any) -> dict[str, Any]:
        seen.append(torch.get_num_threads())
        return data_dict

    loader.transform.transforms.append(count)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        next(loader)
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_every_case_is_drawn(folder: Path) -> None:
    drawn = [name for batch in batches(folder, 10, batch_size=4) for name in batch["cases"]]
    assert set(drawn) == {"a", "b", "c"}


def test_cases_are_drawn_by_their_weights(folder: Path) -> None:
    cases = find_cases(str(folder))
    weighted = [replace(case, weight=weight) for case, weight in zip(cases, (3.0, 1.0, 0.0), strict=False)]
    loader = ViewLoader(weighted, VIEWS, Augmentation(), 1, 0)
    drawn = [loader._draw(np.random.default_rng(i))[0].name for i in range(400)]
    counts = [drawn.count(case.name) for case in weighted]
    assert counts[2] == 0
    assert counts[0] == pytest.approx(300, abs=5 * np.sqrt(400 * 0.75 * 0.25))
    for first, second in zip(batches(folder, 3), same_weights(folder), strict=True):  # as without weights
        assert_equal(first, second)


def same_weights(folder: Path) -> list[dict[str, Any]]:
    cases = [replace(case, weight=2.5) for case in find_cases(str(folder))]
    return list(islice(make_loader(cases, VIEWS, Augmentation(), 2, 5), 3))


def test_a_loader_can_be_sent_to_a_process(folder: Path) -> None:
    loader = ViewLoader(find_cases(str(folder)), VIEWS, Augmentation(), 2, 5)
    copy = pickle.loads(pickle.dumps(loader))
    assert_equal(loader.generate_train_batch(), copy.generate_train_batch())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_user_is_told_which_case_is_damaged_whoever_reads_it(folder: Path, num_workers: int) -> None:
    for file in folder.glob("?.b2nd"):
        os.truncate(file, 100)
    with pytest.raises(UserError, match=r"case \w cannot be read from"):
        batches(folder, 1, num_workers=num_workers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # batchgenerators' own message
def test_a_worker_that_is_killed_is_said_in_a_sentence(folder: Path) -> None:
    loader = make_loader(find_cases(str(folder)), VIEWS, Augmentation(), 2, 5, num_workers=1)
    next(loader)
    for process in loader._source._processes:  # type: ignore[attr-defined]
        process.kill()
    with pytest.raises(UserError, match="a process that loads data has ended unexpectedly"):
        list(islice(loader, 20))  # some batches were ready
    loader.close()


@pytest.mark.parametrize("views", [VIEWS, VIEWS_2D])
def test_pairs_that_share_a_read_open_one_case_and_are_the_same_with_any_number_of_workers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, views: ViewSettings
) -> None:
    shared = replace(views, pairs_per_read=2)
    expected = batches(folder, 3, views=shared, batch_size=5)
    for num_workers in (1, 3):
        for first, second in zip(
            expected, batches(folder, 3, views=shared, batch_size=5, num_workers=num_workers), strict=True
        ):
            assert_equal(first, second)
    for batch in expected:
        assert batch["cases"][0] == batch["cases"][1]
        assert batch["cases"][2] == batch["cases"][3]
        assert np.any(batch["target"][0] != batch["target"][1])
    assert len({tuple(batch["cases"]) for batch in expected}) > 1

    opened: list[str] = []
    monkeypatch.setattr(data, "CaseVolume", lambda case: opened.append(case.name) or CaseVolume(case))
    batches(folder, 1, views=shared, batch_size=5)
    assert len(opened) == 3  # for 2 + 2 + 1 pairs


def test_a_shared_read_is_a_window_of_bounded_size(tmp_path: Path) -> None:
    write(tmp_path / "x.b2nd", np.random.default_rng(0).standard_normal((1, 80, 80, 80)).astype(np.float32))
    volume = CaseVolume(Case("x", str(tmp_path / "x.b2nd")))
    windows = [read_window(volume, replace(VIEWS, pairs_per_read=4), np.random.default_rng(seed)) for seed in range(40)]
    assert {window.within.shape for window in windows} == {(15, 18, 12)}  # 1.5 times 10x12x8
    assert np.max([window.shape for window in windows], axis=0).tolist() == [1, 21, 24, 16]  # and a quarter around it
    corners = {window.array[0, 0, 0, 0] for window in windows}
    assert len(corners) > 35  # they lie anywhere
    flat = read_window(volume, replace(VIEWS_2D, pairs_per_read=4), np.random.default_rng(0))
    assert flat.within.shape == (4, 18, 12)


def test_a_shared_read_shows_something_where_it_can(tmp_path: Path) -> None:
    image = np.zeros((1, 80, 80, 80), dtype=np.float32)
    image[:, :40] = np.random.default_rng(0).standard_normal((1, 40, 80, 80))
    write(tmp_path / "x.b2nd", image)
    volume, views = CaseVolume(Case("x", str(tmp_path / "x.b2nd"))), replace(VIEWS, pairs_per_read=4)
    shares = []
    for seed in range(40):
        window = read_window(volume, views, np.random.default_rng(seed))
        shares.append(background(window.array[window.within.index()]))
    assert np.mean(np.array(shares) > 0.85) < 0.15  # of one draw it would be four of ten


def test_pairs_of_a_shared_read_do_not_reach_beyond_it_inside_a_large_volume(tmp_path: Path) -> None:
    write(tmp_path / "x.b2nd", np.random.default_rng(0).standard_normal((1, 80, 80, 80)).astype(np.float32))
    volume, views = CaseVolume(Case("x", str(tmp_path / "x.b2nd"))), replace(VIEWS, pairs_per_read=4)
    transform, outside = SubCropTransform(views, Augmentation()), []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        window = read_window(volume, views, rng)
        if window.shape == (1, 21, 24, 16):  # not at the volume's border
            _, _, maps = transform.sample(window.within, rng)
            whole = Box.of_size((0, 0, 0), window.shape[1:])
            outside += [not whole.contains(affine.footprint()) for affine in maps["target"]]
    assert len(outside) > 20
    assert np.mean(outside) < 0.1


@pytest.mark.parametrize("views", [VIEWS, VIEWS_2D])
def test_a_sample_in_steps_is_where_it_says(folder: Path, views: ViewSettings) -> None:
    none = Augmentation(
        **dict.fromkeys(("p_noise", "p_blur", "p_gamma", "p_swap", "p_grey", "p_cutout", "p_flip"), 0.0)
    )
    loader = ViewLoader(find_cases(str(folder)), views, replace(none, rotation_degrees=0, scale=0), 1, 0)
    case = loader.cases[0]
    sample, before = loader.sample_in_steps(case, np.random.default_rng(3))
    assert len(before) == 2 + views.num_local
    image = read_box(case, Box((0, 0, 0), CaseVolume(case).shape[1:]))
    for index in sample["slice"]:
        image = image[:, index]
    for box, view in zip([*sample["boxes"].pair, *sample["boxes"].local], before, strict=True):
        affine = AffineMap(
            np.diag(np.divide(box.shape, view.shape[1:])),
            (np.array(box.lower) + box.upper - 1) / 2,
            view.shape[1:],
            tuple(np.divide(box.shape, view.shape[1:]).tolist()),
        )
        np.testing.assert_allclose(view, resample(image, affine), atol=1e-5)
