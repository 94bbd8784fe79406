"""Is it learning? A cosine loss near -1 is no proof: constant features reach it too (method.md 5).

B pairs, c channels of a level.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pcrl_nnunet.methods.pcrlv2 import StepOutput

COLLAPSED_SD = 1 / 3  # of 1/sqrt(c), the sd of vectors spread evenly over the sphere
COLLAPSED_RANK = 2.0
NOT_TOLD_APART = 0.02  # matched minus shuffled cosine; 0 is chance
DEAD_RESTORATION = 0.98  # restoration MSE over the target's variance; 1 is what the mean of each view reaches
DIVERGED_RESTORATION = 2.0  # far worse than the mean of each view, which a network at its start nearly reaches
EARLY_STEPS = 200  # before them nothing is judged: an epoch's mean still holds the first steps
# Before these a loss may stand still and begin to learn all the same (docs/evidence/hippocampus.md): the restoration,
GRACE_STEPS = 500
COMPARISON_GRACE_STEPS = 2000  # and the comparison, which starts where there is nothing to compare
KEPT_VECTORS = 512  # a level and epoch, for the effective rank

Summary = Mapping[str, Mapping[int, float]]  # the monitor's values: by quantity and level, the mean over an epoch


@dataclass(frozen=True)
class Verdict:
    """The answer to "Is it learning?" after some steps.

    Attributes:
        state: "alarm" if there is an alarm; "learning" if every quantity shows it; else "too early".
        text: the answer as a sentence.
        alarms: sentences that say what fails at which level, and what to do.
    """

    state: Literal["too early", "learning", "alarm"]
    text: str
    alarms: tuple[str, ...] = ()


def judge(summary: Summary, steps_done: int) -> Verdict:
    """Say whether a pretraining learns. The log, the report and everybody else ask this function.

    - Under 200 steps it is too early to tell.
    - From 200 steps on, an error of more than twice the images' variance is an alarm.
    - From 500 steps on, a restoration no better than a constant image and collapsed features are alarms; from 2,000
      steps on, features that do not tell scans apart are an alarm. Before, they mean that it is too early to tell.
    - It learns if none of these is found.

    Args:
        summary: of the last epoch, as `Monitor.summary` gives it.
        steps_done: since the training began.
    """
    found = _failures(summary)
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


def _failures(summary: Summary) -> list[tuple[int, str]]:
    """Return what an epoch failed at, each with the number of steps from which on it is an alarm."""
    found = []
    for level, ratio in summary.get("restoration_ratio", {}).items():
        if not ratio < DEAD_RESTORATION:  # also where it is not a number
            diverged = ratio > DIVERGED_RESTORATION
            found.append(
                (
                    EARLY_STEPS if diverged else GRACE_STEPS,
                    f"restoration of level {level} is {'far off' if diverged else 'dead'}: its error is {ratio:.2f} of "
                    f"the images' variance, where a constant image reaches 1.00; lower initial_lr or check the images "
                    f"(--dry_run)",
                )
            )
    for level, margin in summary.get("matched_minus_shuffled", {}).items():
        if not margin >= NOT_TOLD_APART:
            found.append(
                (
                    COMPARISON_GRACE_STEPS,
                    f"features of level {level} do not tell scans apart: two views of the same scan are as alike as "
                    f"views of two scans (cosine {margin:+.3f} more); train longer, or raise batch_size",
                )
            )
    for level, ratio in summary.get("sd_ratio", {}).items():
        rank = summary["effective_rank"][level]
        if not (ratio >= COLLAPSED_SD and rank >= COLLAPSED_RANK):
            found.append(
                (
                    GRACE_STEPS,
                    f"features of level {level} have collapsed: sd {ratio:.2f} of an even spread's, effective rank "
                    f"{rank:.1f}; lower comparison_weight or initial_lr, or raise batch_size",
                )
            )
    return found


class Monitor:
    """Collects one epoch's steps a level; `summary` gives their means, which `judge` judges."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Start the next epoch."""
        self._vectors: dict[int, list[Tensor]] = defaultdict(list)
        self._margins: dict[int, list[float]] = defaultdict(list)
        self._restorations: dict[int, list[float]] = defaultdict(list)

    def state(self) -> dict[str, dict[int, list[Any]]]:
        """What has been collected, as plain values and tensors."""
        return {
            "vectors": dict(self._vectors),
            "margins": dict(self._margins),
            "restorations": dict(self._restorations),
        }

    def load_state(self, state: Mapping[str, Mapping[int, list[Any]]]) -> None:
        """Go on from what `state` gave."""
        self.clear()
        self._vectors.update(state["vectors"])
        self._margins.update(state["margins"])
        self._restorations.update(state["restorations"])

    def update(self, output: StepOutput, target: Tensor) -> None:
        """One step; target (B, 2, C, *)."""
        restoration, comparison, _ = output.levels
        if restoration is not None and output.restored is not None:
            self._restorations[restoration].append(float(restoration_ratio(output.restored, target)))
        if comparison is not None and output.v is not None and output.p is not None:
            if sum(len(v) for v in self._vectors[comparison]) < KEPT_VECTORS:
                self._vectors[comparison].append(output.v.flatten(0, 1).float().cpu())
            self._margins[comparison].append(float(matched_minus_shuffled(output.p[:, 0], output.v[:, 1])))

    def summary(self) -> dict[str, dict[int, float]]:
        """Per quantity and level; levels that no step of the epoch drew are absent."""
        vectors = {level: torch.cat(v) for level, v in sorted(self._vectors.items())}
        return {
            "restoration_ratio": {level: _mean(r) for level, r in sorted(self._restorations.items())},
            "matched_minus_shuffled": {level: _mean(m) for level, m in sorted(self._margins.items())},
            "sd_ratio": {level: float(sd_ratio(v)) for level, v in vectors.items()},
            "effective_rank": {level: float(effective_rank(v)) for level, v in vectors.items()},
        }


def matched_minus_shuffled(p: Tensor, v: Tensor) -> Tensor:
    """Mean cosine of p and v (B, c) of the same sample, less that of different samples; 0 tells nothing apart."""
    cosines = F.normalize(p.float(), dim=1) @ F.normalize(v.float(), dim=1).T
    matched = cosines.diagonal().mean()
    shuffled = (cosines.sum() - cosines.diagonal().sum()) / (cosines.numel() - len(cosines))
    return matched - shuffled


def restoration_ratio(restored: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the target's variance, both (B, 2, C, *): 1 for the mean of each view, 0 for the target.

    The variance is that within a view and channel, mean over these: views differ in their mean, channels differ more,
    and restoring no more than means must not look like a success.
    """
    variance = target.float().flatten(3).var(3, correction=0).mean()
    return F.mse_loss(restored.float(), target.float()) / variance.clamp_min(1e-12)


def sd_ratio(v: Tensor) -> Tensor:
    """Mean over channels of the sd of the L2-normalised v (K, c), over 1/sqrt(c) (SimSiam, section 4.1).

    The BatchNorm before v hides most collapses from it: `effective_rank` and `matched_minus_shuffled` see more.
    """
    return F.normalize(v.float(), dim=1).std(0).mean() * v.shape[1] ** 0.5


def effective_rank(v: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of the centred v (K, c) (Roy & Vetterli, 2007)."""
    singular = torch.linalg.svdvals(v.float() - v.float().mean(0))
    share = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
