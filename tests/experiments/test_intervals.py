"""Bootstrap intervals against theory."""

import numpy as np
import pytest
from scipy import stats

from pcrl_nnunet.experiments.intervals import interval, replicates_of_means


@pytest.mark.parametrize("subsets", [2, 3, 5])
def test_intervals_of_few_subsets_cover_the_truth(subsets):
    rng = np.random.default_rng(0)
    missed = []
    for _ in range(200):
        of_subset, of_case = rng.normal(0, 1, (subsets, 1)), rng.normal(0, 0.5, (1, 20))
        low, high = interval(replicates_of_means(of_subset + of_case + rng.normal(0, 0.5, (subsets, 20)), rng))
        missed.append(not low < 0 < high)
    assert np.mean(missed) < 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 200)


def test_cases_of_a_patient_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    by_patient = rng.normal(0, 1, 10)
    each, patients = np.tile(by_patient, (3, 1)), np.repeat(np.arange(10), 8)
    thrice = np.repeat(each, 8, axis=1)
    one = interval(replicates_of_means(each, np.random.default_rng(1)))
    clustered = interval(replicates_of_means(thrice, np.random.default_rng(1), patients))
    assert clustered == pytest.approx(one, abs=0.05)
    assert np.subtract(*interval(replicates_of_means(thrice, np.random.default_rng(1)))) > 0.6 * np.subtract(
        *one
    )  # both below 0


def test_subsets_that_disagree_widen_the_interval_as_in_theory():
    by_subset = np.random.default_rng(1).normal(1.0, 2.0, (40, 1))
    low, high = interval(replicates_of_means(np.broadcast_to(by_subset, (40, 50)), np.random.default_rng(0)))
    expected = stats.t.interval(0.95, 39, by_subset.mean(), stats.sem(by_subset[:, 0]))
    assert (low, high) == pytest.approx(expected, abs=0.1)
