"""The shape of an encoder, which decides if a checkpoint loads into a plan's network."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.named_plans import COPY_KEY
from pcrl_nnunet.plans import read_json

FITTED_KEY = "pcrl_fitted"  # key in a plan of pcrl_nnunet_transfer: names the plan's checkpoint
NOT_TO_CHOOSE = {FITTED_KEY, COPY_KEY, "pcrl_target"}
MOST_NAMED = 3


@dataclass(frozen=True)
class EncoderShape:
    """The properties that have to agree: kind of network, dimensions, widths of stages."""

    network: str  # PlainConvUNet or ResidualEncoderUNet
    dimensions: int
    widths: tuple[int, ...]  # from full resolution to the bottleneck

    def __str__(self) -> str:
        return f"{self.network} in {self.dimensions}D with {', '.join(map(str, self.widths))} features"

    def loads_into(self, other: EncoderShape) -> bool:
        """Tell if all common stages agree; either network may have more stages."""
        return (self.network, self.dimensions) == (other.network, other.dimensions) and all(
            ours == theirs for ours, theirs in zip(self.widths, other.widths, strict=False)
        )

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor]) -> EncoderShape | None:
        """Read the shape from a state dict with nnU-Net's names; None if it has no such encoder."""
        widths: dict[int, int] = {}
        residual, dimensions = False, 0
        for name, tensor in weights.items():
            match = re.match(r"encoder\.stages\.(\d+)\.", name)
            if match and tensor.ndim >= 4:
                widths[int(match[1])], dimensions = tensor.shape[0], tensor.ndim - 2
                residual |= ".blocks." in name
        network = "ResidualEncoderUNet" if residual else "PlainConvUNet"
        return cls(network, dimensions, tuple(widths[stage] for stage in sorted(widths))) if widths else None

    @classmethod
    def of_plan(cls, plans: Mapping[str, Any], configuration: str) -> EncoderShape | None:
        """Read the shape from a plan; None for a network without stages, such as Primus."""
        architecture = PlansManager(dict(plans)).get_configuration(configuration).configuration["architecture"]
        widths = architecture["arch_kwargs"].get("features_per_stage")
        if widths is None:
            return None
        dimensions = len(architecture["arch_kwargs"]["strides"][0])
        return cls(architecture["network_class_name"].rsplit(".", 1)[-1], dimensions, tuple(widths))


def check_architecture(
    checkpoint: Mapping[str, Any],
    plans: Mapping[str, Any],
    configuration: str,
    folder: str,
    allow_partial: bool = False,
) -> None:
    """Raise `UserError` if a checkpoint's encoder cannot load into a plan's network. The message names fitting plans.

    Args:
        checkpoint: content of a file that `foreign.read_encoder` read.
        folder: the dataset's preprocessed folder, which is searched for other plans.
        allow_partial: accept other widths in some stages.
    """
    random = set(checkpoint.get("random_keys", ()))
    pretrained = {name: tensor for name, tensor in checkpoint["network_weights"].items() if name not in random}
    theirs, ours = EncoderShape.of_weights(pretrained), EncoderShape.of_plan(plans, configuration)
    this = f"{configuration} of {plans['plans_name']}"
    if theirs is None:
        raise UserError(
            "the checkpoint has no encoder with stages of convolutions (encoder.stages.0...); expected one of a "
            "PlainConvUNet or ResidualEncoderUNet: take another checkpoint"
        )
    if ours is None:
        raise UserError(
            f"the network of {this} has no stages; expected a PlainConvUNet or ResidualEncoderUNet: choose another plan"
        )
    some_fits = (theirs.network, theirs.dimensions) == (ours.network, ours.dimensions) and allow_partial
    if theirs.loads_into(ours) or some_fits:
        return
    fitting = [
        shlex.join(["-c", name, "-p", plan])
        for plan, name, shape in _shapes_in(folder)
        if shape and theirs.loads_into(shape)
    ]
    would = f"none of the dataset's plans fits: it needs a {theirs}, at the stages that both have"
    if fitting:
        would = f"it fits {' or '.join(fitting[:MOST_NAMED])}"
    raise UserError(f"the checkpoint is of a {theirs}, {this} of a {ours}; {would}")


def _shapes_in(folder: str) -> Iterator[tuple[str, str, EncoderShape | None]]:
    """Yield plan, configuration and encoder of a dataset's plans, except plans of transfers and cascades."""
    for file in sorted(glob.glob(os.path.join(glob.escape(folder), "*.json"))):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):  # a `UserError` is a ValueError
            plans = read_json(file, "plan again")
            for name, configuration in plans["configurations"].items():
                if not (plans.keys() & NOT_TO_CHOOSE or configuration.get("previous_stage")):
                    yield plans["plans_name"], name, EncoderShape.of_plan(plans, name)
