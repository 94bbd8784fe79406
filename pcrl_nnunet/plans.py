"""The search for an nnU-Net dataset and its plan, with errors that say what is missing and what to run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from glob import escape, glob
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from pcrl_nnunet.commands import corrected
from pcrl_nnunet.errors import UserError

DEFAULT_CONFIGURATION = "3d_fullres"
PLAN = "nnUNetv2_plan_and_preprocess"
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
DATASET_NAME = re.compile(r"Dataset\d{3,}_.+")
ALIKE = 0.6  # difflib's own threshold for a close match
LISTED = 5  # number of names to show if none is near
NEEDED_OF_PLAN = ("configurations", "dataset_name", "plans_name")
NEEDED_OF_CONFIGURATION = (
    *("architecture", "batch_size", "data_identifier", "median_image_size_in_voxels", "normalization_schemes"),
    *("patch_size", "preprocessor_name", "spacing"),
)


@dataclass(frozen=True)
class PlannedConfiguration:
    """A configuration of a dataset's plan."""

    folder: str  # nnUNet_preprocessed/DatasetXXX_NAME
    plans: dict[str, Any]
    configuration: str
    resolved: dict[str, Any]  # the configuration with inherited values
    dataset_json: dict[str, Any]


@dataclass(frozen=True)
class PlanFacts:
    """The numbers of a plan's configuration from which a method of pretraining derives its settings.

    Sizes are in voxels, axes in nnU-Net's order; the spacing is in mm.

    Attributes:
        strides: strides of each encoder stage, from full resolution to the bottleneck.
    """

    configuration: str
    patch_size: tuple[int, ...]
    batch_size: int
    strides: tuple[tuple[int, ...], ...]
    median_size: tuple[float, ...]
    spacing: tuple[float, ...]

    @classmethod
    def of(cls, name: str, configuration: Mapping[str, Any]) -> PlanFacts:
        """Read a resolved configuration. Raise `UserError` for a network without strided stages."""
        architecture = configuration["architecture"]
        strides = architecture["arch_kwargs"].get("strides")
        if strides is None:
            raise UserError(
                f"the network {architecture['network_class_name']} of {name} has no strided stages; expected a "
                f"PlainConvUNet or ResidualEncoderUNet: choose another plan with -p"
            )
        return cls(
            name,
            tuple(configuration["patch_size"]),
            configuration["batch_size"],
            tuple(tuple(stride) for stride in strides),
            tuple(configuration["median_image_size_in_voxels"]),
            tuple(float(s) for s in configuration["spacing"]),
        )


def load_plan(dataset: str, plans_name: str, configuration: str | None = None) -> PlannedConfiguration:
    """Find a dataset, its plan and a configuration, see `find_plan`."""
    folder, plans, configuration, dataset_json = find_plan(dataset, plans_name, configuration)
    return PlannedConfiguration(folder, plans, configuration, resolve(plans, configuration), dataset_json)


def find_plan(
    dataset: str, plans_name: str, configuration: str | None = None
) -> tuple[str, dict[str, Any], str, dict[str, Any]]:
    """Return a dataset's preprocessed folder, its plan, the configuration's name, and dataset.json.

    This takes no time: commands check their arguments by it before they import torch.

    Args:
        dataset: name or ID, like nnU-Net's -d.
        plans_name: like nnU-Net's -p.
        configuration: like nnU-Net's -c; None means 3d_fullres, else the only configuration.

    Raises:
        UserError: nnUNet_preprocessed is not set, or one of the three does not exist.
    """
    folder = dataset_folder(dataset)
    preset = re.fullmatch(r"(nnUNet|PCRL)ResEncUNet(M|L|XL)Plans", plans_name)
    planner = f" -pl {preset[1]}PlannerResEnc{preset[2]}" if preset else ""
    prepare = f"run {planning_command(os.path.basename(folder), options=planner)}"
    others = _plans_in(folder)
    other = f", or choose an existing plan with -p: {', '.join(others)}" if others else ""
    plans = read_json(os.path.join(folder, f"{plans_name}.json"), f"{prepare} first{other}")
    dataset_json = read_json(os.path.join(folder, "dataset.json"), f"{prepare} again")
    missing = sorted({*NEEDED_OF_PLAN} - plans.keys())
    if missing:
        raise UserError(f"{plans_name}.json in {folder} has no {', '.join(missing)}; plan the dataset again: {prepare}")
    names = list(plans["configurations"])
    if configuration is None and DEFAULT_CONFIGURATION not in names and len(names) > 1:
        raise UserError(
            f"{plans_name} has the configurations {', '.join(names)}; choose one with -c, such as "
            f"{corrected('-c', None, names[0])}"
        )
    if configuration is None:
        configuration = DEFAULT_CONFIGURATION if DEFAULT_CONFIGURATION in names else names[0]
    check_configuration(plans, configuration)
    return folder, plans, configuration, dataset_json


def _plans_in(folder: str) -> list[str]:
    """Return the names of the plans in a preprocessed dataset's folder."""
    found = []
    for path in sorted(glob(os.path.join(escape(folder), "*.json"))):
        with suppress(UserError):
            if {*NEEDED_OF_PLAN} <= read_json(path, "").keys():
                found.append(os.path.basename(path).removesuffix(".json"))
    return found


def check_configuration(plans: Mapping[str, Any], configuration: str) -> None:
    """Raise `UserError` if a plan lacks a configuration. The message has the command to paste."""
    names = list(plans["configurations"])
    if configuration in names:
        return
    usual = DEFAULT_CONFIGURATION if DEFAULT_CONFIGURATION in names else names[0]
    (near,) = get_close_matches(configuration, names, 1) or [usual]
    raise UserError(
        f"configuration '{configuration}' is not in {plans['plans_name']}; it has {', '.join(names)}: "
        f"{corrected('-c', configuration, near)}"
    )


def refuse_cascade(plans: Mapping[str, Any], configuration: str) -> None:
    """Raise `UserError` for the second stage of a cascade."""
    this = plans["configurations"][configuration]
    for _ in plans["configurations"]:
        if "previous_stage" not in this:  # perhaps inherited
            this = plans["configurations"].get(this.get("inherits_from"), {})
    if previous := this.get("previous_stage"):
        raise UserError(
            f"{configuration} takes the labels of {previous} as input; take its "
            f"{DEFAULT_CONFIGURATION} instead (-c {DEFAULT_CONFIGURATION}), which fine-tuning of the cascade uses"
        )


def resolve(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return a configuration with inherited values. Raise `UserError` if a required entry is missing."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # imports torch

    resolved: dict[str, Any] = PlansManager(dict(plans)).get_configuration(configuration).configuration
    missing = sorted({*NEEDED_OF_CONFIGURATION} - resolved.keys())
    if missing:
        raise UserError(
            f"configuration {configuration} of {plans['plans_name']}.json of {plans['dataset_name']} has no "
            f"{', '.join(missing)}; put it back, or plan the dataset again"
        )
    return resolved


def channel_names(dataset_json: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the names of the image channels by their numbers, from a dataset.json of nnU-Net v2 or v1.

    Raises:
        UserError: dataset.json names no channel.
    """
    names: Mapping[str, str] | None = dataset_json.get("channel_names") or dataset_json.get("modality")
    if not names:
        raise UserError('dataset.json has no channel_names; add them as nnU-Net expects, such as {"0": "CT"}')
    return names


def channel_labels(case: str, dataset_json: Mapping[str, Any], channels: int) -> list[str]:
    """Return a label for every channel: its name in dataset.json and the number at the end of its raw files.

    Args:
        case: name of the case; with a prefix DATASET/ it belongs to another dataset, whose names are unknown.
        dataset_json: the plan's dataset.json.
        channels: number of channels of the case.
    """
    names = channel_names(dataset_json)
    known = names if len(names) == channels and "/" not in case else {}
    return [f"{known.get(str(number), 'channel')} ({number:04d})" for number in range(channels)]


def unit_of(plans: Mapping[str, Any]) -> str:
    """Return the unit of a plan's spacing: mm, or pixels for natural images such as PNG, which have no spacing."""
    return "pixels" if plans.get("image_reader_writer") == "NaturalImage2DIO" else "mm"


def folder_of(variable: str) -> str:
    """Return the folder in one of nnU-Net's variables. Raise `UserError` if the variable is not set."""
    if not os.environ.get(variable):
        others = [name for name in VARIABLES if name != variable and not os.environ.get(name)]
        nor = f", nor is {' or '.join(others)}; set them" if others else "; set it"
        exports = " ".join(f"{name}=FOLDER" for name in (variable, *others))
        raise UserError(f"the variable {variable} is not set{nor} as for nnU-Net: export {exports}")
    return os.environ[variable]


def dataset_folder(dataset: str, step: str = PLAN) -> str:
    """Return the preprocessed folder of a dataset, given by name or ID.

    Args:
        step: nnU-Net's command that makes the folder.

    Raises:
        UserError: the folder does not exist; the message ends with the command to run.
    """
    folder_of("nnUNet_preprocessed")
    name = dataset_name_of(dataset)
    folder = os.path.join(nnUNet_preprocessed, name)
    if os.path.isdir(folder):
        return folder
    if not _is_raw(name):
        raise UserError(
            f"dataset {name} is neither in {nnUNet_preprocessed} nor, to be prepared, in {_raw_root()}; set "
            f"nnUNet_preprocessed, or nnUNet_raw, to the folder that has it"
        )
    raise UserError(f"dataset {name} is not in {nnUNet_preprocessed}; run {planning_command(name, step)} first")


def dataset_name_of(dataset: str) -> str:
    """Return the name of a dataset in one of nnU-Net's three folders, given by name or ID.

    Raises:
        UserError: the dataset does not exist, or several have the ID; the message ends with the nearest names.
    """
    roots = [root.get() for root in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results) if root.is_set()]
    known = sorted(
        {entry.name for root in roots if os.path.isdir(root) for entry in os.scandir(root) if entry.is_dir()}
    )
    known = [name for name in known if DATASET_NAME.fullmatch(name)]
    found = [dataset] if dataset in known else []
    if dataset.isdecimal():
        found = [str(name) for name in find_candidate_datasets(int(dataset))]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"several datasets have the ID {dataset}, {', '.join(found)}; give the name instead: "
            f"{corrected('-d', dataset, found[0])}"
        )
    near = nearest_datasets(dataset, known)
    if len(near) == 1:
        hint = f"the nearest is {near[0]}: {corrected('-d', dataset, near[0])}"
    elif near:
        hint = f"the nearest are {', '.join(near)}: give one of them with -d"
    elif known:
        more = " and others" if len(known) > LISTED else ""
        hint = f"use -d with one of: {', '.join(known[:LISTED])}{more}"
    else:
        hint = "they hold no dataset: set nnU-Net's variables to the folders that do"
    raise UserError(f"dataset '{dataset}' was not found in {', '.join(roots)}; {hint}")


def nearest_datasets(dataset: str, known: Sequence[str]) -> list[str]:
    """Return up to three names similar to a name or ID, the most similar first.

    The comparison uses the part after the number, because all names begin alike. If this part differs or is missing,
    the number decides.

    Args:
        known: nnU-Net's names of datasets.
    """

    def parts(text: str) -> tuple[str, str]:
        number, rest = re.findall(r"^(?:dataset)?_*(\d*)_*(.*)", text.lower())[0]
        return number.lstrip("0"), rest

    def likeness(name: str) -> float:
        own_number, own_rest = parts(name)
        if not rest:
            return SequenceMatcher(None, number, own_number).ratio()
        if len(rest) > 2 and rest in own_rest:
            return 1.0
        return max(SequenceMatcher(None, rest, own_rest).ratio(), ALIKE if number == own_number else 0.0)

    number, rest = parts(dataset)
    alike = {name: likeness(name) for name in known}
    return sorted((name for name in known if alike[name] >= ALIKE), key=lambda name: -alike[name])[:3]


def has_masks(raw_folder: str, dataset_json: dict[str, Any]) -> bool:
    """Tell if nnU-Net can plan a raw dataset by itself."""
    if "dataset" in dataset_json:
        return all("label" in entry for entry in dataset_json["dataset"].values())
    return os.path.isdir(os.path.join(raw_folder, "labelsTr"))


def lacks_masks(name: str) -> bool:
    """Tell if nnUNet_raw has a dataset of this name without masks."""
    raw = os.path.join(_raw_root(), name)
    return _is_raw(name) and not has_masks(raw, read_json(os.path.join(raw, "dataset.json"), "mend it"))


def planning_command(name: str, step: str = PLAN, options: str = "") -> str:
    """Return the command that prepares a dataset: nnU-Net's command with masks, ours without.

    Args:
        name: name of the dataset; nnU-Net's commands take only the number.
        step: nnU-Net's command for datasets with masks.
        options: further options of that command.
    """
    number = int(re.sub(r"\D.*", "", name.removeprefix("Dataset")))
    return f"pcrl_nnunet_preprocess -d {number}" if lacks_masks(name) else f"{step} -d {number}{options}"


def preprocessing_command(folder: str) -> str:
    """Return the command that fills a folder of preprocessed data.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX_NAME/PLANS_CONFIGURATION, nnU-Net's name.
    """
    name, identifier = os.path.basename(os.path.dirname(folder)), os.path.basename(folder)
    named = re.fullmatch(r"(.+)_(2d|3d_fullres|3d_lowres)", identifier)
    if not DATASET_NAME.fullmatch(name) or named is None:
        return "nnUNetv2_preprocess"
    plans, configuration = named.groups()
    if lacks_masks(name):
        return f"{planning_command(name)} -p {plans} -c {configuration}"
    return planning_command(name, "nnUNetv2_preprocess", f" -plans_name {plans} -c {configuration}")


def _raw_root() -> str:
    return str(nnUNet_raw.get()) if nnUNet_raw.is_set() else "nnUNet_raw (which is not set)"


def _is_raw(name: str) -> bool:
    return os.path.isfile(os.path.join(_raw_root(), name, "dataset.json"))


def read_json(path: str, remedy: str) -> dict[str, Any]:
    """Read a JSON file of names and values. Raise `UserError` if this fails; the message ends with the remedy."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct its permissions") from error
    except ValueError as error:  # includes files that are not UTF-8
        raise UserError(f"{path} is not valid JSON ({error}); mend it, or {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no block of names and values; {remedy}")
    return content
