"""Bootstrap intervals of paired differences over labelled subsets and patients. S: subsets (seeds), K: cases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from pcrl_nnunet.classification.auroc import LEVEL

BOOTSTRAPS = 10_000


@dataclass(frozen=True)
class Replicates:
    """Differences of two arms on the same cases, as observed and in bootstrap draws.

    Attributes:
        observed: (S,) difference of each subset.
        resampled: (BOOTSTRAPS, S) difference with cases drawn with replacement, the same draw for all subsets; NaN if a
            draw has no score.
        of_subsets: (BOOTSTRAPS, S) number of times that each subset is drawn.
    """

    observed: np.ndarray
    resampled: np.ndarray
    of_subsets: np.ndarray


def interval(found: Replicates) -> tuple[float, float]:
    """Return the percentile interval of the mean difference, over labelled subsets and cases at once.

    A bootstrap of a few subsets is too narrow: it takes their spread for the spread of all subsets. This function
    first widens the distances of the subsets from their mean by the ratio of Student's interval to a bootstrap's:
    t(S-1) / z * sqrt(S / (S-1)). S is at least 2.
    """
    num = len(found.observed)
    z, t = stats.norm.ppf((1 + LEVEL) / 2), stats.t.ppf((1 + LEVEL) / 2, num - 1)
    further = (t / z * np.sqrt(num / (num - 1)) - 1) * (found.observed - found.observed.mean())
    means = (found.of_subsets * (found.resampled + further)).sum(1) / num
    low, high = np.nanquantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def interval_over_cases(found: Replicates) -> tuple[float, float]:
    """Return the percentile interval of the mean difference over cases, for the networks of these subsets."""
    low, high = np.nanquantile(found.resampled.mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def draw(num: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `num` things with replacement, and return how often each is drawn, (BOOTSTRAPS, num)."""
    return rng.multinomial(num, np.full(num, 1 / num), BOOTSTRAPS)


def replicates_of_means(
    differences: np.ndarray, rng: np.random.Generator, patients: np.ndarray | None = None
) -> Replicates:
    """Return the replicates of a mean over cases.

    Args:
        differences: (S, K), with the same cases for every subset.
        patients: (K,), a patient's cases are drawn together; None: each case is a patient.
    """
    num_seeds, num_cases = differences.shape
    _, patient = np.unique(np.arange(num_cases) if patients is None else patients, return_inverse=True)
    of_subsets = draw(num_seeds, rng)
    of_cases = draw(patient.max() + 1, rng)[:, patient]
    return Replicates(differences.mean(1), of_cases @ differences.T / of_cases.sum(1, keepdims=True), of_subsets)
