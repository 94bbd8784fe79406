"""A reader of any checkpoint with an encoder of nnU-Net's U-Nets, in the form of our checkpoints.

It reads our own checkpoints, nnssl's (the OpenMind models), and supervised trainings of nnU-Net.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from pcrl_nnunet.checkpoint import EXPECTED, FORMAT, architecture_plans, other_format, read_any
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.plans import channel_names

WRAPPERS = {"module", "_orig_mod"}  # parts of names that DataParallel, DDP and torch.compile add
NNSSL_SCRIPT = "nnssl.utilities.add_adaptation_plan"


def read_encoder(path: str) -> dict[str, Any]:
    """Read any checkpoint with an encoder on the CPU, and return it in the form of our checkpoints.

    Pretraining (``-init``), transfer, fine-tuning and comparison all read through this function. The weights may come
    from a network within DDP or torch.compile.

    Raises:
        UserError: see `checkpoint.read`; or the kind of file is unknown.
    """
    content = with_plain_names(path, read_any(path))
    if content.get("format") == FORMAT:
        return content
    if reason := other_format(path, content, FORMAT):
        raise UserError(reason)
    return in_our_form(path, content)


def in_our_form(path: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of nnssl or nnU-Net with the keys of our checkpoints.

    Entries that nnssl or nnU-Net lack are None or empty: ``plans`` (nnssl), ``cases``, ``epochs``.

    Args:
        path: path for messages.

    Raises:
        UserError: the checkpoint comes from neither, or lacks a part.
    """
    weights, arguments = content.get("network_weights"), content.get("init_args")
    try:
        if isinstance(weights, Mapping) and "nnssl_adaptation_plan" in content:
            return _of_nnssl(content)
        if isinstance(weights, Mapping) and isinstance(arguments, Mapping):
            if "plan" in arguments:  # nnU-Net's key is "plans"
                raise UserError(_without_adaptation_plan(path, weights))
            return _of_nnunet(content)
    except (LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"checkpoint {path} lacks what its kind should have ({reason}); get it again") from error
    raise UserError(_of_no_known_kind(path, content))


def with_plain_names(path: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint whose weights have the names of the plan's own network, without names of wrappers.

    Args:
        path: path for messages.

    Raises:
        UserError: two different tensors would have the same name.
    """
    plain = dict(content)
    if isinstance(weights := content.get("network_weights"), Mapping):
        plain["network_weights"] = {}
        for name, tensor in weights.items():
            there = plain["network_weights"].setdefault(plain_name(name), tensor)
            if there is not tensor and not _equal(there, tensor):
                raise UserError(
                    f"checkpoint {path} holds two different tensors {plain_name(name)}, with and without the prefix "
                    f"of a wrapper; save the state dict of one network"
                )
    if isinstance(names := content.get("random_keys"), list):
        plain["random_keys"] = list(map(plain_name, names))
    return plain


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.equal(b)


def plain_name(name: str) -> str:
    """Return the name of a tensor without the parts that DDP and torch.compile add, in any order."""
    return ".".join(part for part in str(name).split(".") if part not in WRAPPERS)


def _of_nnssl(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a model of nnssl. Its adaptation plan holds the encoder's names."""
    plan = content["nnssl_adaptation_plan"]
    pretraining = plan.get("pretrain_plan") or {}
    # Keep only the encoder, under nnU-Net's names. (PlainConvUNet's stem lies in the encoder's first stage.)
    weights = {}
    for name, tensor in content["network_weights"].items():
        for key, ours in (("key_to_encoder", "encoder.stages."), ("key_to_stem", "encoder.stem.")):
            prefix = f"{plain_name(plan[key])}." if plan.get(key) else None
            if prefix and name.startswith(prefix):
                weights[ours + name.removeprefix(prefix)] = tensor
                break
    (configuration,) = list(pretraining.get("configurations") or {"unknown": None})[:1]
    return {
        **_known_of_all(weights),
        "nnssl_adaptation_plan": plan,
        "method": "nnssl",
        "citations": content.get("citations", []),
        "datasets": [pretraining.get("dataset_name") or "unknown"],
        "configuration": configuration,
        "plans": None,
    }


def _of_nnunet(content: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a supervised training of nnU-Net."""
    plans, configuration = content["init_args"]["plans"], content["init_args"]["configuration"]
    weights, dataset_json = content["network_weights"], content["init_args"]["dataset_json"]
    this = PlansManager(dict(plans)).get_configuration(configuration).configuration
    return {
        **_known_of_all(weights),
        "num_input_channels": len(
            channel_names(dataset_json)
        ),  # image channels: a cascade's label channels come after them
        "nnssl_adaptation_plan": {"architecture_plans": architecture_plans(this["architecture"])},
        "method": f"supervised training ({content.get('trainer_name')})",
        "citations": [],
        "datasets": [plans["dataset_name"]],
        "configuration": configuration,
        "plans": plans,
        "fold": content["init_args"].get("fold"),
        "epochs": content.get("current_epoch"),
    }


def _known_of_all(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    convolutions = [tensor for tensor in weights.values() if tensor.ndim >= 4]
    return {
        "network_weights": dict(weights),
        "random_keys": [],
        "num_input_channels": int(convolutions[0].shape[1]) if convolutions else 0,  # the first convolution's
        "cases": [],
        "all_cases_known": False,
        "fold": None,
        "epochs": None,
    }


def _without_adaptation_plan(path: str, weights: Mapping[str, Any]) -> str:
    """Explain how nnssl's own script adds the adaptation plan, which nnssl's early trainings did not save."""
    folder = f"{os.path.splitext(path)[0]}_adapted"
    stems = (re.match(r"(.+)\.convs\.0\.conv\.weight$", name) for name in weights)
    stem = next((match[1] for match in stems if match and match[1].endswith(".stem")), "encoder.stem")
    command = ["python", "-m", NNSSL_SCRIPT, "-i", path, "-pl", "nnsslPlans.json", "-o", folder, "-arch", "ResEncL"]
    command += ["-key_to_encoder", f"{stem.removesuffix('.stem')}.stages", "-key_to_stem", stem]
    command += ["-keys_to_in_proj", f"{stem}.convs.0.conv", f"{stem}.convs.0.all_modules.0"]
    return (
        f"checkpoint {path} is of nnssl and lacks the nnssl_adaptation_plan, which says where its encoder is; nnssl's "
        f"own script adds it: take {os.path.join(folder, 'checkpoint_final.pth')} after {shlex.join(command)} (give it "
        f"the nnsslPlans.json of nnssl_preprocessed, and with -arch the architecture that was trained)"
    )


def _of_no_known_kind(path: str, content: Mapping[str, Any]) -> str:
    """Describe the content of a file that is not a checkpoint of a known program."""
    named = {"": content, **{f" (under '{key}')": value for key, value in content.items()}}
    for where, weights in named.items():
        if isinstance(weights, Mapping) and weights and all(isinstance(tensor, Tensor) for tensor in weights.values()):
            return (
                f"checkpoint {path} holds only weights{where}, without plan and channels; expected "
                f"{EXPECTED}: take the file that the training itself wrote"
            )
    return f"checkpoint {path} holds no encoder that is known; expected {EXPECTED}"
