"""A forecast of a comparison's work and hours, from a few measured steps of each kind of training."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from math import ceil
from time import time
from types import ModuleType
from typing import Any

import torch

from pcrl_nnunet.experiments.arms import CONTROL, semi_cost
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.layout import Layout
from pcrl_nnunet.plans import PlannedConfiguration, load_plan
from pcrl_nnunet.pretraining.settings import pretrain_settings
from pcrl_nnunet.progress import doing
from pcrl_nnunet.semi_supervised.settings import SemiSettings

MEASURED_SECONDS = 10.0  # seconds of training to measure

StepOfPretraining = Callable[[PlannedConfiguration, int, torch.device], float]  # plan, fold, device: seconds a step


@dataclass(frozen=True)
class Training:
    """A training that is still to do: its kind, its number of steps, and a way to measure the seconds of a step."""

    name: str
    kind: str
    steps: float
    measure: Callable[[], float]


@dataclass(frozen=True)
class Work:
    """The trainings that a comparison still has to do.

    Attributes:
        a_step: seconds a step, by kind of training.
        steps: steps of each training, by kind and name.
    """

    a_step: Mapping[str, float]
    steps: Mapping[str, Mapping[str, float]]

    @property
    def hours(self) -> dict[str, float]:
        """Hours by kind, one training after another."""
        return {kind: self.a_step[kind] * sum(of_kind.values()) / 3600 for kind, of_kind in self.steps.items()}

    def lines(self, device: torch.device, at_a_time: int) -> Iterator[str]:
        """Yield number, seconds a step and hours of each kind of training, and hours in all.

        Args:
            at_a_time: number of processes.
        """
        hours = self.hours
        for kind, of_kind in self.steps.items():
            step, whole = self.a_step[kind], _about(hours[kind])
            yield f"  {kind}: {len(of_kind)} to do, {step:.2f} s a step on {device}, {whole} in all"
        yield (
            f"About {_about(sum(hours.values()) / at_a_time)} of training remain with -np {at_a_time}. Trainings at "
            f"the same time may be slower than one alone."
        )


def measure(
    layout: Layout,
    runs: Sequence[Run],
    device: torch.device,
    trainers: ModuleType,
    step_of_pretraining: StepOfPretraining,
    frozen: bool = False,
) -> Work:
    """Measure a step of each kind of training.

    Meanwhile the process has the comparison's environment.

    Args:
        layout: a prepared folder.
        trainers: module with the classes that train with labels, by name.
        step_of_pretraining: measures a pretraining.
        frozen: leave out the trainings with labels.
    """
    before = dict(os.environ)
    os.environ.update(layout.variables())
    try:
        return _measured(layout, runs, device, trainers, step_of_pretraining, frozen)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _measured(
    layout: Layout,
    runs: Sequence[Run],
    device: torch.device,
    trainers: ModuleType,
    step_of_pretraining: StepOfPretraining,
    frozen: bool,
) -> Work:
    a_step: dict[str, float] = {}
    steps: dict[str, dict[str, float]] = {}  # steps of each training, by kind and name
    for run in runs:
        for training in _to_do(layout, run, device, trainers, step_of_pretraining, frozen):
            if training.kind not in a_step:
                # nnU-Net's trainers print a page for every kind
                with doing(f"Measuring a step of {training.kind}"), redirect_stdout(io.StringIO()):
                    a_step[training.kind] = training.measure()
            steps.setdefault(training.kind, {})[training.name] = training.steps
    return Work(a_step, steps)


def _about(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{ceil(60 * hours)} min"


def _to_do(
    layout: Layout,
    run: Run,
    device: torch.device,
    trainers: ModuleType,
    step_of_pretraining: StepOfPretraining,
    frozen: bool,
) -> Iterator[Training]:
    """Yield the trainings that a run still has to do; with `frozen` its pretraining alone."""
    comparison = layout.comparison

    def plan_named(name: str) -> PlannedConfiguration:
        return load_plan(comparison.dataset, name, comparison.plan.configuration)

    trained = not frozen and layout.trained_before(run) is not None
    if comparison.pretrains(run) and not (trained or os.path.isfile(layout.pretrained(run))):
        name = layout.pretraining_plans_name(run)
        plan = plan_named(name)
        settings = pretrain_settings(plan.plans, plan.configuration, plan.resolved)
        measure = partial(step_of_pretraining, plan, layout.pretraining_fold(run), device)
        kind = f"pretraining of {comparison.pretraining_arm(run)}"
        yield Training(name, kind, settings.epochs * settings.iters_per_epoch, measure)
    if not (frozen or layout.is_done(run) or trained) and comparison.arms[run.arm].shortcut is None:
        control = Run(CONTROL, run.labelled, run.seed)  # the pseudo-labels may not exist yet
        trainer = getattr(trainers, layout.trainer(control))
        plan = plan_named(layout.plans_name(control))
        measure = partial(_seconds_an_iteration, plan, layout.fold(control), device, trainer)
        tuned = comparison.finetune_settings(run.arm)
        an_epoch = tuned.iters_per_epoch + tuned.val_iters_per_epoch / 3  # validation has no backward pass
        semi = SemiSettings.from_plan(comparison.plan_of(run.arm))
        cost = 1.0 if comparison.arms[run.arm].semi is None else semi_cost(semi)
        yield Training(str(run), "training with labels", cost * tuned.epochs * an_epoch, measure)


def _seconds_an_iteration(plan: PlannedConfiguration, fold: int, device: torch.device, trainer_class: Any) -> float:
    """Measure nnU-Net's training, data loading included, in a temporary results folder."""
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
            if hasattr(loader, "_finish"):  # nnU-Net ends batchgenerators' multi-process loaders like this
                loader._finish()
    first = len(ends) // 2  # the first half warms up and uses batches that were waiting
    return (ends[-1] - ends[first]) / (len(ends) - 1 - first)
