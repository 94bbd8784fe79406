"""The monitor's answer to "Is it learning?": an epoch's quantities, and the verdict on them.

K: vectors, c: channels of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pcrl_nnunet.methods.base import StepOutput
from pcrl_nnunet.methods.quantities import EARLY_STEPS, Alarm, Quantity

KEPT_VECTORS = 512  # for each group and epoch, for spread and rank

Summary = Mapping[str, Mapping[str, float]]  # the monitor's values: the mean over an epoch, by quantity and group


@dataclass(frozen=True)
class Verdict:
    """The answer to "Is it learning?" after some steps.

    Attributes:
        state: "alarm" if there is an alarm; "learning" if every quantity shows it; else "too early".
        text: the answer as a sentence.
        alarms: sentences that name the failure and the group, and say what to do.
    """

    state: Literal["too early", "learning", "alarm"]
    text: str
    alarms: tuple[str, ...] = ()


def judge(summary: Summary, steps_done: int, quantities: Sequence[Quantity]) -> Verdict:
    """Judge whether a pretraining learns. The log, the report and all others call this function.

    - Under 200 steps it is too early to tell.
    - Each quantity sets a number of steps. From then on, a failure is an alarm; before, it is too early to tell.
    - If nothing fails, the pretraining learns.

    Args:
        summary: result of `Monitor.summary` for the last epoch.
        steps_done: number of steps since the training began.
        quantities: the method's quantities.
    """
    found = _failures(summary, quantities)
    alarms = tuple(text for needed, text in found if steps_done >= needed)
    if alarms:
        number = "1 alarm" if len(alarms) == 1 else f"{len(alarms)} alarms"
        return Verdict("alarm", f"No: {number} in the last epoch.", alarms)
    needed = max([EARLY_STEPS, *(needed for needed, _ in found)])
    if not any(summary.values()):
        return Verdict("too early", "Too early to tell: nothing has been measured yet.")
    if steps_done < needed:
        return Verdict("too early", f"Too early to tell: {steps_done:,} steps are done, {needed:,} or more are needed.")
    return Verdict("learning", "Yes: no alarm in the last epoch.")


def _failures(summary: Summary, quantities: Sequence[Quantity]) -> list[Alarm]:
    """Return an epoch's failures. Each holds the number of steps from which it is an alarm."""
    found = []
    for quantity in quantities:
        for group in summary.get(quantity.name, {}):
            values = {name: of_groups[group] for name, of_groups in summary.items() if group in of_groups}
            found.append(quantity.alarm(group, values))
    return [alarm for alarm in found if alarm is not None]


class Monitor:
    """A collector of one epoch's steps by group. `summary` returns their means, and `judge` judges the means.

    Attributes:
        collected: plain values and tensors, which a resumed training takes over.
    """

    def __init__(self, quantities: Sequence[Quantity]) -> None:
        self.quantities = quantities
        self.clear()

    def clear(self) -> None:
        """Start the next epoch."""
        self.collected: dict[str, dict[str, Any]] = {"vectors": {}, "values": {}}

    def update(self, output: StepOutput) -> None:
        """Collect one step."""
        for name, of_groups in output.values.items():
            for group, value in of_groups.items():
                self.collected["values"].setdefault(name, {}).setdefault(group, []).append(float(value))
        for group, vectors in output.vectors.items():
            kept = self.collected["vectors"].setdefault(group, [])
            if sum(map(len, kept)) < KEPT_VECTORS:
                kept.append(vectors.float().cpu())

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the means by quantity and group, without groups that no step of the epoch had."""
        vectors = {group: torch.cat(v) for group, v in sorted(self.collected["vectors"].items(), key=_natural)}
        means: dict[str, dict[str, float]] = {}
        for quantity in self.quantities:
            if quantity.of_vectors is not None:
                means[quantity.name] = {group: float(quantity.of_vectors(v)) for group, v in vectors.items()}
            else:
                of_groups = sorted(self.collected["values"].get(quantity.name, {}).items(), key=_natural)
                means[quantity.name] = {group: sum(values) / len(values) for group, values in of_groups}
        return means


def _natural(item: tuple[str, Any]) -> tuple[int, str]:
    """Return a key that sorts "level 2" before "level 10"."""
    return len(item[0]), item[0]
