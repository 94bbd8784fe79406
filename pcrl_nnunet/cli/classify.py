"""pcrl_nnunet_classify: classification of new images, or of points in them."""

from __future__ import annotations

import argparse
import os
from time import time
from typing import Any

DESCRIPTION = """Classify images, or points in them, by the trained folds of a PCRLClassificationTrainer;
several folds give the mean probability. Images have nnU-Net's names (CASE_0000.nii.gz). Writes a table: a line for each
image or point, a column p_NAME for each label or class."""
LISTED = 20  # images that were set aside, in one message


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pcrl_nnunet_classify", description=DESCRIPTION)
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset name or ID")
    parser.add_argument("-i", required=True, metavar="FOLDER", help="folder with the images")
    parser.add_argument("-o", required=True, metavar="FILE.csv", help="the table to write")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION", help="3d_fullres, 2d, ...")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    parser.add_argument("-tr", metavar="TRAINER", default="PCRLClassificationTrainer", help="default: %(default)s")
    parser.add_argument("-f", nargs="+", metavar="FOLD", default=["0", "1", "2", "3", "4"], help="default: 0 1 2 3 4")
    parser.add_argument(
        "-points",
        metavar="FILE.csv",
        help="for trainings on points: as candidates.csv; seriesuid is the image's name, class is not needed",
    )
    parser.add_argument("-device", help="cuda, cpu or mps (default: a GPU if present, else the CPU)")
    return parser


def main() -> None:
    """Parse, load, classify, write."""
    args = _parser().parse_args()
    import pandas as pd

    from pcrl_nnunet.classification.new_images import classify, find_images, load_folds
    from pcrl_nnunet.commands import train_command
    from pcrl_nnunet.device import device_named
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.files import whole, writing
    from pcrl_nnunet.ingest.scans import Target
    from pcrl_nnunet.plans import dataset_name_of, folder_of, read_json

    folder = os.path.join(folder_of("nnUNet_results"), dataset_name_of(args.d), f"{args.tr}__{args.p}__{args.c}")
    device = device_named(args.device)
    train = train_command(args.d, args.c, args.f[0], device.type, tr=args.tr, p=args.p)
    plans, dataset_json = (
        read_json(os.path.join(folder, name), f"train first: {train}") for name in ("plans.json", "dataset.json")
    )
    plan = Target(plans, dataset_json, args.c, takes_label_maps=True)
    scans, bad = find_images(args.i, plan.images)
    predictor, kind = load_folds(folder, args.f, plan, dataset_json, device)
    points = _points(args, kind, scans)
    _check_output(args.o)
    start = time()
    tables, num_outside = classify(scans, points, plan, predictor, kind, bad)
    seconds = time() - start
    if not tables:
        raise UserError(f"none of the {len(bad)} images could be classified; {_listed(bad)}")
    found = pd.concat(tables, ignore_index=True)
    with writing(args.o, "give another -o"), whole(args.o) as draft:
        found.to_csv(draft, index=False)
    if num_outside:
        print(f"WARNING: {num_outside} points lie outside of their image: they have to be mm of the world in LPS")
    speed = f"{len(tables) / seconds:.2f} images a second"
    if points is not None:
        speed += f", {len(found) / seconds:.1f} points a second"
    print(f"{args.o}: {len(found)} {'points' if points is not None else 'images'} in {seconds:.0f} s, {speed}")
    if bad:
        raise UserError(f"{len(bad)} images could not be classified and are not in {args.o}: {_listed(bad)}")


def _points(args: argparse.Namespace, kind: str, scans: dict[str, Any]) -> Any:
    """Read the points of -points. Trainings on points need them; other trainings refuse them."""
    from pcrl_nnunet.classification.label_table import read_points
    from pcrl_nnunet.errors import UserError

    if (kind == "candidates") != (args.points is not None):
        raise UserError(
            f"these trainings are of {'points' if kind == 'candidates' else 'whole images'}; "
            f"{'give the points with -points' if kind == 'candidates' else 'leave -points out'}"
        )
    if args.points is None:
        return None
    points = read_points(args.points, list(scans))
    elsewhere = sorted({str(name) for name in points[0]} - scans.keys())
    if elsewhere:
        print(f"Left out: the points of {len(elsewhere)} images that are not in {args.i}, such as {elsewhere[0]}")
    return points


def _check_output(path: str) -> None:
    """Raise `UserError` for a table that cannot be written, before the work begins."""
    from pcrl_nnunet.errors import UserError

    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(folder, os.W_OK) or os.path.isdir(path):
        raise UserError(f"-o is {path}, which cannot be written; give the name of a file in a folder that is there")


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
