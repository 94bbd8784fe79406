"""The loading of many small 2D images: ours from nnU-Net's case files, and torchvision's ImageFolder from PNG files.

    python scripts/benchmark_images.py [--images 100000] [--json FILE]

Both sides have the same images of 256 x 300 pixels. Files beyond the first 64 are links. One process, one thread. The
ways take turns, round after round. Images a second are those of a core: they are measured in time on the processor,
which other programs disturb less. Ratios are medians of the ratios within a round, because a machine's speed changes
over a run.

- crops: a sample has 2 views of 224 x 224 and 6 of 96 x 96. Ours also flip, rotate by up to 10 degrees and scale.
  torchvision crops, resizes and flips.
- whole: the loader of PCRLv2 with its default augmentation. torchvision adds changes of brightness and contrast, and
  blur.
- patches: a random patch of 224 x 224 as it is, for a classification.
- classification: nnU-Net's own augmentation of such patches. torchvision has a rotation, brightness, contrast and blur.

A start is the listing of the files, the making of the loader, and the first batch. Its memory is the growth of this
process.
"""

from __future__ import annotations

import options  # isort: skip  # first: it answers --help without torch

import json
import os
import pickle
import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import benchmark_data  # noqa: F401  # sets one thread before torch is imported

import numpy as np  # isort: skip
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from PIL import Image
from scipy.ndimage import gaussian_filter
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pcrl_nnunet.classification.label_table import LabelTable
from pcrl_nnunet.classification.loader import ClassificationLoader
from pcrl_nnunet.loading.cases import Case, find_cases
from pcrl_nnunet.loading.loader import ViewLoader
from pcrl_nnunet.methods.pairs import PairViews
from pcrl_nnunet.views import kernels
from pcrl_nnunet.views.settings import Augmentation, ViewSettings

SHAPE, PATCH, LOCAL = (256, 300), (224, 224), (96, 96)
DIFFERENT = 64  # images with a file of their own
BATCH, ROUNDS, LABELS = 16, 12, 14
SCALES = ((0.3, 1.0), (0.05, 0.3))  # shares of the image's area, global and local: the paper's multi-crop
VIEWS = ViewSettings(((224, 224),), ((96, 96),), PATCH, LOCAL, (1.0, 1.0), crops="multi_crop")
SPATIAL_ALONE = Augmentation(p_noise=0.0, p_blur=0.0, p_gamma=0.0, p_swap=0.0, p_grey=0.0, p_cutout=0.0)
ROTATION = (-np.pi, np.pi)  # nnU-Net's range in 2D

Batch = Callable[[], object]


def write_images(home: Path, number: int) -> None:
    """Write the images as preprocessed cases and as PNG files in two classes."""
    rng = np.random.default_rng(0)
    cases, pngs = home / "cases", home / "png"
    for folder in (cases, pngs / "0", pngs / "1"):
        folder.mkdir(parents=True)
    for i in range(number):
        case, png = cases / f"image_{i:06d}", pngs / str(i % 2) / f"image_{i:06d}.png"
        if i >= DIFFERENT:
            for ending in (".b2nd", ".pkl"):
                os.link(cases / f"image_{i % DIFFERENT:06d}{ending}", f"{case}{ending}")
            os.link(pngs / str(i % DIFFERENT % 2) / f"image_{i % DIFFERENT:06d}.png", png)
            continue
        smooth = gaussian_filter(rng.standard_normal(SHAPE), 8)
        grey = 128 + 40 * smooth / smooth.std() + rng.normal(0, 4, SHAPE)
        grey = grey.clip(0, 255).astype(np.uint8)
        Image.fromarray(grey).save(png)
        data = ((grey - grey.mean()) / grey.std()).astype(np.float32)[None, None]
        blocks, chunks = comp_blosc2_params(data.shape, PATCH, data.itemsize)
        segmentation = np.full(data.shape, -1, np.int8)
        nnUNetDatasetBlosc2.save_case(data, segmentation, {}, str(case), chunks, blocks, chunks, blocks)
        os.remove(f"{case}_seg.b2nd")  # images without masks


def torchvision_batches(folder: Path, transform: Callable[[Image.Image], Any]) -> Batch:
    """Return a maker of random batches of an ImageFolder."""
    images = ImageFolder(str(folder), transform)
    order = iter(torch.utils.data.DataLoader(images, BATCH, shuffle=True, num_workers=0))
    return lambda: next(order)


def grey_image(image: Image.Image) -> Image.Image:
    """Return an image with one channel: ImageFolder opens three."""
    return image.convert("L")


def view_transform(size: tuple[int, int], scale: tuple[float, float], colours: bool) -> Any:
    """Return torchvision's transform of one view."""
    spatial = [transforms.RandomResizedCrop(size, scale), transforms.RandomHorizontalFlip()]
    pixels = [
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4)], 0.8),
        transforms.RandomApply([transforms.GaussianBlur(13, (0.1, 2.0))], 0.5),
    ]
    return transforms.Compose([*spatial, *(pixels if colours else []), transforms.ToTensor()])


def views_by_torchvision(folder: Path, colours: bool) -> Batch:
    """Return torchvision's batches of two global and six local views."""
    whole, local = (view_transform(size, scale, colours) for size, scale in zip((PATCH, LOCAL), SCALES, strict=True))

    def sample(image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        grey = grey_image(image)
        return torch.stack([whole(grey) for _ in range(2)]), torch.stack([local(grey) for _ in range(VIEWS.num_local)])

    return torchvision_batches(folder, sample)


def views_by_us(cases: list[Case], augmentation: Augmentation) -> Batch:
    """Return batches of the pretraining's loader."""
    return ViewLoader(cases, PairViews(VIEWS, augmentation, 1), BATCH, 0).generate_train_batch


def patches_by_torchvision(folder: Path, augment: bool) -> Batch:
    """Return torchvision's batches of patches."""
    colours = [
        transforms.RandomAffine(180, scale=(0.7, 1.4)),
        transforms.ColorJitter(0.25, 0.25),
        transforms.RandomApply([transforms.GaussianBlur(7, (0.5, 1.0))], 0.2),
    ]
    crop = [grey_image, transforms.RandomCrop(PATCH), *(colours if augment else []), transforms.ToTensor()]
    return torchvision_batches(folder, transforms.Compose(crop))


def patches_by_us(cases: list[Case], augment: bool) -> Batch:
    """Return batches of the classification's loader."""
    names = np.array([case.name for case in cases])
    value = np.random.default_rng(0).integers(0, 2, (len(names), LABELS)).astype(float)
    labels = LabelTable("classes", tuple(map(str, range(LABELS))), False, names, None, value, {})
    transform: Any = dict
    read: tuple[int, ...] = PATCH
    if augment:
        transform = nnUNetTrainer.get_training_transforms(PATCH, ROTATION, None, (0, 1), False)
        read = tuple(int(np.ceil(np.hypot(*PATCH))) for _ in PATCH)
    of_name = {case.name: case for case in cases}
    samples = np.arange(len(names))
    loader = ClassificationLoader(of_name, labels, samples, BATCH, PATCH, read, transform, True, (0, 1, 2))
    return loader.generate_train_batch


def seconds_of(make: Callable[[], object], clock: Callable[[], float] = perf_counter) -> tuple[float, Any]:
    """Return the seconds of a call and its result."""
    start = clock()
    made = make()
    return clock() - start, made


def megabytes(made: object) -> float:
    """Return the size of pickled objects: what each loading process would get."""
    return len(pickle.dumps(made)) / 1e6


def started(make: Callable[[], Batch], name: str, ending: str) -> tuple[Batch, dict[str, float]]:
    """Make a loader and its first batch. Return the loader, and the seconds and megabytes of this by name."""
    before = resident_megabytes()
    seconds, batch = seconds_of(make)
    first, _ = seconds_of(batch)
    grown = resident_megabytes() - before
    return batch, {f"{name}seconds{ending}": seconds + first, f"{name}megabytes{ending}": grown}


def resident_megabytes() -> float:
    """Return the memory of this process that is in use. Linux alone tells it."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Measure, print, and write JSON if requested."""
    args = options.benchmark_images().parse_args()
    torch.set_num_threads(1)
    np.random.seed(0)
    kernels.compile_all()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=args.o) as folder:
        home = Path(folder)
        write_images(home, args.images)
        files = (home / "cases" / "image_000000.b2nd", home / "png" / "0" / "image_000000.png")
        sizes = [f"{file.stat().st_size / 1e3:.0f} kB a {file.suffix} file" for file in files]
        print(f"{args.images} images of {SHAPE} pixels: {', '.join(sizes)}")
        start_ours, cases = seconds_of(lambda: find_cases(str(home / "cases")))
        start_theirs, listed = seconds_of(lambda: ImageFolder(str(home / "png")))
        found |= {"list_seconds": start_ours, "list_seconds_torchvision": start_theirs}
        found |= {"list_megabytes": megabytes(cases), "list_megabytes_torchvision": megabytes(listed.samples)}
        png, listed_cases = home / "png", partial(find_cases, str(home / "cases"))
        makers: dict[str, tuple[Callable[[], Batch], Callable[[], Batch]]] = {
            "crops": (lambda: views_by_us(listed_cases(), SPATIAL_ALONE), lambda: views_by_torchvision(png, False)),
            "whole": (lambda: views_by_us(listed_cases(), Augmentation()), lambda: views_by_torchvision(png, True)),
            "patches": (lambda: patches_by_us(listed_cases(), False), lambda: patches_by_torchvision(png, False)),
            "classification": (lambda: patches_by_us(listed_cases(), True), lambda: patches_by_torchvision(png, True)),
        }
        ways: dict[str, tuple[Batch, Batch]] = {}
        for name, (make_ours, make_theirs) in makers.items():
            ours, of_ours = started(make_ours, f"{name}_start_", "")
            theirs, of_theirs = started(make_theirs, f"{name}_start_", "_torchvision")
            ways[name] = ours, theirs
            found |= {**of_ours, **of_theirs}
        seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for number in range(-1, ROUNDS):  # the first round warms up
            for name, (by_us, by_torchvision) in ways.items():
                taken = seconds_of(by_us, process_time)[0], seconds_of(by_torchvision, process_time)[0]
                if number >= 0:
                    seconds[name].append(taken)
    for name, of_rounds in seconds.items():
        found[f"{name}_images_per_second"] = median(BATCH / ours for ours, _ in of_rounds)
        ratios = [theirs / ours for ours, theirs in of_rounds]
        found[f"{name}_speed_over_torchvision"] = median(ratios)
        found |= {f"{name}_lowest_ratio": min(ratios), f"{name}_highest_ratio": max(ratios)}
    found = {name: round(value, 3) for name, value in found.items()}
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
