"""Measure the cost of the methods: parts of benchmark_views.py (views, corruption) and of benchmark_step.py (steps).

- Views: all methods on one plan, from the same volume. The measure is the time per voxel of the network's input.
- Corruption: ours and MONAI's do the same work, with every part in every call. MONAI's `RandCoarseShuffle` shuffles
  equally many windows of the same sizes. `RandHistogramShift` changes intensities by a curve. `RandCoarseDropout`
  paints noise into or around five blocks of the same sizes. Ours paints five blocks in 4 of 5 calls, otherwise fewer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmark_data import Volume, trainer_of, volume_of  # sets one thread before torch is imported

import numpy as np  # isort: skip
import torch
from measures import forget_peak, resident, seconds

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.samples import Views
from pcrl_nnunet.methods import DEFAULT, PlanFacts, Preparation, method_class, names
from pcrl_nnunet.pretraining.preparation import make_anew, prepares
from pcrl_nnunet.views.corruption import INNER_BLOCK, MAX_BLOCKS, OUTER_BLOCK, Corruption, corrupt

CASE = Case("in memory", "")
PATCH, MEDIAN = (64, 128, 128), (120, 220, 220)
PLAN = PlanFacts("3d_fullres", PATCH, 2, ((1, 1, 1), *[(2, 2, 2)] * 4, (1, 2, 2)), MEDIAN, (1.0, 1.0, 1.0))
SEEN = ("input", "local")  # arrays that a network gets
ROUNDS = 12
ALWAYS = Corruption(p_shuffle=1, p_curve=1, p_paint=1)


def views_of_methods(rounds: int, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Return for each method the median time of a sample (ms) and of a voxel of the network's input (ns)."""
    volume, made = volume_of(MEDIAN, rng), {}
    for name in names():
        try:
            made[name] = views_of_method(name, volume)
        except UserError as error:
            print(f"  {name} is left out: {error}")
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(-1, rounds):
        for name in rng.permutation(sorted(made)):
            start = perf_counter()
            made[name](CASE, volume, np.random.default_rng((number + 1, 2)))
            if number >= 0:  # the first round warms up
                seconds[name].append(perf_counter() - start)
    found = {}
    for name, views in made.items():
        voxels = sum(math.prod(spec.shape) for array, spec in views.arrays.items() if array in SEEN)
        found[name] = 1e3 * median(seconds[name]), 1e9 * median(seconds[name]) / voxels
    return found


def views_of_method(name: str, volume: Volume) -> Views:
    """Return the views of a method on `PLAN`, prepared for the volume if the method prepares.

    Raises:
        UserError: the plan or the volume does not fit the method.
    """
    method = method_class(name)
    settings, _ = method.configure(PLAN, {})
    if not prepares(method):
        return method.views(settings, PLAN, 1, {})
    with TemporaryDirectory() as folder:
        case = Case(CASE.name, str(Path(folder, "case.npy")))
        np.save(case.path, volume)
        given = Preparation([case], torch.nn.Identity(), 1, settings, 0, torch.device("cpu"))
        return method.views(settings, PLAN, 1, make_anew(method, given))


def by_monai(size: tuple[int, ...], inner: bool) -> Callable[[Volume], object]:
    """Return MONAI's corruption of the same strength."""
    try:
        from monai.transforms import Compose, RandCoarseDropout, RandCoarseShuffle, RandHistogramShift
    except ImportError as error:
        raise SystemExit("Error: MONAI is not installed; run pip install .[benchmark]") from error
    largest = tuple(max(1, length // 10) for length in size)
    low, high = (tuple(max(1, round(n * share)) for n in size) for share in (INNER_BLOCK if inner else OUTER_BLOCK))
    return Compose(
        [
            RandCoarseShuffle(Corruption().shuffled_windows, (1,) * len(size), max_spatial_size=largest, prob=1),
            RandHistogramShift(prob=1),
            RandCoarseDropout(
                MAX_BLOCKS, low, dropout_holes=inner, fill_value=(0.0, 1.0), max_spatial_size=high, prob=1
            ),
        ]
    )


def corruption_against_monai(size: tuple[int, ...], rounds: int, rng: np.random.Generator) -> tuple[float, float]:
    """Return milliseconds of our corruption, and how many times as long MONAI's takes: medians over rounds."""
    image, ours, ratios = volume_of(size, rng), [], []
    for number in range(-1, rounds):
        inner = number % 2 == 0
        corruption = replace(ALWAYS, p_inner=float(inner))
        monai = by_monai(size, inner)
        given = image.copy()  # MONAI changes its input
        start = perf_counter()
        monai(given)
        of_monai = perf_counter() - start
        start = perf_counter()
        corrupt(image, corruption, rng)
        of_ours = perf_counter() - start
        if number >= 0:
            ours.append(1e3 * of_ours)
            ratios.append(of_monai / of_ours)
    return median(ours), median(ratios)


def cost_of_method(home: Path, stages: int, name: str) -> dict[str, float]:
    """Return the mean seconds of a step over its variants, and the peak memory that it adds (bytes).

    The result is empty if the plan does not fit the method.
    """
    try:
        trainer, batch = trainer_of(Path(home), stages, name)
    except UserError:
        return {}
    variants, before = trainer.network.variants(), resident("VmRSS")
    for drawn in variants:  # fills the optimiser's momentum
        trainer.train_step(batch, 0, drawn)
    forget_peak()
    times = []
    for drawn in variants:
        start = seconds()
        trainer.train_step(batch, 0, drawn)
        times.append(seconds() - start)
    voxels = sum(batch[array].size for array in SEEN if array in batch)
    peak = resident("VmHWM") - before
    return {"seconds": fmean(times), "peak": peak, "samples": len(batch["cases"]), "voxels": voxels}


def report(sizes: dict[str, tuple[tuple[int, ...], int]], rng: np.random.Generator) -> dict[str, float]:
    """Measure, print, and return the ratios by their keys.

    Args:
        sizes: of crops and number of rounds, by the name of the setting.
    """
    results = {}
    print(f"views of the methods, patch {PATCH}")
    found = views_of_methods(ROUNDS, rng)
    for name, (milliseconds, nanoseconds) in sorted(found.items(), key=lambda item: item[1][1]):
        print(f"  {name:24} {milliseconds:8.2f} ms a sample, {nanoseconds:6.2f} ns a voxel")
    slowest = max(nanoseconds for name, (_, nanoseconds) in found.items() if name != DEFAULT)
    results["slowest_method_vs_pcrlv2"] = slowest / found[DEFAULT][1]
    print("Models Genesis' corruption against MONAI's")
    for setting, (size, rounds) in sizes.items():
        milliseconds, times = corruption_against_monai(size, rounds, rng)
        print(f"  {setting}, {size}: ours {milliseconds:8.2f} ms, MONAI {times:6.1f} times as long")
        results[f"genesis_vs_monai_{setting}"] = times
    print()
    return results
