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
    known = ~np.isnan(truth)
    return {
        "auroc": auroc(truth, score), **_limits(_replicates(truth, score, groups, bootstraps)),
        "known": int(known.sum()), "positive": int((truth[known] == 1).sum()),
    }  # fmt: skip


def mean_auroc_interval(
    truth: np.ndarray, score: np.ndarray, groups: np.ndarray, bootstraps: int = 1000
) -> dict[str, float]:
    """Return the mean AUROC over the labels that have an interval, with its own interval.

    Each draw of groups is the same for all labels, because a patient's findings belong together.

    Args:
        truth, score: (N, L).
        groups: (N,) names of groups.

    Returns:
        auroc, low, high, and the number of labels. Without a label all are NaN, and the number is 0.
    """
    drawn = [_replicates(truth[:, i], score[:, i], groups, bootstraps) for i in range(truth.shape[1])]
    counted = [i for i, of_label in enumerate(drawn) if not np.isnan(of_label).all()]
    if not counted:
        return {"auroc": float("nan"), "low": float("nan"), "high": float("nan"), "labels": 0}
    mean = float(np.mean([auroc(truth[:, i], score[:, i]) for i in counted]))
    # NaN where a draw has no positive or no negative of a label
    return {"auroc": mean, **_limits(np.mean([drawn[i] for i in counted], axis=0)), "labels": len(counted)}


def _replicates(truth: np.ndarray, score: np.ndarray, groups: np.ndarray, bootstraps: int) -> np.ndarray:
    """Return the AUROC of each draw of groups, (bootstraps,); NaN if all values of a draw are equal.

    All are NaN if positives or negatives come from fewer than `MIN_GROUPS` groups.
    """
    rng = np.random.default_rng(0)
    names, group = np.unique(groups, return_inverse=True)
    known = ~np.isnan(truth)
    of, positive = group[known], truth[known] == 1
    # sorted once: there may be hundreds of thousands of values
    _, place = np.unique(score[known], return_inverse=True)
    found = np.full(bootstraps, np.nan)
    if min(len(np.unique(of[positive])), len(np.unique(of[~positive]))) >= MIN_GROUPS:
        for draw in range(bootstraps):
            times = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[of]
            of_positive, of_negative = (np.bincount(place, times * which) for which in (positive, ~positive))
            if pairs := of_positive.sum() * of_negative.sum():
                found[draw] = (of_positive * (of_negative.cumsum() - of_negative / 2)).sum() / pairs
    return found


def _limits(drawn: np.ndarray) -> dict[str, float]:
    known = drawn[~np.isnan(drawn)]
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(known) else (np.nan, np.nan)
    return {"low": float(low), "high": float(high)}
