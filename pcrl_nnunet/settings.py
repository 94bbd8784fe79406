"""A plan's ``pcrl`` block, and settings as frozen dataclasses that read their fields from it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass, replace
from operator import ge, gt, le, lt
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pcrl_nnunet.errors import UserError

PARTS = ("pretrain", "finetune", "semi", "classify", "checkpoint")  # parts of a plan's block
NOT_IN_BLOCK = {"in_block": False}  # metadata of a field that `replaced` refuses

_Settings = TypeVar("_Settings")
_BOUNDS = {
    "at_least": (ge, "{} or more"),
    "above": (gt, "a number above {}"),
    "at_most": (le, "up to {}"),
    "below": (lt, "below {}"),
}


def number(default: float, hint: str = "", **bounds: float) -> Any:
    """Return a field of settings whose values `replaced` keeps within bounds.

    Args:
        hint: end of the message about a value out of bounds.
        bounds: ``at_least``, ``above``, ``at_most`` and ``below``.
    """
    return field(default=default, metadata={"bounds": bounds, "hint": hint})


def probability(default: float) -> Any:
    """Return a field of settings for a probability."""
    return number(default, at_least=0, at_most=1)


def within(bounds: Mapping[str, float]) -> str:
    """Return bounds in words, such as "a number from 0 to 1"."""
    if [*bounds] == ["at_least", "at_most"]:
        return f"a number from {bounds['at_least']} to {bounds['at_most']}"
    return ", ".join(_BOUNDS[bound][1].format(limit) for bound, limit in bounds.items())


def pcrl_block(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan's ``pcrl`` block, empty if missing. Raise `UserError` for an unknown part."""
    block = part(plan, "pcrl")
    for name in block.keys() - {*PARTS}:
        raise UserError(f"pcrl.{name} is no part of the plan's settings; expected {', '.join(PARTS)}: correct its name")
    named = block.get("checkpoint")
    if named is not None and not isinstance(named, str):
        raise UserError(f"pcrl.checkpoint is {named!r}; expected the path of a checkpoint_final.pth")
    return block


def without_settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plan without our block: everything that determines preprocessing and network."""
    return {key: value for key, value in plan.items() if key != "pcrl"}


def part(settings: Mapping[str, Any], name: str, where: str = "") -> dict[str, Any]:
    """Return a copy of a block of settings, empty if missing."""
    given = settings.get(name, {})
    if not isinstance(given, Mapping):
        raise UserError(f'{where}{name} is {given!r}; expected a block of settings: {{"NAME": VALUE, ...}}')
    return dict(given)


def merged(block: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return a block of settings with another block over it. Common nested blocks are merged in turn."""
    result = dict(block)
    for name, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if both else value
    return result


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return differing values, nested blocks included, by names such as pcrlv2.restoration; missing ones are None."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in dict.fromkeys((*now, *then)):
        one, other = then.get(name, ...), now.get(name, ...)  # None is a value
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= {f"{name}.{inner}": values for inner, values in differences(one, other).items()}
        elif one != other:
            found[name] = then.get(name), now.get(name)
    return found


def changes(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the settings that differ from the defaults, in words.

    Args:
        settings, defaults: values by the names that they have in a plan's block.
    """
    found = differences(*(json.loads(json.dumps(each)) for each in (defaults, settings)))
    said = [f"{name} {json.dumps(now)} (default {json.dumps(then)})" for name, (then, now) in found.items()]
    return ", ".join(said) or "the defaults"


def replaced(settings: _Settings, where: str, given: Mapping[str, Any]) -> _Settings:
    """Return settings with some of their fields replaced.

    For a field that is itself a block of settings, only the given fields of the block are replaced.

    Args:
        settings: a frozen dataclass.
        where: place of the settings in the plan, such as pcrl.finetune.
        given: values by names of fields.

        Raises:
            UserError: a name is unknown, a value has the wrong type, or a value is out of bounds.
    """
    known = {f.name: f for f in fields(settings) if f.metadata.get("in_block", True)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{where}.{name} is not a setting; expected one of {', '.join(sorted(known))}")
        default = getattr(settings, name)
        if is_dataclass(default):
            values[name] = replaced(default, f"{where}.{name}", part(given, name, f"{where}."))
            continue
        if default is None:  # any value: the settings check it themselves
            values[name] = value
            continue
        wanted = (int, float) if isinstance(default, float) else type(default)
        sequence = isinstance(default, tuple) and isinstance(value, (list, tuple))
        if not sequence and (not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool)):
            like = "a list: [VALUE, ...]" if default == () else f"a value like {json.dumps(default)}"
            raise UserError(f"{where}.{name} is {json.dumps(value)}; expected {like}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}.{name} is {value}; expected a finite number")
        kind = get_type_hints(type(settings))[name] if isinstance(value, str) else None
        if get_origin(kind) is Literal and value not in (choices := get_args(kind)):
            raise UserError(f"{where}.{name} is '{value}'; expected {' or '.join(map(repr, filter(None, choices)))}")
        bounds, hint = known[name].metadata.get("bounds", {}), known[name].metadata.get("hint", "")
        if not all(_BOUNDS[bound][0](value, limit) for bound, limit in bounds.items()):
            raise UserError(f"{where}.{name} is {value}; expected {within(bounds)}{hint}")
        values[name] = value
    return replace(settings, **values)  # type: ignore[type-var]
