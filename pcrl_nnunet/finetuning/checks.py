"""Checks before a training makes its output folder. Without them nnU-Net may crash or train something else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet import output_folder, weights_and_biases
from pcrl_nnunet.classification.label_table import FILES
from pcrl_nnunet.commands import train_command
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest.maskless import is_without_masks, trainer_for
from pcrl_nnunet.loading.cases import find_cases
from pcrl_nnunet.loading.splits import SPLITS, Part, fold_of, refuse_unwritable
from pcrl_nnunet.named_plans import refuse_outdated
from pcrl_nnunet.plans import check_configuration, folder_of


def check_surroundings(plan: Mapping[str, Any], configuration: str, device: torch.device) -> None:
    """Raise `UserError` if folders, configuration, device or preprocessed cases are missing."""
    folder_of("nnUNet_results")
    check_configuration(plan, configuration)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU was found, and nnU-Net trains on one by default; add -device cpu to train without")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("-device mps was asked for, but torch finds none; add -device cpu to train without")
    identifier = PlansManager(dict(plan)).get_configuration(configuration).data_identifier
    folder = os.path.join(nnUNet_preprocessed, plan["dataset_name"])
    find_cases(os.path.join(folder, identifier))  # raises if the folder has no cases
    refuse_outdated(plan, configuration, folder)
    weights_and_biases.check()


def refuse_without_masks(
    plan: Mapping[str, Any],
    configuration: str,
    fold: int | str,
    dataset_json: Mapping[str, Any],
    device: torch.device,
    classifies: str,
) -> None:
    """Raise `UserError` for the segmentation of a dataset whose only label is our computed foreground.

    Args:
        classifies: name of the trainer that classifies such a dataset.
    """
    name = plan["dataset_name"]
    if not is_without_masks(name, dataset_json):
        return
    remedy = (
        f"for a classification put a {' or '.join(FILES.values())} into {name} in nnUNet_raw, or bring its "
        f"pretraining into a dataset with masks by pcrl_nnunet_transfer"
    )
    if trainer_for(plan, dataset_json) is not None:
        train = train_command(name, configuration, fold, device.type, tr=classifies, p=plan["plans_name"])
        remedy = f"to classify: {train}"
    raise UserError(f"{name} has no masks, so that a segmentation has nothing to learn; {remedy}")


def check_fold(trainer: type[nnUNetTrainer], plan: Mapping[str, Any], configuration: str, fold: int) -> None:
    """Raise `UserError` for a fold that the split lacks, an empty part of the fold, or missing cases of a fold.

    A finished training may lack its training cases: its validation needs only the validation cases.
    """
    folder = os.path.join(nnUNet_preprocessed, plan["dataset_name"])
    output = output_folder.path_of(trainer.__name__, plan["dataset_name"], plan["plans_name"], configuration, fold)
    finished = os.path.isfile(os.path.join(output, checkpoint_file.FINAL))
    identifier = PlansManager(dict(plan)).get_configuration(configuration).data_identifier
    names = [case.name for case in find_cases(os.path.join(folder, identifier))]
    parts: tuple[Part, ...] = ("val",) if finished else ("train", "val")
    found = fold_of(folder, fold, names, parts)
    for part in parts:
        if not getattr(found, part):
            kind = {"train": "training", "val": "validation"}[part]
            raise UserError(
                f"fold {fold} of {SPLITS} has no {kind} case, and nnU-Net's training loads some in each epoch; put one "
                f"or more into '{part}', or train on all cases with the fold all"
            )
    refuse_unwritable(folder)


def refuse_gap_in_labels(plan: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> None:
    """Raise `UserError` if a label's number is left out: nnU-Net's loss would fail with an index out of bounds.

    Regions may leave out numbers.
    """
    labels = dataset_json["labels"]
    values = [value if isinstance(value, (list, tuple)) else [value] for value in labels.values()]
    if any(len(value) > 1 for value in values):
        return
    numbers = sorted({int(number) for value in values for number in value})
    last = labels.get("ignore", numbers[-1])  # nnU-Net's name of the ignore label
    if last != numbers[-1] or numbers != [*range(len(numbers))]:
        raise UserError(
            f"the labels of {plan['dataset_name']} are {', '.join(map(str, numbers))}; nnU-Net needs 0, 1, 2 and so "
            f"on, without a gap and with the ignore label last: change them in dataset.json and in the masks, and run "
            f"nnUNetv2_plan_and_preprocess again"
        )
