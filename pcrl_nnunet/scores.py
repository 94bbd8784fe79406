"""What the scores of a comparison say: table, interval, and a sentence. S seeds (labelled subsets), K cases."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import roc_auc_score

CONTROL = "scratch"
STOCK = "stock"
COLUMNS = ("method", "labelled", "seed", "case", "label", "dice")
BOOTSTRAPS = 10_000
LEVEL = 0.95
WORTH = 0.5  # Dice points: a gain that surely is smaller does not pay


def per_case(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean over the labels of a case.

    nnU-Net gives no score to a label that neither the truth nor the prediction has. That prediction is right, and
    counts 1: left out, a method that finds nothing where nothing is would not be better than one that does.
    """
    known = scores.fillna({"dice": 1.0})
    return known.groupby(["method", "labelled", "seed", "case"], as_index=False, sort=False)["dice"].mean()


def interval(
    differences: np.ndarray, rng: np.random.Generator, patients: np.ndarray | None = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired differences, over labelled subsets and cases at once.

    A bootstrap of a few subsets is too narrow, as it takes their spread for that of all subsets. Their distances from
    the mean are widened first, as far as Student's interval of S values is wider than a bootstrap's:
    t(S-1) / z * sqrt(S / (S-1)).

    Args:
        differences: (S, K), of the same cases for every subset; S at least 2.
        patients: (K,), whose cases are drawn together; None: each is a patient.
    """
    num_seeds, num_cases = differences.shape
    z, t = stats.norm.ppf((1 + LEVEL) / 2), stats.t.ppf((1 + LEVEL) / 2, num_seeds - 1)
    of_seed = differences.mean(1, keepdims=True) - differences.mean()
    widened = differences + (t / z * np.sqrt(num_seeds / (num_seeds - 1)) - 1) * of_seed
    _, patient = np.unique(np.arange(num_cases) if patients is None else patients, return_inverse=True)
    num_patients = patient.max() + 1
    # how often each is drawn
    of_seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), BOOTSTRAPS)
    of_cases = rng.multinomial(num_patients, np.full(num_patients, 1 / num_patients), BOOTSTRAPS)[:, patient]
    means = np.einsum("bs,sk,bk->b", of_seeds, widened, of_cases, optimize=True) / (num_seeds * of_cases.sum(1))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def gain(cases: pd.DataFrame, method: str, over: str, labelled: int, patients: Mapping[str, str]) -> dict[str, float]:
    """Paired difference of two methods on the subsets and cases that both have, in points (100 Dice).

    Args:
        cases: as `per_case` gives them.

    Returns:
        pairs (subsets), difference, low, high; empty without a pair, and NaN for the interval of a single one, which
        says nothing of other subsets.
    """
    first, second = (cases[(cases["labelled"] == labelled) & (cases["method"] == name)] for name in (method, over))
    paired = first.merge(second, on=["seed", "case"], suffixes=("", "_over"))
    if method == over or paired.empty:
        return {}
    paired["difference"] = (paired["dice"] - paired["dice_over"]) * 100
    matrix = paired.pivot(index="seed", columns="case", values="difference")
    low = high = float("nan")
    if len(matrix) > 1:
        of_patient = np.array([patients.get(case, case) for case in matrix.columns])
        low, high = interval(matrix.to_numpy(), np.random.default_rng(0), of_patient)
    return {"pairs": len(matrix), "difference": float(matrix.to_numpy().mean()), "low": low, "high": high}


def table(scores: pd.DataFrame, patients: Mapping[str, str] | None = None) -> pd.DataFrame:
    """One row a method and number of labelled cases, in points (100 Dice).

    Columns: method, labelled, seeds, mean, sd (over seeds, of the mean over cases), and of `gain` over `CONTROL`:
    difference, low, high (of its 95 % interval).
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
        rows.append({**row, **gain(cases, method, CONTROL, labelled, patients or {})})
    columns = ["method", "labelled", "seeds", "mean", "sd", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns).sort_values("labelled", kind="stable", ignore_index=True)


def verdict(scores: pd.DataFrame, method: str, patients: Mapping[str, str] | None = None) -> str:
    """A sentence to act on: what a method gains at every number of labels over the better of `CONTROL` and `STOCK`."""
    cases = per_case(scores)
    told, lows, highs = [], [], []
    for labelled in sorted(cases["labelled"].unique()):
        of_number = cases[cases["labelled"] == labelled].groupby("method")["dice"].mean()
        controls = of_number[of_number.index.isin([CONTROL, STOCK])]
        found = gain(cases, method, str(controls.idxmax()), labelled, patients or {}) if len(controls) else {}
        if not found:
            continue
        difference, low, high = found["difference"], found["low"], found["high"]
        pairs = f" ({found['pairs']} subset{'s' * (found['pairs'] > 1)})"
        lows.append(low)
        highs.append(high)
        half = f" \N{PLUS-MINUS SIGN} {(high - low) / 2:.1f}" if np.isfinite(low) else ""
        kind = "expect" if low > 0 else "it costs" if high < 0 else "undecided,"
        told.append(f"with {labelled} labels {kind} {difference:+.1f}{half} Dice{pairs}")
    if not told:
        return f"Nothing can be said of {method} yet: there is no finished pair of it and {CONTROL}."
    if any(low > 0 for low in lows):
        start = f"{method} pays"
    elif all(high < WORTH for high in highs):
        start = f"{method} does not pay here"
    else:
        start = f"Whether {method} pays is undecided, more subsets (-seeds) would tell"
    return f"{start}: {'; '.join(told)}."


def auroc(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve over what is known; NaN where all of that is the same.

    Args:
        truth: (N,) 1, 0, or NaN for unknown.
        score: (N,) higher for 1.
    """
    known = ~np.isnan(truth)
    if len(np.unique(truth[known])) < 2:
        return float("nan")
    return float(roc_auc_score(truth[known], score[known]))


def auroc_interval(
    truth: np.ndarray, score: np.ndarray, groups: np.ndarray, bootstraps: int = 1000
) -> dict[str, float]:
    """AUROC with its percentile bootstrap interval; samples of a group (patient, scan) are drawn together.

    Args:
        groups: (N,) names.

    Returns:
        auroc, low, high, and the numbers known and positive.
    """
    rng = np.random.default_rng(0)
    names, group = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(group == i) for i in range(len(names))]
    drawn = []
    for _ in range(bootstraps):
        samples = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        drawn.append(auroc(truth[samples], score[samples]))
    finite = [value for value in drawn if not np.isnan(value)]
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if finite else (np.nan, np.nan)
    known = int((~np.isnan(truth)).sum())
    return {
        "auroc": auroc(truth, score), "low": float(low), "high": float(high),
        "known": known, "positive": int(np.nansum(truth)),
    }  # fmt: skip
