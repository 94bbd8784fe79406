"""pcrl_nnunet_compare: does pretraining help on this dataset, and with how many labels?"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from math import ceil
from queue import SimpleQueue
from threading import Event
from time import time
from typing import Any

DESCRIPTION = """Compare pretraining with training from scratch, for several numbers of labelled cases: splits the
dataset's cases (70 % training, 10 % validation, 20 % test; splits_final.json is not touched), pretrains without the
held-out ones, trains every method on the same randomly drawn labelled cases, and scores them: segmentations by Dice,
classifications (classes.csv or candidates.csv) by AUROC. The same command goes on where it was stopped."""
DEFAULT_METHODS = ("stock", "pseudo_labels", *("thumbnail", "mean_intensity", "position"), "pcrlv2")  # where there are
MEASURED_SECONDS = 10.0  # of training, to tell how long all of it takes
# A child ends with the command that started it, however that ends (Linux; elsewhere where it is stopped in order), and
# in order, so that the processes end that load its data.
_CHILD = """
import ctypes, os, signal, sys
def end(*_):
    if os.name == "posix":
        signal.alarm(5)  # once more: where it forks, as for its loading processes, Python drops what is raised
    sys.exit(128 + signal.SIGTERM)
signal.signal(signal.SIGTERM, end)
if os.name == "posix":
    signal.signal(signal.SIGALRM, end)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
"""
PRETRAIN = f"""{_CHILD}
from pcrl_nnunet.cli.pretrain import main_entry
main_entry()
"""
# nnU-Net's command would take all cores for each of several runs at a time
TRAIN = f"""{_CHILD}
import os, shutil
import torch
from pcrl_nnunet.files import remove_drafts, whole
threads, device, dataset, configuration, fold, trainer, plans, target, trained = sys.argv[1:]
if device == "cpu":
    torch.set_num_threads(int(threads))
if trained and not os.path.exists(target):  # nnU-Net goes on after its last epoch: with scoring
    print(f"Trained before, as {{trained}}; only scored now", flush=True)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    remove_drafts(os.path.dirname(target))
    transferred = os.path.join(os.path.dirname(trained), "transfer.json")
    if os.path.isfile(transferred):
        shutil.copy(transferred, os.path.dirname(target))
    with whole(target) as draft:
        shutil.copyfile(trained, draft)
from nnunetv2.run.run_training import run_training
run_training(dataset, configuration, fold, trainer, plans, continue_training=True, device=torch.device(device))
"""
PSEUDO_LABEL = f"""{_CHILD}
import torch
threads, device, description, model, fold = sys.argv[1:]
if device == "cpu":
    torch.set_num_threads(int(threads))
from pcrl_nnunet.experiments.pseudo_labels import PseudoLabels
PseudoLabels.load(description).write(model, int(fold), torch.device(device))
"""
SHORTCUT = f"""{_CHILD}
import torch
threads, name, dataset, configuration, fold, plans, folder = sys.argv[1:]
torch.set_num_threads(int(threads))
from pcrl_nnunet.plans import load_plan
from pcrl_nnunet.classification.shortcuts import write
write(name, load_plan(dataset, plans, configuration), int(fold), folder)
"""


@dataclass(frozen=True)
class Job:
    """One process: a pretraining, a training, or a prediction of pseudo-labels."""

    name: str
    command: tuple[str, ...]
    is_done: Callable[[], bool]
    after: tuple[str, ...] = ()  # names of the jobs whose results it needs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pcrl_nnunet_compare", description=DESCRIPTION)
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset name or ID")
    parser.add_argument("-c", metavar="CONFIGURATION", help="default: 3d_fullres, else the only one of the plan")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    parser.add_argument(
        "-labelled",
        nargs="+",
        default=["10%", "20%", "40%", "all"],
        help="numbers or shares (default: 10%% 20%% 40%% all)",
    )
    parser.add_argument(
        "-methods",
        nargs="+",
        help="beside scratch (default: stock pseudo_labels pcrlv2; of a classification stock, pcrlv2 and the shortcuts "
        "thumbnail mean_intensity position); ablations: skip_connections cross_scale "
        "restoration_only comparison_only one_level three_levels all_levels multi_crop",
    )
    parser.add_argument(
        "-own_methods", metavar="JSON", help='file of further methods: {"NAME": {"pretrain": {...}, ...}}'
    )
    parser.add_argument(
        "-settings", metavar="JSON", help='file with settings for all: {"pretrain": {}, "finetune": {}}'
    )
    parser.add_argument(
        "-task",
        choices=("segmentation", "classification"),
        help="default: segmentation; classification of a dataset without masks",
    )
    parser.add_argument("-seeds", type=int, default=5, help="labelled subsets a number (default: 5)")
    parser.add_argument("-protocol", choices=("all", "semi", "transfer"), default="all", help="what is pretrained on")
    parser.add_argument("-checkpoint", help="-protocol transfer: a pretraining of other data")
    parser.add_argument("-patients", metavar="CSV", help="columns case, patient; default: each case is a patient")
    parser.add_argument(
        "-scored", choices=("val", "test"), default="test", help="cases that are scored (default: test)"
    )
    parser.add_argument("-device", help="cuda, cpu or mps (default: a GPU if present, else the CPU)")
    parser.add_argument("-np", type=int, default=1, help="steps at a time, on the GPUs in turn (default: 1)")
    parser.add_argument(
        "-o", metavar="FOLDER", help="default: nnUNet_results/pcrl_compare/DATASET__PLANS__CONFIGURATION"
    )
    parser.add_argument("--dry_run", action="store_true", help="print what is to do and how long it takes; no training")
    return parser


def main() -> None:
    """Parse, check, run, report."""
    args = _parser().parse_args()
    from pcrl_nnunet.cli import register  # after the parser, so that --help is quick
    from pcrl_nnunet.device import device_named
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.lock import locked

    device = device_named(args.device)
    comparison, runs = _comparison(args)
    for name, reason in comparison.left_out.items():
        print(f"Nothing is trained on the unlabelled case {name}: {reason}")
    if args.dry_run:
        print(f"Comparison in {comparison.folder}")
        with tempfile.TemporaryDirectory() as folder:
            comparison.preview_in(folder)
            comparison.prepare(runs)
            _dry_run(comparison, runs, _jobs(comparison, runs, device, args.np), device, args.np)
        return
    try:
        os.makedirs(comparison.folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{comparison.folder} cannot be made ({error.strerror}); give another folder with -o"
        ) from error
    with locked(comparison.folder, "pcrl_nnunet_compare"):
        comparison.prepare(runs)
        jobs = _jobs(comparison, runs, device, args.np)
        print(f"Comparison in {comparison.folder}\n{_progress(runs, jobs)}")
        if not register.is_registered():
            for line in register.register():
                print(line)
        # of many candidates the predictions have gigabytes: once will do
        after_each = (lambda: _write_results(comparison, runs)) if comparison.targets is None else (lambda: None)
        failed = _run(jobs, args.np, comparison, after_each)
        for line in _report(comparison, runs):
            print(line)
    if failed:
        raise UserError(
            f"{len(failed)} steps failed ({', '.join(failed)}); look into their logs in {comparison.folder}/logs, and "
            f"run the same command again"
        )


def _progress(runs: list[Any], jobs: list[Job]) -> str:
    return f"{len(runs)} runs, {sum(job.is_done() for job in jobs)} of {len(jobs)} steps are done"


def _comparison(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    from nnunetv2.paths import nnUNet_results

    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.experiments.comparison import (
        Comparison,
        Run,
        built_in_methods,
        methods_of,
        number_of,
        with_settings,
    )
    from pcrl_nnunet.experiments.scores import CONTROL
    from pcrl_nnunet.plans import load_plan, refuse_cascade
    from pcrl_nnunet.pretraining.settings import pretrain_settings

    if args.seeds < 1 or args.np < 1:
        raise UserError(f"-seeds is {args.seeds} and -np {args.np}; expected 1 or more")
    plan = load_plan(args.d, args.p, args.c)
    refuse_cascade(plan)
    given = _json(args.settings)
    # raises for a network that it cannot pretrain
    settings = pretrain_settings(with_settings(plan.plans, given), plan.configuration, plan.resolved)
    if args.o is None and not nnUNet_results.is_set():
        raise UserError("the variable nnUNet_results is not set; set it as for nnU-Net, or give a folder with -o")
    targets = _targets(args.task, plan)
    name = f"{plan.plans['dataset_name']}__{plan.plans['plans_name']}__{plan.configuration}"
    name += "__classification" * (targets is not None)
    folder = os.path.abspath(args.o or os.path.join(nnUNet_results, "pcrl_compare", name))
    num_levels = len(plan.resolved["architecture"]["arch_kwargs"]["strides"]) - 1
    built_in = built_in_methods(plan.configuration, num_levels, settings.batch_size, targets)
    chosen = args.methods or [name for name in DEFAULT_METHODS if name in built_in]
    methods = methods_of(chosen, _json(args.own_methods), built_in)
    comparison = Comparison(
        folder,
        plan,
        methods,
        _patients(args.patients),
        args.protocol,
        args.scored,
        given,
        args.checkpoint and os.path.abspath(args.checkpoint),
        targets,
    )
    numbers = sorted({number_of(text, len(comparison.split.train)) for text in args.labelled})
    named = [name for name in methods if name in (*chosen, CONTROL)]
    runs = []
    for run in [Run(m, n, seed) for seed in range(args.seeds) for n in numbers for m in named]:
        reason = comparison.why_not(run)
        if reason is None:
            runs.append(run)
        elif run.seed == 0:
            print(f"{run.method} with {run.labelled} labels is left out: {reason}")
    return comparison, runs


def _targets(task: str | None, plan: Any) -> Any:
    """Of a classification, what it learns; None of a segmentation."""
    from nnunetv2.paths import nnUNet_raw

    from pcrl_nnunet.classification.label_table import planned_labels
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.ingest.maskless import is_without_masks

    name = plan.plans["dataset_name"]
    without_masks = is_without_masks(name, plan.dataset_json)
    if task == "segmentation" and without_masks:
        raise UserError(f"-task is segmentation and {name} has no masks; give -task classification")
    if task == "segmentation" or (task is None and not without_masks):
        return None
    return planned_labels(
        plan.plans, plan.folder, os.path.join(nnUNet_raw.get(), name) if nnUNet_raw.is_set() else None
    )


def _json(path: str | None) -> dict[str, Any]:
    from pcrl_nnunet.errors import UserError

    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a JSON file") from error
    if not isinstance(content, dict) or not all(isinstance(block, dict) for block in content.values()):
        raise UserError(f"{path} holds no blocks of names and values; expected {{NAME: {{...}}, ...}}")
    return content


def _patients(path: str | None) -> dict[str, str]:
    if path is None:
        return {}
    import pandas as pd

    from pcrl_nnunet.errors import UserError

    try:
        content = pd.read_csv(path, dtype=str)[["case", "patient"]]
        if content.isna().any(axis=None):
            raise ValueError(f"line {2 + int(content.isna().any(axis=1).idxmax())} has an empty cell")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be used ({error}); expected a CSV file with the columns case and patient"
        ) from error
    return dict(zip(content["case"], content["patient"], strict=True))


def _jobs(comparison: Any, runs: list[Any], device: Any, at_a_time: int) -> list[Job]:
    from functools import partial

    from pcrl_nnunet.experiments.comparison import Run
    from pcrl_nnunet.experiments.scores import CONTROL
    from pcrl_nnunet.pretraining.distributed import cores

    common = (str(max(1, cores() // at_a_time)), device.type)
    jobs: dict[str, Job] = {}
    for run in runs:
        after: tuple[str, ...] = ()
        trained = None if comparison.is_done(run) else comparison.trained_before(run)
        if comparison.pretrains(run) and trained is None:
            name = comparison.pretraining_plans_name(run)
            command: tuple[str, ...] = (sys.executable, "-c", PRETRAIN, "-d", comparison.dataset, "-p", name, "--c")
            command += ("-c", comparison.plan.configuration, "-f", str(comparison.pretraining_fold(run)))
            is_done = partial(os.path.isfile, comparison.pretrained(run))
            jobs.setdefault(name, Job(name, (*command, "-device", device.type), is_done))
            after = (name,)
        shortcut = comparison.methods[run.method].shortcut
        if shortcut is not None:
            command = (sys.executable, "-c", SHORTCUT, common[0], shortcut, comparison.dataset)
            command += (comparison.plan.configuration, str(comparison.fold(run)), comparison.plans_name(run))
            command += (os.path.dirname(comparison.evaluation(run)),)
            jobs[str(run)] = Job(str(run), command, partial(comparison.is_done, run))
            continue
        if comparison.pseudo_labelled(run):
            name, control = f"labels_of_{run}", Run(CONTROL, run.labelled, run.seed)
            output = comparison.output(control)
            command = (sys.executable, "-c", PSEUDO_LABEL, *common, comparison.description_of_pseudo_labels(run))
            command += (os.path.dirname(output), str(comparison.fold(control)))
            is_done = partial(os.path.isfile, comparison.pseudo_labels(run).finished)
            jobs[name] = Job(name, command, is_done, (str(control),))
            after = (name,)
        command = (sys.executable, "-c", TRAIN, *common, comparison.dataset, comparison.plan.configuration)
        command += (str(comparison.fold(run)), comparison.trainer(run), comparison.plans_name(run))
        command += (comparison.network(run), trained or "")
        jobs[str(run)] = Job(str(run), command, partial(comparison.is_done, run), after)
    return list(jobs.values())


def _run(jobs: list[Job], at_a_time: int, comparison: Any, after_each: Callable[[], Any]) -> list[str]:
    """Run what is not done; the names of those that failed."""
    from tqdm import tqdm

    slots: SimpleQueue[dict[str, str]] = SimpleQueue()
    for environment in _environments(comparison, at_a_time):
        slots.put(environment)
    children: set[subprocess.Popen[bytes]] = set()
    ended = Event()

    def run(job: Job) -> bool:
        slot = slots.get()
        try:
            with open(os.path.join(comparison.folder, "logs", f"{job.name}.log"), "a", encoding="utf-8") as log:
                # Python looks for modules where it is started: in a clone of this package it would find half of it
                child = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=slot,
                    cwd=comparison.folder,
                )
                children.add(child)
                if ended.is_set():  # too late to be among those that were ended
                    child.terminate()
                return child.wait() == 0 and job.is_done()
        finally:
            slots.put(slot)

    waiting = [job for job in jobs if not job.is_done()]
    done = {job.name for job in jobs} - {job.name for job in waiting}
    failed: list[str] = []
    running: dict[Future[bool], Job] = {}
    with (
        ThreadPoolExecutor(at_a_time) as pool,
        tqdm(total=len(waiting), unit="step", dynamic_ncols=True) as bar,
        _ended_with_us(children, ended),
    ):
        while waiting or running:
            for job in [job for job in waiting if done.issuperset(job.after)][: at_a_time - len(running)]:
                waiting.remove(job)
                running[pool.submit(run, job)] = job
            if not running:  # what is left needs what failed
                failed += [job.name for job in waiting]
                break
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                job = running.pop(future)
                if future.result():
                    done.add(job.name)
                else:
                    failed.append(job.name)
                bar.update()
                bar.write(f"{'done' if future.result() else 'FAILED'}: {job.name}")
            after_each()
    return failed


@contextmanager
def _ended_with_us(children: set[subprocess.Popen[bytes]], ended: Event) -> Iterator[None]:
    """End the children where this process is interrupted or terminated; they go on from their checkpoints."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except BaseException:
        ended.set()
        for child in list(children):
            if child.poll() is None:
                child.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _environments(comparison: Any, at_a_time: int) -> list[dict[str, str]]:
    """The variables of each of so many processes at a time: a share of the cores, and a GPU in turn."""
    import torch
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    from pcrl_nnunet.pretraining.distributed import cores

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    share = {
        **_folders(comparison),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "OMP_NUM_THREADS": str(max(1, cores() // at_a_time)),
        "nnUNet_n_proc_DA": os.environ.get("nnUNet_n_proc_DA", str(max(1, get_allowed_n_proc_DA() // at_a_time))),
        "nnUNet_def_n_proc": os.environ.get("nnUNet_def_n_proc", "2"),
    }
    return [
        {**os.environ, **share, **({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {})}
        for slot in range(at_a_time)
    ]


def _folders(comparison: Any) -> dict[str, str]:
    """The environment in which nnU-Net sees the comparison's folders as its own."""
    folders = {"nnUNet_preprocessed": comparison.preprocessed, "nnUNet_results": comparison.results}
    if comparison.targets is not None:
        folders["nnUNet_raw"] = ""  # a table that is edited there meanwhile would be taken
    return folders


def _dry_run(comparison: Any, runs: list[Any], jobs: list[Job], device: Any, at_a_time: int) -> None:
    """What is done and to do, and how long that takes by a few steps of each kind of training."""
    from pcrl_nnunet.cli import pretrain
    from pcrl_nnunet.config import FinetuneSettings
    from pcrl_nnunet.experiments.comparison import Run
    from pcrl_nnunet.experiments.scores import CONTROL
    from pcrl_nnunet.plans import load_plan
    from pcrl_nnunet.pretraining.settings import pretrain_settings

    print(_progress(runs, jobs))
    for job in jobs:
        print(f"  {'done' if job.is_done() else 'to do':6} {job.name}")
    os.environ.update(_folders(comparison))
    configuration = comparison.plan.configuration
    hours: dict[str, float] = {}
    a_step: dict[str, float] = {}  # of a method's pretraining, or of the plan's network
    for run in runs:
        name, trained = comparison.pretraining_plans_name(run), comparison.trained_before(run) is not None
        pretrained = trained or os.path.isfile(comparison.pretrained(run))
        if comparison.pretrains(run) and not pretrained and name not in hours:
            plan = load_plan(comparison.dataset, name, configuration)
            kind = f"pretraining of {comparison.methods[run.method].pretraining or run.method}"
            if kind not in a_step:
                with redirect_stdout(io.StringIO()):  # of nnU-Net's trainers: a page for every kind
                    measured = pretrain.measured(plan, comparison.pretraining_fold(run), device, {})
                a_step[kind] = measured.seconds_a_step
            settings = pretrain_settings(plan.plans, configuration, plan.resolved)
            hours[name] = a_step[kind] * settings.epochs * settings.iters_per_epoch / 3600
        if not (comparison.is_done(run) or trained) and comparison.methods[run.method].shortcut is None:
            plan = load_plan(comparison.dataset, comparison.plans_name(run), configuration)
            kind = "training with labels"
            if kind not in a_step:
                control = Run(CONTROL, run.labelled, run.seed)  # pseudo-labels may not be there yet
                of_control = load_plan(comparison.dataset, comparison.plans_name(control), configuration)
                trainer = comparison.trainer(control)
                with redirect_stdout(io.StringIO()):
                    a_step[kind] = _seconds_an_iteration(of_control, comparison.fold(control), device, trainer)
            tuned = FinetuneSettings.from_plan(plan.plans)
            iterations = tuned.epochs * (tuned.iters_per_epoch + tuned.val_iters_per_epoch / 3)  # no backward pass
            hours[str(run)] = a_step[kind] * iterations / 3600
    for kind, seconds in a_step.items():
        print(f"  {seconds:.2f} s a step of {kind}, on {device}")
    total = sum(hours.values()) / at_a_time
    about = f"{total:.1f} hours" if total >= 1 else f"{ceil(60 * total)} min"
    print(f"About {about} of training are to do with -np {at_a_time}, if as many at a time are as fast as one;")
    print("starts, evaluations and the prediction of pseudo-labels come on top")
    note = comparison.note_on_stock()
    if note is not None:
        print(note)


def _seconds_an_iteration(plan: Any, fold: int, device: Any, trainer_name: str) -> float:
    """Of nnU-Net's training with its loading of data, in a results folder that is thrown away."""
    import pcrl_nnunet.trainers

    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(nnUNet_results=folder, nnUNet_wandb_enabled="0")
        trainer = getattr(pcrl_nnunet.trainers, trainer_name)(
            plan.plans, plan.configuration, fold, plan.dataset_json, device
        )
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        ends = [time()]
        while len(ends) < 4 or ends[-1] - ends[0] < MEASURED_SECONDS:
            trainer.train_step(next(trainer.dataloader_train))
            ends.append(time())
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            if hasattr(loader, "_finish"):  # of batchgenerators' multi-process loaders, as nnU-Net ends them
                loader._finish()
    first = len(ends) // 2  # the first half warms up, and takes batches that were waiting
    return (ends[-1] - ends[first]) / (len(ends) - 1 - first)


def _write_results(comparison: Any, runs: list[Any]) -> Any:
    """The scores of what is done, also as results.csv, which keeps those of other runs in this folder."""
    for run in runs:
        comparison.drop_best_checkpoint(run)
    return comparison.write_scores(runs)


def _report(comparison: Any, runs: list[Any]) -> Iterator[str]:
    """Yield the table, the pictures' paths and the verdicts; PCRLv2's verdict, if it is there, comes last.

    If no network learned anything, the last line says so instead.
    """
    from pcrl_nnunet.classification.shortcuts import SHORTCUTS
    from pcrl_nnunet.experiments.scores import (
        CONTROL,
        STOCK,
        networks_that_learned,
        note_on_learning,
        shortcut_warning,
        table,
        verdict,
    )

    scores = _write_results(comparison, runs)
    rows = table(scores)
    rows.to_csv(comparison.file("table.csv"), index=False)
    yield rows.to_string(index=False, float_format=lambda x: f"{x:.2f}", na_rep="")
    learned = networks_that_learned(rows, SHORTCUTS)
    yield from _pictures(comparison, scores, learned)
    note = comparison.note_on_stock()
    on_learning = note_on_learning(scores, learned, comparison.remedy_for_learning(), SHORTCUTS)
    yield from filter(None, (shortcut_warning(scores, SHORTCUTS), note, on_learning))
    if not any(learned.values()) and on_learning:
        return
    controls = (CONTROL, STOCK) if note is None else (CONTROL,)  # the better of two alike would be the luckier one
    others = [name for name in dict.fromkeys(scores.runs["method"]) if name not in (CONTROL, *SHORTCUTS)]
    for name in sorted(others, key=lambda name: name == "pcrlv2"):
        yield verdict(scores, name, learned, controls)


def _pictures(comparison: Any, scores: Any, learned: dict[int, list[str]]) -> Iterator[str]:
    """Draw what is done, also by earlier calls, and say where; one that cannot be drawn does not take the others.

    Args:
        learned: by number of labels, the methods whose networks learned; the titles name the other numbers.
    """
    from pcrl_nnunet.experiments import figures
    from pcrl_nnunet.experiments.comparison import Run

    of_all_calls = scores.runs.sort_values("labelled", kind="stable")[["method", "labelled", "seed"]]
    runs = [Run(*row) for row in of_all_calls.itertuples(index=False)]
    done = [run for run in runs if comparison.is_done(run)]
    titles = {
        run.labelled: f"{run.labelled} labelled cases" + ", nothing surely learned" * (not learned.get(run.labelled))
        for run in runs
    }
    untold = [str(number) for number in titles if not learned.get(number)]
    part = {"val": "validation", "test": "test"}[comparison.scored]
    title = f"a point: one labelled subset, all {part} cases"
    title += f"\nno network surely learned anything with {', '.join(untold)} labels" if untold else ""
    # of a segmentation nnU-Net's validation while training sees patches
    while_training = f"{scores.measure}{' of patches' * (comparison.targets is None)}"

    def iterations(path: str) -> None:
        curves: dict[str, dict[str, list[Any]]] = {}
        for run in done:
            curve = comparison.curve(run)
            if curve is not None:
                curves.setdefault(titles[run.labelled], {}).setdefault(run.method, []).append(curve)
        figures.score_while_training(curves, while_training, path)

    drawings: dict[str, Callable[[str], None]] = {
        "label_efficiency.png": lambda path: figures.label_efficiency(
            scores.runs, scores.measure, scores.chance, title, path
        ),
        "iterations.png": iterations,
    }
    if comparison.targets is None:
        drawings["segmentations.png"] = lambda path: figures.segmentations(
            comparison.examples(done, scores, learned), path
        )
    else:
        drawings["roc.png"] = lambda path: figures.roc_of_methods(scores.curves(titles), path)
    for name, draw in drawings.items():
        path = comparison.file(name)
        try:
            if done:
                draw(path)
                yield f"Picture: {path}"
        except (OSError, LookupError, RuntimeError, ValueError) as error:
            yield f"No picture {path}: {type(error).__name__}: {error}"


def main_entry() -> None:
    """The console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
