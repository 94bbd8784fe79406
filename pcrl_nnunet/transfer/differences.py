"""Differences in network and data between a pretraining and a plan, which the shapes of weights do not show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pydoc import locate
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from pcrl_nnunet.plans import resolve

DATA_KEYS = ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm")
LONG = "foreground_intensity_properties_per_channel"
DECODER_ONLY = ("n_conv_per_stage_decoder", "deep_supervision")  # settings that do not affect the encoder


def differences(checkpoint: Mapping[str, Any], plans: Mapping[str, Any], configuration: str) -> dict[str, list[str]]:
    """List all differences in network and data between a checkpoint and a plan."""
    architecture = resolve(plans, configuration)["architecture"]
    of_network = architecture_differences(checkpoint, architecture["network_class_name"], architecture["arch_kwargs"])
    return {
        "architecture_differences": of_network,
        "data_differences": data_differences(checkpoint, plans, configuration),
    }


def notes_on(found: Mapping[str, list[str]]) -> list[str]:
    """Return a note for each of the `differences`."""
    return [
        *(f"Note, pretrained on another network: {note}" for note in found["architecture_differences"]),
        *(f"Note, pretrained on other data: {note}" for note in found["data_differences"]),
    ]


def architecture_differences(
    checkpoint: Mapping[str, Any], network_class_name: str, arch_kwargs: Mapping[str, Any]
) -> list[str]:
    """List the differences between a checkpoint's encoder and the encoder of a plan's configuration.

    Weights do not show them: a network with other strides loads the weights but computes something else.
    """
    theirs = checkpoint["nnssl_adaptation_plan"].get("architecture_plans") or {}
    if theirs.get("arch_kwargs") is None:  # an nnssl preset
        return [f"the checkpoint does not state its architecture, only a name: {theirs.get('arch_class_name')}"]
    pairs: dict[str, tuple[Any, Any]] = {"network": (theirs["arch_class_name"], network_class_name.rsplit(".", 1)[-1])}
    for name in sorted({*theirs["arch_kwargs"], *arch_kwargs} - {*DECODER_ONLY}):
        pairs[name] = (theirs["arch_kwargs"].get(name), arch_kwargs.get(name))
    differing = {name: (a, b) for name, (a, b) in pairs.items() if not same_setting(a, b)}
    return [f"{name}: {a} in the checkpoint, {b} in the plan" for name, (a, b) in differing.items()]


def data_differences(checkpoint: Mapping[str, Any], plans: Mapping[str, Any], configuration: str) -> list[str]:
    """List the differences between a pretraining's and a plan's preprocessed data.

    Weights of the same shapes load in any case, even if they were trained on other voxel sizes or intensities.
    """
    ours, theirs, missing = dict(plans), checkpoint["plans"], []
    of_ours = PlansManager(ours).get_configuration(configuration).configuration
    pairs: dict[str, tuple[Any, Any]] = {}
    if theirs is None:  # nnssl states some of it
        stated = checkpoint["nnssl_adaptation_plan"].get("pretrain_plan") or {}
        of_theirs = (stated.get("configurations") or {}).get(checkpoint["configuration"]) or {}
        missing = [name for name in DATA_KEYS if of_theirs.get(name) is None]
    else:
        of_theirs = PlansManager(dict(theirs)).get_configuration(checkpoint["configuration"]).configuration
        for name in ("transpose_forward", LONG):
            pairs[name] = (theirs.get(name), ours.get(name))
    pairs |= {name: (of_theirs.get(name), of_ours.get(name)) for name in DATA_KEYS if name not in missing}
    differences = [
        f"{name}: different" if name == LONG else f"{name}: {a} in the checkpoint's plan, {b} in this one"
        for name, (a, b) in pairs.items()
        if not same_setting(a, b)
    ]
    return [*differences, *([f"the checkpoint does not state {', '.join(missing)}"] if missing else [])]


def same_setting(a: Any, b: Any) -> bool:
    """Tell if two values of a plan spell the same setting.

    For nnU-Net's networks a value equals a list that repeats it. A tuple equals a list, a class's long name equals its
    short name, and None equals an empty block.
    """
    a, b = _spelled(a), _spelled(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_setting(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_setting, a, b))
    if isinstance(a, list) or isinstance(b, list):
        several, single = (a, b) if isinstance(a, list) else (b, a)
        return bool(several) and all(same_setting(item, single) for item in several)
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)  # float32 and float64
    return bool(a == b)


def _spelled(value: Any) -> Any:
    """Return a value in its standard spelling, at the first level: list, dict, class, number, or None."""
    if isinstance(value, (Tensor, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()} or None
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str) and value.startswith("torch."):  # no other package is imported
        return locate(value) or value
    return value
