"""What the scores of a comparison say: table, interval, and a sentence. S seeds (labelled subsets), K cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

CONTROL = "scratch"
COLUMNS = ("method", "labelled", "seed", "case", "label", "dice")
BOOTSTRAPS = 10_000


def per_case(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean over the labels of a case; a label that neither the truth nor the prediction has does not count."""
    return scores.groupby(["method", "labelled", "seed", "case"], as_index=False)["dice"].mean()


def interval(differences: np.ndarray, rng: np.random.Generator, share: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired differences, over labelled subsets and cases at once.

    Args:
        differences: (S, K), of the same cases for every subset; NaN where a case has no score.
    """
    num_seeds, num_cases = differences.shape
    means = np.empty(BOOTSTRAPS)
    for i in range(BOOTSTRAPS):
        rows, columns = rng.integers(num_seeds, size=num_seeds), rng.integers(num_cases, size=num_cases)
        means[i] = np.nanmean(differences[np.ix_(rows, columns)])
    low, high = np.nanquantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def table(scores: pd.DataFrame) -> pd.DataFrame:
    """One row a method and number of labelled cases, in points (100 Dice).

    Columns: method, labelled, seeds, mean, sd (over seeds, of the mean over cases), difference (to `CONTROL` on the
    same subsets and cases), low, high (of its 95 % interval; NaN for one subset, which says nothing of others).
    """
    cases = per_case(scores)
    rows = []
    for (labelled, method), group in cases.groupby(["labelled", "method"], sort=False):
        by_seed = group.groupby("seed")["dice"].mean() * 100
        row = {
            "method": method,
            "labelled": labelled,
            "seeds": len(by_seed),
            "mean": by_seed.mean(),
            "sd": by_seed.std(),
        }
        control = cases[(cases["labelled"] == labelled) & (cases["method"] == CONTROL)]
        paired = group.merge(control, on=["seed", "case"], suffixes=("", "_control"))
        if method != CONTROL and len(paired):
            paired["difference"] = (paired["dice"] - paired["dice_control"]) * 100
            matrix = paired.pivot_table(index="seed", columns="case", values="difference", dropna=False).to_numpy()
            low, high = interval(matrix, np.random.default_rng(0)) if len(matrix) > 1 else (np.nan, np.nan)
            row |= {"difference": float(np.nanmean(matrix)), "low": low, "high": high}
        rows.append(row)
    columns = ["method", "labelled", "seeds", "mean", "sd", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns).sort_values("labelled", kind="stable", ignore_index=True)


def verdict(rows: pd.DataFrame, method: str) -> str:
    """A sentence to act on: what a method gains over the control at every number of labels where it surely does."""
    own = rows[(rows["method"] == method) & rows["difference"].notna()]
    if own.empty:
        return f"Nothing can be said of {method} yet: there is no finished pair of it and {CONTROL}."
    if own["low"].isna().all():
        told = "; ".join(f"{row.difference:+.1f} Dice with {row.labelled} labels" for row in own.itertuples())
        return f"One labelled subset does not tell whether {method} pays ({told}): give -seeds 2 or, better, 5."
    surely = own[own["low"] > 0]
    if surely.empty:
        own = own[own["low"].notna()]
        told = "; ".join(f"{_gain(row)} Dice with {row.labelled} labels" for row in own.itertuples())
        costs = "it costs Dice" if (own["high"] < 0).any() else "no gain beyond chance"
        return f"{method} does not pay here, {costs}: {told}."
    return (
        f"With {method}: "
        + "; ".join(f"with {row.labelled} labels expect {_gain(row)} Dice" for row in surely.itertuples())
        + "."
    )


def _gain(row: Any) -> str:
    half = (row.high - row.low) / 2
    return f"{row.difference:+.1f} \N{PLUS-MINUS SIGN} {half:.1f}"
