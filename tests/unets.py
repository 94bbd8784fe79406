"""Small networks of nnU-Net, their plans, and checkpoints of their pretrainings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
NEEDS_IMPORT = ["conv_op", "norm_op", "dropout_op", "nonlin"]


def arch_kwargs(name: str = PLAIN, dim: int = 3, features: Sequence[int] = (4, 8, 8), **changes: Any) -> dict[str, Any]:
    blocks = "n_conv_per_stage" if name == PLAIN else "n_blocks_per_stage"
    n = len(features)
    return {
        "n_stages": n,
        "features_per_stage": list(features),
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[3] * dim] * n,
        "strides": [[1] * dim] + [[2] * dim] * (n - 1),
        blocks: [2] * n,
        "n_conv_per_stage_decoder": [1] * (n - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **changes,
    }


def build(name: str = PLAIN, channels: int = 1, **changes: Any) -> Any:
    return get_network_from_plans(name, arch_kwargs(name, **changes), NEEDS_IMPORT, channels, 2, deep_supervision=True)


def content_of(network: Any, channels: int = 1, name: str = PLAIN, **changes: Any) -> dict[str, Any]:
    """Return the content of a pretraining's checkpoint for transfer; no encoder parameter has its initial value."""
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.add_(torch.rand_like(parameter))
    state = copy.deepcopy(network.state_dict())  # aliases stay aliases
    return {
        "network_weights": state,
        "random_keys": [key for key in state if key.startswith("decoder.") and not key.startswith("decoder.encoder.")],
        "num_input_channels": channels,
        "cases": [],
        "nnssl_adaptation_plan": {
            "architecture_plans": {
                "arch_class_name": name.rsplit(".", 1)[-1],
                "arch_kwargs": arch_kwargs(name, **changes),
                "arch_kwargs_requiring_import": NEEDS_IMPORT,
            }
        },
    }


def plan_with(name: str = PLAIN, plans_name: str = "P", **changes: Any) -> dict[str, Any]:
    architecture = {"network_class_name": name, "arch_kwargs": arch_kwargs(name, **changes), "_kw_requires_import": []}
    configuration = "2d" if changes.get("dim") == 2 else "3d_fullres"
    return {"plans_name": plans_name, "configurations": {configuration: {"architecture": architecture}}}
