import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pcrl_nnunet.scores import interval, table, verdict


def scores(gain, seeds=5, cases=40, noise=0.01):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.7, 0.9, (seeds, cases))
    better = base + gain + rng.normal(0, noise, base.shape)
    rows = [
        (method, 10, seed, f"case_{case}", label, values[seed, case])
        for method, values in (("scratch", base), ("pcrlv2", better))
        for seed in range(seeds)
        for case in range(cases)
        for label in ("a", "b")
    ]
    return pd.DataFrame(rows, columns=["method", "labelled", "seed", "case", "label", "dice"])


def test_the_table_has_the_paired_difference_and_an_interval_around_it():
    rows = table(scores(0.03)).set_index("method")
    assert rows.loc["pcrlv2", "difference"] == pytest.approx(3.0, abs=0.3)
    assert 2.5 < rows.loc["pcrlv2", "low"] < rows.loc["pcrlv2", "difference"] < rows.loc["pcrlv2", "high"] < 3.5
    assert np.isnan(rows.loc["scratch", "difference"])
    expected = scores(0.03).query("method == 'scratch'").groupby("seed")["dice"].mean() * 100
    assert rows.loc["scratch", "mean"] == pytest.approx(expected.mean())
    assert rows.loc["scratch", "sd"] == pytest.approx(expected.std())


def test_finding_nothing_where_nothing_is_counts_as_right():
    given = scores(0.0).query("label == 'a'").copy()
    empty = given["case"].isin([f"case_{i}" for i in range(20)])
    given.loc[empty & (given["method"] == "scratch"), "dice"] = np.nan  # nnU-Net's: rightly nothing
    given.loc[empty & (given["method"] == "pcrlv2"), "dice"] = 0.0  # a false positive
    rows = table(given).set_index("method")
    assert rows.loc["pcrlv2", "difference"] < -40
    assert rows.loc["pcrlv2", "difference"] == pytest.approx(rows.loc["pcrlv2", "mean"] - rows.loc["scratch", "mean"])


@pytest.mark.parametrize("subsets", [2, 3, 5])
def test_an_interval_misses_the_truth_once_in_twenty_times_also_for_few_subsets(subsets):
    rng = np.random.default_rng(0)
    missed = []
    for _ in range(200):
        of_subset, of_case = rng.normal(0, 1, (subsets, 1)), rng.normal(0, 0.5, (1, 20))
        low, high = interval(of_subset + of_case + rng.normal(0, 0.5, (subsets, 20)), rng)
        missed.append(not low < 0 < high)
    assert np.mean(missed) < 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 200)


def test_cases_of_a_patient_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    by_patient = rng.normal(0, 1, 10)
    each, patients = np.tile(by_patient, (3, 1)), np.repeat(np.arange(10), 8)
    thrice = np.repeat(each, 8, axis=1)
    one = interval(each, np.random.default_rng(1))
    clustered = interval(thrice, np.random.default_rng(1), patients)
    assert clustered == pytest.approx(one, abs=0.05)
    assert np.subtract(*interval(thrice, np.random.default_rng(1))) > 0.6 * np.subtract(*one)  # both below 0


def test_subsets_that_disagree_widen_the_interval_as_in_theory():
    by_subset = np.random.default_rng(1).normal(1.0, 2.0, (40, 1))
    low, high = interval(np.broadcast_to(by_subset, (40, 50)), np.random.default_rng(0))
    expected = stats.t.interval(0.95, 39, by_subset.mean(), stats.sem(by_subset[:, 0]))
    assert (low, high) == pytest.approx(expected, abs=0.1)


def together(*given):
    """Scores of several numbers of labels: (number, gain)."""
    return pd.concat([scores(gain, noise=noise).assign(labelled=number) for number, gain, noise in given])


def test_the_verdict_names_gains_costs_and_what_is_undecided():
    assert verdict(together((10, 0.03, 1e-4)), "pcrlv2") == (
        "pcrlv2 pays: with 10 labels expect +3.0 \N{PLUS-MINUS SIGN} 0.0 Dice (5 subsets)."
    )
    mixed = verdict(together((10, 0.03, 1e-4), (20, -0.02, 1e-4), (40, 0.01, 0.3)), "pcrlv2")
    assert mixed.startswith("pcrlv2 pays: with 10 labels expect +3.0")
    assert "with 20 labels it costs -2.0" in mixed
    assert "with 40 labels undecided, -1." in mixed  # drawn with a spread of 30
    assert verdict(together((10, -0.03, 1e-4)), "pcrlv2").startswith(
        "pcrlv2 does not pay here: with 10 labels it costs"
    )
    assert verdict(together((10, 0.0, 1e-3)), "pcrlv2").startswith("pcrlv2 does not pay here: ")
    assert verdict(together((10, 0.0, 0.5)), "pcrlv2").startswith("Whether pcrlv2 pays is undecided, more subsets")
    assert verdict(scores(0.03, seeds=1, noise=1e-4), "pcrlv2").startswith("Whether pcrlv2 pays is undecided")
    assert "no finished pair" in verdict(scores(0.0), "other")


def test_the_verdict_takes_the_better_control():
    stock = scores(0.025, noise=1e-4).replace({"method": {"pcrlv2": "stock"}}).query("method == 'stock'")
    told = verdict(pd.concat([scores(0.01, noise=1e-4), stock]), "pcrlv2")
    assert told.startswith("pcrlv2 does not pay here: with 10 labels it costs -1.5")
