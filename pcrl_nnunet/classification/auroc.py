"""The area under the ROC curve, with an interval by groups of samples."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score

LEVEL = 0.95  # probability of an interval
MIN_GROUPS = 3  # patients with either value; an interval from fewer says nothing about other patients


def auroc(truth: np.ndarray, score: np.ndarray) -> float:
    """Return the area under the ROC curve over known values; NaN if all known values are equal.

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
    """Return the AUROC with its percentile bootstrap interval. The bootstrap draws whole groups (patients, scans).

    Args:
        groups: (N,) names of groups.

    Returns:
        auroc, low, high, and the numbers known and positive. Low and high are NaN if positives or negatives come from
        fewer than `MIN_GROUPS` groups.
    """
    rng = np.random.default_rng(0)
    names, group = np.unique(groups, return_inverse=True)
    known = ~np.isnan(truth)
    of, positive = group[known], truth[known] == 1
    # sorted once: there may be hundreds of thousands of values
    _, place = np.unique(score[known], return_inverse=True)
    drawn = []
    if min(len(np.unique(of[positive])), len(np.unique(of[~positive]))) >= MIN_GROUPS:
        for _ in range(bootstraps):
            times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[of]
            of_positive, of_negative = (np.bincount(place, times * which) for which in (positive, ~positive))
            if pairs := of_positive.sum() * of_negative.sum():
                drawn.append((of_positive * (of_negative.cumsum() - of_negative / 2)).sum() / pairs)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if drawn else (np.nan, np.nan)
    return {
        "auroc": auroc(truth, score), "low": float(low), "high": float(high),
        "known": int(known.sum()), "positive": int(positive.sum()),
    }  # fmt: skip
