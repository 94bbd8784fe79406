"""Measure the cost of a pretraining step against the authors' way, and what grows with the number of cases. Linux.

    pip install .
    python scripts/benchmark_step.py [--json FILE] [--quick] [--parts PART [PART ...]]

The script runs on a GPU if there is one, otherwise on one CPU thread. On a CPU, times of steps are CPU seconds, which
other programs hardly change. Steps are the trainer's own, with its optimiser. All numbers are medians.

The parts:

- steps: a step in the authors' way and in ours, in turn, with the same weights and the same batch. The authors' way
  decodes all views to full resolution and runs the heads of all levels (`AuthorsWay`). Ours draws one level and stops
  there (`restoration: single`). Every level is measured equally often.
- memory: the memory that a process adds from its first to the peak of its second step; ours by level. At the finest
  level, ours computes the features of the local views twice instead of keeping them (`PCRLv2`), which takes longer.
  On a CPU the part also measures ours with `memory.keep_freed_memory`, which `pcrl_nnunet_pretrain` turns on.
- growth: the command's time to the first batch, with ten cases and with 100,000 (links to the ten). Its memory, and the
  memory of its two loading processes, after a few batches; shared pages count once. The time for the fingerprints of
  all cases, extrapolated from some, on one thread.
- reading: batches of one loading process from files outside the system's cache, and the same batches from the cache.
- methods: time and peak memory of a step of each method, on one plan, each in its own process.
- gpu: mixed precision, torch.compile and channels_last; the share of time that the GPU waits for 8 loading processes.

The hours to the same validation Dice need trainings: see "Hours to the same Dice" in docs/evidence/hippocampus.md.
"""

from __future__ import annotations

import options  # isort: skip  # first: it answers --help without torch

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict
from itertools import cycle, islice
from multiprocessing import active_children
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import fmean, median
from time import perf_counter, process_time, time
from typing import Any

# benchmark_data sets one thread before torch is imported
from benchmark_data import DATA, DATASET, FEW, QUICK, Sizes, device, trainer_of, use_folders, write_case, write_dataset
from benchmark_methods import cost_of_method
from benchmark_views import SETTINGS, replaced

import numpy as np  # isort: skip
import torch
from authors_way import AuthorsWay
from measures import forget_peak, resident, seconds, shared_once
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import nn

import pcrl_nnunet.pretraining.step as step_module
import pcrl_nnunet.trainers.pretrain as trainer_module
from pcrl_nnunet import registration
from pcrl_nnunet.cli import pretrain
from pcrl_nnunet.loading.cases import find_cases, fingerprint
from pcrl_nnunet.loading.loader import make_loader
from pcrl_nnunet.methods import names
from pcrl_nnunet.methods.pairs import PairViews
from pcrl_nnunet.methods.pcrlv2 import Levels
from pcrl_nnunet.pretraining.memory import keep_freed_memory
from pcrl_nnunet.views import kernels
from pcrl_nnunet.views.settings import Augmentation

BATCHES = 5  # number of batches before the memory of a start is measured
GPU_LOADERS = 8
WAITING_STEPS = 160


# ----------------------------------------------------------------------------------------------- steps, memory, growth


def steps(home: Path, stages: int, rounds: int) -> tuple[float, list[float]]:
    """Return the median seconds of a step in the authors' way, and in ours by level."""
    trainer, batch = trainer_of(home, stages)
    ours = trainer.network
    authors, by_depth = AuthorsWay(ours), ours.variants()

    def timed(network: nn.Module, levels: Levels) -> float:
        trainer.stepper.method = network
        start = seconds()
        trainer.train_step(batch, 0, levels)
        return seconds() - start

    for network in (authors, ours):
        timed(network, by_depth[-1])  # warms up
    of_authors: list[float] = []
    of_ours: dict[int, list[float]] = {levels.deepest: [] for levels in by_depth}
    for _ in range(rounds):
        for levels in by_depth:
            of_authors.append(timed(authors, levels))
            of_ours[levels.deepest].append(timed(ours, levels))
    return median(of_authors), [median(of_level) for of_level in of_ours.values()]


def costs(home: Path, stages: int, way: str, drawn: list[int], keeps: bool) -> dict[str, list[float]]:
    """Measure a step of each drawn level in a new process: bytes at the peak above the start, seconds, page faults.

    Each level has done a step before, so the optimiser has its momentum.

    Args:
        way: authors or ours.
        keeps: keep freed memory.
    """
    if keeps:
        keep_freed_memory()
    trainer, batch = trainer_of(Path(home), stages)
    levels_of_steps = [levels for levels in trainer.network.variants() if levels.deepest in drawn]
    if way == "authors":
        trainer.stepper.method = AuthorsWay(trainer.network)
    before = resident("VmRSS")
    for levels in levels_of_steps:
        trainer.train_step(batch, 0, levels)
    found: dict[str, list[float]] = {"peak": [], "seconds": [], "faults": []}
    for levels in levels_of_steps:
        forget_peak()
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, seconds()
        trainer.train_step(batch, 0, levels)
        found["seconds"].append(seconds() - start)
        found["faults"].append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults)
        found["peak"].append(resident("VmHWM") - before)
    return found


def start(home: Path, stages: int, started: float) -> dict[str, float]:
    """Measure the command: seconds from its start (`started`) to the first batch, and bytes after `BATCHES` batches."""
    use_folders(Path(home), loaders=2)
    found: dict[str, float] = {}

    def looked_at(trainer: Any, batch: dict[str, Any], step: int, drawn: Any = None) -> dict[str, float]:
        if step == 0:
            found.update(seconds=time() - started, cpu_seconds=process_time())
        if step + 1 == BATCHES:
            loaders = [process.pid for process in active_children()]
            found.update(cases=len(trainer.cases), training=shared_once(os.getpid()))
            found.update(loading=sum(shared_once(pid) for pid in loaders if pid))
            raise SystemExit
        return {"loss": 0.0}

    with (
        replaced(trainer_module.PCRLPretrainTrainer, "train_step", looked_at),
        replaced(registration, "is_registered", lambda: True),  # a benchmark leaves nnU-Net's folders alone
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        redirect_stdout(nowhere),
        suppress(SystemExit),
    ):
        sys.argv = ["pcrl_nnunet_pretrain", "-d", DATASET, "-p", f"Stages{stages}", "-device", "cpu"]
        pretrain.main()
    return found


def seconds_of_fingerprints(home: Path, number: int) -> float:
    """Return the seconds for the fingerprints of `number` cases, which a training computes at its end."""
    cases = find_cases(str(home / "preprocessed" / DATASET / DATA))[:number]
    begin = perf_counter()
    with ThreadPool(max(1, get_allowed_n_proc_DA())) as pool:
        pool.map(fingerprint, cases)
    return perf_counter() - begin


def cold_and_warm(home: Path, sizes: Sizes) -> dict[str, float] | None:
    """Return seconds per batch from disk and from memory, and bytes read from disk; None: the folder is in memory."""
    views = PairViews(SETTINGS[0].views, Augmentation(), 1)
    folder = home / "large"
    folder.mkdir()
    write_case(folder / "case_0", sizes.large_case, np.random.default_rng(0))
    for i in range(1, sizes.large_cases):
        shutil.copyfile(folder / "case_0.b2nd", folder / f"case_{i}.b2nd")
    cases = find_cases(str(folder))
    kernels.compile_all()
    cold, warm = (make_loader(cases, views, sizes.samples, 0) for _ in range(2))
    found: dict[str, list[float]] = {"cold": [], "warm": [], "read": []}
    for number in range(-1, sizes.cold_batches):
        for case in cases:
            file = os.open(case.path, os.O_RDONLY)
            os.fsync(file)  # unwritten pages cannot be dropped from the cache
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)
        blocks = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
        times = [perf_counter()]
        next(cold)
        times.append(perf_counter())
        read = resource.getrusage(resource.RUSAGE_SELF).ru_inblock - blocks
        next(warm)  # the same views
        times.append(perf_counter())
        if number >= 0:  # the first round warms up
            for name, value in zip(found, (times[1] - times[0], times[2] - times[1], 512 * read), strict=True):
                found[name].append(value)
    medians = {name: median(values) for name, values in found.items()}
    return medians if medians["read"] else None


def gpu(home: Path, stages: int, amp: bool, compiled: bool, channels_last: bool, rounds: int) -> dict[str, float]:
    """Return steps per second, peak bytes, and the share of time that the GPU waits for its loading processes."""
    trainer, batch = trainer_of(Path(home), stages)
    network = trainer.network
    if channels_last:
        network.to(memory_format=torch.channels_last_3d)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # one graph per level and view size
        for part in (network.encoder, network.decoder):
            part.compile(dynamic=False)
    if not amp:
        trainer.stepper.grad_scaler = None
    with nullcontext() if amp else replaced(step_module, "autocast", lambda kind: nullcontext()):
        by_depth = network.variants()
        for levels in 2 * by_depth:  # warms up
            trainer.train_step(batch, 0, levels)
        forget_peak()
        begin = perf_counter()
        for levels in islice(cycle(by_depth), rounds * len(by_depth)):
            trainer.train_step(batch, 0, levels)
        a_step = (perf_counter() - begin) / (rounds * len(by_depth))
        peak = resident("VmHWM")
        os.environ["nnUNet_n_proc_DA"] = str(GPU_LOADERS)
        loader, waited = trainer.get_dataloaders(), 0.0
        for _ in range(8 * GPU_LOADERS):  # empties the loaders' queues: earlier batches do not count
            next(loader)
        begin = perf_counter()
        for step in range(WAITING_STEPS):  # with levels drawn as in a training
            asked = perf_counter()
            batch = next(loader)
            waited += perf_counter() - asked
            trainer.train_step(batch, step)
        share = waited / (perf_counter() - begin)
        loader.close()
    return {"steps_a_second": 1 / a_step, "peak": peak, "waiting": share}


# ---------------------------------------------------------------------------------------------------------- the report


def fresh(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function of this file in a new process and return its result."""
    call = json.dumps([measure.__name__, *arguments], default=str)
    done = subprocess.run([sys.executable, __file__, "--measure", call], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def report_steps(home: Path, sizes: Sizes) -> dict[str, float]:
    """Measure both ways on the two plans."""
    results: dict[str, float] = {}
    for stages in sizes.stages:
        trainer, _ = trainer_of(home, stages)
        views, channels = trainer.settings.own.views, trainer.network.encoder.output_channels
        print(
            f"\nSteps with {stages} stages ({channels[0]} to {channels[-1]} channels), {sizes.samples} samples: 2 "
            f"views of {views.global_input_size}, {views.num_local} of {views.local_input_size} a sample"
        )
        authors, by_level = steps(home, stages, sizes.rounds if stages == sizes.stages[0] else max(1, sizes.rounds - 1))
        ours = fmean(by_level)
        print(f"  authors' way        {authors:8.3f} s")
        print(f"  ours                {ours:8.3f} s, mean over levels: {', '.join(f'{s:.3f}' for s in by_level)}")
        print(f"  ratio               {authors / ours:8.2f}")
        name = "" if stages == sizes.stages[0] else f"_{stages}_stages"
        results |= {
            f"early_exit_speedup{name}": authors / ours,
            f"authors_seconds_a_step{name}": authors,
            f"seconds_a_step{name}": ours,
        }
    return results


def report_memory(home: Path, sizes: Sizes) -> dict[str, float]:
    """Measure the peak memory of both ways, and ours with freed memory kept."""
    stages = sizes.stages[0]
    drawn = list(range(1, stages))
    (authors,) = fresh(costs, home, stages, "authors", drawn[-1:], False)["peak"]
    by_level = [fresh(costs, home, stages, "ours", [level], False) for level in drawn]
    ours = {name: [of[name][0] for of in by_level] for name in by_level[0]}
    results = {
        "peak_memory_ratio": max(ours["peak"]) / authors,
        "peak_memory_ratio_mean_level": fmean(ours["peak"]) / authors,
    }
    print(f"\nPeak memory of a step over what was there before, {stages} stages, each in a process of its own")
    print(f"  authors' way        {authors / 2**30:8.3f} GB")
    print(f"  ours, by level      {', '.join(f'{peak / 2**30:.3f}' for peak in ours['peak'])} GB")
    print(f"  ours / authors'     {results['peak_memory_ratio']:8.3f} of a training (its deepest level), "
          f"{results['peak_memory_ratio_mean_level']:.3f} of a step (mean over levels)")  # fmt: skip
    if torch.cuda.is_available():
        return results
    kept = fresh(costs, home, stages, "ours", drawn, True)
    print("\nAllocator, ours, mean over levels: as glibc sets it, and as pcrl_nnunet_pretrain does on a CPU")
    for name, found in (("glibc", ours), ("pcrl_nnunet_pretrain", kept)):
        print(f"  {name:20}{fmean(found['seconds']):8.3f} s a step, {fmean(found['faults']):10.0f} page faults, peak "
              f"{max(found['peak']) / 2**30:.3f} GB")  # fmt: skip
    return results | {
        "allocator_speedup": fmean(ours["seconds"]) / fmean(kept["seconds"]),
        "allocator_peak_ratio": max(kept["peak"]) / max(ours["peak"]),
    }


def report_methods(home: Path, sizes: Sizes) -> dict[str, float]:
    """Measure a step of each method."""
    results: dict[str, float] = {}
    print(f"\nA step of each method, {sizes.stages[0]} stages, each in a process of its own")
    for name in names():
        found = fresh(cost_of_method, home, sizes.stages[0], name)
        if not found:
            print(f"  {name:20} is left out: the plan does not fit")
            continue
        print(f"  {name:20}{found['seconds']:8.3f} s, peak {found['peak'] / 2**30:6.3f} GB, {found['samples']:.0f} "
              f"samples, {1e9 * found['seconds'] / found['voxels']:7.1f} ns a voxel")  # fmt: skip
        results |= {f"{name}_seconds_a_step": found["seconds"], f"{name}_peak": found["peak"]}
    return results


def report_growth(few: Path, many: Path, sizes: Sizes) -> dict[str, float]:
    """Measure start-up and memory by number of cases."""
    write_dataset(many, sizes, sizes.many)
    print(f"\nStart of pcrl_nnunet_pretrain with 2 loading processes; memory after {BATCHES} batches")
    found = {}
    for number, home in ((FEW, few), (FEW, few), (sizes.many, many)):  # the first time reads programs from the disk
        found[number] = fresh(start, home, sizes.stages[0], time())
    for number, of in found.items():
        print(
            f"  {int(of['cases']):7} cases: first batch after {of['seconds']:6.2f} s ({of['cpu_seconds']:.2f} of the "
            f"training process's CPU); {of['training'] / 2**20:.0f} MB of the training and {of['loading'] / 2**20:.0f} "
            f"MB of the loading processes"
        )
        assert of["cases"] == number
    fingerprints = seconds_of_fingerprints(many, sizes.fingerprints) / sizes.fingerprints * sizes.many
    print(f"  {sizes.many:7} fingerprints at the end: {fingerprints:.0f} s, extrapolated from {sizes.fingerprints}")
    memory = {number: of["training"] + of["loading"] for number, of in found.items()}
    return {
        "startup_seconds_10": found[FEW]["seconds"],
        "startup_seconds_100000": found[sizes.many]["seconds"],
        "startup_cpu_seconds_100000": found[sizes.many]["cpu_seconds"],
        "rss_100000_vs_10": memory[sizes.many] / memory[FEW],
        "fingerprint_seconds_100000": fingerprints,
    }


def report_reading(home: Path, sizes: Sizes) -> dict[str, float]:
    """Compare reading from disk with reading from the cache."""
    found = cold_and_warm(home, sizes)
    print(f"\nReading {sizes.large_cases} distinct files of {sizes.large_case} voxels, {sizes.samples} samples a "
          f"batch of the paper's sizes, one process")  # fmt: skip
    if found is None:
        print(f"  not measured: {home} is in memory; set TMPDIR to a folder on a disk")
        return {}
    print(
        f"  cold cache          {1 / found['cold']:8.2f} batches a second, {found['read'] / 2**20:.1f} MB read a batch"
    )
    print(f"  warm                {1 / found['warm']:8.2f}")
    return {"cold_batches_a_second": 1 / found["cold"], "cold_vs_warm": found["warm"] / found["cold"]}


def report_gpu(home: Path, sizes: Sizes) -> dict[str, float]:
    """Measure the GPU's modes."""
    print(f"\n{torch.cuda.get_device_name()}, ours with {sizes.stages[0]} stages, {GPU_LOADERS} loading processes")
    results: dict[str, float] = {}
    for name, amp, compiled, channels_last in (
        ("float32", False, False, False),
        ("amp", True, False, False),
        ("amp_channels_last", True, False, True),
        ("amp_compile", True, True, False),
        ("amp_compile_channels_last", True, True, True),
    ):
        found = fresh(gpu, home, sizes.stages[0], amp, compiled, channels_last, 4 * sizes.rounds)
        print(f"  {name:28}{found['steps_a_second']:7.2f} steps a second, {found['peak'] / 2**30:6.2f} GB, "
              f"{100 * found['waiting']:5.1f} % of the time waiting for the loader")  # fmt: skip
        results |= {f"gpu_{name}_{key}": value for key, value in found.items()}
    return results


def main() -> None:
    """Measure, print, and write JSON if requested."""
    args = options.benchmark_step().parse_args()
    torch.set_num_threads(1)
    if args.measure:
        name, *arguments = json.loads(args.measure)
        print(json.dumps(globals()[name](*arguments)))
        return
    sizes = QUICK if args.quick else Sizes()
    if device().type == "cpu":
        keep_freed_memory()
    print(f"torch {torch.__version__} on {device()}, {os.cpu_count()} cores, one thread; sizes: {asdict(sizes)}")
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few", Path(folder) / "many"
        write_dataset(few, sizes)
        reports: dict[str, Callable[[], dict[str, float]]] = {
            "steps": lambda: report_steps(few, sizes),
            "memory": lambda: report_memory(few, sizes),
            "methods": lambda: report_methods(few, sizes),
            "growth": lambda: report_growth(few, many, sizes),
            "reading": lambda: report_reading(few, sizes),
            "gpu": lambda: report_gpu(few, sizes) if torch.cuda.is_available() else {},
        }
        results = {name: value for part in args.parts for name, value in reports[part]().items()}
    results = {name: round(value, 4) for name, value in results.items()}
    print(f"\n{json.dumps(results, indent=2)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
