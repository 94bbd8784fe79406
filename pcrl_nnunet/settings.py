"""A plan's ``pcrl`` block, and settings as frozen dataclasses that take their fields from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

from pcrl_nnunet.errors import UserError

PARTS = ("pretrain", "finetune", "classify", "checkpoint")  # of a plan's block
NOT_IN_BLOCK = {"in_block": False}  # metadata of a field that `replaced` does not take

_Settings = TypeVar("_Settings")


def pcrl_block(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan's ``pcrl`` block, empty where there is none; `UserError` for a part that it does not have."""
    block = part(plan, "pcrl")
    for name in block.keys() - {*PARTS}:
        raise UserError(f"pcrl.{name} is no part of the plan's settings; expected {', '.join(PARTS)}: correct its name")
    named = block.get("checkpoint")
    if named is not None and not isinstance(named, str):
        raise UserError(f"pcrl.checkpoint is {named!r}; expected the path of a checkpoint_final.pth")
    return block


def without_settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan less our block: all that preprocessing and network depend on."""
    return {key: value for key, value in plan.items() if key != "pcrl"}


def part(settings: Mapping[str, Any], name: str, where: str = "") -> dict[str, Any]:
    """Return a copy of a block of settings, empty where there is none."""
    given = settings.get(name, {})
    if not isinstance(given, Mapping):
        raise UserError(f'{where}{name} is {given!r}; expected a block of settings: {{"NAME": VALUE, ...}}')
    return dict(given)


def merged(block: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block of settings with another one over it; blocks that both have are merged in turn."""
    result = dict(block)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result


def replaced(settings: _Settings, where: str, given: Mapping[str, Any]) -> _Settings:
    """Return settings with some of their fields replaced.

    A field that is itself a block of settings takes a block, of which the fields that are given are replaced.

    Args:
        settings: a frozen dataclass.
        where: its place in the plan, such as pcrl.finetune.
        given: values by the names of fields.

    Raises:
        UserError: a name or a type that the settings do not have.
    """
    known = {f.name for f in fields(settings) if f.metadata.get("in_block", True)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{where}.{name} is not a setting; expected one of {', '.join(sorted(known))}")
        default = getattr(settings, name)
        if is_dataclass(default):
            values[name] = replaced(default, f"{where}.{name}", part(given, name, f"{where}."))
            continue
        if default is None:  # any value: it is for the settings themselves to check
            values[name] = value
            continue
        wanted = (int, float) if isinstance(default, float) else type(default)
        sequence = isinstance(default, tuple) and isinstance(value, (list, tuple))
        if not sequence and (not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool)):
            raise UserError(f"{where}.{name} is {value!r}; expected a value like {default!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}.{name} is {value}; expected a finite number")
        values[name] = value
    return replace(settings, **values)  # type: ignore[type-var]
