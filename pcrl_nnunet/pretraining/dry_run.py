"""A few real steps of a pretraining, which measure its sizes, memory and hours (``--dry_run``)."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import escape, glob
from time import time
from typing import Any

import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from pcrl_nnunet.files import writing
from pcrl_nnunet.loading.cases import CaseVolume
from pcrl_nnunet.loading.loader import ViewLoader, make_loader
from pcrl_nnunet.plans import PlannedConfiguration, channel_labels, unit_of
from pcrl_nnunet.pretraining.distributed import largest_part
from pcrl_nnunet.pretraining.memory import estimated_peak
from pcrl_nnunet.pretraining.preparation import make_anew, prepares
from pcrl_nnunet.progress import duration
from pcrl_nnunet.views import kernels

NUM_PICTURES = 3
PICTURE = "views_of_"  # prefix of the pictures' names


@dataclass(frozen=True)
class Measurement:
    """A few real steps of a pretraining."""

    trainer: Any
    loader: ViewLoader
    batch_size: int  # samples for one process
    estimated_bytes: int | None  # peak of the network; None: shapes alone do not tell it
    peak_bytes: float  # on the GPU, or of the process
    preparing: float  # seconds of the method's stage before the training; 0: no such stage
    loading: float  # seconds that one worker needs for a batch
    seconds_a_step: float


def measured(
    make_trainer: Callable[[], Any],
    device: torch.device,
    draw_views: Callable[[ViewLoader], None] | None = None,
    processes: int = 1,
) -> Measurement:
    """Do one step of each variant on the device, in a temporary results folder.

    Args:
        make_trainer: makes the trainer of the pretraining.
        draw_views: draws the views of a few cases from the loader.
        processes: number of processes that share a batch. One process's part is measured, without communication.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["nnUNet_results"] = folder
        os.environ["nnUNet_wandb_enabled"] = "0"  # do not list this run
        trainer = make_trainer()
        trainer.initialize()
        preparing = 0.0
        if prepares(trainer.method):
            start = time()
            trainer.prepared = make_anew(trainer.method, trainer.preparation())
            preparing = time() - start
        settings, views = trainer.settings, trainer.views()
        number = largest_part(settings.batch_size, processes, trainer.method.min_samples_of_rank)
        workers = get_allowed_n_proc_DA()
        estimate = estimated_peak(trainer.network, views.arrays, number, settings.optimizer)
        loader = ViewLoader(trainer.cases, views, number, settings.seed)
        kernels.compile_all()  # compiled once for a training, so it must not count as part of a batch
        start = time()
        next(loader)
        loading = time() - start
        if draw_views is not None:
            draw_views(loader)
        trainer.dataloader_train = make_loader(
            trainer.cases, views, number, settings.seed, num_workers=workers, pin_memory=device.type == "cuda"
        )
        variants = trainer.network.variants()
        try:
            # the most expensive variant first: it needs the most memory, and warms up
            trainer.train_step(next(trainer.dataloader_train), 0, variants[-1])
            seconds = []
            for drawn in variants:
                start = time()
                trainer.train_step(next(trainer.dataloader_train), 0, drawn)
                seconds.append(time() - start)
        finally:
            trainer.dataloader_train.close()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_of_process()
    # the workers' queues were full: in the long run a step takes at least as long as its batch
    # (without workers, the step includes making the batch)
    a_step = max(sum(seconds) / len(seconds), loading / max(1, workers))
    return Measurement(trainer, loader, number, estimate, peak, preparing, loading, a_step)


def described(found: Measurement, device: torch.device, processes: int) -> Iterator[str]:
    """Yield the lines of a dry run."""
    trainer, settings = found.trainer, found.trainer.settings
    method = trainer.method
    facts = {
        "method": method.title,
        "cases": str(len(trainer.cases)),
        **method.facts(settings.own),
        "background": found.loader.background_line(),
        "batch": f"{settings.batch_size} samples",
    }
    if unit_of(trainer.plans_manager.plans) == "pixels":
        facts.pop("spacing", None)  # nnU-Net's 1 mm for natural images is made up
    yield from (_line(name, text) for name, text in facts.items() if text)
    if processes > 1:
        yield _line("processes", f"{processes}; memory and time are for one process with {found.batch_size} samples,")
        yield _line("", "without the exchange of gradients")
    yield _line("length", f"{settings.epochs} epochs of {settings.iters_per_epoch} steps")
    if prepares(method):
        yield _line("before the training", f"{found.preparing / 60:.1f} minutes in which {method.title} prepares it")
    where = f"on {device}" if device.type == "cuda" else "for the process"
    if found.estimated_bytes is not None:
        yield _line("peak memory", f"{found.estimated_bytes / 2**30:.2f} GB estimated for the network in float32")
    name = "peak memory" if found.estimated_bytes is None else ""
    yield _line(name, f"{found.peak_bytes / 2**30:.2f} GB measured {where}")
    yield _line("time", f"{found.seconds_a_step:.2f} s a step on {device} (mean of one step of each variant;")
    workers = get_allowed_n_proc_DA()
    yield _line("", f"one batch of samples takes {found.loading:.2f} s, with {workers} loading processes)")
    yield _line("", f"{duration(found.seconds_a_step * settings.steps)} in all")


def _line(name: str, text: str) -> str:
    return f"  {name:<22}{text}"


def _peak_of_process() -> float:
    """Return the peak memory in bytes; NaN if the system does not tell it (Windows)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def draw_views(loader: ViewLoader, plan: PlannedConfiguration, folder: str, draw: Callable[..., None]) -> None:
    """Draw a picture of each of a few cases, evenly from first to last.

    Args:
        folder: folder for the pictures; pictures of an earlier dry run are replaced.
        draw: `report.pictures.views_of_a_case`.
    """
    with writing(f"the pictures in {folder}", "run this in a folder that you may write to"):
        os.makedirs(folder, exist_ok=True)
        for earlier in glob(os.path.join(escape(folder), f"{PICTURE}*.png")):
            os.remove(earlier)
        for case, rng in loader.examples(NUM_PICTURES):
            path = os.path.join(folder, f"{PICTURE}{case.name.replace('/', '_')}.png")
            volume = CaseVolume(case)
            channels = channel_labels(case.name, plan.dataset_json, volume.shape[0])
            shown, spacing = loader.views.show(case, volume, rng), loader.views.spacing
            draw(
                case.full_name(plan.plans["dataset_name"]), volume, shown, spacing, unit_of(plan.plans), channels, path
            )
