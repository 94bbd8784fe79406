"""The verdict of a comparison in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pcrl_nnunet.experiments.arm_names import CONTROL, SEMI, SEMI_SCRATCH, STOCK
from pcrl_nnunet.experiments.scores import Scores, labelled_cases

WORTH = 0.5  # points: a gain that is surely smaller does not pay


@dataclass(frozen=True)
class Gain:
    """The gain of an arm over a control with one number of labelled cases, in points."""

    labelled: int
    control: str
    pairs: int
    difference: float
    low: float
    high: float

    @property
    def pays(self) -> bool:
        """Tell if the gain is surely above 0, and perhaps worth it."""
        return self.low > 0 and self.high >= WORTH

    @property
    def costs(self) -> bool:
        """Tell if the arm is surely worse than the control."""
        return self.high < 0

    def sentence(self, measure: str) -> str:
        """Say what to expect."""
        kind = "expect" if self.low > 0 else "it costs" if self.costs else "undecided,"
        between = f"{self.low:+.1f} to {self.high:+.1f}, " if np.isfinite(self.low) else ""
        subsets = f"{self.pairs} subset{'s' * (self.pairs > 1)}"
        gain = f"{self.difference:+.1f} {measure} over {self.control}"
        return f"with {labelled_cases(self.labelled)} {kind} {gain} ({between}{subsets})"


def verdict(
    scores: Scores, arm: str, learned: Mapping[int, Sequence[str]], controls: Sequence[str] = (CONTROL, STOCK)
) -> str:
    """Say what an arm gains over the better control, for every number of labelled cases.

    Args:
        learned: see `networks_that_learned`. If neither arm nor control learned, their difference means nothing.
    """
    gains, nothing = _gains(scores, arm, learned, controls)
    if not gains and nothing:
        return f"Nothing can be said about {arm}: {'; '.join(nothing)}."
    if not gains:
        return f"Nothing can be said about {arm} yet: there is no finished pair of {arm} and {CONTROL}."
    told = [gain.sentence(scores.measure) for gain in gains]
    return f"{_start(arm, gains, bool(nothing), scores.measure)}: {'; '.join(told + nothing)}."


def what_to_use(
    scores: Scores, learned: Mapping[int, Sequence[str]], controls: Mapping[str, Sequence[str]]
) -> str | None:
    """Name the method to use with each number of labelled cases; None if no network learned anything.

    A method that pays (see `Gain.pays`) is named; of several such methods, the one with the highest mean. If no method
    pays, the answer is the control, which costs least.

    Args:
        learned: see `networks_that_learned`.
        controls: the controls of each arm with a network, by its name.
    """
    told = []
    for labelled in sorted(number for number, arms in learned.items() if arms):
        means = scores.runs[scores.runs["labelled"] == labelled].groupby("method")["points"].mean()
        gains = {arm: _gain(scores, arm, labelled, own) for arm, own in controls.items()}
        known = {arm: gain for arm, gain in gains.items() if gain is not None and np.isfinite(gain.low)}
        paying = [arm for arm, gain in known.items() if gain.pays]
        start = f"with {labelled_cases(labelled)}"
        if paying:
            best = max(paying, key=lambda arm: means[arm])
            equal = [arm for arm in paying if arm != best and not scores.gain(best, arm, labelled).get("low", 0.0) > 0]
            told.append(f"{start} {best}" + f" (perhaps no better than {', '.join(equal)})" * bool(equal))
        elif known:
            told.append(f"{start} {CONTROL}, as no method surely pays")
        elif any(gain is not None for gain in gains.values()):
            told.append(f"{start} nothing can be said, as a single subset has no interval (add subsets: -seeds)")
    return f"What to use: {'; '.join(told)}." if told else None


def note_on_pretraining(scores: Scores, learned: Mapping[int, Sequence[str]]) -> str | None:
    """Say what the pretraining adds to semi-supervised training; None without a pair of both arms.

    Args:
        learned: see `networks_that_learned`.
    """
    gains, nothing = _gains(scores, SEMI, learned, [SEMI_SCRATCH])
    told = [gain.sentence(scores.measure) for gain in gains] + nothing
    return f"What the pretraining adds to {SEMI}: {'; '.join(told)}." if told else None


def _gains(
    scores: Scores, arm: str, learned: Mapping[int, Sequence[str]], controls: Sequence[str]
) -> tuple[list[Gain], list[str]]:
    """Return the gains over the better control, and clauses about the numbers with which neither arm learned."""
    gains, nothing = [], []
    for labelled in sorted(scores.runs["labelled"].unique()):
        gain = _gain(scores, arm, labelled, controls)
        if gain is None:
            continue
        if {arm, gain.control} & {*learned.get(labelled, ())}:
            gains.append(gain)
        else:
            nothing.append(f"with {labelled_cases(labelled)} neither {arm} nor {gain.control} surely learned anything")
    return gains, nothing


def _gain(scores: Scores, arm: str, labelled: int, controls: Sequence[str]) -> Gain | None:
    """Return the gain over the better control; None without a pair."""
    control = _better_control(scores, arm, labelled, controls)
    found = {} if control is None else scores.gain(arm, control, labelled)
    if control is None or not found:
        return None
    return Gain(labelled, control, int(found["pairs"]), found["difference"], found["low"], found["high"])


def _start(arm: str, gains: Sequence[Gain], some_learned_nothing: bool, measure: str) -> str:
    """Return the verdict's main clause."""
    pays, costs, numbers = (
        ", ".join(str(gain.labelled) for gain in those)
        for those in ([g for g in gains if g.pays], [g for g in gains if g.costs], gains)
    )
    highs = [gain.high for gain in gains]
    if pays:
        everywhere = all(gain.pays for gain in gains) and not some_learned_nothing
        where = "" if everywhere else f" with {pays} labelled cases" + f", and costs with {costs}" * bool(costs)
        return f"{arm} pays{where}"
    if all(high < WORTH for high in highs):
        return f"{arm} does not pay " + (f"with {numbers} labelled cases" if some_learned_nothing else "here")
    most = f" (at most {max(highs):+.1f} {measure})" if np.isfinite(highs).all() else ""
    return f"It is undecided whether {arm} pays{most}, more subsets (-seeds) or scored cases may tell"


def _better_control(scores: Scores, arm: str, labelled: int, controls: Sequence[str]) -> str | None:
    """Return the better control on the arm's subsets; None without a control.

    A control that ran on fewer of these subsets than another is left out. It would lose pairs, and its mean would
    depend on how easy its subsets are.
    """
    of_number = scores.runs[scores.runs["labelled"] == labelled]
    points = of_number.pivot(index="seed", columns="method", values="points")
    names = [name for name in controls if name in points and name != arm]
    if arm not in points or not names:
        return None
    found = points.loc[points[arm].notna(), names]
    pairs = found.notna().sum()
    found = found.loc[:, pairs == pairs.max()]
    common = found.dropna()
    return str(found.columns[0] if common.empty else common.mean().idxmax())
