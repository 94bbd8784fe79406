"""The check that a resumed training agrees with its training state."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pcrl_nnunet.checkpoint import plans_hash
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.pretraining import distributed
from pcrl_nnunet.pretraining.request import Request
from pcrl_nnunet.pretraining.result import versions
from pcrl_nnunet.settings import differences, without_settings


def agreement(request: Request) -> dict[str, Any]:
    """Return the facts that a training state and the resumed training must share."""
    return {
        "settings": request.settings.as_dict(),
        "plans": without_settings(request.plan.plans),
        "cases": [case.name for case in request.cases.used],
        "other_plans": dict(request.cases.other_plans),
    }


def refuse_another(state: Mapping[str, Any], now: Mapping[str, Any], path: str) -> None:
    """Raise `UserError` if a training state differs from this training's `agreement`.

    Args:
        path: path of the state.
    """
    of_state = {**state, "plans": without_settings(state["plans"])}  # the state holds the settings separately
    for what, value in now.items():
        then = of_state[what]
        if then != value:
            if isinstance(value, dict):
                differing = list(differences(then, value))
            else:
                differing = sorted(set(value) ^ set(then))[:5] or ["their order"]
            raise UserError(
                f"the {what.replace('_', ' ')} {differing} differ from those that {path} was trained with; continue "
                f"with the same ones, or start anew with --overwrite in the place of --c"
            )


def agree_with_other_ranks(request: Request, cases: Sequence[Case]) -> None:
    """Raise `UserError` on all ranks if the machines differ in settings, plans, cases or versions."""
    paths = {case.name: case.path for case in cases}
    for what, value in (
        ("settings", repr(request.settings)),
        ("plans", plans_hash(request.plan.plans)),
        # None: the file is missing, which reading it will report
        ("cases", repr({name: os.path.getsize(p) if os.path.exists(p) else None for name, p in paths.items()})),
        ("versions", repr(versions())),
    ):
        distributed.require_same(what, value)
