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


@dataclass(frozen=True)
class Job:
    """One process: a pretraining or a training. It is done when `result` is there."""

    name: str
    command: tuple[str, ...]
    result: str
    after: tuple[str, ...] = ()  # results that it needs


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
        "-methods", nargs="+", default=["stock", "pcrlv2"], help="beside scratch (default: stock pcrlv2)"
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
    parser.add_argument("--dry_run", action="store_true", help="print the trainings, done or to do; train nothing")
    return parser


def main() -> None:
    """Parse, check, run, report."""
    args = _parser().parse_args()
    from pcrl_nnunet.cli import register  # after the parser, so that --help is quick

    comparison, runs = _comparison(args)
    comparison.prepare(runs)
    jobs = _jobs(comparison, runs, args)
    print(f"{len(runs)} runs, {sum(os.path.isfile(job.result) for job in jobs)} of {len(jobs)} trainings are done")
    if args.dry_run:
        for job in jobs:
            print(f"  {'done' if os.path.isfile(job.result) else 'to do':6} {job.name}")
        return
    if not register.is_registered():
        for line in register.register():
            print(line)
    failed = _run(jobs, args.np, comparison, lambda: _write_results(comparison, runs))
    print(_report(comparison, runs))
    if failed:
        from pcrl_nnunet.errors import UserError

        raise UserError(
            f"{len(failed)} trainings failed ({', '.join(failed)}); look into their logs in {comparison.folder}/logs, "
            f"and run the same command again"
        )


def _comparison(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    from nnunetv2.paths import nnUNet_results

    from pcrl_nnunet.comparison import Comparison, Run, methods_of, number_of
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.plans import load_plan

    plan = load_plan(args.d, args.p, args.c)
    if args.o is None and not nnUNet_results.is_set():
        raise UserError("the variable nnUNet_results is not set; set it as for nnU-Net, or give a folder with -o")
    name = f"{plan.plans['dataset_name']}__{plan.plans['plans_name']}__{plan.configuration}"
    folder = os.path.abspath(args.o or os.path.join(nnUNet_results, "pcrl_compare", name))
    methods = methods_of(args.methods, _json(args.own_methods))
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
    named = [name for name in methods if name in (*args.methods, "scratch")]
    return comparison, [Run(m, n, seed) for seed in range(args.seeds) for n in numbers for m in named]


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


def _jobs(comparison: Any, runs: list[Any], args: argparse.Namespace) -> list[Job]:
    from pcrl_nnunet.cli import pretrain

    device = pretrain._device(args.device).type
    threads = str(max(1, (os.cpu_count() or 1) // args.np))
    jobs: dict[str, Job] = {}
    for run in runs:
        after: tuple[str, ...] = ()
        if comparison.pretrains(run):
            result, plans = comparison.pretrained(run), comparison.pretraining_plans_name(run)
            command: tuple[str, ...] = (sys.executable, "-m", "pcrl_nnunet.cli.pretrain", "-d", comparison.dataset)
            command += ("-c", comparison.plan.configuration, "-p", plans, "-f", str(comparison.pretraining_fold(run)))
            jobs.setdefault(result, Job(plans, (*command, "-device", device, "--c"), result))
            after = (result,)
        command = (sys.executable, "-c", TRAIN, threads, device, comparison.dataset, comparison.plan.configuration)
        command += (str(comparison.fold(run)), comparison.methods[run.method].trainer, comparison.plans_name(run))
        jobs[comparison.summary(run)] = Job(str(run), command, comparison.summary(run), after)
    return list(jobs.values())


def _run(jobs: list[Job], at_a_time: int, comparison: Any, after_each: Callable[[], Any]) -> list[str]:
    """Run what is not done; the names of those that failed."""
    from tqdm import tqdm

    environment = {
        **os.environ,
        "nnUNet_preprocessed": comparison.preprocessed,
        "nnUNet_results": comparison.results,
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
        return status.returncode == 0 and os.path.isfile(job.result)

    waiting = [job for job in jobs if not os.path.isfile(job.result)]
    failed: list[str] = []
    running: dict[Future[bool], Job] = {}
    with ThreadPoolExecutor(at_a_time) as pool, tqdm(total=len(waiting), unit="training", dynamic_ncols=True) as bar:
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


def _write_results(comparison: Any, runs: list[Any]) -> Any:
    """The scores of what is done, also as results.csv."""
    scores = comparison.scores(runs)
    scores.to_csv(os.path.join(comparison.folder, "results.csv"), index=False)
    return scores


def _report(comparison: Any, runs: list[Any]) -> str:
    """The table and the verdict on what is done, after writing results.csv."""
    from pcrl_nnunet.comparison import CONTROL, table, verdict

    rows = table(_write_results(comparison, runs))
    lines = [rows.to_string(index=False, float_format=lambda x: f"{x:.2f}", na_rep="")]
    lines += [verdict(rows, name) for name in dict.fromkeys(run.method for run in runs) if name != CONTROL]
    return "\n".join(lines)


def main_entry() -> None:
    """The console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
