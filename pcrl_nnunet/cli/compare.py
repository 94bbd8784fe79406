"""pcrl_nnunet_compare: does pretraining help on this dataset, and with how many labelled cases?"""

from __future__ import annotations

import argparse
import os
import tempfile
from typing import Any

from pcrl_nnunet.cli import arguments
from pcrl_nnunet.method_names import DEFAULT

DESCRIPTION = """
Compare pretraining with training from scratch, for several numbers of
labelled cases.

The command does all of this:
  1. It splits the dataset's cases: 70 % training, 10 % validation, 20 % test.
     It does not touch splits_final.json.
  2. It pretrains without the held-out cases.
  3. It trains every method on the same randomly drawn labelled cases.
  4. It scores segmentations by Dice, and classifications by AUROC.

The word semi has two meanings: -protocol semi leaves the labelled cases out of
the pretraining; -methods semi trains semi-supervised after a pretraining.

If the command was stopped, run it again: it continues.
"""
EXAMPLES = """
  pcrl_nnunet_compare -d 4 --dry_run                 show the work and its hours only
  pcrl_nnunet_compare -d 4                           default methods and numbers of labelled cases
  pcrl_nnunet_compare -d 4 -c 2d -methods pcrlv2 mae -labelled 10 20 -seeds 3
  pcrl_nnunet_compare -d 4 -np 4                     four trainings at a time
  pcrl_nnunet_compare -d 4 -methods all -hours 48    every method of pretraining, in two days
  pcrl_nnunet_compare -d 4 -methods mae -frozen      a cheap look first, without fine-tuning
"""


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("pcrl_nnunet_compare", DESCRIPTION, EXAMPLES)
    parser.add_argument("-d", required=True, metavar="DATASET", help=arguments.DATASET)
    parser.add_argument("-c", metavar="CONFIGURATION", help=arguments.CONFIGURATION)
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help=arguments.PLANS)
    parser.add_argument(
        "-labelled",
        nargs="+",
        metavar="NUMBER",
        default=["10%", "20%", "40%", "all"],
        help="numbers of labelled cases, or shares of the training cases (default: 10%% 20%% 40%% all)",
    )
    parser.add_argument(
        "-methods",
        nargs="+",
        metavar="NAME",
        help=f"methods to compare with training from scratch (default: stock, pseudo_labels and {DEFAULT}; for a "
        "classification, the shortcuts thumbnail, mean_intensity and position replace pseudo_labels). all stands for "
        "every method of pretraining. A wrong name lists all names",
    )
    parser.add_argument(
        "-own_methods", metavar="FILE.json", help='file with further methods: {"NAME": {"pretrain": {...}, ...}}'
    )
    parser.add_argument(
        "-settings",
        metavar="FILE.json",
        help='file with settings for all methods: {"pretrain": {...}, "finetune": {...}}',
    )
    parser.add_argument(
        "-task",
        choices=("segmentation", "classification"),
        help="default: segmentation, or classification if the dataset has no masks",
    )
    _add_how_to_compare(parser)
    return parser


def _add_how_to_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-seeds",
        type=int,
        default=5,
        metavar="N",
        help="subsets for each number of labelled cases (default: 5)",
    )
    parser.add_argument(
        "-protocol",
        choices=("all", "semi", "transfer"),
        default="all",
        help="cases for pretraining. all: all training cases (default); semi: the training cases without the "
        "labelled ones; transfer: none, because -checkpoint is used",
    )
    parser.add_argument("-checkpoint", metavar="FILE.pth", help="pretraining on other data, for -protocol transfer")
    parser.add_argument(
        "-patients", metavar="FILE.csv", help="table with the columns case and patient (default: one patient per case)"
    )
    parser.add_argument(
        "-scored", choices=("val", "test"), default="test", help="part of the split to score (default: test)"
    )
    parser.add_argument(
        "-hours",
        type=float,
        metavar="H",
        help="shorten all trainings alike, so that the comparison takes about H hours. The command measures a step of "
        "each kind first, and says which lengths it chose",
    )
    parser.add_argument("-device", help=arguments.DEVICE)
    parser.add_argument(
        "-np", type=int, default=1, metavar="N", help="number of trainings at a time, on the GPUs in turn (default: 1)"
    )
    parser.add_argument(
        "-o",
        metavar="FOLDER",
        help="folder for the results (default: nnUNet_results/pcrl_compare/DATASET__PLANS__CONFIGURATION)",
    )
    parser.add_argument(
        "-frozen",
        action="store_true",
        help="do not fine-tune: pretrain, train light heads on the frozen features of each method and of a random "
        "network, and test what the features tell. A later comparison in the same folder uses the pretrainings",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="do not train: print the work and measure how long it takes"
    )


def main() -> None:
    """Parse, check, run, report."""
    args = _parser().parse_args()
    _check(args)
    arguments.load("pcrl_nnunet.experiments.report", "pcrl_nnunet.trainers")
    from pcrl_nnunet.device import device_named
    from pcrl_nnunet.experiments.settings import read_blocks
    from pcrl_nnunet.progress import doing
    from pcrl_nnunet.settings import merged

    device = device_named(args.device)
    with doing("Checking the methods, and splitting the cases"):
        layout, runs = _layout(args, read_blocks(args.settings))
    if args.hours is not None:
        lengths = _lengths(args, layout, runs, device)
        print(lengths)
        layout, runs = _layout(args, merged(read_blocks(args.settings), lengths.settings))
    if never := layout.comparison.cases.never_trained_on:
        print(f"Nothing is trained on {', '.join(never)}: pcrl.semi.leave_out names them")
    for name, reason in layout.comparison.cases.left_out.items():
        print(f"Nothing is trained on the unlabelled case {name}: {reason}")
    if args.dry_run:
        _dry_run(layout, runs, device, args)
    elif args.frozen:
        _look_at_frozen(layout, runs, device, args.np)
    else:
        _compare(layout, runs, device, args.np)


def _check(args: argparse.Namespace) -> None:
    """Raise `UserError` for wrong arguments, before torch is imported."""
    from pcrl_nnunet.device import check_device_name
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.experiments.arm_names import check_arm_names, expanded
    from pcrl_nnunet.experiments.settings import check_protocol, read_blocks
    from pcrl_nnunet.experiments.split import check_number_labelled
    from pcrl_nnunet.plans import find_plan, refuse_cascade

    arguments.check_numbers(args, seeds=1, np=1)
    if args.hours is not None and not args.hours > 0:
        raise UserError(f"-hours is {args.hours:g}; expected a number of hours above 0")
    check_device_name(args.device)
    check_protocol(args.protocol, args.checkpoint)
    for text in args.labelled:
        check_number_labelled(text)
    _, plans, configuration, _ = find_plan(args.d, args.p, args.c)
    refuse_cascade(plans, configuration)
    check_arm_names(
        expanded(args.methods or [], []), read_blocks(args.own_methods), read_blocks(args.settings), plans, args.task
    )
    arguments.check_file("-patients", args.patients, "a table with the columns case and patient")
    arguments.check_file("-checkpoint", args.checkpoint, "a checkpoint_final.pth")


def _lengths(args: argparse.Namespace, layout: Any, runs: list[Any], device: Any) -> Any:
    """Return the lengths of the trainings that fit into ``-hours``: chosen before, or from measured steps."""
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.experiments import hours
    from pcrl_nnunet.experiments.arms import CONTROL
    from pcrl_nnunet.files import writing
    from pcrl_nnunet.pretraining.settings import pretrain_settings

    folder, comparison = layout.folder, layout.comparison
    chosen = hours.read(folder, args.hours, args.frozen)
    if chosen is not None:
        trained = [] if args.frozen else [run for run in runs if comparison.arms[run.arm].shortcut is None]
        number = len(trained) + len({layout.pretraining_plans_name(run) for run in runs if comparison.pretrains(run)})
        if number > chosen.number:
            print(
                f"WARNING: the lengths were chosen for {chosen.number} trainings; this command has up to {number} and "
                f"takes longer than {chosen.hours:g} hours"
            )
        return chosen
    if layout.has_begun():
        raise UserError(f"the comparison in {folder} was begun without -hours; leave -hours out, or give another -o")
    with tempfile.TemporaryDirectory() as preview:
        _prepare_preview(layout, runs, preview)
        work = _work(layout, runs, device, args.frozen, args.np)
    plan = comparison.plan
    default = pretrain_settings(comparison.plan_of(CONTROL), plan.configuration, plan.resolved).epochs
    tuned = comparison.finetune_settings(CONTROL).epochs
    found = hours.lengths_for(args.hours, work, args.np, default, tuned, args.frozen)
    if not args.dry_run:
        with writing(folder, "give another folder with -o"):
            os.makedirs(folder, exist_ok=True)
            hours.write(folder, found)
    return found


def _layout(args: argparse.Namespace, given: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return the layout of the comparison's folder, and the runs, with the settings for all methods."""
    from pcrl_nnunet.experiments.arm_names import expanded
    from pcrl_nnunet.experiments.arms import CONTROL, DEFAULTS, built_in_arms, choose_arms, methods_for
    from pcrl_nnunet.experiments.cases import read_patients
    from pcrl_nnunet.experiments.comparison import Comparison, find_label_table
    from pcrl_nnunet.experiments.layout import Layout
    from pcrl_nnunet.experiments.settings import read_blocks, with_settings
    from pcrl_nnunet.experiments.split import number_labelled
    from pcrl_nnunet.plans import PlanFacts, load_plan
    from pcrl_nnunet.pretraining.settings import pretrain_settings
    from pcrl_nnunet.semi_supervised.settings import SemiSettings

    plan = load_plan(args.d, args.p, args.c)
    # raises for a network that cannot be pretrained
    plans = with_settings(plan.plans, given)
    settings = pretrain_settings(plans, plan.configuration, plan.resolved)
    label_table = find_label_table(args.task, plan)
    folder = args.o or _default_folder(plan, label_table is not None)
    facts = PlanFacts.of(plan.configuration, plan.resolved)
    semi = SemiSettings.from_plan(plans)
    built_in = built_in_arms(facts, settings.method, settings.batch_size, label_table, semi)
    chosen = expanded(args.methods or [name for name in DEFAULTS if name in built_in], methods_for(facts))
    arms = choose_arms(chosen, read_blocks(args.own_methods), built_in)
    checkpoint = args.checkpoint and os.path.abspath(args.checkpoint)
    patients = read_patients(args.patients)
    comparison = Comparison.of_plan(
        plan, arms, patients, args.protocol, args.scored, given, checkpoint=checkpoint, label_table=label_table
    )
    numbers = sorted({number_labelled(text, len(comparison.cases.split.train)) for text in args.labelled})
    controls = {CONTROL, *(control for name in chosen for control in arms[name].controls)}
    compared = [name for name in arms if name in {*chosen, *controls}]
    if args.frozen:
        compared = _frozen_arms(chosen, comparison)
    runs, lacking = comparison.runs(compared, numbers, args.seeds)
    for run, reason in lacking.items():
        if run.seed == 0:
            print(f"{run.arm} with {run.labelled} labelled cases is left out: {reason}")
    return Layout(comparison, os.path.abspath(folder)), runs


def _frozen_arms(chosen: list[str], comparison: Any) -> list[str]:
    """Return the arms of -frozen. Raise `UserError` for arms or labels that it cannot take."""
    from pcrl_nnunet.experiments.frozen import frozen_methods, task_of

    arms, note = frozen_methods(chosen, comparison.arms, comparison.checkpoint)
    task_of(comparison)
    if note:
        print(note)
    return arms


def _default_folder(plan: Any, classifies: bool) -> str:
    from pcrl_nnunet.plans import folder_of

    name = f"{plan.plans['dataset_name']}__{plan.plans['plans_name']}__{plan.configuration}"
    return os.path.join(folder_of("nnUNet_results"), "pcrl_compare", f"{name}{'__classification' * classifies}")


def _dry_run(layout: Any, runs: list[Any], device: Any, args: argparse.Namespace) -> None:
    from pcrl_nnunet.experiments.jobs import jobs_of, overview, pretrainings_of
    from pcrl_nnunet.experiments.notes import note_on_stock

    with tempfile.TemporaryDirectory() as folder:
        _prepare_preview(layout, runs, folder)
        jobs = pretrainings_of(layout, runs, device) if args.frozen else jobs_of(layout, runs, device, args.np)
        print("\n".join(overview(layout, runs, jobs)))
        for line in _work(layout, runs, device, args.frozen, args.np).lines(device, args.np):
            print(line)
    if args.frozen:
        print("The light heads take additional time, minutes on small images.")
        return
    print("The evaluations take additional time.")
    if note := note_on_stock(layout.comparison):
        print(note)


def _prepare_preview(layout: Any, runs: list[Any], folder: str) -> None:
    from pcrl_nnunet.experiments.preparation import prepare, preview_in

    preview_in(layout, folder)
    prepare(layout, runs)


def _work(layout: Any, runs: list[Any], device: Any, frozen: bool, at_a_time: int) -> Any:
    """Measure a step of each kind of training that remains."""
    from pcrl_nnunet import trainers
    from pcrl_nnunet.experiments.forecast import measure
    from pcrl_nnunet.pretraining.dry_run import measured
    from pcrl_nnunet.pretraining.request import Request
    from pcrl_nnunet.trainers.pretrain import pretrain_trainer

    def step_of_pretraining(plan: Any, fold: int, device: Any) -> float:
        request = Request.of_plan(plan, fold)
        return measured(lambda: pretrain_trainer(request, device), device).seconds_a_step

    return measure(layout, runs, device, trainers, step_of_pretraining, frozen, at_a_time)


def _compare(layout: Any, runs: list[Any], device: Any, at_a_time: int) -> None:
    from pcrl_nnunet import registration
    from pcrl_nnunet.experiments.jobs import jobs_of, overview
    from pcrl_nnunet.experiments.preparation import prepare
    from pcrl_nnunet.experiments.processes import run_jobs
    from pcrl_nnunet.experiments.report import report
    from pcrl_nnunet.experiments.results import collect
    from pcrl_nnunet.experiments.shares import environments
    from pcrl_nnunet.files import writing
    from pcrl_nnunet.lock import locked
    from pcrl_nnunet.progress import doing

    with writing(layout.folder, "give another folder with -o"):
        os.makedirs(layout.folder, exist_ok=True)
    with locked(layout.folder, "pcrl_nnunet_compare"):
        prepare(layout, runs)
        jobs = jobs_of(layout, runs, device, at_a_time)
        print("\n".join(overview(layout, runs, jobs)))
        if not registration.is_registered():
            for line in registration.register():
                print(line)
        # the predictions of many candidates take gigabytes: collect them once, in the report
        after_each = (lambda: collect(layout, runs)) if layout.comparison.label_table is None else (lambda: None)
        failed = run_jobs(jobs, layout.folder, environments(layout.variables(), at_a_time), after_each)
        with doing("Scoring, and drawing figures"):
            lines = list(report(layout, runs))
        print("\n".join(lines))
    _refuse_failed(failed, layout.folder)


def _look_at_frozen(layout: Any, runs: list[Any], device: Any, at_a_time: int) -> None:
    from pcrl_nnunet.experiments.frozen import FrozenLook
    from pcrl_nnunet.experiments.frozen_report import report
    from pcrl_nnunet.experiments.jobs import overview, pretrainings_of
    from pcrl_nnunet.experiments.preparation import prepare
    from pcrl_nnunet.experiments.processes import run_jobs
    from pcrl_nnunet.experiments.shares import environments
    from pcrl_nnunet.files import writing
    from pcrl_nnunet.lock import locked

    with writing(layout.folder, "give another folder with -o"):
        os.makedirs(layout.folder, exist_ok=True)
    with locked(layout.folder, "pcrl_nnunet_compare"):
        prepare(layout, runs)
        jobs = pretrainings_of(layout, runs, device)
        print("\n".join(overview(layout, runs, jobs)))
        failed = run_jobs(jobs, layout.folder, environments(layout.variables(), at_a_time), lambda: None)
        frozen = FrozenLook(layout, runs)
        frozen.look(device)
        print("\n".join(report(frozen)))
    _refuse_failed(failed, layout.folder)


def _refuse_failed(failed: list[str], folder: str) -> None:
    """Raise `UserError` if steps failed."""
    from pcrl_nnunet.errors import UserError

    if failed:
        raise UserError(
            f"{len(failed)} steps failed ({', '.join(failed)}); look into their logs in {folder}/logs, and "
            f"run the same command again"
        )


def main_entry() -> None:
    """Run the console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
