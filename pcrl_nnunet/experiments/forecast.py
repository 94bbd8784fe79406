"""A forecast of a comparison's work and hours: measured steps of each kind of training, starts, and predictions."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from time import time
from types import ModuleType
from typing import Any

import torch
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from pcrl_nnunet.experiments.arms import CONTROL, semi_cost
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.layout import Layout
from pcrl_nnunet.experiments.shares import threads
from pcrl_nnunet.plans import PlanFacts, PlannedConfiguration, load_plan
from pcrl_nnunet.pretraining.settings import pretrain_settings
from pcrl_nnunet.progress import doing
from pcrl_nnunet.semi_supervised.settings import SemiSettings

MEASURED_SECONDS = 10.0  # seconds of training to measure

IMPORTS = "import nnunetv2.run.run_training, pcrl_nnunet.experiments.steps"  # what every training imports first
STEP_OF_WINDOWS = 0.5  # nnU-Net's, as a share of the patch

StepOfPretraining = Callable[[PlannedConfiguration, int, torch.device], float]  # plan, fold, device: seconds a step


@dataclass(frozen=True)
class Cost:
    """Measured seconds of a training.

    Attributes:
        step: one step, with its share of what an epoch ends with.
        start: before the first step, without the imports.
        case: the prediction of a case of the median size.
    """

    step: float
    start: float = 0.0
    case: float = 0.0


@dataclass(frozen=True)
class Training:
    """A training that is still to do.

    Attributes:
        predictions: number of cases that are predicted.
        measure: returns the seconds of its parts.
    """

    name: str
    kind: str
    steps: float
    predictions: int
    measure: Callable[[], Cost]


@dataclass(frozen=True)
class Work:
    """The trainings that a comparison still has to do.

    Attributes:
        a_start: seconds in which a process imports what it needs.
        costs: measured seconds, by kind of training.
        trainings: the trainings, by kind and name.
    """

    a_start: float
    costs: Mapping[str, Cost]
    trainings: Mapping[str, Mapping[str, Training]]

    @property
    def number(self) -> int:
        """Number of trainings."""
        return sum(map(len, self.trainings.values()))

    @property
    def hours(self) -> dict[str, float]:
        """Hours of the steps by kind, one training after another."""
        return {
            kind: self.costs[kind].step * sum(training.steps for training in of_kind.values()) / 3600
            for kind, of_kind in self.trainings.items()
        }

    @property
    def other_hours(self) -> float:
        """Hours of starts and predictions, which do not depend on the length of the trainings."""
        return (
            sum(
                self.a_start + self.costs[kind].start + self.costs[kind].case * training.predictions
                for kind, of_kind in self.trainings.items()
                for training in of_kind.values()
            )
            / 3600
        )

    def lines(self, device: torch.device, at_a_time: int) -> Iterator[str]:
        """Yield number, seconds a step and hours of each kind of training, and hours in all.

        Args:
            at_a_time: number of processes.
        """
        hours = self.hours
        for kind, of_kind in self.trainings.items():
            step, whole = self.costs[kind].step, _about(hours[kind])
            yield f"  {kind}: {len(of_kind)} to do, {step:.2f} s a step on {device}, {whole} in all"
        if self.number:
            yield f"  starts and predictions: {_about(self.other_hours)} in all"
        remaining = _about((sum(hours.values()) + self.other_hours) / at_a_time)
        yield f"About {remaining} remain with -np {at_a_time}. Trainings at the same time may be slower than one alone."


def measure(
    layout: Layout,
    runs: Sequence[Run],
    device: torch.device,
    trainers: ModuleType,
    step_of_pretraining: StepOfPretraining,
    frozen: bool = False,
    at_a_time: int = 1,
) -> Work:
    """Measure a step of each kind of training.

    Meanwhile the process has the comparison's environment, and the threads of one of its trainings.

    Args:
        layout: a prepared folder.
        trainers: module with the classes that train with labels, by name.
        step_of_pretraining: measures a pretraining.
        frozen: leave out the trainings with labels.
        at_a_time: trainings that run side by side.
    """
    before, number = dict(os.environ), torch.get_num_threads()
    os.environ.update(layout.variables())
    torch.set_num_threads(threads(at_a_time))
    try:
        return _measured(layout, runs, device, trainers, step_of_pretraining, frozen)
    finally:
        torch.set_num_threads(number)
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
    costs: dict[str, Cost] = {}
    trainings: dict[str, dict[str, Training]] = {}  # by kind and name
    for run in runs:
        for training in _to_do(layout, run, device, trainers, step_of_pretraining, frozen):
            if training.kind not in costs:
                # nnU-Net's trainers print a page for every kind
                with doing(f"Measuring a step of {training.kind}"), redirect_stdout(io.StringIO()):
                    costs[training.kind] = training.measure()
            trainings.setdefault(training.kind, {})[training.name] = training
    return Work(_seconds_of_imports() if trainings else 0.0, costs, trainings)


def _seconds_of_imports() -> float:
    with doing("Measuring a start"):
        begin = time()
        subprocess.run([sys.executable, "-c", IMPORTS], check=True, capture_output=True)
        return time() - begin


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
        fold = layout.pretraining_fold(run)
        kind = f"pretraining of {comparison.pretraining_arm(run)}"
        steps = settings.epochs * settings.iters_per_epoch
        measure = partial(_measured_pretraining, step_of_pretraining, plan, fold, device)
        yield Training(name, kind, steps, 0, measure)
    if not (frozen or layout.is_done(run) or trained) and comparison.arms[run.arm].shortcut is None:
        control = Run(CONTROL, run.labelled, run.seed)  # the pseudo-labels may not exist yet
        trainer = getattr(trainers, layout.trainer(control))
        plan = plan_named(layout.plans_name(control))
        segments = comparison.label_table is None
        measure = partial(_measured_training, plan, layout.fold(control), device, trainer, segments)
        tuned = comparison.finetune_settings(run.arm)
        an_epoch = tuned.iters_per_epoch + tuned.val_iters_per_epoch / 3  # validation has no backward pass
        semi = SemiSettings.from_plan(comparison.plan_of(run.arm))
        cost = 1.0 if comparison.arms[run.arm].semi is None else semi_cost(semi)
        predictions = len(comparison.scored_cases)
        if comparison.arms[run.arm].pseudo_labels:
            predictions += len(comparison.pseudo_labelled(run))
        yield Training(str(run), "training with labels", cost * tuned.epochs * an_epoch, predictions, measure)


def _measured_pretraining(
    step_of_pretraining: StepOfPretraining, plan: PlannedConfiguration, fold: int, device: torch.device
) -> Cost:
    return Cost(step_of_pretraining(plan, fold, device))


def _measured_training(
    plan: PlannedConfiguration, fold: int, device: torch.device, trainer_class: Any, segments: bool
) -> Cost:
    """Measure nnU-Net's training, data loading included, in a temporary results folder."""
    begin = time()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(nnUNet_results=folder, nnUNet_wandb_enabled="0")
        trainer = trainer_class(plan.plans, plan.configuration, fold, plan.dataset_json, device)
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.train_step(next(trainer.dataloader_train))  # the first step waits for the first batch
        ends, outputs = [time()], []
        while len(ends) < 4 or ends[-1] - ends[0] < MEASURED_SECONDS:
            outputs.append(trainer.train_step(next(trainer.dataloader_train)))
            ends.append(time())
        end_of_epoch = _seconds_to_end_an_epoch(trainer, outputs) / trainer.num_iterations_per_epoch
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            if hasattr(loader, "_finish"):  # nnU-Net ends batchgenerators' multi-process loaders like this
                loader._finish()
        case = _seconds_a_patch(trainer, plan) * (_patches_of_a_case(trainer, plan) if segments else 1)
    first = len(ends) // 2  # the first half warms up and uses batches that were waiting
    step = (ends[-1] - ends[first]) / (len(ends) - 1 - first)
    return Cost(step + end_of_epoch, ends[0] - begin, case)


def _seconds_to_end_an_epoch(trainer: Any, outputs: list[Any]) -> float:
    """Return the seconds of nnU-Net's log, curves and checkpoint, without the validation's steps."""
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        validated = [trainer.validation_step(next(trainer.dataloader_val))]
    begin = time()
    trainer.on_train_epoch_end(outputs)
    trainer.on_validation_epoch_end(validated)
    trainer.on_epoch_end()
    return time() - begin


def _seconds_a_patch(trainer: Any, plan: PlannedConfiguration) -> float:
    patch = plan.resolved["patch_size"]
    batch = torch.zeros(1, trainer.num_input_channels, *patch, device=trainer.device)
    trainer.network.eval()
    seconds = 0.0
    for _ in range(2):  # the first pass warms up
        begin = time()
        with torch.no_grad():
            trainer.network(batch)
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        seconds = time() - begin
    return seconds


def _patches_of_a_case(trainer: Any, plan: PlannedConfiguration) -> int:
    """Return the number of windows of a case of the median size, times its slices in 2D, times the mirrored copies."""
    facts = PlanFacts.of(plan.configuration, plan.resolved)
    patch = tuple(facts.patch_size)
    median = tuple(max(length, round(edge)) for length, edge in zip(patch, facts.median_size, strict=True))
    windows = prod(map(len, compute_steps_for_sliding_window(median, patch, STEP_OF_WINDOWS)))
    slices = round(plan.plans["original_median_shape_after_transp"][0]) if len(patch) == 2 else 1
    return int(windows * slices * 2 ** len(trainer.inference_allowed_mirroring_axes or ()))
