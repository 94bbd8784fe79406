"""The plans with which a dataset SOURCE pretrains for another dataset TARGET; `ingest.target` makes them."""

from __future__ import annotations

import os

from pcrl_nnunet.commands import command
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.plans import dataset_folder

TARGET_KEY = "pcrl_target"  # key in such a plan: names TARGET and its plan; nnU-Net ignores it


def plans_name_for(dataset_name: str, plans_name: str) -> str:
    """Return the name, in SOURCE's folder, of the plan for a plan of TARGET."""
    return f"{plans_name}_for_{dataset_name}"


def existing_plan(dataset: str, target: str, plans_name: str) -> str:
    """Return the name of SOURCE's plan for a plan of TARGET.

    Args:
        dataset, target: names or IDs of SOURCE and TARGET.
        plans_name: name of TARGET's plan.

    Raises:
        UserError: the plan does not exist; the message has the command that makes it.
    """
    name = plans_name_for(os.path.basename(dataset_folder(target)), plans_name)
    path = os.path.join(dataset_folder(dataset, "nnUNetv2_extract_fingerprint"), f"{name}.json")
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; run {preprocess_command(dataset, target, plans_name)} first")
    return name


def preprocess_command(source: str, dataset_name: str, plans_name: str, configuration: str | None = None) -> str:
    """Return the command that makes SOURCE's plan for a plan of another dataset, and preprocesses the images."""
    plans = None if plans_name == "nnUNetPlans" else plans_name
    return command("pcrl_nnunet_preprocess", d=source, target=dataset_name, p=plans, c=configuration)
