"""The benchmark runs and measures the right things; speed itself is not tested."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads /proc")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script; its changes to the environment and to torch are undone after the test."""
    folders = ("raw", "preprocessed", "results", "n_proc_DA", "wandb_enabled")
    for name in (*THREADS, *(f"nnUNet_{folder}" for folder in folders)):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(sys, "argv", sys.argv)
    threads = torch.get_num_threads()
    yield importlib.import_module("benchmark_step")
    torch.set_num_threads(threads)


def dataset(benchmark: ModuleType, home: Path) -> Path:
    """Write the dataset of a quick run. Return its home folder."""
    benchmark.write_dataset(home, benchmark.QUICK)
    return home


def test_a_quick_run_writes_finite_numbers_and_prints_the_same(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def in_this_process(measure: Callable[..., Any], *arguments: Any) -> Any:
        ctypes.CDLL(None).malloc_trim(0)  # otherwise such small steps reuse freed memory
        return measure(*arguments)

    forward, steps_of_authors = benchmark.AuthorsWay.forward, []

    def counted(*given: Any) -> Any:
        steps_of_authors.append(given)
        return forward(*given)

    monkeypatch.setattr(benchmark.AuthorsWay, "forward", counted)
    monkeypatch.setattr(benchmark, "keep_freed_memory", lambda: None)  # this process goes on with other tests
    monkeypatch.setattr(benchmark, "fresh", in_this_process)  # imports would take most of the time
    file = tmp_path / "numbers.json"
    sys.argv = ["benchmark_step.py", "--quick", "--json", str(file)]
    benchmark.main()
    assert len(steps_of_authors) > 3  # the comparison really ran the authors' way
    printed, numbers = capsys.readouterr().out, json.loads(file.read_text())
    needed = {"early_exit_speedup", "peak_memory_ratio", "startup_seconds_100000", "rss_100000_vs_10"}
    assert needed <= set(numbers)
    assert all(math.isfinite(number) and number > 0 for number in numbers.values())
    ratio, ratio_of_other = re.findall(r"ratio +([\d.]+)", printed)
    assert float(ratio) == pytest.approx(numbers["early_exit_speedup"], abs=0.01)
    assert float(ratio_of_other) == pytest.approx(numbers["early_exit_speedup_3_stages"], abs=0.01)
    authors, ours = (float(re.search(rf"{way} +([\d.]+) s", printed)[1]) for way in ("authors' way", "ours"))  # type: ignore[index]
    assert authors / ours == pytest.approx(numbers["early_exit_speedup"], rel=0.05)
    memory = re.search(r"ours / authors' +([\d.]+) of a training", printed)
    assert memory is not None
    assert float(memory[1]) == pytest.approx(numbers["peak_memory_ratio"], abs=0.001)
    seconds = re.search(r"200 cases: first batch after +([\d.]+) s", printed)
    assert seconds is not None
    assert float(seconds[1]) == pytest.approx(numbers["startup_seconds_100000"], abs=0.01)


def test_parts_that_are_not_asked_for_are_not_measured(benchmark: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    sys.argv = ["benchmark_step.py", "--quick", "--json", str(file), "--parts", "reading", "gpu"]
    benchmark.main()
    assert {"cold_vs_warm", "cold_batches_a_second"} >= {n for n in json.loads(file.read_text()) if "gpu" not in n}


@pytest.mark.parametrize("drawn", [1, 3])
def test_the_authors_way_adds_full_resolution_to_the_drawn_levels(
    benchmark: ModuleType, tmp_path: Path, drawn: int
) -> None:
    trainer, batch = benchmark.trainer_of(dataset(benchmark, tmp_path), 4)
    data = {name: torch.as_tensor(batch[name]) for name in ("input", "target", "local")}
    method = trainer.network
    variants = method.variants()
    assert [levels.deepest for levels in variants] == [1, 2, 3]
    authors = benchmark.AuthorsWay(method)
    authors.rng = SimpleNamespace(integers=lambda low, high: drawn)  # all pairs on the same level, as in our method
    output = authors(data, variants[drawn - 1], 0.5)
    ours = method(data, variants[drawn - 1])
    restored = {picture.title: picture.images.detach() for picture in method.pictures(data)}
    error = [torch.mean((restored[f"level {of}"] - data["target"][:, 0]) ** 2) for of in (3, drawn)]
    comparison = ours.terms["comparison_global"] + ours.terms["comparison_local"]
    assert output.loss.item() == pytest.approx(float(error[0] + 0.5 * error[1] + comparison), rel=1e-4)
    output.loss.backward()
    assert all(p.grad is not None for p in method.decoder.parameters())  # every level, whichever is drawn


def test_the_peak_of_a_step_covers_its_own_memory_only(benchmark: ModuleType) -> None:
    before = benchmark.resident("VmRSS")
    array = np.ones(1 << 28, np.uint8)
    del array
    ctypes.CDLL(None).malloc_trim(0)  # another test may have set that freed memory is kept
    assert benchmark.resident("VmHWM") - before > 0.7 * (1 << 28)  # a part may be memory that was freed before
    benchmark.forget_peak()
    assert benchmark.resident("VmHWM") - before < 0.2 * (1 << 28)


def test_cases_beyond_the_tenth_repeat_the_first_ten(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.write_dataset(tmp_path, benchmark.QUICK, 25)
    data = tmp_path / "preprocessed" / benchmark.DATASET / benchmark.DATA
    cases = benchmark.find_cases(str(data))
    assert len(cases) == 25
    assert len({os.stat(case.path).st_ino for case in cases}) == 10


@pytest.mark.parametrize(("period", "share"), [(0.002, 0.0), (0.009, 0.33), (0.012, 0.5)])
def test_the_waiting_share_matches_the_speed_of_a_slow_loader(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, period: float, share: float
) -> None:
    """Steps take 6 ms; the loader starts with 34 batches. With a period of 9 ms, a third of the time is waiting."""
    store: queue.Queue[int] = queue.Queue(34)
    over = threading.Event()

    def load() -> None:
        while not over.wait(period):
            with contextlib.suppress(queue.Full):
                store.put(0, timeout=1)

    thread = threading.Thread(target=load, daemon=True)

    def loaders() -> Any:
        thread.start()
        return type("Loader", (), {"__next__": lambda self: store.get(), "close": lambda self: over.set()})()

    network = SimpleNamespace(variants=lambda: [1, 2, 3])
    trainer = SimpleNamespace(network=network, get_dataloaders=loaders, train_step=lambda *a: time.sleep(0.006))
    monkeypatch.setattr(benchmark, "trainer_of", lambda *a: (trainer, {}))
    monkeypatch.setattr(benchmark, "forget_peak", lambda: None)
    found = benchmark.gpu(tmp_path, 4, True, False, False, 1)
    thread.join(5)
    assert found["waiting"] == pytest.approx(share, abs=0.1)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # from torch.compile
@pytest.mark.parametrize(("compiled", "channels_last"), [(False, True), (True, True)])
def test_gpu_measurements_run_without_a_gpu(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool, channels_last: bool
) -> None:
    compile_part = torch.nn.Module.compile
    by_hand: Callable[..., None] = lambda part, **options: compile_part(part, backend="aot_eager", **options)  # noqa: E731
    monkeypatch.setattr(torch.nn.Module, "compile", by_hand)  # the default backend needs a C++ compiler on a CPU
    monkeypatch.setattr(benchmark, "GPU_LOADERS", 2)
    monkeypatch.setattr(benchmark, "WAITING_STEPS", 6)
    found = benchmark.gpu(dataset(benchmark, tmp_path), 4, True, compiled, channels_last, 1)
    assert all(math.isfinite(value) and value >= 0 for value in found.values())
    assert found["steps_a_second"] > 0
    assert found["waiting"] < 1


@pytest.mark.slow
def test_a_measurement_in_a_new_process_is_returned(benchmark: ModuleType, tmp_path: Path) -> None:
    found = benchmark.fresh(benchmark.costs, dataset(benchmark, tmp_path), 4, "ours", [1, 3], True)
    assert {name: len(of_levels) for name, of_levels in found.items()} == {"peak": 2, "seconds": 2, "faults": 2}
    assert min(found["seconds"]) > 0
