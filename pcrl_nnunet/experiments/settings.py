"""Settings of a comparison: the plan's blocks, then blocks for all arms, then one arm's. Later blocks win."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.plans import read_json
from pcrl_nnunet.settings import merged

PARTS = ("pretrain", "finetune", "semi", "classify")  # parts of the plan's pcrl block that -settings may change


def with_settings(plans: Mapping[str, Any], *settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a plan with these settings; later settings win over earlier settings and the plan's."""
    plan = dict(deepcopy(plans))
    block = plan.setdefault("pcrl", {})
    for part in PARTS:
        of_part: dict[str, Any] = block.get(part, {})
        for given in settings:
            of_part = _with(of_part, given.get(part) or {}, plan["configurations"])
        if of_part or part in ("pretrain", "finetune"):
            block[part] = of_part
    block.pop("checkpoint", None)
    return plan


def _with(block: Mapping[str, Any], given: Mapping[str, Any], configurations: Iterable[str]) -> dict[str, Any]:
    """Return a block with settings over it. A setting for all configurations wins over a configuration's own."""
    kept = dict(block)
    for name in configurations:
        if name in block:
            kept[name] = _without(block[name], given)
    return merged(kept, deepcopy(dict(given)))


def _without(block: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block without the given settings, nested blocks included."""
    kept = {}
    for name, value in block.items():
        if isinstance(value, Mapping) and isinstance(given.get(name), Mapping):
            kept[name] = _without(value, given[name])
        elif name not in given:
            kept[name] = value
    return kept


def refuse_other_parts(where: str, block: Mapping[str, Any]) -> None:
    """Raise `UserError` for a block with entries that are not `PARTS` or that hold no settings."""
    for part, given in block.items():
        if part not in PARTS or not isinstance(given, Mapping):
            raise UserError(f"{where} has {part}: {short(given)}; expected the blocks of settings {', '.join(PARTS)}")


def check_protocol(protocol: str, checkpoint: str | None) -> None:
    """Raise `UserError` for a checkpoint without the protocol transfer, or the protocol without a checkpoint."""
    if (protocol == "transfer") != (checkpoint is not None):
        raise UserError(
            f"-protocol is {protocol} and -checkpoint {checkpoint}; only transfer compares a pretraining on other "
            f"data: give its checkpoint_final.pth with -checkpoint, or choose all or semi"
        )


def read_blocks(path: str | None) -> dict[str, Any]:
    """Read a JSON file of the form ``{NAME: {...}, ...}``; empty without a path."""
    content = {} if path is None else read_json(path, "expected a JSON file of the form {NAME: {...}, ...}")
    if not all(isinstance(block, dict) for block in content.values()):
        raise UserError(f"{path} holds no blocks of names and values; expected {{NAME: {{...}}, ...}}")
    return content


def short(value: Any) -> str:
    """Return a value as JSON for a message, cut after 60 characters."""
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."
