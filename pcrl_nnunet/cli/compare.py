"""pcrl_nnunet_compare: does pretraining help on this dataset, and with how many labels?"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

DESCRIPTION = """Compare pretraining with training from scratch, for several numbers of labelled cases: splits the
dataset's cases (70 % training, 10 % validation, 20 % test; splits_final.json is not touched), pretrains without the
held-out ones, trains every method on the same randomly drawn labelled cases, and scores them: segmentations by Dice,
classifications (classes.csv or candidates.csv) by AUROC. The same command goes on where it was stopped."""


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
        help="beside scratch (default: stock, pseudo_labels and the default method of pretraining; of a "
        "classification the shortcuts thumbnail mean_intensity position in the place of pseudo_labels); also every "
        "method of pretraining, and the ablations of the plan's method: a wrong name lists all",
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
    from pcrl_nnunet.device import device_named  # after the parser, to keep --help quick

    device = device_named(args.device)
    layout, runs = _layout(args)
    for name, reason in layout.comparison.cases.left_out.items():
        print(f"Nothing is trained on the unlabelled case {name}: {reason}")
    if args.dry_run:
        _dry_run(layout, runs, device, args.np)
    else:
        _compare(layout, runs, device, args.np)


def _layout(args: argparse.Namespace) -> tuple[Any, list[Any]]:
    """Return the layout of the comparison's folder, and the runs."""
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.experiments.arms import CONTROL, DEFAULTS, built_in_arms, choose_arms
    from pcrl_nnunet.experiments.cases import read_patients
    from pcrl_nnunet.experiments.comparison import Comparison, find_label_table
    from pcrl_nnunet.experiments.layout import Layout
    from pcrl_nnunet.experiments.settings import read_blocks, with_settings
    from pcrl_nnunet.experiments.split import number_labelled
    from pcrl_nnunet.plans import PlanFacts, load_plan, refuse_cascade
    from pcrl_nnunet.pretraining.settings import pretrain_settings

    if args.seeds < 1 or args.np < 1:
        raise UserError(f"-seeds is {args.seeds} and -np {args.np}; expected 1 or more")
    plan = load_plan(args.d, args.p, args.c)
    refuse_cascade(plan)
    given = read_blocks(args.settings)
    # raises for a network that cannot be pretrained
    settings = pretrain_settings(with_settings(plan.plans, given), plan.configuration, plan.resolved)
    label_table = find_label_table(args.task, plan)
    folder = args.o or _default_folder(plan, label_table is not None)
    facts = PlanFacts.of(plan.configuration, plan.resolved)
    built_in = built_in_arms(facts, settings.method, settings.batch_size, label_table)
    chosen = args.methods or [name for name in DEFAULTS if name in built_in]
    arms = choose_arms(chosen, read_blocks(args.own_methods), built_in)
    checkpoint = args.checkpoint and os.path.abspath(args.checkpoint)
    patients = read_patients(args.patients)
    comparison = Comparison.of_plan(
        plan, arms, patients, args.protocol, args.scored, given, checkpoint=checkpoint, label_table=label_table
    )
    numbers = sorted({number_labelled(text, len(comparison.cases.split.train)) for text in args.labelled})
    runs, lacking = comparison.runs([name for name in arms if name in (*chosen, CONTROL)], numbers, args.seeds)
    for run, reason in lacking.items():
        if run.seed == 0:
            print(f"{run.arm} with {run.labelled} labels is left out: {reason}")
    return Layout(comparison, os.path.abspath(folder)), runs


def _default_folder(plan: Any, classifies: bool) -> str:
    from pcrl_nnunet.plans import folder_of

    name = f"{plan.plans['dataset_name']}__{plan.plans['plans_name']}__{plan.configuration}"
    return os.path.join(folder_of("nnUNet_results"), "pcrl_compare", f"{name}{'__classification' * classifies}")


def _dry_run(layout: Any, runs: list[Any], device: Any, at_a_time: int) -> None:
    from pcrl_nnunet import trainers
    from pcrl_nnunet.experiments.forecast import forecast
    from pcrl_nnunet.experiments.jobs import jobs_of
    from pcrl_nnunet.experiments.preparation import prepare, preview_in
    from pcrl_nnunet.pretraining.dry_run import measured
    from pcrl_nnunet.pretraining.request import Request
    from pcrl_nnunet.trainers.pretrain import pretrain_trainer

    def step_of_pretraining(plan: Any, fold: int, device: Any) -> float:
        request = Request.of_plan(plan, fold)
        return measured(lambda: pretrain_trainer(request, device), device).seconds_a_step

    print(f"Comparison in {layout.folder}")
    with tempfile.TemporaryDirectory() as folder:
        preview_in(layout, folder)
        prepare(layout, runs)
        jobs = jobs_of(layout, runs, device, at_a_time)
        for line in forecast(layout, runs, jobs, device, at_a_time, trainers, step_of_pretraining):
            print(line)


def _compare(layout: Any, runs: list[Any], device: Any, at_a_time: int) -> None:
    from pcrl_nnunet import registration
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.experiments.jobs import jobs_of, progress
    from pcrl_nnunet.experiments.preparation import prepare
    from pcrl_nnunet.experiments.processes import run_jobs
    from pcrl_nnunet.experiments.report import report
    from pcrl_nnunet.experiments.results import collect
    from pcrl_nnunet.experiments.shares import environments
    from pcrl_nnunet.files import writing
    from pcrl_nnunet.lock import locked

    with writing(layout.folder, "give another folder with -o"):
        os.makedirs(layout.folder, exist_ok=True)
    with locked(layout.folder, "pcrl_nnunet_compare"):
        prepare(layout, runs)
        jobs = jobs_of(layout, runs, device, at_a_time)
        print(f"Comparison in {layout.folder}\n{progress(runs, jobs)}")
        if not registration.is_registered():
            for line in registration.register():
                print(line)
        # the predictions of many candidates take gigabytes: collect them once, in the report
        after_each = (lambda: collect(layout, runs)) if layout.comparison.label_table is None else (lambda: None)
        failed = run_jobs(jobs, layout.folder, environments(layout.variables(), at_a_time), after_each)
        for line in report(layout, runs):
            print(line)
    if failed:
        raise UserError(
            f"{len(failed)} steps failed ({', '.join(failed)}); look into their logs in {layout.folder}/logs, and "
            f"run the same command again"
        )


def main_entry() -> None:
    """Run the console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
