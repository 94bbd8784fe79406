"""The table in the form of the papers: a row for each method, a column for each number of labelled cases."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from pcrl_nnunet.experiments import intervals
from pcrl_nnunet.experiments.scores import Scores, labelled_cases


def side_by_side(scores: Scores) -> pd.DataFrame:
    """Return the mean and its 95 % interval, in points: the index has the methods, the columns the numbers of labels.

    A star marks the method that is surely the best, see `surely_best`.
    """
    methods, columns = list(dict.fromkeys(scores.runs["method"])), {}
    for number in sorted(scores.runs["labelled"].unique()):
        best = surely_best(scores, number)
        columns[labelled_cases(number)] = [_cell(scores, name, number) + " *" * (name == best) for name in methods]
    return pd.DataFrame(columns, index=pd.Index(methods, name="method"))


def notes(scores: Scores) -> Iterator[str]:
    """Yield what the star means, and the numbers of labelled cases without a star."""
    numbers = sorted(scores.runs["labelled"].unique())
    undecided = [labelled_cases(number) for number in numbers if surely_best(scores, number) is None]
    if len(undecided) < len(numbers):
        yield "* surely the best: the 95 % interval of its difference to each other method lies above 0"
    if undecided:
        yield f"No method is surely the best with {', '.join(undecided)}."


def surely_best(scores: Scores, labelled: int) -> str | None:
    """Return the method whose difference to each other method has an interval above 0; None if there is none."""
    of_number = scores.runs[scores.runs["labelled"] == labelled]
    means = of_number.groupby("method")["points"].mean()
    if len(means) < 2 or means.isna().all():
        return None
    best = str(means.idxmax())
    gains = [scores.gain(best, str(other), labelled) for other in means.index if other != best]
    return best if all(gain.get("low", np.nan) > 0 for gain in gains) else None


def _cell(scores: Scores, method: str, labelled: int) -> str:
    """Return the mean and its interval over subsets and patients; a single subset has no interval.

    The interval of two or three subsets is so wide that it may leave the range of scores. It is cut there.
    """
    chosen = (scores.runs["method"] == method) & (scores.runs["labelled"] == labelled)
    points = scores.runs.loc[chosen, "points"]
    if points.empty:
        return ""
    found = scores.replicates(method, None, labelled, np.random.default_rng(0))
    if found is None or len(found.observed) < 2:
        return f"{points.mean():.1f}"
    shift = points.mean() - found.observed.mean()
    low, high = (min(max(shift + end, 0.0), 100.0) for end in intervals.interval(found))
    return f"{points.mean():.1f} ({low:.1f} to {high:.1f})"
