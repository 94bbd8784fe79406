"""Pretraining on one dataset for another: images of SOURCE in a plan with TARGET's spacing, patch and network.

`plan_for` makes that plan from SOURCE's properties and a plan of TARGET; the rest handles files. Normalisation and
channels are SOURCE's. Another dataset's intensity statistics would clip images to constants (livers' statistics do so
with lungs), or take CT for MR. The plan lies beside SOURCE's own plans, with its own name and data folders.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import write_text, writing
from pcrl_nnunet.ingest.find import own_scans, reader_of
from pcrl_nnunet.method_names import names
from pcrl_nnunet.methods.registry import method_class
from pcrl_nnunet.plans import channel_names, planning_command, read_json, resolve
from pcrl_nnunet.settings import differences, pcrl_block, without_settings
from pcrl_nnunet.target_plans import TARGET_KEY, plans_name_for

NEEDED_OF_FINGERPRINT = (
    *("foreground_intensity_properties_per_channel", "median_relative_size_after_cropping"),
    *("shapes_after_crop", "spacings"),
)


@dataclass(frozen=True)
class Source:
    """The parts of a dataset that the plan needs: dataset.json, fingerprint, and the class that reads the images."""

    dataset_name: str
    dataset_json: dict[str, Any]
    fingerprint: dict[str, Any]
    reader: str

    @property
    def num_channels(self) -> int:
        return len(channel_names(self.dataset_json))


def plan_for(
    source: Source, target_plans: Mapping[str, Any], normalization: Literal["source", "target"] = "source"
) -> tuple[dict[str, Any], list[str]]:
    """Return the plan with which images of `source` pretrain for `target_plans`.

    The plan has TARGET's configurations, without 3D configurations if SOURCE's images are flat. It keeps the
    ``pretrain`` part of TARGET's ``pcrl`` block; the rest of the block concerns TARGET's own training. Settings of
    views stay, because spacing and network are the same. Only crop sizes beyond SOURCE's median image become the
    defaults: cut down to the image, both crops of a pair would be the whole image.

    Args:
        target_plans: a plan of nnU-Net's planner.
        normalization: the dataset that gives scheme and intensity statistics.

    Returns:
        the plan, with plain JSON values, and a sentence about each part of TARGET's plan that was left out.

    Raises:
        UserError: no configuration is left, or TARGET's normalisation has another number of channels.
    """
    target = {"dataset_name": target_plans["dataset_name"], "plans_name": target_plans["plans_name"]}
    name = plans_name_for(**target)
    axes = [int(axis) for axis in target_plans["transpose_forward"]]  # order of the fingerprint's (Z, Y, X)
    spacings = np.array(source.fingerprint["spacings"], float)[:, axes]  # (cases, 3), mm
    shapes = np.array(source.fingerprint["shapes_after_crop"], float)[:, axes]  # (cases, 3), voxels
    median_shape = np.median(shapes, 0)
    intensities = source.fingerprint["foreground_intensity_properties_per_channel"]
    if normalization == "target":
        intensities = PlansManager(dict(target_plans)).foreground_intensity_properties_per_channel

    configurations, flat = _configurations(source, target_plans, normalization, spacings, shapes)
    what = f"{', '.join(flat)} of {target['plans_name']} of {target['dataset_name']}"
    if not configurations:
        raise UserError(
            f"the images of {source.dataset_name} are flat, one voxel along an axis that all configurations ({what}) "
            f"need; give a -target that has a 2d configuration with the same axes"
        )
    notes = [f"{what} cannot be pretrained on the flat images of {source.dataset_name}"] if flat else []
    plan = {
        "dataset_name": source.dataset_name,
        "plans_name": name,
        TARGET_KEY: target,
        "original_median_spacing_after_transp": np.median(spacings, 0).tolist(),
        "original_median_shape_after_transp": [round(n) for n in median_shape],
        "image_reader_writer": source.reader,
        "transpose_forward": axes,
        "transpose_backward": list(target_plans["transpose_backward"]),
        "configurations": configurations,
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": intensities,
    }
    if "pretrain" in pcrl_block(target_plans):
        gone = target_plans["configurations"].keys() - configurations.keys()
        settings, of_views = _pretrain_part(pcrl_block(target_plans)["pretrain"], gone, configurations)
        plan["pcrl"] = {"pretrain": settings}
        notes += of_views
    return json.loads(json.dumps(plan)), notes


def _configurations(
    source: Source,
    target_plans: Mapping[str, Any],
    normalization: Literal["source", "target"],
    spacings: np.ndarray,
    shapes: np.ndarray,
) -> tuple[dict[str, Any], list[str]]:
    """Return TARGET's configurations for SOURCE's images, and the configurations that flat images rule out.

    Args:
        spacings, shapes: (cases, 3) of SOURCE's images, mm and voxels, in the order of axes of TARGET's plan.
    """
    name = plans_name_for(target_plans["dataset_name"], target_plans["plans_name"])
    schemes, masks = _own_normalization(source)
    median_shape = np.median(shapes, 0)
    configurations: dict[str, Any] = {}
    identifiers: dict[str, str] = {}  # configurations that share their data, as in a cascade, still share it
    flat = []
    for configuration in target_plans["configurations"]:
        this = deepcopy(resolve(target_plans, configuration))
        this.pop("inherits_from", None)
        dim = len(this["spacing"])
        if 1 in median_shape[-dim:]:
            flat.append(configuration)
            continue
        sizes = [
            compute_new_shape(shape, spacing, this["spacing"])
            for shape, spacing in zip(shapes[:, -dim:], spacings[:, -dim:], strict=True)
        ]
        this["median_image_size_in_voxels"] = np.median(sizes, 0).tolist()
        this["data_identifier"] = identifiers.setdefault(this["data_identifier"], f"{name}_{configuration}")
        if normalization == "source":
            this.update(normalization_schemes=schemes, use_mask_for_norm=masks)
        elif len(this["normalization_schemes"]) != source.num_channels:
            raise UserError(
                f"the images of {source.dataset_name} have {source.num_channels} channels and the normalisation of "
                f"{target_plans['dataset_name']} is for {len(this['normalization_schemes'])}; leave -normalization "
                f"target out"
            )
        configurations[configuration] = this
    return configurations, flat


def _own_normalization(source: Source) -> tuple[list[str], list[bool]]:
    """Return each channel's scheme and use of the non-zero mask, as nnU-Net's planner chooses them.

    A namespace with two attributes stands in for the planner, which needs raw data and copies the split into the
    preprocessed folder.
    """
    planner = SimpleNamespace(dataset_json=source.dataset_json, dataset_fingerprint=source.fingerprint)
    schemes, masks = ExperimentPlanner.determine_normalization_scheme_and_whether_mask_is_used_for_norm(planner)
    return schemes, masks


def _pretrain_part(
    given: Mapping[str, Any], left_out: Collection[str], configurations: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return TARGET's ``pcrl.pretrain`` for a plan with these configurations, and the parts that were left out.

    Args:
        left_out: names of TARGET's configurations that the plan lacks.
    """
    settings = {name: value for name, value in deepcopy(dict(given)).items() if name not in left_out}
    medians = {name: this["median_image_size_in_voxels"] for name, this in configurations.items()}
    notes = _fitted(settings, "pcrl.pretrain", list(medians.values()))
    for name, median in medians.items():
        if isinstance(settings.get(name), dict):
            notes += _fitted(settings[name], f"pcrl.pretrain.{name}", [median])
    return settings, notes


def _fitted(block: dict[str, Any], where: str, medians: Sequence[Sequence[float]]) -> list[str]:
    """Remove crop sizes beyond a median image from the methods' blocks, in place. Return a sentence for each."""
    notes = []
    for method in names():
        for median in medians if isinstance(block.get(method), dict) else ():
            block[method], left_out = method_class(method).fitted(block[method], median)
            if left_out:
                notes.append(
                    f"{' and '.join(left_out)} of {where}.{method} exceed the median image of "
                    f"{' x '.join(f'{n:g}' for n in median)} voxels: the defaults are used"
                )
    return notes


# -------------------------------------------------------------------------------------------------------------- files


def read_source(folder: str, raw_folder: str) -> Source:
    """Read a dataset's source files. Its own plans and preprocessed data play no part.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX_NAME.
        raw_folder: nnUNet_raw/DatasetXXX_NAME.

    Raises:
        UserError: the dataset has no fingerprint, or no raw images that nnU-Net can read.
    """
    name = os.path.basename(folder)
    step, file = "nnUNetv2_extract_fingerprint", os.path.join(folder, "dataset_fingerprint.json")
    fingerprint = read_json(file, f"run {planning_command(name, step)} first")
    missing = [key for key in NEEDED_OF_FINGERPRINT if key not in fingerprint]
    if missing:
        raise UserError(f"{file} has no {', '.join(missing)}; run {planning_command(name, step, ' --clean')}")
    where = f"set nnUNet_raw to the folder that has the raw images of {name}"
    planned = os.path.join(folder, "dataset.json")
    described = planned if os.path.isfile(planned) else os.path.join(raw_folder, "dataset.json")
    dataset_json = read_json(described, where)
    scans = own_scans(raw_folder, dataset_json)
    if not scans:
        raise UserError(f"no image of {name} was found in {raw_folder}; {where}")
    return Source(name, dataset_json, fingerprint, reader_of(scans, dataset_json).__name__)


def write_plan(folder: str, plan: Mapping[str, Any], source: Source) -> bool:
    """Write the plan into SOURCE's folder, and dataset.json if planning has not yet written it.

    Returns:
        whether the plan was written: an existing plan is kept, with its ``pcrl`` block.

    Raises:
        UserError: another plan has that name, or the folder is not writable.
    """
    path = os.path.join(folder, f"{plan['plans_name']}.json")
    if os.path.exists(path):
        there = read_json(path, "delete it and run this again")
        if changed := list(differences(without_settings(there), without_settings(plan))):
            raise UserError(
                f"{path} exists, and its values of {', '.join(changed[:5])} differ from the new plan's (was "
                f"{plan[TARGET_KEY]['dataset_name']} planned again, or another -normalization given?); to use the new "
                f"plan, delete or rename that file, whose pcrl block you may want to keep, and run this again"
            )
        return False
    with writing(folder, "check permissions and free space"):
        if not os.path.isfile(os.path.join(folder, "dataset.json")):
            write_text(os.path.join(folder, "dataset.json"), json.dumps(source.dataset_json, indent=4))
        write_text(path, json.dumps(plan, indent=4))
    return True
