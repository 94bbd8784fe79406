"""The file of a finished pretraining of the tiny dataset, with random parameters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import DATASET, DATASET_JSON, make_plan
from torch import Tensor

from pcrl_nnunet import checkpoint
from pcrl_nnunet.plans import PlannedConfiguration
from pcrl_nnunet.transfer.find import place


def pretrain(
    results: Path,
    fold: int | str = "all",
    configuration: str = "3d_fullres",
    plan: dict[str, Any] | None = None,
    cases: Sequence[dict[str, str]] = (),
    method: str = "pcrlv2",
    trains_decoder: bool = False,
) -> tuple[str, dict[str, Tensor]]:
    """Write the file of a finished pretraining, with random parameters. Returns its path and encoder."""
    plan = plan or make_plan()
    this = PlansManager(plan).get_configuration("3d_fullres")
    network = get_network_from_plans(
        this.network_arch_class_name,
        this.network_arch_init_kwargs,
        this.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=True,
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    state = network.state_dict()
    path = place(str(results), "nnUNetPlans", configuration, fold, method)
    os.makedirs(os.path.dirname(path))
    random = ("decoder.seg_layers.",) if trains_decoder else ("decoder.stages.", "decoder.transpconvs.", "decoder.seg")
    planned = PlannedConfiguration("", plan, configuration, this.configuration, DATASET_JSON)
    content = {
        "format": checkpoint.FORMAT,
        "network_weights": state,
        "random_keys": [k for k in state if k.startswith(random)],
        "num_input_channels": 1,
        "cases": list(cases),
        "nnssl_adaptation_plan": checkpoint.nnssl_adaptation_plan(planned, (8, 8, 8), 1, network),
        "plans": plan,
        "method": method,
        "datasets": [DATASET],
        "configuration": configuration,
        "fold": fold,
        "epochs": 240,
    }
    checkpoint.write(path, content)
    return path, encoder_of(network)


def encoder_of(network: Any) -> dict[str, Tensor]:
    """Return copies of the encoder's weights."""
    return {name: value.clone() for name, value in network.encoder.state_dict().items()}
