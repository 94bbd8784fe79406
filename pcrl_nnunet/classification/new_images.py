"""Classification of raw images with the trained folds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from tqdm import tqdm

from pcrl_nnunet import checkpoint
from pcrl_nnunet.classification.label_table import CASE, COORDINATES, Kind, LabelTable
from pcrl_nnunet.classification.prediction import Predictor, write_scores
from pcrl_nnunet.classification.world import outside, to_voxels
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest.checks import short_reason
from pcrl_nnunet.ingest.find import left_over, misnumbered
from pcrl_nnunet.ingest.scans import ImageFormat, Scan, SetAside, Target
from pcrl_nnunet.ingest.unlabelled import preprocessed
from pcrl_nnunet.networks import Classifier
from pcrl_nnunet.networks.of_plan import network_of_plan
from pcrl_nnunet.progress import counted

Points = tuple[np.ndarray, np.ndarray]  # (N,) names of images, (N, 3) world mm


def find_images(folder: str, images: ImageFormat) -> tuple[dict[str, Scan], list[SetAside]]:
    """Return the scans by name, and the images that are set aside unread.

    Raises:
        UserError: no image has one of nnU-Net's names.
    """
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


def load_folds(
    folder: str, folds: Sequence[str], plan: Target, dataset_json: dict[str, Any], device: torch.device
) -> tuple[Predictor, Kind]:
    """Load the networks of trained folds.

    Args:
        folder: ``nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION``.

    Returns:
        The predictor, and the kind of table that trained the folds.

    Raises:
        UserError: a fold is not trained, or was trained differently from the first fold.
    """
    networks: list[Any] = []
    described: dict[str, Any] = {}
    for fold in folds:
        path = os.path.join(folder, f"fold_{fold}", checkpoint.FINAL)
        if not os.path.isfile(path):
            raise UserError(f"fold {fold} is not trained: there is no {path}; train it, or name trained folds with -f")
        content = checkpoint.read_any(path)
        if "pcrl_classification" not in content:
            raise UserError(f"checkpoint {path} is not of a classification; give the -tr of one")
        if described and content["pcrl_classification"] != described:
            raise UserError(
                f"checkpoint {path} was trained on other labels or sizes than fold {folds[0]}; train the folds alike, "
                f"or give fewer of them with -f"
            )
        described = content["pcrl_classification"]
        network, _ = network_of_plan(plan.plans, plan.configuration, dataset_json)
        classifier = Classifier(network, len(described["names"]))
        classifier.load_state_dict(content["network_weights"])
        networks.append(classifier.to(device).eval())
    names, exclusive, size = described["names"], described["exclusive"], described["size"]
    return Predictor(networks, names, exclusive, size, device), described["kind"]


def classify(
    scans: dict[str, Scan], points: Points | None, plan: Target, predictor: Predictor, kind: Kind, bad: list[SetAside]
) -> tuple[list[pd.DataFrame], int]:
    """Classify scan after scan, or the points in each scan. Add images that cannot be read to `bad`.

    Returns:
        A table for each image, and the number of points outside their image.
    """
    tables, num_outside = [], 0
    for name, scan in counted(scans.items(), len(scans), "images are done"):
        of_image = None if points is None else points[1][points[0] == name]
        if of_image is not None and not len(of_image):
            continue
        try:
            voxels = preprocessed(scan, plan)
        except Exception as error:  # one bad file must not stop the others
            bad.append(SetAside(scan.sources[0], short_reason(error)))
            continue
        for note in voxels.notes:
            tqdm.write(f"Note: {scan.sources[0]}: {note}.")
        centres, shape = None, voxels.data.shape[1:]
        if of_image is not None:
            centres = to_voxels(of_image, voxels.properties, shape, plan.plans["transpose_forward"])
            num_outside += int(outside(centres, shape).sum())
        found = predictor.of_volume(voxels.data, centres)
        table = pd.DataFrame({CASE[kind]: [name] * len(found)})
        if of_image is not None:
            table[list(COORDINATES)] = of_image
        table[list(predictor.columns)] = found
        tables.append(table)
    return tables, num_outside


def scored(found: pd.DataFrame, truth: LabelTable, prefix: str) -> tuple[pd.DataFrame, list[str]]:
    """Write AUROCs and ROC curves of classified images beside their table.

    Args:
        found: the table of `classify` for whole images.
        prefix: beginning of the paths, before ``_auroc.json`` and ``_roc.png``.

    Returns:
        The table with the truth in a column for each label, and sentences about the scores.
    """
    row_of = {str(name): i for i, name in enumerate(truth.case)}
    cases = found[CASE["classes"]]
    rows = [row_of.get(str(name), -1) for name in cases]
    value = np.concatenate([truth.value, np.full((1, len(truth.names)), np.nan)])[rows]  # -1: no label
    table = found.assign(**{name: value[:, i] for i, name in enumerate(truth.names)})
    known = np.flatnonzero(~np.isnan(value).all(1))
    lines = write_scores(table.iloc[known], truth, np.array(rows)[known], f"{prefix}_")
    if len(known) < len(table):
        lines.append(f"{len(table) - len(known)} images have no label and are not scored")
    if absent := len(row_of.keys() - set(map(str, cases))):
        lines.append(f"WARNING: {absent} images that -labels names were not classified, so they are not scored")
    return table, lines
