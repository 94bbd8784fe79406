"""Is it learning? The quantities of an epoch's steps, and the verdict on them.

K vectors, c channels of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pcrl_nnunet.methods.base import StepOutput
from pcrl_nnunet.methods.quantities import EARLY_STEPS, Alarm, Quantity

KEPT_VECTORS = 512  # a group and epoch, for spread and rank

Summary = Mapping[str, Mapping[str, float]]  # the monitor's values: by quantity and group, the mean over an epoch


@dataclass(frozen=True)
class Verdict:
    """The answer to "Is it learning?" after some steps.

    Attributes:
        state: "alarm" if there is an alarm; "learning" if every quantity shows it; else "too early".
        text: the answer as a sentence.
        alarms: sentences that say what fails in which group, and what to do.
    """

    state: Literal["too early", "learning", "alarm"]
    text: str
    alarms: tuple[str, ...] = ()


def judge(summary: Summary, steps_done: int, quantities: Sequence[Quantity]) -> Verdict:
    """Say whether a pretraining learns. The log, the report and everybody else ask this function.

    - Under 200 steps it is too early to tell.
    - A failure of a quantity is an alarm from the number of steps on that the quantity says. Before, it means that it
      is too early to tell.
    - It learns if nothing fails.

    Args:
        summary: of the last epoch, as `Monitor.summary` gives it.
        steps_done: since the training began.
        quantities: of the method.
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
    """Return what an epoch failed at, each with the number of steps from which on it is an alarm."""
    found = []
    for quantity in quantities:
        for group in summary.get(quantity.name, {}):
            values = {name: of_groups[group] for name, of_groups in summary.items() if group in of_groups}
            found.append(quantity.alarm(group, values))
    return [alarm for alarm in found if alarm is not None]


class Monitor:
    """Collects one epoch's steps by group; `summary` gives their means, which `judge` judges.

    Attributes:
        collected: plain values and tensors, which a training that goes on takes over.
    """

    def __init__(self, quantities: Sequence[Quantity]) -> None:
        self.quantities = quantities
        self.clear()

    def clear(self) -> None:
        """Start the next epoch."""
        self.collected: dict[str, dict[str, Any]] = {"vectors": {}, "values": {}}

    def update(self, output: StepOutput) -> None:
        """Take one step."""
        for name, of_groups in output.values.items():
            for group, value in of_groups.items():
                self.collected["values"].setdefault(name, {}).setdefault(group, []).append(float(value))
        for group, vectors in output.vectors.items():
            kept = self.collected["vectors"].setdefault(group, [])
            if sum(map(len, kept)) < KEPT_VECTORS:
                kept.append(vectors.float().cpu())

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the means by quantity and group; groups that no step of the epoch had are absent."""
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
    """Sort "level 2" before "level 10"."""
    return len(item[0]), item[0]
