"""Copies of a plan under another name, to give a second pretraining its own folder.

The copy PLANS_NAME shares the preprocessed data of PLANS. Every command accepts it with ``-p PLANS_NAME``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import write_text, writing
from pcrl_nnunet.plans import PlannedConfiguration, read_json, resolve
from pcrl_nnunet.settings import pcrl_block, without_settings

COPY_KEY = "pcrl_copy_of"  # key in a copy: the name of the original plan
_OF_DATA = ("data_identifier", "spacing", "normalization_schemes", "use_mask_for_norm")
_OF_ALL_DATA = ("transpose_forward", "foreground_intensity_properties_per_channel")


def check_name(name: str) -> None:
    """Raise `UserError` for a NAME that cannot be part of a folder's name."""
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise UserError(f"-name is '{name}'; expected letters, digits, - and _: it becomes part of folders' names")


def named_plan(plan: PlannedConfiguration, name: str) -> PlannedConfiguration:
    """Return the plan PLANS_NAME: the existing copy with its own ``pcrl`` block, or a new copy, not yet written.

    Raises:
        UserError: the name cannot be part of a folder's name, or another plan has that name.
    """
    check_name(name)
    given = plan.plans
    plans = {**deepcopy(given), "plans_name": f"{given['plans_name']}_{name}", COPY_KEY: given["plans_name"]}
    if "pcrl" in plans:  # without a checkpoint: fine-tuning should use the copy's own pretraining
        plans["pcrl"] = {part: value for part, value in pcrl_block(plans).items() if part != "checkpoint"}
    path = _path(plan, plans)
    if os.path.isfile(path):
        there = read_json(path, "give another -name")
        if without_settings(there) != without_settings(plans):
            is_copy = there.get(COPY_KEY) == plans[COPY_KEY]
            why = f"a copy of {plans[COPY_KEY]} from before that plan was changed" if is_copy else "another plan"
            raise UserError(f"{path} is {why}; give another -name")
        plans = there
    return replace(plan, plans=plans, resolved=resolve(plans, plan.configuration))


def write_copy(plan: PlannedConfiguration) -> str | None:
    """Write a plan of `named_plan`. Return its path, or None if it exists or is not a copy.

    Raises:
        UserError: the folder is not writable.
    """
    path = _path(plan, plan.plans)
    if COPY_KEY not in plan.plans or os.path.isfile(path):
        return None
    with writing(f"-name writes the plan {path}, which", "make that folder writable, or leave -name out"):
        write_text(path, json.dumps(plan.plans, indent=4))
    return path


def name_of(plans: Mapping[str, Any]) -> str | None:
    """Return the NAME of a copy; None for an original plan."""
    return plans["plans_name"].removeprefix(f"{plans[COPY_KEY]}_") if COPY_KEY in plans else None


def refuse_outdated(plans: Mapping[str, Any], configuration: str, folder: str) -> None:
    """Raise `UserError` for a copy whose original now describes other preprocessed data in the same folder.

    Args:
        folder: the dataset's folder in nnUNet_preprocessed.
    """
    path = os.path.join(folder, f"{plans.get(COPY_KEY)}.json")
    if not os.path.isfile(path):
        return
    original = read_json(path, "plan the dataset again")
    values = [_values(each, configuration) for each in (plans, original)]
    changed = [name for name in values[0] if values[0][name] != values[1].get(name)]
    if changed:
        raise UserError(
            f"{plans['plans_name']} is a copy of {plans[COPY_KEY]}, which was planned again since and has other values "
            f"of {', '.join(changed)}; both share the preprocessed data: take {plans[COPY_KEY]} and another -name"
        )


def _values(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return the parts of a plan that determine the preprocessed data."""
    known = plans["configurations"]
    resolved = resolve(plans, configuration) if configuration in known else {}
    return {name: resolved.get(name) for name in _OF_DATA} | {name: plans.get(name) for name in _OF_ALL_DATA}


def _path(plan: PlannedConfiguration, plans: Mapping[str, Any]) -> str:
    return os.path.join(plan.folder, f"{plans['plans_name']}.json")
