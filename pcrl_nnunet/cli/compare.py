"""pcrl_nnunet_compare: does pretraining help on this dataset, and with how many labels?"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

DESCRIPTION = """Compare pretraining with training from scratch, for several numbers of labelled cases: splits the
dataset's cases (70 % training, 10 % validation, 20 % test; splits_final.json is not touched), pretrains without the
held-out ones, fine-tunes every method on the same randomly drawn labelled cases, and scores them. The same command goes
on where it was stopped."""
# nnU-Net's command would take all cores for each of several runs at a time
TRAIN = """
import sys, torch
threads, device, dataset, configuration, fold, trainer, plans = sys.argv[1:]
if device == "cpu":
    torch.set_num_threads(int(threads))
from nnunetv2.run.run_training import run_training
run_training(dataset, configuration, fold, trainer, plans, continue_training=True, device=torch.device(device))
"""
PSEUDO_LABEL = """
import sys, torch
threads, device, description, model, fold = sys.argv[1:]
if device == "cpu":
    torch.set_num_threads(int(threads))
from pcrl_nnunet.pseudo_labels import PseudoLabels
PseudoLabels.load(description).write(model, int(fold), torch.device(device))
"""


@dataclass(frozen=True)
class Job:
    """One process: a pretraining, a training, or a prediction of pseudo-labels. It is done when `result` is there."""

    name: str
    command: tuple[str, ...]
    result: str
    after: tuple[str, ...] = ()  # results that it needs

    @property
    def is_done(self) -> bool:
        """Whether its result is there."""
        return os.path.isfile(self.result)


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
        default=["stock", "pseudo_labels", "pcrlv2"],
        help="beside scratch (default: stock pseudo_labels pcrlv2); ablations: skip_connections cross_scale "
        "restoration_only comparison_only one_level three_levels all_levels multi_crop",
    )
    parser.add_argument(
        "-own_methods", metavar="JSON", help='file of further methods: {"NAME": {"pretrain": {...}, ...}}'
    )
    parser.add_argument(
        "-settings", metavar="JSON", help='file with settings for all: {"pretrain": {}, "finetune": {}}'
    )
    parser.add_argument("-seeds", type=int, default=5, help="labelled subsets a number (default: 5)")
    parser.add_argument("-protocol", choices=("all", "semi", "transfer"), default="all", help="what is pretrained on")
    parser.add_argument("-checkpoint", help="-protocol transfer: a pretraining of other data")
    parser.add_argument("-patients", metavar="CSV", help="columns case, patient; default: each case is a patient")
    parser.add_argument(
        "-scored", choices=("val", "test"), default="test", help="cases that are scored (default: test)"
    )
    parser.add_argument("-device", help="cuda, cpu or mps (default: a GPU if present, else the CPU)")
    parser.add_argument("-np", type=int, default=1, help="runs at a time (default: 1)")
    parser.add_argument(
        "-o", metavar="FOLDER", help="default: nnUNet_results/pcrl_compare/DATASET__PLANS__CONFIGURATION"
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print what is done and to do, and how long it takes; no training"
    )
    return parser


def main() -> None:
    """Parse, check, run, report."""
    args = _parser().parse_args()
    from pcrl_nnunet.cli import pretrain, register  # after the parser, so that --help is quick

    device = pretrain._device(args.device)
    comparison, runs = _comparison(args)
    comparison.prepare(runs)
    jobs = _jobs(comparison, runs, device, args.np)
    for name, twin in comparison.left_out.items():
        print(f"Unlabelled case {name} is the held-out case {twin} under another name: nothing is trained on it")
    print(f"{len(runs)} runs, {sum(job.is_done for job in jobs)} of {len(jobs)} steps are done: {comparison.folder}")
    if args.dry_run:
        _dry_run(comparison, runs, jobs, device, args.np)
        return
    if not register.is_registered():
        for line in register.register():
            print(line)
    failed = _run(jobs, args.np, comparison, lambda: _write_results(comparison, runs))
    for line in _report(comparison, runs):
        print(line)
    if failed:
        from pcrl_nnunet.errors import UserError

        raise UserError(
            f"{len(failed)} steps failed ({', '.join(failed)}); look into their logs in {comparison.folder}/logs, and "
            f"run the same command again"
        )


def _comparison(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    from nnunetv2.paths import nnUNet_results

    from pcrl_nnunet.cli import pretrain
    from pcrl_nnunet.comparison import Comparison, Run, built_in_methods, methods_of, number_of
    from pcrl_nnunet.config import pretrain_settings
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.plans import load_plan
    from pcrl_nnunet.scores import CONTROL

    if args.seeds < 1 or args.np < 1:
        raise UserError(f"-seeds is {args.seeds} and -np {args.np}; expected 1 or more")
    plan = load_plan(args.d, args.p, args.c)
    pretrain.refuse_cascade(plan)
    pretrain_settings(plan.plans, plan.configuration, plan.resolved)  # raises for a network that it cannot pretrain
    if args.o is None and not nnUNet_results.is_set():
        raise UserError("the variable nnUNet_results is not set; set it as for nnU-Net, or give a folder with -o")
    name = f"{plan.plans['dataset_name']}__{plan.plans['plans_name']}__{plan.configuration}"
    folder = os.path.abspath(args.o or os.path.join(nnUNet_results, "pcrl_compare", name))
    num_levels = len(plan.resolved["architecture"]["arch_kwargs"]["strides"]) - 1
    methods = methods_of(args.methods, _json(args.own_methods), built_in_methods(plan.configuration, num_levels))
    comparison = Comparison(
        folder,
        plan,
        methods,
        _patients(args.patients),
        args.protocol,
        args.scored,
        _json(args.settings),
        args.checkpoint and os.path.abspath(args.checkpoint),
    )
    numbers = sorted({number_of(text, len(comparison.split.train)) for text in args.labelled})
    named = [name for name in methods if name in (*args.methods, CONTROL)]
    runs = [Run(m, n, seed) for seed in range(args.seeds) for n in numbers for m in named]
    return comparison, [run for run in runs if not methods[run.method].pseudo_labels or comparison.pseudo_labelled(run)]


def _json(path: str | None) -> dict[str, Any]:
    from pcrl_nnunet.errors import UserError

    if path is None:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); expected a JSON file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no block of names and values")
    return content


def _patients(path: str | None) -> dict[str, str]:
    if path is None:
        return {}
    import pandas as pd

    from pcrl_nnunet.errors import UserError

    try:
        content = pd.read_csv(path, dtype=str)[["case", "patient"]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be used ({error}); expected a CSV file with the columns case and patient"
        ) from error
    return dict(zip(content["case"], content["patient"], strict=True))


def _jobs(comparison: Any, runs: list[Any], device: Any, at_a_time: int) -> list[Job]:
    from pcrl_nnunet.comparison import Run
    from pcrl_nnunet.scores import CONTROL

    common = (str(max(1, (os.cpu_count() or 1) // at_a_time)), device.type)
    jobs: dict[str, Job] = {}
    for run in runs:
        after: tuple[str, ...] = ()
        if comparison.pretrains(run):
            result, plans = comparison.pretrained(run), comparison.pretraining_plans_name(run)
            command: tuple[str, ...] = (sys.executable, "-m", "pcrl_nnunet.cli.pretrain", "-d", comparison.dataset)
            command += ("-c", comparison.plan.configuration, "-p", plans, "-f", str(comparison.pretraining_fold(run)))
            jobs.setdefault(result, Job(plans, (*command, "-device", device.type, "--c"), result))
            after = (result,)
        if comparison.pseudo_labelled(run):
            control, pseudo_labels = Run(CONTROL, run.labelled, run.seed), comparison.pseudo_labels(run)
            output = comparison.output(control)
            command = (sys.executable, "-c", PSEUDO_LABEL, *common, comparison.description_of_pseudo_labels(run))
            command += (os.path.dirname(output), str(comparison.fold(control)))
            result = pseudo_labels.finished
            jobs[result] = Job(f"labels_of_{run}", command, result, (comparison.summary(control),))
            after = (result,)
        command = (sys.executable, "-c", TRAIN, *common, comparison.dataset, comparison.plan.configuration)
        command += (str(comparison.fold(run)), comparison.methods[run.method].trainer, comparison.plans_name(run))
        jobs[comparison.summary(run)] = Job(str(run), command, comparison.summary(run), after)
    return list(jobs.values())


def _run(jobs: list[Job], at_a_time: int, comparison: Any, after_each: Callable[[], Any]) -> list[str]:
    """Run what is not done; the names of those that failed."""
    from tqdm import tqdm

    environment = {
        **os.environ,
        **_folders(comparison),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_a_time)),
        "nnUNet_def_n_proc": os.environ.get("nnUNet_def_n_proc", "2"),
    }

    def run(job: Job) -> bool:
        with open(os.path.join(comparison.folder, "logs", f"{job.name}.log"), "a", encoding="utf-8") as log:
            status = subprocess.run(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
            )
        return status.returncode == 0 and job.is_done

    waiting = [job for job in jobs if not job.is_done]
    failed: list[str] = []
    running: dict[Future[bool], Job] = {}
    with ThreadPoolExecutor(at_a_time) as pool, tqdm(total=len(waiting), unit="step", dynamic_ncols=True) as bar:
        while waiting or running:
            for job in [j for j in waiting if all(os.path.isfile(r) for r in j.after)][: at_a_time - len(running)]:
                waiting.remove(job)
                running[pool.submit(run, job)] = job
            if not running:  # what is left needs what failed
                failed += [job.name for job in waiting]
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job = running.pop(future)
                if not future.result():
                    failed.append(job.name)
                bar.update()
                bar.write(f"{'done' if future.result() else 'FAILED'}: {job.name}")
            after_each()
    return failed


def _folders(comparison: Any) -> dict[str, str]:
    """The environment in which nnU-Net sees the comparison's folders as its own."""
    return {"nnUNet_preprocessed": comparison.preprocessed, "nnUNet_results": comparison.results}


def _dry_run(comparison: Any, runs: list[Any], jobs: list[Job], device: Any, at_a_time: int) -> None:
    """What is done and to do, and how long that takes by a few steps of each kind of training."""
    from pcrl_nnunet.cli import pretrain
    from pcrl_nnunet.config import FinetuneSettings, pretrain_settings
    from pcrl_nnunet.plans import load_plan

    for job in jobs:
        print(f"  {'done' if job.is_done else 'to do':6} {job.name}")
    os.environ.update(_folders(comparison))
    configuration = comparison.plan.configuration
    hours: dict[str, float] = {}
    a_step: dict[str, float] = {}  # of a method's pretraining, or of the plan's network
    for run in runs:
        if comparison.pretrains(run) and not os.path.isfile(comparison.pretrained(run)):
            plan = load_plan(comparison.dataset, comparison.pretraining_plans_name(run), configuration)
            kind = f"pretraining of {comparison.methods[run.method].pretraining or run.method}"
            if kind not in a_step:
                a_step[kind] = pretrain.measured(plan, comparison.pretraining_fold(run), device, {}).seconds_a_step
            settings = pretrain_settings(plan.plans, configuration, plan.resolved)
            # once a pretraining, not once a run that uses it
            hours[comparison.pretrained(run)] = a_step[kind] * settings.epochs * settings.iters_per_epoch / 3600
        if not comparison.is_done(run):
            plan = load_plan(comparison.dataset, comparison.plans_name(run), configuration)
            kind = "fine-tuning"
            if kind not in a_step:
                a_step[kind] = _seconds_an_iteration(plan, comparison.fold(run), device)
            tuned = FinetuneSettings.from_plan(plan.plans)
            iterations = tuned.epochs * (tuned.iters_per_epoch + tuned.val_iters_per_epoch / 3)  # no backward pass
            hours[str(run)] = a_step[kind] * iterations / 3600
    for kind, seconds in a_step.items():
        print(f"  {seconds:.2f} s a step of {kind}, on {device}")
    print(
        f"About {sum(hours.values()) / at_a_time:.1f} hours of training are to do with -np {at_a_time}, if as many\n"
        f"at a time are as fast as one; evaluations come on top"
    )


def _seconds_an_iteration(plan: Any, fold: int, device: Any) -> float:
    """Of nnU-Net's training, its loading of data included, in a results folder that is thrown away."""
    import tempfile
    from time import time

    from pcrl_nnunet.trainers.finetune import PCRLScratchTrainer

    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(nnUNet_results=folder, nnUNet_wandb_enabled="0")
        trainer = PCRLScratchTrainer(plan.plans, plan.configuration, fold, plan.dataset_json, device)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        seconds = []
        for _ in range(4):
            start = time()
            trainer.train_step(next(trainer.dataloader_train))
            seconds.append(time() - start)
        for loader in (trainer.dataloader_train, trainer.dataloader_val):
            if hasattr(loader, "_finish"):  # of batchgenerators' multi-process loaders, as nnU-Net ends them
                loader._finish()
    return sum(seconds[1:]) / len(seconds[1:])  # the first one warms up


def _write_results(comparison: Any, runs: list[Any]) -> Any:
    """The scores of what is done, also as results.csv."""
    for run in runs:
        comparison.drop_best_checkpoint(run)
    scores = comparison.scores(runs)
    scores.to_csv(os.path.join(comparison.folder, "results.csv"), index=False)
    return scores


def _report(comparison: Any, runs: list[Any]) -> list[str]:
    """The table, where the pictures are, and the verdicts on what is done; PCRLv2's, if it is there, comes last."""
    from pcrl_nnunet.scores import CONTROL, table, verdict

    scores = _write_results(comparison, runs)
    rows = table(scores)
    lines = [rows.to_string(index=False, float_format=lambda x: f"{x:.2f}", na_rep="")]
    lines += [f"Picture: {path}" for path in _pictures(comparison, runs, scores)]
    others = [name for name in dict.fromkeys(run.method for run in runs) if name != CONTROL]
    return lines + [verdict(rows, name) for name in sorted(others, key=lambda name: name == "pcrlv2")]


def _pictures(comparison: Any, runs: list[Any], scores: Any) -> list[str]:
    """label_efficiency.png, iterations.png and segmentations.png, of what is done; their paths."""
    from pcrl_nnunet import figures
    from pcrl_nnunet.scores import per_case

    done = [run for run in runs if comparison.is_done(run)]
    if not done:
        return []
    paths = [
        os.path.join(comparison.folder, f"{name}.png") for name in ("label_efficiency", "iterations", "segmentations")
    ]
    figures.label_efficiency(per_case(scores), paths[0])
    curves: dict[str, dict[str, list[Any]]] = {}
    for run in sorted(done, key=lambda run: run.labelled):
        of_method = curves.setdefault(f"{run.labelled} labelled cases", {}).setdefault(run.method, [])
        of_method.append(comparison.curve(run))
    figures.dice_while_training(curves, paths[1])
    examples = comparison.examples(done, scores)
    if not examples:
        print("No picture of segmentations: it needs the images in nnUNet_raw, and a finished pair of two methods")
        return paths[:2]
    figures.segmentations(examples, paths[2])
    return paths


def main_entry() -> None:
    """The console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
