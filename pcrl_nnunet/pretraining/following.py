"""The command that comes after a pretraining."""

from __future__ import annotations

import os

from nnunetv2.paths import nnUNet_results

from pcrl_nnunet.commands import command, train_command
from pcrl_nnunet.ingest.maskless import trainer_for
from pcrl_nnunet.named_plans import name_of
from pcrl_nnunet.pretraining.request import Request
from pcrl_nnunet.target_plans import TARGET_KEY
from pcrl_nnunet.transfer.find import methods_in


def next_command(request: Request, final: str, device: str) -> str:
    """Return a line with the command to run after a pretraining.

    Args:
        final: path of the pretraining's checkpoint.
        device: type of its device.
    """
    plans, configuration, fold = request.plan.plans, request.plan.configuration, request.fold
    if TARGET_KEY in plans:
        target, plans_name = (plans[TARGET_KEY][key] for key in ("dataset_name", "plans_name"))
        name = "_".join(part for part in (plans["dataset_name"], name_of(plans)) if part)
        bring = command("pcrl_nnunet_transfer", i=final, d=target, c=configuration, p=plans_name, name=name)
        return f"Bring it into {target} with: {bring}"
    trainer = trainer_for(plans, request.plan.dataset_json)
    if trainer is None:
        bring = command("pcrl_nnunet_transfer", i=final, d="DATASET", name=plans["dataset_name"])
        return (
            f"{plans['dataset_name']} has neither masks nor a table of classes; bring the encoder into a dataset that "
            f"has, with: {bring}"
        )
    results = os.path.join(nnUNet_results.get(), plans["dataset_name"])
    if {*methods_in(results, plans["plans_name"], configuration)} - {request.settings.method}:
        trainer = f"{trainer}_{request.settings.method}"
    number, others = (0, ", and the other folds alike,") if fold == "all" else (fold, "")
    train = train_command(plans["dataset_name"], configuration, number, device, tr=trainer, p=plans["plans_name"])
    return f"Fine-tune fold {number}{others} with: {train}"
