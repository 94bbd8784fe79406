"""Batches do not depend on the process that makes them; faults in loading processes are reported."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from noise_cases import write, write_three
from small_views import LARGE, FailingViews, NumberedViews, WrongViews

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading import loader as loader_module
from pcrl_nnunet.loading.cases import Case, find_cases
from pcrl_nnunet.loading.loader import BACKGROUND_SAMPLES, ViewLoader, make_loader
from pcrl_nnunet.loading.samples import ArraySpec, Sample
from pcrl_nnunet.methods.pairs import PairViews
from pcrl_nnunet.views import sub_crop
from pcrl_nnunet.views.settings import Augmentation, ViewSettings
from pcrl_nnunet.views.sub_crop import MAX_BACKGROUND, Volume

SETTINGS = ViewSettings(
    ((8, 10, 6), (10, 12, 8)), ((3, 3, 3), (5, 6, 4)), (8, 8, 8), (4, 4, 4), (1.0, 1.0, 2.0), num_local=3
)
VIEWS = PairViews(SETTINGS, Augmentation(), 2)

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere multiprocessing's own memory is taken")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_three(tmp_path)


@pytest.fixture
def half_empty(tmp_path: Path) -> Path:
    """A case with two channels and constant background; in one channel the constant is not the minimum."""
    image = np.random.default_rng(0).standard_normal((2, 20, 20, 20)).astype(np.float32)
    image[0, :, 8:], image[1, :, 8:] = -3, 0.5
    write(tmp_path / "a.b2nd", image)
    return tmp_path


@pytest.fixture(params=["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def start_method(request: pytest.FixtureRequest) -> Iterator[str]:
    """How processes are started."""
    if request.param not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {request.param}")
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def batches(folder: Path, steps: int, **arguments: Any) -> list[dict[str, Any]]:
    given = {"views": VIEWS, "batch_size": 2, "seed": 5}
    loader = make_loader(find_cases(str(folder)), **{**given, **arguments})
    try:
        return [kept(next(loader)) for _ in range(steps)]
    finally:
        loader.close()


def kept(batch: dict[str, Any]) -> dict[str, Any]:
    """Copy a batch, because workers reuse its memory."""
    return {name: value.copy() if isinstance(value, np.ndarray) else value for name, value in batch.items()}


def assert_equal(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


def test_batches_are_the_same_without_segmentations_and_properties(folder: Path) -> None:
    (before,) = batches(folder, 1)
    for file in [*folder.glob("*_seg.b2nd"), *folder.glob("*.pkl")]:
        file.unlink()
    (after,) = batches(folder, 1)
    assert_equal(before, after)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("num_local", [0, 3])
def test_a_batch_has_the_arrays_that_its_views_name(folder: Path, num_local: int, num_workers: int) -> None:
    views = PairViews(replace(SETTINGS, num_local=num_local), Augmentation(), 2)
    (batch,) = batches(folder, 1, views=views, batch_size=4, num_workers=num_workers)
    assert set(batch) == {*views.arrays, "cases"}
    for name, spec in views.arrays.items():
        assert batch[name].shape == (4, *spec.shape)
        assert batch[name].dtype == spec.dtype
    assert set(batch["cases"]) <= {"a", "b", "c"}


def test_batches_are_the_same_bit_for_bit_with_0_1_and_3_workers(folder: Path) -> None:
    expected = batches(folder, 5)
    for num_workers in (1, 3):
        for first, second in zip(expected, batches(folder, 5, num_workers=num_workers), strict=True):
            assert_equal(first, second)


def test_whole_numbers_pass_unchanged_through_shared_memory(folder: Path) -> None:
    expected = batches(folder, 12, views=NumberedViews())
    for batch, first in zip(batches(folder, 12, views=NumberedViews(), num_workers=2), expected, strict=True):
        assert_equal(first, batch)
        assert (batch["places"].dtype, batch["known"].dtype) == (np.int64, np.bool_)
        assert batch["places"].min() >= LARGE
    assert len({batch["places"].tobytes() for batch in expected}) == 12


def test_moved_local_views_are_bit_identical_with_and_without_workers(
    half_empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(half_empty, 4)
    for num_workers in (1, 3):
        for first, second in zip(expected, batches(half_empty, 4, num_workers=num_workers), strict=True):
            assert_equal(first, second)
    assert_equal(expected[3], batches(half_empty, 1, first_step=3)[0])
    monkeypatch.setattr(sub_crop, "LOCAL_TRIES", 1)
    unmoved = batches(half_empty, 4)
    assert any((first["local"] != second["local"]).any() for first, second in zip(expected, unmoved, strict=True))


class WatchedViews(PairViews):
    """Records the shares of background, and the case and generator of each view."""

    def __init__(self, settings: ViewSettings) -> None:
        super().__init__(settings, Augmentation(), 2)
        self.shares: list[dict[str, list[float]]] = []
        self.drawn: list[tuple[str, Any]] = []

    def __call__(self, case: Case, volume: Volume, rng: np.random.Generator) -> Sample:
        self.drawn.append((case.name, rng.bit_generator.state))
        return super().__call__(case, volume, rng)

    def background(self, case: Case, volume: Volume, rng: np.random.Generator) -> dict[str, list[float]]:
        self.drawn.append((case.name, rng.bit_generator.state))
        self.shares.append(super().background(case, volume, rng))
        return self.shares[-1]


def test_the_background_line_describes_the_views_drawn_in_training(half_empty: Path) -> None:
    views = WatchedViews(SETTINGS)
    loader = ViewLoader(find_cases(str(half_empty)), views, 2, 5)
    line, judged = loader.background_line(), views.drawn
    views.drawn = []
    for index in range(BACKGROUND_SAMPLES):
        loader.sample(0, index)
    assert views.drawn == judged
    shares = {kind: np.array([of[kind] for of in views.shares]) for kind in ("global", "local")}
    means = [round(100 * of_kind.mean()) for of_kind in shares.values()]
    empty = [round(100 * (of_kind > MAX_BACKGROUND).mean()) for of_kind in shares.values()]
    assert line == (
        f"{means[0]} % of global views (more than 85 % in {empty[0]} %), "
        f"{means[1]} % of local views (more than 85 % in {empty[1]} %); 48 samples"
    )
    without_local = WatchedViews(replace(SETTINGS, num_local=0))
    assert "local" not in ViewLoader(find_cases(str(half_empty)), without_local, 2, 5).background_line()


def test_views_without_background_information_have_no_background_line(half_empty: Path) -> None:
    assert ViewLoader(find_cases(str(half_empty)), NumberedViews(), 2, 5).background_line() == ""


@only_linux
def test_workers_run_without_a_shared_memory_file_system(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For machines with a small /dev/shm."""
    tried: list[str] = []
    reserve = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        tried.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if tried[-1].startswith("/dev/shm"):
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, offset, length)

    monkeypatch.setattr(loader_module.os, "posix_fallocate", full)
    for first, second in zip(batches(folder, 5), batches(folder, 5, num_workers=2), strict=True):
        assert_equal(first, second)
    assert [path.startswith("/dev/shm") for path in tried] == 3 * [True, False]  # target, input, local


@only_linux
def test_missing_room_for_shared_memory_is_an_error_with_the_places_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loader_module.os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"no room for 3 MB .*\(/dev/shm: No space .*; /.*: No space .*\); make room"):
        loader_module.shared_memory(3 << 20)


@only_linux
def test_shared_memory_is_reserved_on_creation(tmp_path: Path) -> None:
    """Python's own class only checks free space, so trainings that start together could all count on the same space."""
    before = shutil.disk_usage("/dev/shm").free
    memory = loader_module.shared_memory(1 << 24)
    assert before - shutil.disk_usage("/dev/shm").free > 1 << 23  # nothing has been written yet
    array = np.frombuffer(memory.buffer, np.float32)
    assert len(array) == 1 << 22
    assert not array.any()


@pytest.mark.parametrize("slots", [None, 1])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_batch_stays_unchanged_until_the_next_one_is_requested(
    folder: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int, slots: int | None
) -> None:
    """Workers run ahead as far as possible and reuse all their memory; with less memory they wait."""
    if slots:
        monkeypatch.setattr(loader_module.math, "ceil", lambda _: slots - 1 - loader_module.CACHED)
    loader = make_loader(find_cases(str(folder)), VIEWS, 2, 5, num_workers=num_workers)
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
def test_workers_make_batches_in_advance(folder: Path, num_workers: int) -> None:
    """They make as many batches in advance as batchgenerators: 2 per queue, 1 in each worker, and its own queue."""
    loader = make_loader(find_cases(str(folder)), VIEWS, 2, 5, num_workers=num_workers)
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


def test_a_sample_is_a_function_of_seed_step_and_index(folder: Path) -> None:
    cases = find_cases(str(folder))

    def targets(seed: int = 0, step: int = 0, index: int = 0) -> bytes:
        return ViewLoader(cases, VIEWS, 2, seed).sample(step, index)[1]["target"].tobytes()

    assert targets(1, 2, 3) == targets(1, 2, 3)
    assert len({targets(), targets(seed=1), targets(step=1), targets(index=1)}) == 4


def test_processes_sharing_a_batch_make_the_samples_of_one_process(folder: Path) -> None:
    cases = find_cases(str(folder))

    def batch(size: int, first_sample: int = 0) -> dict[str, Any]:
        return ViewLoader(cases, VIEWS, size, 0, first_sample, first_step=3).generate_train_batch()

    whole, parts = batch(5), [batch(3), batch(2, first_sample=3)]
    for name in ("input", "target", "local"):
        np.testing.assert_array_equal(whole[name], np.concatenate([part[name] for part in parts]))
    assert whole["cases"] == [case for part in parts for case in part["cases"]]


class ThreadCountingViews(NumberedViews):
    """Counts torch's threads."""

    seen: list[int]

    def __call__(self, case: Case, volume: Volume, rng: np.random.Generator) -> Sample:
        self.seen.append(torch.get_num_threads())
        return super().__call__(case, volume, rng)


def test_a_batch_is_made_by_one_thread(folder: Path) -> None:
    views = ThreadCountingViews()
    views.seen = []
    loader = ViewLoader(find_cases(str(folder)), views, 1, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        next(loader)
        assert views.seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_every_case_is_drawn(folder: Path) -> None:
    drawn = [name for batch in batches(folder, 10, batch_size=4) for name in batch["cases"]]
    assert set(drawn) == {"a", "b", "c"}


def test_cases_are_drawn_by_their_weights(folder: Path) -> None:
    cases = find_cases(str(folder))
    weighted = [replace(case, weight=weight) for case, weight in zip(cases, (3.0, 1.0, 0.0), strict=True)]
    drawn = ViewLoader(weighted, NumberedViews(), 400, 0).generate_train_batch()["cases"]
    counts = [drawn.count(case.name) for case in weighted]
    assert counts[2] == 0
    assert counts[0] == pytest.approx(300, abs=5 * np.sqrt(400 * 0.75 * 0.25))
    alike = make_loader([replace(case, weight=2.5) for case in cases], VIEWS, 2, 5)
    for first, second in zip(batches(folder, 3), islice(alike, 3), strict=True):  # equal weights change nothing
        assert_equal(first, second)


def test_a_loader_can_be_sent_to_a_process(folder: Path) -> None:
    loader = ViewLoader(find_cases(str(folder)), VIEWS, 2, 5)
    copy = pickle.loads(pickle.dumps(loader))
    assert_equal(loader.generate_train_batch(), copy.generate_train_batch())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_case_is_named_with_and_without_workers(folder: Path, num_workers: int) -> None:
    for file in folder.glob("?.b2nd"):
        os.truncate(file, 100)
    with pytest.raises(UserError, match=r"case \w cannot be read from"):
        batches(folder, 1, num_workers=num_workers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # batchgenerators' own message
def test_a_killed_worker_ends_with_a_sentence(folder: Path) -> None:
    loader = make_loader(find_cases(str(folder)), VIEWS, 2, 5, num_workers=1)
    next(loader)
    for process in loader._source._processes:  # type: ignore[attr-defined]
        process.kill()
    with pytest.raises(UserError, match="a process that loads data has ended unexpectedly"):
        list(islice(loader, 20))  # some batches were ready
    loader.close()


@pytest.mark.parametrize(
    ("name", "spec", "came"),
    [
        ("input", ArraySpec((2, 2, 3, 5)), r"\(2, 2, 3, 4\) of float32"),
        ("places", ArraySpec((5,), "int32"), r"\(5,\) of int64"),
        ("key", ArraySpec((5,)), "no such array"),
    ],
)
def test_views_whose_arrays_differ_from_their_declaration_are_named(
    folder: Path, name: str, spec: ArraySpec, came: str
) -> None:
    promised = rf"{tuple(spec.shape)} of {spec.dtype}".replace("(", r"\(").replace(")", r"\)")
    message = rf"WrongViews made {came} for '{name}'; its `arrays` promises {promised}"
    with pytest.raises(ValueError, match=message):
        batches(folder, 1, views=WrongViews(name, spec))
    with pytest.raises(RuntimeError, match=rf"a loading process failed:(.|\n)*ValueError: {message}"):
        batches(folder, 1, views=WrongViews(name, spec), num_workers=1)


def test_without_workers_an_exception_in_views_is_raised_unchanged(folder: Path) -> None:
    with pytest.raises(KeyError, match="no such sample"):
        batches(folder, 12, views=FailingViews())


def test_a_worker_exception_is_raised_in_order_with_its_own_traceback(folder: Path, start_method: str) -> None:
    expected = batches(folder, 12, views=NumberedViews(), batch_size=1)
    good = next(number for number, batch in enumerate(expected) if batch["cases"] == ["a"])
    assert good > 0
    loader = make_loader(find_cases(str(folder)), FailingViews(), 1, 5, num_workers=1)
    for batch in expected[:good]:
        assert_equal(next(loader), batch)
    with pytest.raises(RuntimeError, match="a loading process failed") as raised:
        next(loader)
    assert re.search(r'small_views\.py", line \d+, in _looked_up\n', str(raised.value))
    assert str(raised.value).rstrip().endswith("KeyError: 'no such sample'")
    assert list(loader) == []
