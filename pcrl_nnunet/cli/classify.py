"""pcrl_nnunet_classify: what trained classifications say of new images, or of points in them."""

from __future__ import annotations

import argparse
import os
from time import time
from typing import Any

DESCRIPTION = """Classify images, or points in them, with what nnUNetv2_train ... -tr PCRLClassificationTrainer has
trained; of several folds the mean probability. Images have nnU-Net's names (CASE_0000.nii.gz). Writes a table: a line
an image or a point, a column p_NAME a label or class."""
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

    from pcrl_nnunet.classification.targets import read_points
    from pcrl_nnunet.commands import command, device_option
    from pcrl_nnunet.device import device_named
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.files import whole
    from pcrl_nnunet.ingest.scans import Target
    from pcrl_nnunet.plans import dataset_name_of, read_json

    results = os.environ.get("nnUNet_results")
    if not results:
        raise UserError("the variable nnUNet_results is not set; set it to the folder where trainings are kept")
    folder = os.path.join(results, dataset_name_of(args.d), f"{args.tr}__{args.p}__{args.c}")
    device = device_named(args.device)
    train = command(
        "nnUNetv2_train", args.d, args.c, args.f[0], tr=args.tr, p=args.p, device=device_option(device.type)
    )
    train_first = f"train first: {train}"
    plans = read_json(os.path.join(folder, "plans.json"), train_first)
    dataset_json = read_json(os.path.join(folder, "dataset.json"), train_first)
    target = Target(plans, dataset_json, args.c, takes_label_maps=True)
    manager, configuration = target.plans_manager, target.configuration_manager
    images, bad = _images(args.i, target.images)
    predictor, kind = _predictor(folder, args.f, manager, configuration, dataset_json, device)
    if (kind == "candidates") != (args.points is not None):
        raise UserError(
            f"these trainings are of {'points' if kind == 'candidates' else 'whole images'}; "
            f"{'give the points with -points' if kind == 'candidates' else 'leave -points out'}"
        )
    points = None if args.points is None else read_points(args.points, list(images))
    if points is not None:
        elsewhere = sorted({str(name) for name in points[0]} - images.keys())
        if elsewhere:
            print(f"Left out: the points of {len(elsewhere)} images that are not in {args.i}, such as {elsewhere[0]}")
    _check_output(args.o)
    start = time()
    tables, num_outside = _classified(images, points, target, predictor, kind, bad)
    seconds = time() - start
    if not tables:
        raise UserError(f"none of the {len(bad)} images could be classified; {_said(bad)}")
    found = pd.concat(tables, ignore_index=True)
    try:
        with whole(args.o) as draft:
            found.to_csv(draft, index=False)
    except OSError as error:
        raise UserError(f"{args.o} cannot be written ({error.strerror}); give another -o") from error
    if num_outside:
        print(f"WARNING: {num_outside} points lie outside of their image: they have to be mm of the world in LPS")
    speed = f"{len(tables) / seconds:.2f} images a second"
    if points is not None:
        speed += f", {len(found) / seconds:.1f} points a second"
    print(f"{args.o}: {len(found)} {'points' if points is not None else 'images'} in {seconds:.0f} s, {speed}")
    if bad:
        raise UserError(f"{len(bad)} images could not be classified and are not in {args.o}: {_said(bad)}")


def _classified(
    images: dict[str, Any], points: Any, target: Any, predictor: Any, kind: Any, bad: list[Any]
) -> tuple[list[Any], int]:
    """Classify image after image; what cannot be read is added to `bad`.

    Args:
        points: names of images and (N, axes) mm, or None for whole images.

    Returns:
        a table an image, and the number of points outside of their image.
    """
    import pandas as pd
    from tqdm import tqdm

    from pcrl_nnunet.classification.targets import CASE, COORDINATES, outside, to_voxels
    from pcrl_nnunet.ingest.checks import short_reason
    from pcrl_nnunet.ingest.scans import SetAside
    from pcrl_nnunet.ingest.unlabelled import preprocessed

    tables, num_outside = [], 0
    for name, scan in tqdm(images.items(), unit="image", disable=None):
        of_image = None if points is None else points[1][points[0] == name]
        if of_image is not None and not len(of_image):
            continue
        try:
            voxels = preprocessed(scan, target)
        except Exception as error:  # whatever a file makes nnU-Net do, the others go on
            bad.append(SetAside(scan.sources[0], short_reason(error)))
            continue
        for note in voxels.notes:
            tqdm.write(f"Note: {scan.sources[0]}: {note}.")
        centres, shape = None, voxels.data.shape[1:]
        if of_image is not None:
            centres = to_voxels(of_image, voxels.properties, shape, target.plans["transpose_forward"])
            num_outside += int(outside(centres, shape).sum())
        found = predictor.of_volume(voxels.data, centres)
        table = pd.DataFrame({CASE[kind]: [name] * len(found)})
        if of_image is not None:
            table[list(COORDINATES)] = of_image
        table[list(predictor.columns)] = found
        tables.append(table)
    return tables, num_outside


def _said(bad: list[Any]) -> str:
    """Name the images that were set aside, and why; not more than fit on a screen."""
    listed = "; ".join(f"{s.where}: {s.reason}" for s in bad[:LISTED])
    return listed + (f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else "")


def _check_output(path: str) -> None:
    """Raises `UserError` for a table that could not be written, before the work is done."""
    from pcrl_nnunet.errors import UserError

    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(folder, os.W_OK) or os.path.isdir(path):
        raise UserError(f"-o is {path}, which cannot be written; give the name of a file in a folder that is there")


def _images(folder: str, images: Any) -> tuple[dict[str, Any], list[Any]]:
    """Find the scans by name, and the images that are set aside unread.

    Raises:
        UserError: no image has one of nnU-Net's names.
    """
    from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.ingest.find import left_over, misnumbered
    from pcrl_nnunet.ingest.scans import Scan, SetAside

    if not os.path.isdir(folder):
        raise UserError(f"-i is {folder}, which is not a folder; give the folder with the images")
    ending, bad, scans = images.file_ending, left_over(folder, images.file_ending), {}
    for files in filter(None, create_lists_from_splitted_dataset_folder(folder, ending)):
        scan = Scan(os.path.basename(files[0])[: -len(ending) - len("_0000")], tuple(files), "plan")
        if reason := misnumbered(scan, images):
            bad.append(SetAside(files[0], reason))
        else:
            scans[scan.name] = scan
    if not scans:
        found = f"{len(bad)} are there, the first is {bad[0].where}: {bad[0].reason}" if bad else "there is none"
        raise UserError(f"no image in {folder} is named CASE_0000{ending}, as nnU-Net names images; {found}")
    return scans, bad


def _predictor(
    folder: str, folds: list[str], manager: Any, configuration: Any, dataset_json: dict[str, Any], device: Any
) -> tuple[Any, Any]:
    """The folds' networks, and what they are trained on: classes or candidates."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

    from pcrl_nnunet import checkpoint
    from pcrl_nnunet.classification.prediction import Predictor
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.networks import Classifier

    networks: list[Any] = []
    described: dict[str, Any] = {}
    for fold in folds:
        path = os.path.join(folder, f"fold_{fold}", checkpoint.FINAL)
        if not os.path.isfile(path):
            raise UserError(f"fold {fold} is not trained: there is no {path}; train it, or name those that are with -f")
        content = checkpoint.read_any(path)
        if "pcrl_classification" not in content:
            raise UserError(f"checkpoint {path} is not of a classification; give the -tr of one")
        if described and content["pcrl_classification"] != described:
            raise UserError(
                f"checkpoint {path} was trained on other labels or sizes than that of fold {folds[0]}; train the folds "
                f"alike, or give fewer of them with -f"
            )
        described = content["pcrl_classification"]
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            determine_num_input_channels(manager, configuration, dataset_json),
            manager.get_label_manager(dataset_json).num_segmentation_heads,
            deep_supervision=False,
        )
        classifier = Classifier(network, len(described["names"]))
        classifier.load_state_dict(content["network_weights"])
        networks.append(classifier.to(device).eval())
    names, exclusive, size = described["names"], described["exclusive"], described["size"]
    return Predictor(networks, names, exclusive, size, device), described["kind"]


def main_entry() -> None:
    """The console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
