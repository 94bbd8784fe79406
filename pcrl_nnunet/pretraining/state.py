"""The training state and the training that goes on from it have to agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.pretraining.settings import PretrainSettings
from pcrl_nnunet.settings import without_settings


def agreement(
    settings: PretrainSettings, plans: Mapping[str, Any], cases: Sequence[Case], other_plans: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a training state and the training that goes on from it have to agree in."""
    return {
        "settings": settings.as_dict(),
        "plans": without_settings(plans),
        "cases": [case.name for case in cases],
        "other_plans": dict(other_plans),
    }


def refuse_another(state: Mapping[str, Any], now: Mapping[str, Any], path: str) -> None:
    """Raise `UserError` where a training state differs from the `agreement` of the training at hand.

    Args:
        path: of the state.
    """
    of_state = {**state, "plans": without_settings(state["plans"])}  # its settings are among the state's own
    for what, value in now.items():
        then = of_state[what]
        if then != value:
            if isinstance(value, dict):
                differing = differences(then, value)
            else:
                differing = sorted(set(value) ^ set(then))[:5] or ["their order"]
            raise UserError(
                f"the {what.replace('_', ' ')} {differing} differ from those that {path} was trained with; continue "
                f"with the same ones, or start anew with --overwrite in the place of --c"
            )


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the names of the values that differ, also those within blocks, such as pcrlv2.restoration."""
    found = []
    for name in dict.fromkeys((*now, *then)):
        one, other = then.get(name, ...), now.get(name, ...)  # None is a value
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += [f"{name}.{inner}" for inner in differences(one, other)]
        elif one != other:
            found.append(name)
    return found
