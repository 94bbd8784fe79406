import numpy as np
import pandas as pd
import pytest

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


def test_a_case_without_a_score_for_a_label_counts_with_the_other():
    given = scores(0.03)
    given.loc[(given["case"] == "case_0") & (given["label"] == "b"), "dice"] = np.nan
    assert table(given).set_index("method").loc["pcrlv2", "difference"] == pytest.approx(3.0, abs=0.3)


def test_subsets_that_disagree_widen_the_interval_as_in_theory():
    rng = np.random.default_rng(1)
    by_subset = rng.normal(1.0, 2.0, (8, 1))
    low, high = interval(np.broadcast_to(by_subset, (8, 50)), np.random.default_rng(0))
    half = 1.96 * by_subset.std() / np.sqrt(8)  # the bootstrap's sd of a mean is the population's over sqrt(n)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


def test_the_verdict_promises_no_more_than_the_interval():
    assert verdict(table(scores(0.03, noise=1e-4)), "pcrlv2").startswith(
        "With pcrlv2: with 10 labels expect +3.0 \N{PLUS-MINUS SIGN} 0."
    )
    assert verdict(table(scores(-0.03)), "pcrlv2").startswith("pcrlv2 does not pay here, it costs Dice: -")
    assert "does not pay here, no gain beyond chance" in verdict(table(scores(0.0, noise=0.05)), "pcrlv2")
    assert "One labelled subset does not tell whether pcrlv2 pays (+3.0" in verdict(
        table(scores(0.03, seeds=1, noise=1e-4)), "pcrlv2"
    )
    assert "no finished pair" in verdict(table(scores(0.0)), "other")
