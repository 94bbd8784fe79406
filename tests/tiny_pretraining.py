"""A pretraining of the tiny dataset, made like by the command."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed
from tiny_dataset import DATASET_JSON, make_plan

from pcrl_nnunet.plans import PlannedConfiguration, resolve
from pcrl_nnunet.pretraining.request import Request
from pcrl_nnunet.trainers.pretrain import pretrain_trainer

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
    folder, resolved = os.path.join(nnUNet_preprocessed, plan["dataset_name"]), resolve(plan, "3d_fullres")
    planned = PlannedConfiguration(folder, plan, "3d_fullres", resolved, dataset_json or copy.deepcopy(DATASET_JSON))
    request = Request.of_plan(planned, fold, **{**SHORT, **overrides})
    return pretrain_trainer(replace(request, init=init, continues=continues), torch.device(device))


def folder_of(tiny: Any, fold: int | str = "all", plans: str = "nnUNetPlans", method: str = "pcrlv2") -> Path:
    """Return the folder of the results."""
    folder: Path = tiny.results / f"PCRLPretrainTrainer_{method}__{plans}__3d_fullres" / f"fold_{fold}"
    return folder
