"""Dice and AUROC of runs, and the table of their differences."""

import numpy as np
import pandas as pd
import pytest
from example_scores import OF_THREE, dice_table, predictions
from sklearn.metrics import roc_auc_score

from pcrl_nnunet.classification.auroc import auroc_interval
from pcrl_nnunet.experiments import intervals
from pcrl_nnunet.experiments import scores as scores_module
from pcrl_nnunet.experiments.intervals import interval
from pcrl_nnunet.experiments.scores import COLUMNS, AurocScores, DiceScores, blind_dice
from pcrl_nnunet.experiments.table import table


def test_the_table_has_the_paired_difference_with_an_interval():
    rows = table(DiceScores(dice_table(0.03))).set_index("method")
    assert rows.loc["pcrlv2", "difference"] == pytest.approx(3.0, abs=0.3)
    assert 2.5 < rows.loc["pcrlv2", "low"] < rows.loc["pcrlv2", "difference"] < rows.loc["pcrlv2", "high"] < 3.5
    assert np.isnan(rows.loc["scratch", "difference"])
    assert rows["pairs"].to_dict() == {"scratch": 0, "pcrlv2": 5}
    fewer = dice_table(0.03).query("method == 'pcrlv2' or seed > 1")
    assert table(DiceScores(fewer)).set_index("method")["pairs"].to_dict() == {"scratch": 0, "pcrlv2": 3}
    expected = dice_table(0.03).query("method == 'scratch'").groupby("seed")["dice"].mean() * 100
    assert rows.loc["scratch", "mean"] == pytest.approx(expected.mean())
    assert rows.loc["scratch", "sd"] == pytest.approx(expected.std())


def test_an_empty_prediction_of_an_empty_truth_counts_as_right():
    given = dice_table(0.0).query("label == 'a'").copy()
    empty = given["case"].isin([f"case_{i}" for i in range(20)])
    given.loc[empty & (given["method"] == "scratch"), "dice"] = np.nan  # nnU-Net's value for a correct empty prediction
    given.loc[empty & (given["method"] == "pcrlv2"), "dice"] = 0.0  # a false positive
    rows = table(DiceScores(given)).set_index("method")
    assert rows.loc["pcrlv2", "difference"] < -40
    assert rows.loc["pcrlv2", "difference"] == pytest.approx(rows.loc["pcrlv2", "mean"] - rows.loc["scratch", "mean"])


def dice_of(truth, prediction):
    return 2 * (truth & prediction).sum() / max(1, truth.sum() + prediction.sum())


def test_blind_predictions_count_as_nothing_learned():
    """Random labels, from one label everywhere to few voxels, against small and large true labels."""
    rng = np.random.default_rng(0)
    truths = {f"case_{i}": rng.choice(3, 20000, p=[0.75, 0.2, 0.05]) for i in range(12)}
    shares = {(case, name): (t == label).mean() for case, t in truths.items() for name, label in (("a", 1), ("b", 2))}
    rows = []
    for number, p in enumerate([(0, 0.5, 0.5), (0, 1, 0), (0.3, 0.6, 0.1), (0.9, 0.05, 0.05), (1, 0, 0)]):
        for case, truth in truths.items():
            prediction = rng.choice(3, truth.size, p=p)
            for name, label in (("a", 1), ("b", 2)):
                rows.append((f"random_{number}", 5, 0, case, name, dice_of(truth == label, prediction == label)))
    scores = DiceScores(pd.DataFrame(rows, columns=list(COLUMNS)), shares=shares)
    assert scores.chance == pytest.approx(100 * np.mean([2 * 0.2 / 1.2, 2 * 0.05 / 1.05]), abs=0.3)
    assert scores.runs["points"].max() > 15  # far from 0, the score of a prediction that labels everything
    assert not table(scores)["learned"].any()
    found = pd.DataFrame([(*row[:5], 0.4) for row in rows], columns=list(COLUMNS))
    assert table(DiceScores(found, shares=shares))["learned"].all()


def test_blind_predictions_leave_rare_labels_out():
    shares = {("a", "rare"): 0.0, ("b", "rare"): 0.0, ("c", "rare"): 0.1, **{(c, "organ"): 0.25 for c in "abc"}}
    organ = 2 * 0.25 / 1.25
    expected = {"a": 50 * (1 + organ), "b": 50 * (1 + organ), "c": 50 * organ}
    assert blind_dice(shares).to_dict() == pytest.approx(expected)


def of_run(given, method, seed, label="a"):
    return given[(given["method"] == method) & (given["seed"] == seed) & (given["label"] == label)]


def test_auroc_agrees_with_scikit_learn_in_each_draw(monkeypatch):
    given = predictions(labels=("a", "b"))
    given.loc[(given["label"] == "b") & (given["sample"] < 30), "truth"] = np.nan  # unknown
    weights = np.random.default_rng(3).multinomial(10, np.full(10, 0.1), 4)
    monkeypatch.setattr(intervals, "draw", lambda num, rng: weights[:, :num])
    order = np.random.default_rng(0).permutation(sorted(set(OF_THREE.values())))
    place = {name: i for i, name in enumerate(order)}
    scores = AurocScores(given, OF_THREE)
    found = scores.replicates("pcrlv2", "scratch", 10, np.random.default_rng(0))
    for seed in range(3):
        for draw, weight in enumerate([np.ones(10, int), *weights]):
            differences = []
            for label in ("a", "b"):
                first, second = (of_run(given, m, seed, label).dropna() for m in ("pcrlv2", "scratch"))
                own = weight[[place[OF_THREE[case]] for case in first["case"]]]
                values = [roc_auc_score(f["truth"], f["score"], sample_weight=own) for f in (first, second)]
                differences.append(values[0] - values[1])
            got = found.observed[seed] if draw == 0 else found.resampled[draw - 1, seed]
            assert got == pytest.approx(100 * np.mean(differences))
    rows = table(AurocScores(given, OF_THREE)).set_index("method")
    assert rows.loc["pcrlv2", "difference"] == pytest.approx(rows.loc["pcrlv2", "mean"] - rows.loc["scratch", "mean"])
    assert rows.loc["pcrlv2", "low"] < rows.loc["pcrlv2", "difference"] < rows.loc["pcrlv2", "high"]


def test_a_draw_without_both_classes_does_not_count():
    given = predictions(cases=4, points=1)
    given["truth"] = (given["sample"] == 0).astype(float)  # one positive, which many draws lack
    found = AurocScores(given).replicates("pcrlv2", "scratch", 10, np.random.default_rng(0))
    assert 0.2 < np.isnan(found.resampled).mean() < 0.5  # (3/4)^4 = 0.32 have no positive, 1/256 no negative
    assert np.isfinite(interval(found)).all()


def test_many_patients_are_drawn_in_blocks(monkeypatch):
    given = predictions(cases=200, points=1, seeds=4)
    fine = interval(AurocScores(given).replicates("pcrlv2", "scratch", 10, np.random.default_rng(0)))
    monkeypatch.setattr(scores_module, "MAX_BLOCKS", 50)
    coarse = interval(AurocScores(given).replicates("pcrlv2", "scratch", 10, np.random.default_rng(0)))
    assert coarse == pytest.approx(fine, abs=2.0)


def test_a_draw_without_a_rare_label_counts_the_other_labels():
    given = predictions(cases=40, points=1, labels=("a", "rare"))
    given.loc[given["label"] == "rare", "truth"] = (given["sample"] == 0).astype(float)
    found = AurocScores(given).replicates("pcrlv2", "scratch", 10, np.random.default_rng(0))
    assert np.isfinite(found.resampled).all()  # a third of the draws lack a positive of the rare label


def test_intervals_of_curves_agree_with_a_bootstrap_of_a_single_run():
    given = predictions(seeds=1, labels=("a", "b"))
    found = AurocScores(given, OF_THREE).intervals_of_curves({10: "10 labelled cases"})
    assert list(found) == ["a, 10 labelled cases", "b, 10 labelled cases"]
    for label in ("a", "b"):
        for arm, values in found[f"{label}, 10 labelled cases"].items():
            own = given[(given["label"] == label) & (given["method"] == arm)]
            patients = own["case"].map(OF_THREE).to_numpy(str)
            alone = auroc_interval(own["truth"].to_numpy(), own["score"].to_numpy(), patients, bootstraps=4000)
            assert values["points"] == pytest.approx(100 * alone["auroc"])
            assert [values["low"], values["high"]] == pytest.approx([100 * alone["low"], 100 * alone["high"]], abs=1)


def test_intervals_of_curves_over_several_subsets_are_wider_and_few_patients_have_none():
    titles = {10: "10"}
    one, three = (AurocScores(predictions(seeds=n), OF_THREE).intervals_of_curves(titles)["a, 10"] for n in (1, 3))
    for arm in ("scratch", "pcrlv2"):
        assert three[arm]["high"] - three[arm]["low"] > one[arm]["high"] - one[arm]["low"]
    two = AurocScores(predictions(cases=2), {"case_0": "x", "case_1": "y"}).intervals_of_curves(titles)["a, 10"]
    assert np.isnan([two["scratch"]["low"], two["scratch"]["high"]]).all()
