"""pcrl_nnunet_preprocess: preprocessing of unlabelled scans with a dataset's plan, for pretraining."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from pcrl_nnunet.cli import arguments

DESCRIPTION = """
Preprocess scans without labels, for pcrl_nnunet_pretrain.

The command takes all NIfTI, MHA, NRRD, GIPL and DICOM scans in FOLDER and in
the folders below it. Their names do not matter, unless they have several
channels: then use nnU-Net's names, such as CASE_0000.nii.gz. First run
nnUNetv2_plan_and_preprocess on the dataset, because the scans are
preprocessed by its plan. nnU-Net's own training does not use them.

Run the command again after a stop, or after you have added scans.

Two other uses:
  - With -target, the images of the dataset itself become pretraining data for
    the network of another dataset.
  - Without -i, the command plans and preprocesses a dataset without masks.
"""
EXAMPLES = """
  pcrl_nnunet_preprocess -d 4 -i scans          add all scans in the folder
  pcrl_nnunet_preprocess -d 16 -target 42       prepare dataset 16 to pretrain for 42
  pcrl_nnunet_preprocess -d 60                  plan a dataset without masks
"""
LISTED = 20  # listed scans that were set aside; the file lists all
PLANNERS = ("PCRLPlanner", "PCRLPlannerResEncL", "PCRLPlannerResEncM", "PCRLPlannerResEncXL")


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("pcrl_nnunet_preprocess", DESCRIPTION, EXAMPLES)
    parser.add_argument("-d", required=True, metavar="DATASET", help=arguments.DATASET)
    parser.add_argument("-i", metavar="FOLDER", help="folder with the scans")
    parser.add_argument(
        "-c",
        nargs="+",
        metavar="CONFIGURATION",
        help="configurations of the plan (default: 3d_fullres, or the plan's only one)",
    )
    parser.add_argument(
        "-p",
        metavar="PLANS",
        help="name of the plan (default: nnUNetPlans, or the plan that -pl writes). With -target, a plan of that "
        "dataset",
    )
    parser.add_argument(
        "-np", type=int, metavar="N", help="number of processes, each with one scan in memory (default: at most 8)"
    )
    parser.add_argument(
        "-pl",
        metavar="PLANNER",
        help="first plan the dataset with this planner of ours, such as PCRLPlanner. Use this if pcrl_nnunet_register "
        "may not write into nnU-Net's folder. -i is optional then",
    )
    parser.add_argument(
        "-target",
        metavar="DATASET",
        help="preprocess the images of -d for a network of this dataset, with spacing, patch and network of its plan. "
        "-i is optional then",
    )
    parser.add_argument(
        "-normalization",
        choices=("source", "target"),
        help="dataset whose normalisation and intensity statistics -target uses: source is -d (default), target is "
        "-target. The target's statistics can clip other images to constants, such as CT of another organ",
    )
    parser.add_argument(
        "--label_maps_are_scans",
        action="store_true",
        help="use images that look like label maps, with few values in flat regions, as scans",
    )
    return parser


def main() -> None:
    """Parse, check, plan if requested, preprocess, report."""
    args = _parser().parse_args()
    _check(args)
    if args.i is None and args.pl is None and args.target is None:
        _without_masks(args.d, args.p, args.c or [], _num_processes(args.np))
        return
    arguments.load("pcrl_nnunet.ingest.unlabelled", "pcrl_nnunet.ingest.target")
    num, plans_name, configurations = _num_processes(args.np), args.p or "nnUNetPlans", args.c or [None]
    if args.target is not None:
        name = _plan_for(args.d, args.target, plans_name, configurations[0], args.normalization or "source")
        _preprocess(args.d, args.i, configurations, name, num, args.label_maps_are_scans, own=True)
        _say_next({"d": args.d, "target": args.target, "p": _unless_default(plans_name)}, args.c)
        return
    if args.pl is not None:
        planned = _plan(args.d, args.pl)
        plans_name = args.p or planned
    if args.i is not None:
        _preprocess(args.d, args.i, configurations, plans_name, num, args.label_maps_are_scans)
        _say_next({"d": args.d, "p": _unless_default(plans_name)}, args.c)


def _check(args: argparse.Namespace) -> None:
    """Raise `UserError` for wrong arguments, before torch is imported."""
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.plans import dataset_folder, find_plan

    arguments.check_numbers(args, np=1)
    if args.normalization is not None and args.target is None:
        raise UserError("-normalization needs -target: without it the plan decides; leave -normalization out")
    if args.pl is not None and args.target is not None:
        raise UserError(f"-pl and -target exclude each other; run -d {args.target} -pl first")
    if args.pl is not None and args.pl not in PLANNERS:
        raise UserError(
            f"-pl is '{args.pl}'; expected {', '.join(PLANNERS)} (nnU-Net's own planners, of datasets with masks: "
            f"nnUNetv2_plan_experiment)"
        )
    if args.i is not None:
        arguments.check_folder("-i", args.i, "scans")
    plans_name, configurations = args.p or "nnUNetPlans", args.c or [None]
    if args.target is not None:
        folder = dataset_folder(args.d, "nnUNetv2_extract_fingerprint")
        if os.path.samefile(folder, dataset_folder(args.target)):
            raise UserError(
                f"-target {args.target} is the dataset of -d itself, which pretrains for itself without -target"
            )
        find_plan(args.target, plans_name, configurations[0])
    elif args.pl is not None:
        dataset_folder(args.d)
    elif args.i is not None:
        for configuration in configurations:
            find_plan(args.d, plans_name, configuration)


def _without_masks(dataset: str, plans_name: str | None, configurations: list[str], num: int) -> None:
    """Plan and preprocess a dataset without labelsTr. If a plan is named, only preprocess with it."""
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.plans import dataset_name_of, find_plan, has_masks, planning_command, read_json

    missing = f"-i is missing; give the folder with the scans: pcrl_nnunet_preprocess -d {dataset} -i FOLDER"
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        if not os.environ.get(variable):
            raise UserError(f"{missing} (or set {variable}, if the dataset itself has no masks)")
    name = dataset_name_of(dataset)
    raw = os.path.join(os.environ["nnUNet_raw"], name)
    described = read_json(os.path.join(raw, "dataset.json"), "describe the dataset as nnU-Net wants it")
    if has_masks(raw, described):
        raise UserError(f"{missing} ({name} has masks: plan it with {planning_command(name)})")
    if plans_name is not None:
        _, _, configuration, _ = find_plan(dataset, plans_name, configurations[0] if configurations else None)
        configurations = configurations or [configuration]
    arguments.load("pcrl_nnunet.ingest.maskless", "pcrl_nnunet.ingest.workers")
    from tqdm import tqdm

    from pcrl_nnunet.ingest.maskless import plan_and_preprocess
    from pcrl_nnunet.ingest.workers import worker_pool

    print(f"{name} has no masks: the foreground is found from the images, {num} at a time")
    with worker_pool(num) as pool:
        bad = plan_and_preprocess(
            raw,
            os.environ["nnUNet_preprocessed"],
            plans_name,
            configurations,
            num,
            pool,
            lambda line: tqdm.write(line, sys.stderr),
        )
    _list_set_aside(bad)
    print(f"\n{name} is {'' if plans_name else 'planned and '}preprocessed, {len(bad)} bad images were left out.")
    _say_next_without_masks(dataset, raw, plans_name or "nnUNetPlans", configurations)


def _say_next_without_masks(dataset: str, raw: str, plan: str, configurations: list[str]) -> None:
    import torch

    from pcrl_nnunet.commands import command, train_command
    from pcrl_nnunet.ingest.maskless import trainer_for
    from pcrl_nnunet.plans import load_plan

    print(f"Next: {command('pcrl_nnunet_pretrain', d=dataset, p=_unless_default(plan))}")
    planned = load_plan(dataset, plan, configurations[0] if configurations else None)
    if trainer := trainer_for(planned.plans, planned.dataset_json):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        train = train_command(dataset, planned.configuration, 0, device, tr=trainer, p=plan)
        print(f"Then, and the other folds alike: {train}")
    else:
        print(f"To classify, put a classes.csv or candidates.csv into {raw}.")
        print("The page docs/classification.md says what is in them.")


def _plan(dataset: str, planner_name: str) -> str:
    """Plan a dataset with one of our planners, and return the plan's name."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

    import pcrl_nnunet.planners as planners
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.files import writing
    from pcrl_nnunet.ingest.maskless import planned_again
    from pcrl_nnunet.plans import dataset_folder, has_masks, planning_command, read_json

    folder = dataset_folder(dataset)
    raw = _raw_folder(folder)
    if not os.path.isdir(raw):
        raise UserError("planning needs the dataset's raw images; set nnUNet_raw to the folder that has them")
    with_masks = has_masks(
        raw, read_json(os.path.join(raw, "dataset.json"), "describe the dataset as nnU-Net wants it")
    )
    if not os.path.isfile(os.path.join(folder, "dataset_fingerprint.json")):
        before = planning_command(os.path.basename(folder), "nnUNetv2_extract_fingerprint")
        raise UserError(f"{folder} has no dataset_fingerprint.json; run {before} first")
    planning = nullcontext() if with_masks else planned_again(raw, folder)
    with writing(folder, "make that folder writable"), planning:
        _, name = plan_experiment_dataset(os.path.basename(folder), getattr(planners, planner_name))
    print(f"Wrote the plan {os.path.join(folder, name)}.json; use it with -p {name}")
    return str(name)


def _plan_for(dataset: str, target: str, plans_name: str, configuration: str | None, normalization: Any) -> str:
    """Make the plan with which a dataset pretrains for another, unless it exists. Return its name."""
    from pcrl_nnunet.ingest.target import plan_for, read_source, write_plan
    from pcrl_nnunet.plans import dataset_folder, load_plan

    folder = dataset_folder(dataset, "nnUNetv2_extract_fingerprint")
    planned = load_plan(target, plans_name, configuration)
    source = read_source(folder, _raw_folder(folder))
    plan, notes = plan_for(source, planned.plans, normalization)
    name = str(plan["plans_name"])
    if write_plan(folder, plan, source):
        print(f"Wrote the plan {os.path.join(folder, name)}.json")
        print(f"  spacing, patch and network: {plans_name} of {planned.plans['dataset_name']}")
        print(f"  channels: {source.dataset_name}")
        print(f"  normalisation: {source.dataset_name if normalization == 'source' else planned.plans['dataset_name']}")
        for note in notes:
            print(f"  Note: {note}")
    return name


def _raw_folder(preprocessed_dataset_folder: str) -> str:
    return os.path.join(os.environ.get("nnUNet_raw", ""), os.path.basename(preprocessed_dataset_folder))


def _num_processes(asked: int | None) -> int:
    from nnunetv2.configuration import default_num_processes

    return asked or min(default_num_processes, os.cpu_count() or 1)


def _preprocess(
    dataset: str,
    scan_folder: str | None,
    configurations: list[str | None],
    plans_name: str,
    num: int,
    label_maps_are_scans: bool,
    own: bool = False,
) -> None:
    """Preprocess the scans in a folder, and the dataset's own images if requested."""
    from tqdm import tqdm

    from pcrl_nnunet.ingest.find import find_scans, make_target, own_scans
    from pcrl_nnunet.ingest.scans import Found
    from pcrl_nnunet.ingest.unlabelled import preprocess, unlabelled_folder
    from pcrl_nnunet.ingest.workers import worker_pool
    from pcrl_nnunet.plans import load_plan
    from pcrl_nnunet.progress import doing

    plans = [load_plan(dataset, plans_name, configuration) for configuration in configurations]
    # By folder, because two configurations may share their data, such as a cascade and 3d_fullres.
    targets = {
        unlabelled_folder(p.folder, p.resolved["data_identifier"]): replace(
            make_target(p, _raw_folder(p.folder)), takes_label_maps=label_maps_are_scans
        )
        for p in plans
    }
    target = next(iter(targets.values()))
    if not target.own_images:
        print("The dataset's raw images were not found (is nnUNet_raw set?): copies of them will not be recognised.")
    bar = sys.stderr.isatty()
    with worker_pool(num) as pool:
        found = Found()
        if scan_folder is not None:
            with doing(f"Looking through {scan_folder}"):
                # headers take a millisecond each
                found = find_scans(scan_folder, target, partial(pool.map, chunksize=64))
            _describe(found, scan_folder, target)
        if own:
            own_images = own_scans(_raw_folder(plans[0].folder), plans[0].dataset_json)
            print(f"{len(own_images)} images of {os.path.basename(plans[0].folder)} itself")
            found.scans += own_images
        for folder, target in targets.items():
            print(f"\n{target.configuration}: into {folder}, {num} at a time")
            try:
                summary = preprocess(found, target, folder, pool, lambda line: tqdm.write(line, sys.stderr), bar)
            except KeyboardInterrupt:
                print("\nStopped. Finished scans are kept; the same command goes on from here.", file=sys.stderr)
                raise
            _report(summary, folder)


def _unless_default(plans_name: str) -> str | None:
    return None if plans_name == "nnUNetPlans" else plans_name


def _say_next(options: dict[str, Any], configurations: list[str] | None) -> None:
    from pcrl_nnunet.commands import command

    chosen: list[str | None] = [*configurations] if configurations else [None]
    for configuration in chosen:
        print(f"\nPretraining will use them: {command('pcrl_nnunet_pretrain', **options, c=configuration)}")


def _describe(found: Any, folder: str, target: Any) -> None:
    """Print the findings, and hints at likely mistakes."""
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.ingest.scans import VOLUME_ENDINGS

    kinds: Counter[str] = Counter()
    for scan in found.scans:
        ending = max((e for e in VOLUME_ENDINGS if scan.files[0].lower().endswith(e)), key=len, default="")
        kinds["DICOM series" if scan.how == "dicom" else ending or os.path.splitext(scan.files[0])[1].lower()] += 1
    others = ", ".join(f"{n} {ending}" for ending, n in found.ignored.most_common(8))
    if not found.scans and not found.set_aside:
        raise UserError(
            f"no scan in {folder}, {f'only {others}' if others else 'which is empty'}; give a folder with "
            f"{target.images.wanted}"
        )
    listed = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))
    print(f"  {len(found.scans)} scans: {listed or 'none'}")
    if others:
        print(f"  {sum(found.ignored.values())} files are no scans: {others}")
    _list_set_aside(found.set_aside)
    if target.orientation and any(scan.how != "plan" for scan in found.scans):
        print(
            f"  all but {target.images.file_ending} files are turned to {target.orientation}, like most images of the "
            f"dataset"
        )
    _list_notes(found.notes)


def _report(summary: Any, folder: str) -> None:
    from pcrl_nnunet.ingest.unlabelled import BAD_LIST

    skipped = len(summary.set_aside) - len(summary.bad)
    print(f"{summary.made} made, {summary.already} there already, {skipped} skipped, {len(summary.bad)} bad")
    _list_set_aside(summary.set_aside)
    _list_notes(summary.notes)
    if summary.set_aside:
        print(f"  (listed in {os.path.join(folder, BAD_LIST)})")


def _list_notes(notes: list[str]) -> None:
    for note in notes[:LISTED]:
        print(f"  Note: {note}.")
    if len(notes) > LISTED:
        print(f"  ... and {len(notes) - LISTED} more notes, in cases.json")


def _list_set_aside(set_aside: list[Any]) -> None:
    """Print the scans that were set aside, bad scans first, up to a screenful."""
    for s in sorted(set_aside, key=lambda s: not s.bad)[:LISTED]:
        print(f"  {'bad' if s.bad else 'skipped'}: {s.where}: {s.reason}")
    if len(set_aside) > LISTED:
        print(f"  ... and {len(set_aside) - LISTED} more")


def main_entry() -> None:
    """Run the console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
