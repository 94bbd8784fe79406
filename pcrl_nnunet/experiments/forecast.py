"""What a comparison has to do, and how long that takes by a few steps of each kind of training."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from math import ceil
from time import time
from types import ModuleType
from typing import Any

import torch

from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.experiments.arms import CONTROL
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.jobs import progress
from pcrl_nnunet.experiments.layout import Layout
from pcrl_nnunet.experiments.notes import note_on_stock
from pcrl_nnunet.experiments.processes import Job
from pcrl_nnunet.plans import PlannedConfiguration, load_plan
from pcrl_nnunet.pretraining.settings import pretrain_settings

MEASURED_SECONDS = 10.0  # of training

StepOfPretraining = Callable[[PlannedConfiguration, int, torch.device], float]  # plan, fold, device: seconds a step


class Forecast:
    """Hours of the trainings of a comparison that are to do.

    Args:
        layout: a folder that is prepared.
        trainers: module with the classes that train, by name.
        step_of_pretraining: measures a pretraining.

    Attributes:
        a_step: seconds a step of each kind of training that was measured.
        hours: of each training that is to do.
    """

    def __init__(
        self, layout: Layout, device: torch.device, trainers: ModuleType, step_of_pretraining: StepOfPretraining
    ) -> None:
        self.layout, self.device = layout, device
        self.trainers, self.step_of_pretraining = trainers, step_of_pretraining
        self.a_step: dict[str, float] = {}
        self.hours: dict[str, float] = {}

    def add(self, run: Run) -> None:
        """Add what is to do for a run."""
        comparison, layout = self.layout.comparison, self.layout
        trained = layout.trained_before(run) is not None
        pretrained = trained or os.path.isfile(layout.pretrained(run))
        if comparison.pretrains(run) and not pretrained:
            self._add_pretraining(run)
        if not (layout.is_done(run) or trained) and comparison.arms[run.arm].shortcut is None:
            self._add_training(run)

    def _add_pretraining(self, run: Run) -> None:
        name = self.layout.pretraining_plans_name(run)
        if name in self.hours:
            return
        plan, fold = self._plan(name), self.layout.pretraining_fold(run)
        seconds = self._seconds(
            f"pretraining of {self.layout.comparison.pretraining_arm(run)}",
            lambda: self.step_of_pretraining(plan, fold, self.device),
        )
        settings = pretrain_settings(plan.plans, plan.configuration, plan.resolved)
        self.hours[name] = seconds * settings.epochs * settings.iters_per_epoch / 3600

    def _add_training(self, run: Run) -> None:
        control = Run(CONTROL, run.labelled, run.seed)  # pseudo-labels may not be there yet
        seconds = self._seconds(
            "training with labels",
            lambda: _seconds_an_iteration(
                self._plan(self.layout.plans_name(control)),
                self.layout.fold(control),
                self.device,
                getattr(self.trainers, self.layout.trainer(control)),
            ),
        )
        settings = FinetuneSettings.from_plan(self._plan(self.layout.plans_name(run)).plans)
        an_epoch = settings.iters_per_epoch + settings.val_iters_per_epoch / 3  # these have no backward pass
        self.hours[str(run)] = seconds * settings.epochs * an_epoch / 3600

    def _plan(self, name: str) -> PlannedConfiguration:
        return load_plan(self.layout.comparison.dataset, name, self.layout.comparison.plan.configuration)

    def _seconds(self, kind: str, measure: Callable[[], float]) -> float:
        if kind not in self.a_step:
            with redirect_stdout(io.StringIO()):  # nnU-Net's trainers print a page for every kind
                self.a_step[kind] = measure()
        return self.a_step[kind]


def forecast(
    layout: Layout,
    runs: Sequence[Run],
    jobs: Sequence[Job],
    device: torch.device,
    at_a_time: int,
    trainers: ModuleType,
    step_of_pretraining: StepOfPretraining,
) -> Iterator[str]:
    """Yield lines: the steps, seconds a step of each kind of training, and hours in all.

    The process's environment is that of the comparison from here on.

    Args:
        at_a_time: number of processes.
        trainers: see `Forecast`.
        step_of_pretraining: see `Forecast`.
    """
    yield progress(runs, jobs)
    for job in jobs:
        yield f"  {'done' if job.is_done() else 'to do':6} {job.name}"
    os.environ.update(layout.variables())
    found = Forecast(layout, device, trainers, step_of_pretraining)
    for run in runs:
        found.add(run)
    for kind, seconds in found.a_step.items():
        yield f"  {seconds:.2f} s a step of {kind}, on {device}"
    total = sum(found.hours.values()) / at_a_time
    about = f"{total:.1f} hours" if total >= 1 else f"{ceil(60 * total)} min"
    yield f"About {about} of training are to do with -np {at_a_time}, if as many at a time are as fast as one;"
    yield "starts, evaluations and the prediction of pseudo-labels come on top"
    note = note_on_stock(layout.comparison)
    if note is not None:
        yield note


def _seconds_an_iteration(plan: PlannedConfiguration, fold: int, device: torch.device, trainer_class: Any) -> float:
    """Measure nnU-Net's training with its loading of data, in a results folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(nnUNet_results=folder, nnUNet_wandb_enabled="0")
        trainer = trainer_class(plan.plans, plan.configuration, fold, plan.dataset_json, device)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        ends = [time()]
        while len(ends) < 4 or ends[-1] - ends[0] < MEASURED_SECONDS:
            trainer.train_step(next(trainer.dataloader_train))
            ends.append(time())
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            if hasattr(loader, "_finish"):  # as nnU-Net ends batchgenerators' multi-process loaders
                loader._finish()
    first = len(ends) // 2  # the first half warms up, and takes batches that were waiting
    return (ends[-1] - ends[first]) / (len(ends) - 1 - first)
