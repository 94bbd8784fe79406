"""The interval of an AUROC."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from pcrl_nnunet.classification.auroc import auroc_interval, mean_auroc_interval


def of_80():
    rng = np.random.default_rng(3)
    truth = (rng.random(80) < 0.4).astype(float)
    return truth, rng.normal(truth, 1.2)


def test_auroc_interval_agrees_with_scipys_bootstrap():
    truth, score = of_80()
    found = auroc_interval(truth, score, np.arange(80).astype(str))
    other = stats.bootstrap(
        (truth, score), roc_auc_score, paired=True, vectorized=False, n_resamples=1000, method="percentile", rng=1
    ).confidence_interval
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, score))
    assert (found["low"], found["high"]) == pytest.approx((other.low, other.high), abs=0.02)
    assert (found["known"], found["positive"]) == (80, truth.sum())


def test_auroc_interval_counts_ties_half():
    truth, score = of_80()
    score, groups = np.round(score), np.arange(80) // 2
    rng, drawn = np.random.default_rng(0), []
    for _ in range(200):
        samples = np.concatenate([[2 * i, 2 * i + 1] for i in rng.integers(40, size=40)])
        drawn.append(roc_auc_score(truth[samples], score[samples]))
    found = auroc_interval(truth, score, groups, 200)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_samples_of_a_patient_are_drawn_together_and_unknown_ones_count_for_nothing():
    truth, score = of_80()
    alone = auroc_interval(truth, score, np.arange(80))
    five_of_each = [np.repeat(values, 5) for values in (truth, score)]
    assert auroc_interval(*five_of_each, np.repeat(np.arange(80), 5)) == {
        **alone, "known": 400, "positive": 5 * alone["positive"],
    }  # fmt: skip
    as_if_independent = auroc_interval(*five_of_each, np.arange(400))
    assert as_if_independent["high"] - as_if_independent["low"] < 0.6 * (alone["high"] - alone["low"])
    with_unknown = [np.append(truth, [np.nan] * 9), np.append(score, np.arange(9))]
    assert auroc_interval(*with_unknown, np.arange(89))["auroc"] == alone["auroc"]
    two_patients = auroc_interval(np.array([1.0, 0, 1, 0]), np.arange(4.0), np.array([0, 0, 1, 1]))
    assert two_patients["auroc"] == 0.25
    assert np.isnan([two_patients["low"], two_patients["high"]]).all()
    assert np.isnan(auroc_interval(np.ones(4), np.arange(4.0), np.arange(4))["auroc"])


def test_the_mean_auroc_draws_patients_for_all_labels_together():
    rng = np.random.default_rng(5)
    groups = np.arange(60) // 2
    truth = (rng.random((60, 2)) < 0.4).astype(float)
    truth[:4, 1] = np.nan
    score = rng.normal(truth.round(), 1.2)
    score[np.isnan(score)] = 0.3
    found = mean_auroc_interval(truth, score, groups, 200)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(200):
        samples = np.concatenate([[2 * i, 2 * i + 1] for i in rng.integers(30, size=30)])
        known = [samples[~np.isnan(truth[samples, i])] for i in range(2)]
        drawn.append(np.mean([roc_auc_score(truth[known[i], i], score[known[i], i]) for i in range(2)]))
    each = [auroc_interval(truth[:, i], score[:, i], groups)["auroc"] for i in range(2)]
    assert found["auroc"] == pytest.approx(np.mean(each))
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    assert found["labels"] == 2


def test_labels_without_an_interval_do_not_count_in_the_mean():
    truth, score = of_80()
    rare = np.zeros(80)
    rare[:2] = 1  # two patients
    both = mean_auroc_interval(np.stack([truth, rare], 1), np.stack([score, score], 1), np.arange(80), 50)
    alone = mean_auroc_interval(truth[:, None], score[:, None], np.arange(80), 50)
    assert both == alone
    assert both["labels"] == 1
    none = mean_auroc_interval(rare[:, None], score[:, None], np.arange(80), 50)
    assert none["labels"] == 0
    assert np.isnan([none["auroc"], none["low"], none["high"]]).all()
