"""The conversion of single X-rays: any mode and size to grey PNG files, in several processes."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Generator, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import convert
import numpy as np
from nnunetv2.configuration import default_num_processes
from PIL import Image
from tqdm import tqdm

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest.checks import short_reason
from pcrl_nnunet.ingest.scans import SetAside, Unusable
from pcrl_nnunet.ingest.workers import worker_pool

CHUNK = 16  # images that a process converts before it reports
FEWEST_PIXELS = 32  # short side; an encoder leaves nothing of a smaller image
START_OF_SCAN, HOLE = b"\xff\xda", bytes(512)  # a JPEG's pixels have no such run of zeros: its codes have ones


class Job(NamedTuple):
    """An image to convert."""

    source: Path
    target: Path


def grey(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return an image of any mode in grey and in another size. 16 bits stay 16 bits, everything else becomes 8 bits.

    Transparency is ignored: in the few NIH images that have it, every pixel is opaque. PIL itself reads 16-bit colours
    as 8 bits.
    """
    if image.mode.startswith("I"):  # 16 bits
        exact = Image.fromarray(np.asarray(image).astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
        return Image.fromarray(np.rint(np.asarray(exact)).clip(0, 2**16 - 1).astype(np.uint16))
    return (image if image.mode == "L" else image.convert("L")).resize(size, Image.Resampling.BICUBIC)


def resized(source: Path, short_side: int) -> Image.Image:
    """Read an image in grey, with a short side of `short_side` pixels. Smaller images keep their size.

    Raises:
        Unusable: the file has a hole, the image is tiny, or all of its pixels are the same; any error of PIL.
    """
    content = source.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        if image.format == "JPEG" and HOLE in content[content.rfind(START_OF_SCAN) :]:
            raise Unusable(f"has {len(HOLE)} bytes of zeros or more among its pixels, as after a broken download")
        image.verify()  # of a PNG, the checksums, which PIL does not check while it reads
    with Image.open(io.BytesIO(content)) as image:
        if min(image.size) < FEWEST_PIXELS:
            raise Unusable(f"has {image.width} x {image.height} pixels; expected at least {FEWEST_PIXELS} a side")
        scale = min(1.0, short_side / min(image.size))
        size = (round(image.width * scale), round(image.height * scale))
        # JPEGs are decoded at a half or a quarter of their size where twice the wanted pixels remain
        image.draft("L", (2 * size[0], 2 * size[1]))
        found = grey(image, size)
    values = np.asarray(found)
    if values.min() == values.max():
        raise Unusable("all of its pixels are the same")
    return found


def convert_image(job: Job, scratch: Path, short_side: int) -> SetAside | None:
    """Convert an image, or return the reason why it is unusable.

    Raises:
        UserError: the file cannot be written, which is not the image's fault.
    """
    try:
        image = resized(job.source, short_side)
    except MemoryError:
        return SetAside(str(job.source), "not enough memory for it")
    except Exception as error:  # one bad file must not stop the others
        return SetAside(str(job.source), short_reason(error))
    content = io.BytesIO()
    image.save(content, "PNG")
    draft = scratch / job.target.name
    try:
        draft.write_bytes(content.getbuffer())
        os.replace(draft, job.target)
    except OSError as error:
        raise UserError(
            f"cannot write {job.target} ({short_reason(error)}): check permissions and free space, and run the same "
            "command again; finished images are kept"
        ) from error
    return None


def convert_chunk(jobs: Sequence[Job], scratch: Path, short_side: int) -> list[SetAside]:
    """Convert some images, and return the unusable ones."""
    return [bad for job in jobs if (bad := convert_image(job, scratch, short_side)) is not None]


def convert_images(
    jobs: Sequence[Job], folder: Path, short_side: int, processes: int | None, done: int = 0
) -> list[SetAside]:
    """Convert images into the dataset's folder, and return the unusable ones.

    Args:
        processes: with one process, everything happens in this one.
        done: number of images that an earlier run has converted.

    Raises:
        UserError: a worker was killed, or the folder is not writable.
    """
    bad: list[SetAside] = []
    scratch = folder / convert.UNFINISHED
    shutil.rmtree(scratch, ignore_errors=True)
    if not jobs:
        return bad
    scratch.mkdir()
    chunks = [jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK)]
    number = min(processes or min(default_num_processes, os.cpu_count() or 1), len(chunks))
    every = 0.1 if sys.stderr.isatty() else 60  # seconds: a log needs few lines
    with (
        closing(_converted(chunks, scratch, short_side, number)) as results,
        tqdm(total=done + len(jobs), initial=done, unit="image", mininterval=every) as bar,
    ):
        for size, unusable in results:
            for one in unusable:
                tqdm.write(f"bad: {one.where}: {one.reason}", sys.stderr)
            bad += unusable
            bar.update(size)
    shutil.rmtree(scratch)
    return bad


def _converted(
    chunks: Sequence[Sequence[Job]], scratch: Path, short_side: int, processes: int
) -> Generator[tuple[int, list[SetAside]], None, None]:
    """Convert chunks, and yield the size and the unusable images of each."""
    if processes == 1:
        yield from ((len(chunk), convert_chunk(chunk, scratch, short_side)) for chunk in chunks)
        return
    with worker_pool(processes) as pool:
        futures = {pool.submit(convert_chunk, chunk, scratch, short_side): len(chunk) for chunk in chunks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, most likely because the memory ran out: run the same command with a "
                "smaller -np; finished images are kept"
            ) from None
