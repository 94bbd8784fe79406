"""The steps of a comparison and their order."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch

from pcrl_nnunet.experiments.arms import CONTROL
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.layout import Layout
from pcrl_nnunet.experiments.processes import Job
from pcrl_nnunet.experiments.shares import threads

STEPS = "pcrl_nnunet.experiments.steps"
KINDS = {  # nouns of the steps
    "pretrain": ("pretraining",),
    "train": ("training",),
    "pseudo_label": ("prediction", " of pseudo-labels"),
    "shortcut": ("shortcut",),
}


def jobs_of(layout: Layout, runs: Sequence[Run], device: torch.device, at_a_time: int) -> list[Job]:
    """Return the jobs of the runs, each after the jobs that it needs."""
    options = ("-threads", str(threads(at_a_time)), "-device", device.type)
    jobs: dict[str, Job] = {}
    for run in runs:
        for job in _jobs_of_run(layout, run, options):
            jobs.setdefault(job.name, job)
    return list(jobs.values())


def pretrainings_of(layout: Layout, runs: Sequence[Run], device: torch.device) -> list[Job]:
    """Return the jobs of the runs' pretrainings alone."""
    own = [_pretraining(layout, run, ("-device", device.type)) for run in runs if layout.comparison.pretrains(run)]
    return list({job.name: job for job in own}.values())


def overview(layout: Layout, runs: Sequence[Run], jobs: Sequence[Job]) -> list[str]:
    """Return lines that say how many runs and steps a comparison has, and how many steps are done."""
    methods = list(dict.fromkeys(run.arm for run in runs))
    labels = sorted({run.labelled for run in runs})
    subsets = len({run.seed for run in runs})
    factors = (
        _count(len(methods), "method"),
        _count(len(labels), "number", " of labelled cases"),
        _count(subsets, "subset"),
    )
    lacking = len(methods) * len(labels) * subsets - len(runs)
    kinds = Counter(job.command[job.command.index(STEPS) + 1] for job in jobs)
    return [
        f"Comparison in {layout.named}",
        f"  methods          {', '.join(methods)}",
        f"  labelled cases   {', '.join(map(str, labels))}",
        f"  runs             {len(runs)}: {' x '.join(factors)}{f', less {lacking} that lack cases' * bool(lacking)}",
        f"  steps            {len(jobs)}: {', '.join(_count(number, *KINDS[kind]) for kind, number in kinds.items())}",
        f"  done             {sum(job.is_done() for job in jobs)} of {len(jobs)} steps",
    ]


def _count(number: int, noun: str, more: str = "") -> str:
    return f"{number} {noun}{'s' * (number != 1)}{more}"


def _jobs_of_run(layout: Layout, run: Run, options: tuple[str, ...]) -> list[Job]:
    """Return the jobs that a run needs: pretraining, prediction of pseudo-labels, training."""
    comparison = layout.comparison
    if comparison.arms[run.arm].shortcut is not None:
        return [_shortcut(layout, run, options[:2])]
    jobs = []
    trained = None if layout.is_done(run) else layout.trained_before(run)
    if comparison.pretrains(run) and trained is None:
        jobs.append(_pretraining(layout, run, options[2:]))
    if comparison.pseudo_labelled(run):
        jobs.append(_pseudo_labels(layout, run, options))
    given = ("-trained", trained) if trained else ()
    fold, configuration = str(layout.fold(run)), comparison.plan.configuration
    training = (comparison.dataset, configuration, fold, layout.trainer(run), layout.plans_name(run))
    command = _command("train", *options, *given, *training, layout.network(run))
    after = tuple(job.name for job in jobs)
    return [*jobs, Job(str(run), command, partial(layout.is_done, run), after)]


def _pretraining(layout: Layout, run: Run, device: tuple[str, ...]) -> Job:
    name, fold = layout.pretraining_plans_name(run), str(layout.pretraining_fold(run))
    dataset, configuration = layout.comparison.dataset, layout.comparison.plan.configuration
    command = _command("pretrain", "-d", dataset, "-p", name, "--c", "-c", configuration, "-f", fold, *device)
    return Job(name, command, partial(os.path.isfile, layout.pretrained(run)))


def _pseudo_labels(layout: Layout, run: Run, options: tuple[str, ...]) -> Job:
    control = Run(CONTROL, run.labelled, run.seed)
    model, fold = layout.model(control), str(layout.fold(control))
    command = _command("pseudo_label", *options, layout.description_of_pseudo_labels(run), model, fold)
    is_done = partial(os.path.isfile, layout.pseudo_labels(run).finished)
    return Job(f"labels_of_{run}", command, is_done, (str(control),))


def _shortcut(layout: Layout, run: Run, options: tuple[str, ...]) -> Job:
    comparison, fold = layout.comparison, str(layout.fold(run))
    data = (comparison.dataset, comparison.plan.configuration, fold, layout.plans_name(run))
    folder = os.path.dirname(layout.evaluation(run))
    name = comparison.arms[run.arm].shortcut
    assert name is not None
    return Job(str(run), _command("shortcut", *options, name, *data, folder), partial(layout.is_done, run))


def _command(step: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", STEPS, step, *arguments)
