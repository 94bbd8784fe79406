"""pcrl_nnunet_classify: classification of new images, or of points in them."""

from __future__ import annotations

import argparse
import os
from time import time
from typing import Any

from pcrl_nnunet.cli import arguments

DESCRIPTION = """
Classify images, or points in images, by trained folds.

PCRLClassificationTrainer trains the folds. The probability is the mean over
the folds. Images have nnU-Net's names, such as CASE_0000.nii.gz. The command
writes a table with a line for each image or point, and a column p_NAME for
each label or class. With -labels, it also writes the AUROCs with their
intervals, and the ROC curves.
"""
EXAMPLES = """
  pcrl_nnunet_classify -d 60 -c 2d -i images -o predictions.csv
  pcrl_nnunet_classify -d 61 -c 2d -f 0 -i imagesTs -labels classesTs.csv -o test.csv
  pcrl_nnunet_classify -d 50 -c 3d_fullres -f 0 -i images -points points.csv -o predictions.csv
"""
LISTED = 20  # images that were set aside, in one message


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("pcrl_nnunet_classify", DESCRIPTION, EXAMPLES)
    parser.add_argument("-d", required=True, metavar="DATASET", help=arguments.DATASET)
    parser.add_argument("-i", required=True, metavar="FOLDER", help="folder with the images")
    parser.add_argument("-o", required=True, metavar="FILE.csv", help="table to write")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="configuration, such as 3d_fullres or 2d")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help=arguments.PLANS)
    parser.add_argument(
        "-tr",
        metavar="TRAINER",
        default="PCRLClassificationTrainer",
        help="class that trained the folds (default: %(default)s)",
    )
    parser.add_argument(
        "-f", nargs="+", metavar="FOLD", default=["0", "1", "2", "3", "4"], help="trained folds (default: 0 1 2 3 4)"
    )
    parser.add_argument(
        "-points",
        metavar="FILE.csv",
        help="points to classify, if the folds were trained on points. The columns are those of candidates.csv without "
        "class; seriesuid is the name of the image",
    )
    parser.add_argument(
        "-labels",
        metavar="FILE.csv",
        help="table with the true labels of whole images, in the format of classes.csv. The AUROCs go into "
        "NAME_auroc.json beside -o NAME.csv, with intervals over patients if the table has the column patient",
    )
    parser.add_argument("-device", help=arguments.DEVICE)
    return parser


def main() -> None:
    """Parse, check, load, classify, write."""
    args = _parser().parse_args()
    folder, plans, dataset_json = _check(args)
    arguments.load("pcrl_nnunet.classification.new_images")
    import pandas as pd

    from pcrl_nnunet.classification.new_images import classify, find_images, load_folds, scored
    from pcrl_nnunet.device import device_named
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.files import whole, writing
    from pcrl_nnunet.ingest.scans import Target

    device = device_named(args.device)
    plan = Target(plans, dataset_json, args.c, takes_label_maps=True)
    scans, bad = find_images(args.i, plan.images)
    predictor, kind = load_folds(folder, args.f, plan, dataset_json, device)
    points = _points(args, kind, scans)
    truth = _truth(args, kind, predictor, scans)
    start = time()
    tables, num_outside = classify(scans, points, plan, predictor, kind, bad)
    seconds = time() - start
    if not tables:
        raise UserError(f"none of the {len(bad)} images could be classified; {_listed(bad)}")
    found = pd.concat(tables, ignore_index=True)
    lines: list[str] = []
    with writing(args.o, "give another -o"):
        if truth is not None:
            found, lines = scored(found, truth, os.path.splitext(args.o)[0])
        with whole(args.o) as draft:
            found.to_csv(draft, index=False)
    if num_outside:
        print(f"WARNING: {num_outside} points lie outside their image: give points in world coordinates, mm, LPS")
    speed = f"{len(tables) / seconds:.2f} images a second"
    if points is not None:
        speed += f", {len(found) / seconds:.1f} points a second"
    print(f"{args.o}: {len(found)} {'points' if points is not None else 'images'} in {seconds:.0f} s, {speed}")
    for line in lines:
        print(line)
    if bad:
        raise UserError(f"{len(bad)} images could not be classified and are not in {args.o}: {_listed(bad)}")


def _check(args: argparse.Namespace) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Check the arguments before torch is imported. Return the trainings' folder, the plan and dataset.json."""
    from pcrl_nnunet.commands import train_command
    from pcrl_nnunet.device import check_device_name
    from pcrl_nnunet.plans import check_configuration, dataset_name_of, folder_of, read_json

    check_device_name(args.device)
    folder = os.path.join(folder_of("nnUNet_results"), dataset_name_of(args.d), f"{args.tr}__{args.p}__{args.c}")
    train = train_command(args.d, args.c, args.f[0], args.device or "cuda", tr=args.tr, p=args.p)
    plans, dataset_json = (
        read_json(os.path.join(folder, name), f"train first: {train}") for name in ("plans.json", "dataset.json")
    )
    check_configuration(plans, args.c)
    arguments.check_folder("-i", args.i, "images")
    arguments.check_file("-points", args.points, "a table of points")
    arguments.check_file("-labels", args.labels, "a table of labels such as classes.csv")
    _check_output(args.o)
    return folder, plans, dataset_json


def _points(args: argparse.Namespace, kind: str, scans: dict[str, Any]) -> Any:
    """Read the points of -points. Trainings on points need them; other trainings refuse them."""
    from pcrl_nnunet.classification.label_table import read_points
    from pcrl_nnunet.errors import UserError

    if (kind == "candidates") != (args.points is not None):
        raise UserError(
            f"these folds were trained on {'points' if kind == 'candidates' else 'whole images'}; "
            f"{'give the points with -points' if kind == 'candidates' else 'leave -points out'}"
        )
    if args.points is None:
        return None
    points = read_points(args.points, list(scans))
    elsewhere = sorted({str(name) for name in points[0]} - scans.keys())
    if elsewhere:
        print(f"Left out: the points of {len(elsewhere)} images that are not in {args.i}, such as {elsewhere[0]}")
    return points


def _truth(args: argparse.Namespace, kind: str, predictor: Any, scans: dict[str, Any]) -> Any:
    """Read the table of -labels. Trainings on points refuse it."""
    from pcrl_nnunet.classification.label_table import read_truth
    from pcrl_nnunet.errors import UserError

    if args.labels is None:
        return None
    if kind == "candidates":
        raise UserError("these folds were trained on points, and -labels has labels of whole images; leave -labels out")
    return read_truth(args.labels, predictor.names, predictor.exclusive, scans)


def _check_output(path: str) -> None:
    """Raise `UserError` for a table that cannot be written, before the work begins."""
    from pcrl_nnunet.errors import UserError

    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(folder, os.W_OK) or os.path.isdir(path):
        raise UserError(f"-o is {path}, which cannot be written; give the name of a file in an existing folder")


def _listed(bad: list[Any]) -> str:
    """Name the images that were set aside, with reasons, up to a screenful."""
    listed = "; ".join(f"{s.where}: {s.reason}" for s in bad[:LISTED])
    return listed + (f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else "")


def main_entry() -> None:
    """Run the console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
