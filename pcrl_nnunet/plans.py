"""A dataset that nnU-Net has planned, or one sentence that says what is missing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from pcrl_nnunet.errors import UserError

DEFAULT_CONFIGURATION = "3d_fullres"
NEEDED_OF_CONFIGURATION = (
    *("architecture", "batch_size", "data_identifier", "median_image_size_in_voxels", "normalization_schemes"),
    *("patch_size", "preprocessor_name", "spacing"),
)


@dataclass(frozen=True)
class PlannedConfiguration:
    """One configuration of a dataset's plan."""

    folder: str  # nnUNet_preprocessed/DatasetXXX_NAME
    plans: dict[str, Any]
    configuration: str
    resolved: dict[str, Any]  # the configuration with what it inherits
    dataset_json: dict[str, Any]


def load_plan(dataset: str, plans_name: str, configuration: str | None = None) -> PlannedConfiguration:
    """Find a dataset, its plan and a configuration.

    Args:
        dataset: name or ID, as nnU-Net's -d.
        plans_name: as nnU-Net's -p.
        configuration: as nnU-Net's -c; None stands for 3d_fullres, else the only one there is.

    Raises:
        UserError: nnUNet_preprocessed is not set, or any of the three is not there.
    """
    folder = dataset_folder(dataset)
    plans = read_json(
        os.path.join(folder, f"{plans_name}.json"),
        f"run nnUNetv2_plan_and_preprocess -d {dataset} first (without masks: pcrl_nnunet_preprocess -d {dataset}), or "
        f"name one of its plans with -p",
    )
    again = f"run nnUNetv2_plan_and_preprocess -d {dataset} again"
    dataset_json = read_json(os.path.join(folder, "dataset.json"), again)
    missing = sorted({"configurations", "dataset_name", "plans_name"} - plans.keys())
    if missing:
        raise UserError(f"{plans_name}.json in {folder} has no {', '.join(missing)}; plan the dataset again")
    names = list(plans["configurations"])
    if configuration is None:
        if DEFAULT_CONFIGURATION not in names and len(names) > 1:
            raise UserError(f"{plans_name} has the configurations {', '.join(names)}; choose one with -c")
        configuration = DEFAULT_CONFIGURATION if DEFAULT_CONFIGURATION in names else names[0]
    if configuration not in names:
        raise UserError(f"configuration '{configuration}' is not in {plans_name}; it has {', '.join(names)}: use -c")
    return PlannedConfiguration(folder, plans, configuration, resolve(plans, configuration), dataset_json)


def resolve(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """A configuration with what it inherits; `UserError` where it lacks something that every one has."""
    resolved: dict[str, Any] = PlansManager(dict(plans)).get_configuration(configuration).configuration
    missing = sorted({*NEEDED_OF_CONFIGURATION} - resolved.keys())
    if missing:
        raise UserError(
            f"configuration {configuration} of {plans['plans_name']}.json of {plans['dataset_name']} has no "
            f"{', '.join(missing)}; put it back, or plan the dataset again"
        )
    return resolved


def channel_labels(case: str, dataset_json: Mapping[str, Any], channels: int) -> list[str]:
    """Return a label for every channel: its name in dataset.json and the number that its raw files end with.

    Args:
        case: name; where it begins with DATASET/, its dataset is another one, whose names are not known.
        dataset_json: of the plan's dataset.
        channels: number of channels of the case.
    """
    names = dataset_json.get("channel_names") or dataset_json.get("modality") or {}  # "modality" as in nnU-Net v1
    known = names if len(names) == channels and "/" not in case else {}
    return [f"{known.get(str(number), 'channel')} ({number:04d})" for number in range(channels)]


def dataset_folder(dataset: str, command: str = "nnUNetv2_plan_and_preprocess") -> str:
    """The preprocessed folder of a dataset's name or ID; `UserError`, with the command to run, where there is none."""
    if not nnUNet_preprocessed.is_set():
        raise UserError(
            "the variable nnUNet_preprocessed is not set; set it as for nnU-Net: export nnUNet_preprocessed=FOLDER"
        )
    try:
        name = maybe_convert_to_dataset_name(dataset)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"dataset '{dataset}' was not found in {nnUNet_preprocessed}; give the name or the ID of a dataset that "
            f"{command} has been run on"
        ) from error
    folder = os.path.join(nnUNet_preprocessed, name)
    if not os.path.isdir(folder):
        raise UserError(f"dataset {name} is not in {nnUNet_preprocessed}; run {command} -d {dataset} first")
    return folder


def dataset_name_of(dataset: str) -> str:
    """The name of a dataset's name or ID; `UserError` where there is none."""
    try:
        return str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"dataset '{dataset}' was not found; give the name or the ID of one in nnUNet_raw") from error


def read_json(path: str, remedy: str) -> dict[str, Any]:
    """A file of names and values; `UserError`, which ends with the remedy, where it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct its permissions") from error
    except ValueError as error:  # also what is no UTF-8
        raise UserError(f"{path} is not valid JSON ({error}); mend it, or {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no block of names and values; {remedy}")
    return content
