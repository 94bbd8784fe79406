"""The time of one sample's views: ours, torchio as in the authors' code, batchgenerators, and the loader from disk.

    pip install .[benchmark]
    python scripts/benchmark_views.py [--json FILE]

One process and one thread. All ways get the same crops of the same volume, in turn, round after round. All numbers are
medians. Ratios are medians of the ratios within a round, because a machine's speed changes over a run.

- torchio: the transforms of the authors' LUNA pretraining (flip, affine, blur, noise, gamma, swap, z-norm). As in the
  authors' code, the crops are cut and resized before.
- batchgenerators: crop, then rotation, scaling and resizing in a single interpolation, mirroring, noise, blur, gamma.
- ours: `SubCropTransform`, `SpatialViewTransform`, `PixelTransform`, from the volume to the batch's arrays.
- limit: crop and trilinear resize in torch, no augmentation.
- loader: `make_loader` on blosc2 files like nnU-Net's, with 1 and 2 processes, against ours alone. The reported ratio
  is the smaller one.
- methods: the views of each method, and Models Genesis' corruption against MONAI's; see benchmark_methods.py.
"""

from __future__ import annotations

import options  # isort: skip  # first: it answers --help without torch

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import benchmark_methods
from benchmark_data import Volume, volume_of, write_case  # sets one thread before torch is imported

import numpy as np  # isort: skip
import torch
from batchgenerators.transforms.color_transforms import GammaTransform
from batchgenerators.transforms.noise_transforms import GaussianBlurTransform, GaussianNoiseTransform
from batchgenerators.transforms.spatial_transforms import MirrorTransform, SpatialTransform
from torch.nn.functional import interpolate

from pcrl_nnunet.loading import loader as loader_module
from pcrl_nnunet.loading.cases import Case, CaseVolume, find_cases
from pcrl_nnunet.loading.loader import ViewLoader, make_loader
from pcrl_nnunet.methods.pairs import PairViews
from pcrl_nnunet.views import filters, kernels, pixel, sub_crop
from pcrl_nnunet.views.background import Background
from pcrl_nnunet.views.boxes import Box, sample_view_boxes
from pcrl_nnunet.views.settings import Augmentation, ViewSettings


@dataclass(frozen=True)
class Setting:
    """A setting of the benchmark: sizes of the views, shape of the volume, number of rounds."""

    name: str
    views: ViewSettings
    volume: tuple[int, int, int]
    rounds: int


SETTINGS = (
    Setting(
        "paper",
        ViewSettings(
            global_crop_sizes=((64, 64, 32), (96, 96, 64), (96, 96, 96), (112, 112, 64)),
            local_crop_sizes=((8, 8, 8), (16, 16, 16), (32, 32, 16), (32, 32, 32)),
            global_input_size=(64, 64, 32),
            local_input_size=(16, 16, 16),
            spacing=(1.0, 1.0, 1.0),
        ),
        (224, 224, 160),
        60,
    ),
    Setting(  # patches of 128 from crops of up to 180, as in nnssl
        "large",
        ViewSettings(
            global_crop_sizes=((128, 128, 128), (144, 144, 144), (162, 162, 162), (180, 180, 180)),
            local_crop_sizes=((32, 32, 32), (48, 48, 48), (64, 64, 64)),
            global_input_size=(128, 128, 128),
            local_input_size=(64, 64, 64),
            spacing=(1.0, 1.0, 1.0),
        ),
        (240, 240, 240),
        8,
    ),
)
AUGMENTATION = Augmentation()
CASE = Case("in memory", "")
LOADER_CASES, LOADER_SHAPE, LOADER_PATCH = 6, (224, 224, 160), 128
LOADER_SAMPLES, LOADER_BATCHES, LOADER_TURNS = 8, 6, 4  # samples in a batch; batches in a turn


def crops(boxes: Any) -> tuple[list[Box], list[Box]]:
    """Return the global and the local crops of a sample."""
    return list(boxes.pair), list(boxes.local)


def resized(volume: Volume, box: Box, size: tuple[int, ...]) -> torch.Tensor:
    """Crop and resize trilinearly to (C, *size)."""
    return interpolate(torch.from_numpy(volume[box.index()])[None], size, mode="trilinear")[0]


# ------------------------------------------------------------------------------------------------------------ the ways


def by_torchio(views: ViewSettings) -> Callable[[Volume, Any], Callable[[], object]]:
    """Return the online part of the authors' loader. Cutting and resizing come before the clock starts, as theirs."""
    try:
        import torchio.transforms as tio
    except ImportError as error:
        raise SystemExit("Error: torchio is not installed; run pip install .[benchmark]") from error
    spatial = tio.Compose([tio.RandomFlip(), tio.RandomAffine()])
    local = tio.Compose([tio.RandomBlur(), tio.RandomNoise(), tio.RandomGamma(), tio.ZNormalization()])
    swap = tio.RandomSwap(patch_size=(8, 4, 4))
    whole = tio.Compose([tio.RandomBlur(), tio.RandomNoise(), tio.RandomGamma(), swap, tio.ZNormalization()])

    def prepare(volume: Volume, boxes: Any) -> Callable[[], object]:
        pair, locals_ = crops(boxes)
        # to 0..1, like the authors: their gamma refuses negative intensities
        scaled = (volume - volume.min()) / np.ptp(volume)
        big = [resized(scaled, box, views.global_input_size) for box in pair]
        small = [resized(scaled, box, views.local_input_size) for box in locals_]

        def run() -> object:
            targets = [spatial(view) for view in big]
            return targets, [whole(view.clone()) for view in targets], [local(spatial(view)) for view in small]

        return run

    return prepare


def by_batchgenerators(views: ViewSettings, order: int) -> Callable[[Volume, Any], Callable[[], object]]:
    """Return batchgenerators' views with one interpolation, and noise, blur and gamma of our strengths."""
    a = AUGMENTATION
    angle = np.deg2rad(a.rotation_degrees)
    colours = [
        GaussianNoiseTransform((0, a.noise_sd**2), p_per_sample=a.p_noise),  # batchgenerators takes the variance
        GaussianBlurTransform((0.5, a.blur_sigma), p_per_sample=a.p_blur),
        GammaTransform((np.exp(-a.gamma), np.exp(a.gamma)), per_channel=True, p_per_sample=a.p_gamma),
    ]

    def one(crop: Volume, size: tuple[int, ...]) -> object:
        zoom = float(np.prod(np.divide(crop.shape[1:], size)) ** (1 / len(size)))
        spatial = SpatialTransform(
            size, do_elastic_deform=False, angle_x=(-angle, angle), angle_y=(-angle, angle), angle_z=(-angle, angle),
            scale=((1 - a.scale) * zoom, (1 + a.scale) * zoom), border_mode_data="nearest", order_data=order,
            random_crop=False,
        )  # fmt: skip
        data = {"data": crop[None]}
        for transform in (spatial, MirrorTransform()):
            data = transform(**data)
        target = data["data"].copy()
        for transform in colours:
            data = transform(**data)
        return target, data["data"]

    def prepare(volume: Volume, boxes: Any) -> Callable[[], object]:
        pair, locals_ = crops(boxes)

        def run() -> object:
            big = [one(volume[box.index()], views.global_input_size) for box in pair]
            return big, [one(volume[box.index()], views.local_input_size) for box in locals_]

        return run

    return prepare


def by_limit(views: ViewSettings) -> Callable[[Volume, Any], Callable[[], object]]:
    def prepare(volume: Volume, boxes: Any) -> Callable[[], object]:
        pair, locals_ = crops(boxes)

        def run() -> object:
            big = [resized(volume, box, views.global_input_size) for box in pair]
            return big, [resized(volume, box, views.local_input_size) for box in locals_]

        return run

    return prepare


def by_us(views: ViewSettings) -> Callable[[Volume, Any], Callable[[], object]]:
    """Return the loader's own views of given crops, so that all ways have the same crops."""
    ours = PairViews(views, AUGMENTATION, 1)

    def prepare(volume: Volume, boxes: Any) -> Callable[[], object]:
        rng = np.random.default_rng(int(boxes.bounds.lower[0]))

        def run() -> object:
            with replaced(sub_crop, "sample_view_boxes", lambda *_: boxes):
                return ours(CASE, volume, rng)

        return run

    return prepare


@contextmanager
def replaced(module: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Replace a function of a module for a while."""
    kept = getattr(module, name)
    setattr(module, name, by)
    try:
        yield
    finally:
        setattr(module, name, kept)


# ----------------------------------------------------------------------------------------------------------- measuring


def interleaved(ways: dict[str, Any], setting: Setting, rng: np.random.Generator) -> dict[str, list[float]]:
    """Return seconds a sample by way, with an entry for each round."""
    volume = volume_of(setting.volume, rng)
    seconds: dict[str, list[float]] = defaultdict(list)
    for number in range(-1, setting.rounds):
        boxes = sample_view_boxes(setting.volume, setting.views, rng)
        for name in rng.permutation(sorted(ways)):
            run = ways[name](volume, boxes)
            start = perf_counter()
            run()
            if number >= 0:  # the first round warms up
                seconds[name].append(perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Return the median of the ratios within the rounds."""
    return median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def stages(setting: Setting, rng: np.random.Generator) -> dict[str, float]:
    """Return our milliseconds a sample by stage: the median over rounds."""
    ours = PairViews(setting.views, AUGMENTATION, 1)
    volume = volume_of(setting.volume, rng)
    spent: dict[str, float] = defaultdict(float)

    def timed(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapper(*arguments: Any, **named: Any) -> Any:
            start = perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                spent[stage] += perf_counter() - start

        return wrapper

    of_rounds: dict[str, list[float]] = defaultdict(list)
    watched = [
        ("read", sub_crop, "read_views"),
        ("background: its values", Background, "of"),
        ("background: its share", Background, "share"),
        ("interpolation", kernels, "interpolate"),
        ("smoothing (anti-aliasing and blur)", filters, "gaussian"),
        ("drawing pixel parameters, noise", pixel, "sample_pixel"),
        ("gamma", pixel, "_gamma"),
    ]
    for number in range(setting.rounds):
        spent.clear()
        start = perf_counter()
        with ExitStack() as stack:
            for stage, module, function in watched:
                stack.enter_context(replaced(module, function, timed(stage, getattr(module, function))))
            ours(CASE, volume, np.random.default_rng((number, 1)))
        whole = perf_counter() - start
        for stage, _, _ in watched:
            of_rounds[stage].append(spent[stage])
        of_rounds["other (geometry, swaps, copies)"].append(whole - sum(spent.values()))
        of_rounds["all"].append(whole)
    return {stage: 1e3 * median(values) for stage, values in of_rounds.items()}


def loader_against_transform(views: ViewSettings, rng: np.random.Generator) -> dict[int, tuple[float, float]]:
    """Return, by number of processes, the loader's views a second and process, and their share of the bare transform's.

    In a turn the bare transform first makes samples from cases in memory, with nothing else running. Then a loader
    starts. After as many batches as its queues hold, its next batches are timed.
    """
    ours = PairViews(views, AUGMENTATION, 1)
    views_a_batch = LOADER_SAMPLES * (2 + views.num_local)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(LOADER_CASES):
            write_case(Path(folder) / f"case_{i}", LOADER_SHAPE, rng, LOADER_PATCH)
        cases = find_cases(folder)
        in_memory = {case.name: CaseVolume(case)[(slice(None),) * 4] for case in cases}
        bare_loader = ViewLoader(cases, ours, LOADER_SAMPLES, 0)

        def bare() -> float:
            bare_loader.batches_done = 0
            with replaced(loader_module, "CaseVolume", lambda case: in_memory[case.name]):
                start = perf_counter()
                for _ in range(LOADER_BATCHES):
                    bare_loader.generate_train_batch()
            return LOADER_BATCHES * views_a_batch / (perf_counter() - start)

        found: dict[int, tuple[float, float]] = {}
        bare()
        for processes in (1, 2):
            # batchgenerators: 2 for each worker, 1 in each worker's hands, its own queue, and 1 more in hand
            held = 3 * processes + max(3, processes) + 1
            timed = 2 * LOADER_BATCHES * processes
            speeds, shares = [], []
            for _ in range(LOADER_TURNS):
                alone = bare()
                loader = make_loader(cases, ours, LOADER_SAMPLES, 0, num_workers=processes)
                for _ in range(held):
                    next(loader)
                start = perf_counter()
                for _ in range(timed):
                    next(loader)
                speeds.append(timed * views_a_batch / (perf_counter() - start) / processes)
                loader.close()
                shares.append(speeds[-1] / alone)
            found[processes] = median(speeds), median(shares)
    return found


def main() -> None:
    """Measure, print, and write JSON if requested."""
    args = options.benchmark_views().parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    np.random.seed(0)  # batchgenerators draws from it
    kernels.compile_all()
    print(f"ours is computed by {'numba' if kernels.compiled else 'scipy: numba is not installed'}\n")

    results: dict[str, float] = {}
    for setting in SETTINGS:
        ways = {
            "ours": by_us(setting.views),
            "limit": by_limit(setting.views),
            "batchgenerators linear": by_batchgenerators(setting.views, 1),
            "batchgenerators cubic": by_batchgenerators(setting.views, 3),
        }
        if setting.name == "paper":
            ways["torchio"] = by_torchio(setting.views)
        seconds = interleaved(ways, setting, rng)
        print(f"{setting.name}: 2 views of {setting.views.global_input_size}, {setting.views.num_local} of "
              f"{setting.views.local_input_size}; {setting.rounds} rounds")  # fmt: skip
        for name in sorted(seconds, key=lambda name: median(seconds[name])):
            of_ours = ratio(seconds, name, "ours")
            print(f"  {name:24} {1e3 * median(seconds[name]):8.2f} ms a sample, {of_ours:6.2f} times ours")
        print("  ours by stage, ms (medians)")
        for stage, milliseconds in stages(setting, rng).items():
            print(f"    {stage:36} {milliseconds:8.2f}")
        print()
        for way, kind in (("torchio", "torchio"), ("batchgenerators linear", "batchgenerators_linear"),
                          ("batchgenerators cubic", "batchgenerators_cubic")):  # fmt: skip
            if way in seconds:
                results[f"{setting.name}_vs_{kind}"] = ratio(seconds, way, "ours")
        if setting.name == "paper":
            results["vs_limit"] = ratio(seconds, "ours", "limit")

    sizes = {setting.name: (setting.views.global_input_size, max(6, setting.rounds // 4)) for setting in SETTINGS}
    results |= benchmark_methods.report(sizes, rng)

    print(f"loader, {LOADER_SAMPLES} samples a batch of the paper's sizes from {LOADER_SHAPE} blosc2 files")
    cores = os.cpu_count() or 1
    found = loader_against_transform(SETTINGS[0].views, rng)
    for processes, (speed, share) in found.items():
        shared = "" if processes < cores else ", sharing cores with the one that takes the batches"
        print(f"  {processes} processes: {speed:7.1f} views a second and process, {share:.2f} of the transform{shared}")
    results["loader_vs_transform"] = min(share for _, share in found.values())

    wanted = ("paper_vs_torchio", "paper_vs_batchgenerators_linear", "large_vs_batchgenerators_cubic",
              "large_vs_batchgenerators_linear", "loader_vs_transform", "vs_limit", "slowest_method_vs_pcrlv2",
              "genesis_vs_monai_paper", "genesis_vs_monai_large")  # fmt: skip
    results = {name: round(results[name], 3) for name in wanted}
    print(f"\n{json.dumps(results, indent=2)}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
