"""Compare the conversion of chest X-rays with PIL alone, in one process and one run.

    python scripts/benchmark_chest_xrays.py -i IMAGES -images 200

It makes images of 1024 x 1024 pixels from the PNG images in a folder, or from noise. Then it converts them twice in
turn, round by round:

- PIL alone reads, resizes and saves each image
- the conversion of convert_nih_chestxray.py, with its checks and whole files, from the search for the images to the
  tables and folds

It prints the images a second of both, and the median over the rounds of the ratio of their times: of the time on the
clock, and of the time on the processor, which other programs disturb less.
"""

from __future__ import annotations

import options  # isort: skip  # first: it answers --help without torch

import csv
import io
import shutil
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from time import perf_counter, process_time

import chest_xrays
import convert
import convert_nih_chestxray as nih
import numpy as np
from PIL import Image

from pcrl_nnunet.errors import UserError, console

EDGE, SHORT_SIDE = 1024, 256  # pixels
AN_IMAGES_PATIENT = 4  # images of a patient, as in NIH ChestX-ray14 on average


def originals(folder: Path | None, number: int) -> list[Image.Image]:
    """Return images to enlarge."""
    if folder is None:
        rng = np.random.default_rng(0)
        coarse = [rng.integers(0, 255, (EDGE // 8, EDGE // 8), dtype=np.uint8) for _ in range(min(number, 20))]
        return [Image.fromarray(values) for values in coarse]
    files = sorted(folder.glob("*.png"))[:number]
    if not files:
        raise UserError(f"-i is {folder}, which has no PNG image; give another folder, or leave -i out")
    return [Image.open(file).convert("L") for file in files]


def write_download(folder: Path, images: list[Image.Image], number: int) -> None:
    """Write images and tables in the layout of NIH ChestX-ray14. Enlarged images get the noise of a detector."""
    rng = np.random.default_rng(0)
    (folder / "images_001" / "images").mkdir(parents=True)
    names = [f"{i // AN_IMAGES_PATIENT:08d}_{i % AN_IMAGES_PATIENT:03d}.png" for i in range(number)]
    for i, name in enumerate(names):
        large = np.asarray(images[i % len(images)].resize((EDGE, EDGE), Image.Resampling.BICUBIC), np.float32)
        noisy = (large + rng.normal(0, 2, large.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "images_001" / "images" / name)
    tested = max(1, number // (5 * AN_IMAGES_PATIENT)) * AN_IMAGES_PATIENT
    (folder / "test_list.txt").write_text("\n".join(names[:tested]))
    (folder / "train_val_list.txt").write_text("\n".join(names[tested:]))
    with open(folder / "Data_Entry_2017.csv", "w", newline="") as file:
        rows = [(name, nih.LABELS[i % 14], str(i // AN_IMAGES_PATIENT)) for i, name in enumerate(names)]
        csv.writer(file).writerows([nih.COLUMNS, *rows])


def with_pil(source: Path, target: Path) -> None:
    """Read, resize and save each image with PIL alone."""
    target.mkdir()
    for path in sorted((source / "images_001" / "images").iterdir()):
        with Image.open(path) as image:
            image.resize((SHORT_SIDE, SHORT_SIDE), Image.Resampling.BICUBIC).save(target / path.name)


def with_script(source: Path, raw: Path) -> None:
    """Convert as convert_nih_chestxray.py does with one process."""
    args = Namespace(i=source, d=61, o=raw, np=1, size=SHORT_SIDE, partial=False)
    folder = convert.dataset_folder(args, "NIHChestXray")
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        chest_xrays.run(args, folder, nih.find(source), {}, nih.REFERENCE)


def seconds_of(way: Callable[[Path, Path], None], home: Path) -> tuple[float, float]:
    """Return the seconds of a conversion on the clock and on the processor."""
    clock, processor = perf_counter(), process_time()
    way(home / "nih", home / "out")
    seconds = perf_counter() - clock, process_time() - processor
    shutil.rmtree(home / "out")
    return seconds


def main() -> None:
    """Make the images, convert them in both ways, print."""
    args = options.benchmark_chest_xrays().parse_args()
    if args.images <= AN_IMAGES_PATIENT:
        raise UserError(f"-images is {args.images}; expected more than the {AN_IMAGES_PATIENT} of the test patient")
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        write_download(home / "nih", originals(args.i, args.images), args.images)
        ratios = []
        for _ in range(args.rounds):
            pil, script = (seconds_of(way, home) for way in (with_pil, with_script))
            ratios.append((script[0] / pil[0], script[1] / pil[1]))
            speeds = f"PIL alone {args.images / pil[0]:.1f} images a second, the script {args.images / script[0]:.1f}"
            print(f"{speeds}: ratio {ratios[-1][0]:.3f}, on the processor {ratios[-1][1]:.3f}", flush=True)
    clock, processor = (statistics.median(of_rounds) for of_rounds in zip(*ratios, strict=True))
    print(f"median ratio {clock:.3f}, on the processor {processor:.3f}; {args.rounds} rounds with {args.images} images")


if __name__ == "__main__":
    console(main)
