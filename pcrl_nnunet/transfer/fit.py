"""The fit of a pretrained checkpoint to another plan's network, and the plan for its fine-tuning."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import new_folder, whole
from pcrl_nnunet.networks.of_plan import network_of_plan
from pcrl_nnunet.plans import PlannedConfiguration, read_json
from pcrl_nnunet.settings import without_settings
from pcrl_nnunet.transfer.differences import differences, notes_on
from pcrl_nnunet.transfer.find import place
from pcrl_nnunet.transfer.foreign import read_encoder
from pcrl_nnunet.transfer.report import TransferReport
from pcrl_nnunet.transfer.shapes import FITTED_KEY, check_architecture
from pcrl_nnunet.transfer.weights import load_encoder, load_trained_decoder

TABLE = "transfer.csv"
HEADER = ("tensor", "what", "elements", "how")


@dataclass(frozen=True)
class Fitted:
    """A checkpoint fitted to a plan's network, not yet written.

    Attributes:
        plan: the new plan; it differs from the given plan only in its name and its settings.
        plan_file, checkpoint_file: paths of the files to write.
        content: content of the fitted checkpoint.
        notes: differences in network and data between the pretraining and the plan.
    """

    plan: dict[str, Any]
    plan_file: str
    checkpoint_file: str
    content: dict[str, Any]
    report: TransferReport
    notes: list[str]


def fit(source: str, plan: PlannedConfiguration, name: str, input_channels: str, results: str) -> Fitted:
    """Fit a checkpoint to a plan's network.

    Args:
        source: path of the checkpoint.
        name: name of the experiment, a part of the new plan's name.
        input_channels: way to adapt the number of input channels, see `adapt.adapt_input_channels`.
        results: nnUNet_results.

        Raises:
            UserError: the checkpoint does not fit, or files of the same names have other contents.
    """
    checkpoint = read_encoder(source)
    torch.manual_seed(0)  # weights that are not pretrained are always the same
    network, channels = network_of_plan(plan.plans, plan.configuration, plan.dataset_json)
    try:
        check_architecture(checkpoint, plan.plans, plan.configuration, plan.folder)
        report = load_encoder(network, checkpoint, allow_partial=True, input_channels=input_channels)
        load_trained_decoder(network, checkpoint, report)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    plans_name, block = f"{plan.plans['plans_name']}_{name}", _settings(plan.plans, report.encoder_share < 1)
    new = {**deepcopy(plan.plans), "plans_name": plans_name, FITTED_KEY: source, "pcrl": block}
    folder = os.path.join(results, plan.plans["dataset_name"])
    fitted = Fitted(
        new,
        os.path.join(plan.folder, f"{plans_name}.json"),
        place(folder, plans_name, plan.configuration, "all"),
        _content(checkpoint, source, network, channels, replace(plan, plans=new), report),
        report,
        notes_on(differences(checkpoint, plan.plans, plan.configuration)),
    )
    _refuse_others(fitted)
    return fitted


def write(fitted: Fitted) -> None:
    """Write the files, the plan last: if the plan exists, everything does. An error leaves no new files."""
    folder = os.path.dirname(fitted.checkpoint_file)
    table = os.path.join(folder, TABLE)
    try:
        with new_folder(folder), whole(fitted.plan_file) as plan_draft, whole(table) as table_draft:
            with open(plan_draft, "w", encoding="utf-8") as file:  # fails before any file is in place
                json.dump(fitted.plan, file, indent=4)
            with open(table_draft, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([HEADER, *fitted.report.rows()])
            checkpoint_file.write(fitted.checkpoint_file, fitted.content, go_on="run this again")
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}), so no plan and no checkpoint were written; "
            f"make room or the folder writable, and run this again"
        ) from error


def _settings(plans: Mapping[str, Any], partial: bool) -> dict[str, Any]:
    """Return the new plan's settings, which make fine-tuning accept a partially covered encoder if needed."""
    block = {key: value for key, value in deepcopy(plans.get("pcrl", {})).items() if key != "checkpoint"}
    return {**block, "finetune": {**block.get("finetune", {}), **({"allow_partial_encoder": True} if partial else {})}}


def _content(
    checkpoint: Mapping[str, Any],
    source: str,
    network: Any,
    channels: int,
    plan: PlannedConfiguration,
    report: TransferReport,
) -> dict[str, Any]:
    """Return the checkpoint with the plan's network. It keeps its origin and the cases that it saw."""
    state = network.state_dict()
    adaptation_plan = checkpoint_file.nnssl_adaptation_plan(plan, plan.resolved["patch_size"], channels, network)
    if stated := checkpoint["nnssl_adaptation_plan"].get("pretrain_plan"):
        adaptation_plan["pretrain_plan"] = stated  # describes the data of the pretraining
    pretrained = {state[name].untyped_storage()._cdata for name in (*report.loaded, *report.adapted)}
    return {
        **checkpoint,
        "format": checkpoint_file.FORMAT,
        "network_weights": state,
        "random_keys": [n for n, tensor in state.items() if tensor.untyped_storage()._cdata not in pretrained],
        "num_input_channels": channels,
        "encoder_hash": checkpoint_file.encoder_hash(network.encoder),
        "architecture_kwargs": plan.resolved["architecture"]["arch_kwargs"],
        "nnssl_adaptation_plan": adaptation_plan,
        "adapted": {"checkpoint": source, "encoder_share": report.encoder_share, "notes": report.notes},
    }


def _refuse_others(fitted: Fitted) -> None:
    """Raise `UserError` if files of the same names have other contents: an experiment is never replaced."""
    plan = fitted.plan
    if os.path.isfile(fitted.plan_file):
        there = read_json(fitted.plan_file, "remove it and run this again")
        given = {**json.loads(json.dumps(plan)), FITTED_KEY: there.get(FITTED_KEY)}  # the checkpoint is compared below
        if without_settings(there) != without_settings(given):
            raise UserError(f"{fitted.plan_file} exists and is another plan; give another -name, or remove it")
        plan["pcrl"] = _settings(there, plan["pcrl"]["finetune"].get("allow_partial_encoder", False))  # edited
    target = fitted.checkpoint_file
    if os.path.isfile(target) and checkpoint_file.read(target)["encoder_hash"] != fitted.content["encoder_hash"]:
        raise UserError(f"{target} exists and holds another encoder; give another -name, or remove it")
