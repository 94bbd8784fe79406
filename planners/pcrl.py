"""Planners that write nnU-Net's own plans under our name, with a ``pcrl`` block of settings to edit.

Each planner keeps the networks and the preprocessing of the stock planner that it extends. If the preprocessed data
would equal the stock plan's, the plan names the stock data folder, so that nothing is preprocessed twice::

    nnUNetv2_plan_experiment -d 4 -pl PCRLPlanner

An already preprocessed dataset then needs only this command. (`nnUNetv2_plan_and_preprocess` deletes the data folder
and preprocesses again after planning, for any plan.)
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import fields
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import isfile, join, load_json
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.methods import DEFAULT, method_class
from pcrl_nnunet.pretraining.settings import pretrain_settings

# The few settings that a user may want to edit; other settings can be added by hand.
PRETRAIN_KEYS = ("epochs", "iters_per_epoch", "seed")  # shared by all methods; rate and batch belong to a method
FINETUNE_KEYS = ("recipe", "epochs", "iters_per_epoch", "warmup_share")  # the rate belongs to the recipe

# Parts of the plan that determine preprocessed voxels.
PLAN_KEYS = ("image_reader_writer", "transpose_forward", "foreground_intensity_properties_per_channel")
CONFIGURATION_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_seg",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg_kwargs",
)


class PCRLPlanner(ExperimentPlanner):
    """nnU-Net's default planner, which writes ``PCRLPlans`` with the settings of pretraining and fine-tuning."""

    pcrl_plans_name = "PCRLPlans"
    stock_plans_name = "nnUNetPlans"

    def __init__(self, dataset_name_or_id: str | int, **settings: Any) -> None:
        """Accept the stock planner's settings by keyword."""
        super().__init__(dataset_name_or_id, **{"plans_name": self.pcrl_plans_name, **settings})
        changed = {"overwrite_target_spacing", "gpu_memory_target_in_gb", "suppress_transpose"}
        self._plans_as_stock = (
            not any(settings.get(name) for name in changed)
            and settings.get("preprocessor_name", "DefaultPreprocessor") == "DefaultPreprocessor"
        )

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Save the plan with its data folders and ``pcrl`` block. An existing block is kept."""
        recursive_fix_for_json_export(plans)
        for name, configuration in plans["configurations"].items():
            if "data_identifier" in configuration:
                configuration["data_identifier"] = self._data_identifier(plans, name)
        path = join(nnUNet_preprocessed, self.dataset_name, self.plans_identifier + ".json")
        old = load_json(path) if isfile(path) else {}
        plans["pcrl"] = _kept(old, plans) if "pcrl" in old else default_block(plans)
        super().save_plans(plans)

    def _data_identifier(self, plans: dict[str, Any], configuration: str) -> str:
        """Return the stock plan's data folder if its voxels would be the same, else our own."""
        own = f"{self.plans_identifier}_{configuration}"
        # ResEnc planners also keep these two under the default planner's name.
        shared = configuration in ("2d", "3d_fullres")
        stock_plans_name = PCRLPlanner.stock_plans_name if shared else self.stock_plans_name
        stock_file = join(nnUNet_preprocessed, self.dataset_name, stock_plans_name + ".json")
        stock = f"{stock_plans_name}_{configuration}"
        if not isfile(stock_file):
            return stock if self._plans_as_stock else own
        stock_plans = load_json(stock_file)
        stock_configuration = stock_plans["configurations"].get(configuration, {})
        if _voxels(plans, plans["configurations"][configuration]) != _voxels(stock_plans, stock_configuration):
            return own
        return stock_configuration["data_identifier"]


class PCRLPlannerResEncM(PCRLPlanner, nnUNetPlannerResEncM):
    """`PCRLPlanner` for nnU-Net's ResEnc M preset."""

    pcrl_plans_name = "PCRLResEncUNetMPlans"
    stock_plans_name = "nnUNetResEncUNetMPlans"


class PCRLPlannerResEncL(PCRLPlanner, nnUNetPlannerResEncL):
    """`PCRLPlanner` for nnU-Net's ResEnc L preset."""

    pcrl_plans_name = "PCRLResEncUNetLPlans"
    stock_plans_name = "nnUNetResEncUNetLPlans"


class PCRLPlannerResEncXL(PCRLPlanner, nnUNetPlannerResEncXL):
    """`PCRLPlanner` for nnU-Net's ResEnc XL preset."""

    pcrl_plans_name = "PCRLResEncUNetXLPlans"
    stock_plans_name = "nnUNetResEncUNetXLPlans"


def default_block(plans: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the ``pcrl`` block of a new plan, with the defaults that would hold without a block.

    The block has the default method, `PRETRAIN_KEYS` and `FINETUNE_KEYS`. For every configuration that can be
    pretrained it has the method's own settings, derived from the plan.
    """
    finetune = {field.name: field.default for field in fields(FinetuneSettings) if field.name in FINETUNE_KEYS}
    pretrain: dict[str, Any] = {"method": DEFAULT}
    for name in plans["configurations"]:
        configuration = PlansManager(plans).get_configuration(name).configuration
        if configuration.get("previous_stage"):  # a cascade uses 3d_fullres's pretraining
            continue
        settings = pretrain_settings({"configurations": plans["configurations"]}, name, configuration)
        pretrain |= {key: getattr(settings, key) for key in PRETRAIN_KEYS}
        pretrain[name] = {DEFAULT: method_class(DEFAULT).editable(settings.own)}
    return json.loads(json.dumps({"pretrain": pretrain, "finetune": finetune}))  # lists for tuples, as in the file


def _kept(old: dict[str, Any], plans: dict[str, Any]) -> dict[str, Any]:
    """Return an earlier plan's block. Configurations that nobody edited come from the new plan."""
    block = deepcopy(old["pcrl"])
    given = block.get("pretrain", {})
    then, now = (default_block(p)["pretrain"] for p in (old, plans))
    for name in old["configurations"]:
        if name in given and given[name] == then.get(name):
            del given[name]
            if name in now:
                given[name] = now[name]
    return block


def _voxels(plans: dict[str, Any], configuration: dict[str, Any]) -> str:
    """Return everything that determines preprocessed voxels, as a comparable string."""
    parts = [plans.get(key) for key in PLAN_KEYS] + [configuration.get(key) for key in CONFIGURATION_KEYS]
    return json.dumps(parts, sort_keys=True)
