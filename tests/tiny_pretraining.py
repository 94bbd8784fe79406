"""A pretraining of the tiny dataset, as the command makes it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import DATASET_JSON, make_plan

from pcrl_nnunet.pretraining.cases import PretrainingData
from pcrl_nnunet.pretraining.settings import pretrain_settings
from pcrl_nnunet.trainers import PCRLPretrainTrainer

SHORT = {"epochs": 2, "iters_per_epoch": 2, "batch_size": 4}


def make_trainer(
    fold: int | str = "all",
    plan: dict[str, Any] | None = None,
    continues: bool = False,
    init: str | None = None,
    dataset_json: dict[str, Any] | None = None,
    device: str = "cpu",
    **overrides: Any,
) -> Any:
    """Return a trainer of the tiny dataset's cases; `overrides` are settings."""
    plan = plan or make_plan()
    configuration = PlansManager(plan).get_configuration("3d_fullres").configuration
    settings = pretrain_settings(plan, "3d_fullres", configuration, **{**SHORT, **overrides})
    trainer = PCRLPretrainTrainer.of(settings, PretrainingData.find(plan, "3d_fullres", fold), init)
    plans = {**copy.deepcopy(plan), "continue_training": continues}
    return trainer(plans, "3d_fullres", fold, dataset_json or copy.deepcopy(DATASET_JSON), torch.device(device))


def folder_of(tiny: Any, fold: int | str = "all", plans: str = "nnUNetPlans", method: str = "pcrlv2") -> Path:
    """Return the folder of the results."""
    folder: Path = tiny.results / f"PCRLPretrainTrainer_{method}__{plans}__3d_fullres" / f"fold_{fold}"
    return folder
