import re

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from pcrl_nnunet.classification.auroc import auroc_interval
from pcrl_nnunet.experiments import scores as scores_module
from pcrl_nnunet.experiments.scores import (
    PREDICTION_COLUMNS,
    AurocScores,
    DiceScores,
    blind_dice,
    interval,
    networks_that_learned,
    note_on_learning,
    of_differences,
    shortcut_warning,
    table,
)


def verdict(scores, method, *controls):
    return scores_module.verdict(scores, method, networks_that_learned(table(scores)), *controls)


def frame(gain, seeds=5, cases=40, noise=0.01):
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
    rows = table(DiceScores(frame(0.03))).set_index("method")
    assert rows.loc["pcrlv2", "difference"] == pytest.approx(3.0, abs=0.3)
    assert 2.5 < rows.loc["pcrlv2", "low"] < rows.loc["pcrlv2", "difference"] < rows.loc["pcrlv2", "high"] < 3.5
    assert np.isnan(rows.loc["scratch", "difference"])
    assert rows["pairs"].to_dict() == {"scratch": 0, "pcrlv2": 5}
    fewer = frame(0.03).query("method == 'pcrlv2' or seed > 1")
    assert table(DiceScores(fewer)).set_index("method")["pairs"].to_dict() == {"scratch": 0, "pcrlv2": 3}
    expected = frame(0.03).query("method == 'scratch'").groupby("seed")["dice"].mean() * 100
    assert rows.loc["scratch", "mean"] == pytest.approx(expected.mean())
    assert rows.loc["scratch", "sd"] == pytest.approx(expected.std())


def test_finding_nothing_where_nothing_is_counts_as_right():
    given = frame(0.0).query("label == 'a'").copy()
    empty = given["case"].isin([f"case_{i}" for i in range(20)])
    given.loc[empty & (given["method"] == "scratch"), "dice"] = np.nan  # nnU-Net's: rightly nothing
    given.loc[empty & (given["method"] == "pcrlv2"), "dice"] = 0.0  # a false positive
    rows = table(DiceScores(given)).set_index("method")
    assert rows.loc["pcrlv2", "difference"] < -40
    assert rows.loc["pcrlv2", "difference"] == pytest.approx(rows.loc["pcrlv2", "mean"] - rows.loc["scratch", "mean"])


@pytest.mark.parametrize("subsets", [2, 3, 5])
def test_an_interval_misses_the_truth_once_in_twenty_times_also_for_few_subsets(subsets):
    rng = np.random.default_rng(0)
    missed = []
    for _ in range(200):
        of_subset, of_case = rng.normal(0, 1, (subsets, 1)), rng.normal(0, 0.5, (1, 20))
        low, high = interval(of_differences(of_subset + of_case + rng.normal(0, 0.5, (subsets, 20)), rng))
        missed.append(not low < 0 < high)
    assert np.mean(missed) < 0.05 + 2.5 * np.sqrt(0.05 * 0.95 / 200)


def test_cases_of_a_patient_do_not_narrow_the_interval():
    rng = np.random.default_rng(0)
    by_patient = rng.normal(0, 1, 10)
    each, patients = np.tile(by_patient, (3, 1)), np.repeat(np.arange(10), 8)
    thrice = np.repeat(each, 8, axis=1)
    one = interval(of_differences(each, np.random.default_rng(1)))
    clustered = interval(of_differences(thrice, np.random.default_rng(1), patients))
    assert clustered == pytest.approx(one, abs=0.05)
    assert np.subtract(*interval(of_differences(thrice, np.random.default_rng(1)))) > 0.6 * np.subtract(
        *one
    )  # both below 0


def test_subsets_that_disagree_widen_the_interval_as_in_theory():
    by_subset = np.random.default_rng(1).normal(1.0, 2.0, (40, 1))
    low, high = interval(of_differences(np.broadcast_to(by_subset, (40, 50)), np.random.default_rng(0)))
    expected = stats.t.interval(0.95, 39, by_subset.mean(), stats.sem(by_subset[:, 0]))
    assert (low, high) == pytest.approx(expected, abs=0.1)


def together(*given):
    """Scores of several numbers of labels: (number, gain)."""
    return DiceScores(pd.concat([frame(gain, noise=noise).assign(labelled=number) for number, gain, noise in given]))


def test_the_verdict_names_gains_costs_and_what_is_undecided():
    assert verdict(together((10, 0.03, 1e-4)), "pcrlv2") == (
        "pcrlv2 pays: with 10 labels expect +3.0 Dice over scratch (+3.0 to +3.0, 5 subsets)."
    )
    mixed = verdict(together((10, 0.03, 1e-4), (20, -0.02, 1e-4), (40, 0.01, 0.3)), "pcrlv2")
    assert mixed.startswith("pcrlv2 pays with 10 labels, and costs with 20: with 10 labels expect +3.0")
    assert "with 20 labels it costs -2.0" in mixed
    assert "with 40 labels undecided, -1." in mixed  # drawn with a spread of 30
    assert verdict(together((10, -0.03, 1e-4)), "pcrlv2").startswith(
        "pcrlv2 does not pay here: with 10 labels it costs"
    )
    assert verdict(together((10, 0.0, 1e-3)), "pcrlv2").startswith("pcrlv2 does not pay here: ")
    sure = together((10, 0.002, 1e-4))
    assert verdict(sure, "pcrlv2").startswith(
        "pcrlv2 does not pay here: with 10 labels expect +0.2 Dice over scratch ("
    )
    undecided = together((10, 0.0, 0.5), (20, 0.0, 0.2))
    highest = max(undecided.gain("pcrlv2", "scratch", labelled)["high"] for labelled in (10, 20))
    assert verdict(undecided, "pcrlv2").startswith(
        f"Whether pcrlv2 pays is undecided (at most {highest:+.1f} Dice), more subsets"
    )
    assert verdict(DiceScores(frame(0.03, seeds=1, noise=1e-4)), "pcrlv2").startswith(
        "Whether pcrlv2 pays is undecided, more subsets"
    )
    assert "no finished pair" in verdict(DiceScores(frame(0.0)), "other")


def test_the_verdict_takes_the_better_control():
    stock = frame(0.025, noise=1e-4).replace({"method": {"pcrlv2": "stock"}}).query("method == 'stock'")
    told = verdict(DiceScores(pd.concat([frame(0.01, noise=1e-4), stock])), "pcrlv2")
    assert told.startswith("pcrlv2 does not pay here: with 10 labels it costs -1.5 Dice over stock (")
    both = DiceScores(pd.concat([frame(0.01, noise=1e-4), stock]))
    over_scratch = verdict(both, "pcrlv2", ("scratch",))
    assert over_scratch.startswith("pcrlv2 pays: with 10 labels expect +1.0 Dice over scratch (")
    of_control = verdict(DiceScores(pd.concat([frame(0.01, noise=1e-4), stock])), "stock")
    assert of_control.startswith("stock pays: with 10 labels expect +2.5")


@pytest.mark.parametrize(("of_scratch", "of_stock"), [(range(5), [4]), (range(5), [7, 8, 9]), ([0, 1], [3, 4])])
def test_a_control_that_was_run_on_few_or_other_subsets_decides_nothing(of_scratch, of_stock):
    """Easy subsets, on which it has a higher mean than scratch has on all."""
    given = frame(0.03, noise=1e-4)
    scratch = given.query("method == 'scratch'")
    stock = scratch[scratch["seed"] < len(of_stock)].assign(method="stock")
    stock = stock.assign(seed=stock["seed"].map(dict(enumerate(of_stock))), dice=stock["dice"] + 0.1)
    scratch = scratch[scratch["seed"].isin(of_scratch)]
    told = verdict(DiceScores(pd.concat([given.query("method == 'pcrlv2'"), scratch, stock])), "pcrlv2")
    assert told.startswith("pcrlv2 pays: with 10 labels expect +3.0")
    assert told.endswith(f"{len(of_scratch)} subsets).")


def nothing_found(labelled):
    return frame(0.0).assign(labelled=labelled, dice=0.0)


REMEDY = "Lengthen the trainings."


def said(scores, shortcuts=()):
    return note_on_learning(scores, networks_that_learned(table(scores), shortcuts), REMEDY, shortcuts)


def test_networks_that_learned_nothing_get_no_verdict():
    scores = DiceScores(nothing_found(2))
    assert not table(scores)["learned"].any()
    assert said(scores) == (
        "Nothing was learned, and there is no verdict: with 2 labels no network learned anything (the best, scratch: "
        "0.0); without a look at the images a prediction reaches up to 0.0 Dice. Lengthen the trainings."
    )
    assert verdict(scores, "pcrlv2") == (
        "Nothing can be said of pcrlv2: with 2 labels neither pcrlv2 nor scratch surely learned anything."
    )


def test_the_verdict_is_of_the_numbers_of_labels_with_which_a_network_learned():
    scores = DiceScores(pd.concat([nothing_found(2), frame(-0.03, noise=1e-4)]))
    assert re.fullmatch(
        r"pcrlv2 does not pay with 10 labels: with 10 labels it costs -3\.0 .*\); with 2 labels neither pcrlv2 nor "
        r"scratch surely learned anything\.",
        verdict(scores, "pcrlv2"),
    )
    assert said(scores).startswith("With 2 labels no network learned anything (the best, scratch: 0.0); without")
    assert said(DiceScores(frame(0.0))) is None
    pays = DiceScores(pd.concat([nothing_found(2), frame(0.03, noise=1e-4)]))
    assert verdict(pays, "pcrlv2").startswith("pcrlv2 pays with 10 labels: ")


def test_one_network_that_learned_is_compared_with_one_that_learned_nothing_which_is_named():
    given = frame(0.0)
    given.loc[given["method"] == "scratch", "dice"] = 0.0
    third = nothing_found(10).query("method == 'pcrlv2'").assign(method="other")
    scores = DiceScores(pd.concat([given, third]))
    assert verdict(scores, "pcrlv2").startswith("pcrlv2 pays: with 10 labels expect +")
    assert verdict(scores, "other").startswith("Nothing can be said of other: with 10 labels neither")
    assert said(scores).startswith("With 10 labels some networks learned nothing (scratch: 0.0, other: 0.0); without")


def dice_of(truth, prediction):
    return 2 * (truth & prediction).sum() / max(1, truth.sum() + prediction.sum())


def test_predictions_without_a_look_at_the_image_count_as_nothing_learned():
    """Labels at random, in shares from one label everywhere to few voxels, on truths of small and of large labels."""
    rng = np.random.default_rng(0)
    truths = {f"case_{i}": rng.choice(3, 20000, p=[0.75, 0.2, 0.05]) for i in range(12)}
    shares = {(case, name): (t == label).mean() for case, t in truths.items() for name, label in (("a", 1), ("b", 2))}
    rows = []
    for number, p in enumerate([(0, 0.5, 0.5), (0, 1, 0), (0.3, 0.6, 0.1), (0.9, 0.05, 0.05), (1, 0, 0)]):
        for case, truth in truths.items():
            prediction = rng.choice(3, truth.size, p=p)
            for name, label in (("a", 1), ("b", 2)):
                rows.append((f"random_{number}", 5, 0, case, name, dice_of(truth == label, prediction == label)))
    scores = DiceScores(pd.DataFrame(rows, columns=list(scores_module.COLUMNS)), shares=shares)
    assert scores.chance == pytest.approx(100 * np.mean([2 * 0.2 / 1.2, 2 * 0.05 / 1.05]), abs=0.3)
    assert scores.runs["points"].max() > 15  # far from 0, where predictions of everything have few errors
    assert not table(scores)["learned"].any()
    found = pd.DataFrame([(*row[:5], 0.4) for row in rows], columns=list(scores_module.COLUMNS))
    assert table(DiceScores(found, shares=shares))["learned"].all()


def test_a_label_that_most_cases_lack_is_best_predicted_nowhere():
    shares = {("a", "rare"): 0.0, ("b", "rare"): 0.0, ("c", "rare"): 0.1, **{(c, "organ"): 0.25 for c in "abc"}}
    organ = 2 * 0.25 / 1.25
    expected = {"a": 50 * (1 + organ), "b": 50 * (1 + organ), "c": 50 * organ}
    assert blind_dice(shares).to_dict() == pytest.approx(expected)


def predictions(seeds=3, cases=30, points=4, labels=("a",), better=1.5):
    """Points of cases, three cases a patient; the second method's scores tell the classes apart further."""
    rng = np.random.default_rng(0)
    truth = {label: rng.integers(0, 2, cases * points).astype(float) for label in labels}
    rows = []
    for method, distance in (("scratch", 0.5), ("pcrlv2", better)):
        for seed in range(seeds):
            for label in labels:
                score = np.round(distance * truth[label] + rng.normal(0, 1, cases * points), 1)  # with ties
                for sample, (t, s) in enumerate(zip(truth[label], score, strict=True)):
                    rows.append((method, 10, seed, f"case_{sample // points}", sample, label, t, s))
    return pd.DataFrame(rows, columns=list(PREDICTION_COLUMNS))


OF_THREE = {f"case_{i}": f"patient_{i // 3}" for i in range(30)}


def of_run(given, method, seed, label="a"):
    return given[(given["method"] == method) & (given["seed"] == seed) & (given["label"] == label)]


def test_an_auroc_around_chance_is_nothing_learned(monkeypatch):
    given = predictions(better=1.5)
    assert networks_that_learned(table(AurocScores(given, OF_THREE)), ["scratch"]) == {10: ["pcrlv2"]}
    same = AurocScores(given.assign(score=0.5), OF_THREE)
    assert said(same) == (
        "Nothing was learned, and there is no verdict: with 10 labels no network learned anything (the best, scratch: "
        "50.0); without a look at the images a prediction reaches up to 50.0 AUROC. Lengthen the trainings."
    )
    monkeypatch.setattr(scores_module, "BOOTSTRAPS", 400)
    by_luck = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        chance = AurocScores(given[given["method"] == "scratch"].assign(score=lambda x, r=rng: r.normal(size=len(x))))
        by_luck.append(chance.has_learned("scratch", 10))
    assert np.mean(by_luck) <= 0.1  # of an interval of 95 % one end: 0.025 expected


def test_a_shortcut_is_no_network_that_learned():
    given = predictions()
    given.loc[given["method"] == "scratch", "score"] = 0.5
    scores = AurocScores(given.replace({"method": {"pcrlv2": "thumbnail"}}), OF_THREE)
    assert table(scores).set_index("method")["learned"].to_dict() == {"scratch": False, "thumbnail": True}
    assert said(scores, ["thumbnail"]).startswith("Nothing was learned")


def test_of_one_patient_a_right_order_may_be_chance():
    given = predictions(cases=2, points=4)
    right = AurocScores(given.assign(score=given["truth"]))
    assert (right.runs["points"] == 100).all()
    assert not table(right)["learned"].any()
    assert said(right).startswith(
        "There is no verdict: with 10 labels no network is surely better than chance (the best, scratch: 100.0)"
    )


def test_an_auroc_is_scikit_learns_and_a_draw_of_patients_is_its_weighted_one(monkeypatch):
    given = predictions(labels=("a", "b"))
    given.loc[(given["label"] == "b") & (given["sample"] < 30), "truth"] = np.nan  # unknown
    weights = np.random.default_rng(3).multinomial(10, np.full(10, 0.1), 4)
    monkeypatch.setattr(scores_module, "_drawn", lambda num, rng: weights[:, :num])
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
    given["truth"] = (given["sample"] == 0).astype(float)  # one positive: in many draws there is none
    found = AurocScores(given).replicates("pcrlv2", "scratch", 10, np.random.default_rng(0))
    assert 0.2 < np.isnan(found.resampled).mean() < 0.5  # (3/4)^4 = 0.32 have no positive, 1/256 no negative
    assert np.isfinite(interval(found)).all()


def test_more_patients_than_blocks_are_drawn_by_the_block(monkeypatch):
    given = predictions(cases=200, points=1, seeds=4)
    fine = interval(AurocScores(given).replicates("pcrlv2", "scratch", 10, np.random.default_rng(0)))
    monkeypatch.setattr(scores_module, "MAX_BLOCKS", 50)
    coarse = interval(AurocScores(given).replicates("pcrlv2", "scratch", 10, np.random.default_rng(0)))
    assert coarse == pytest.approx(fine, abs=2.0)


def test_the_verdict_speaks_of_auroc_and_a_shortcut_that_is_as_good_is_named():
    given = predictions(cases=200)
    told = verdict(AurocScores(given), "pcrlv2")
    assert told.startswith("pcrlv2 pays: with 10 labels expect +")
    assert re.search(r"[\d.]+ AUROC over scratch \(\+[\d.]+ to \+[\d.]+, 3 subsets\)", told)
    shortcut = given[given["method"] == "pcrlv2"].assign(method="thumbnail")
    assert shortcut_warning(AurocScores(given), ["thumbnail"]) is None
    both = pd.concat([given[given["method"] == "scratch"], shortcut])
    assert "with 10 labels thumbnail reaches" in shortcut_warning(AurocScores(both), ["thumbnail"])


def test_of_a_draw_without_a_rare_labels_positives_the_other_labels_count():
    given = predictions(cases=40, points=1, labels=("a", "rare"))
    given.loc[given["label"] == "rare", "truth"] = (given["sample"] == 0).astype(float)
    found = AurocScores(given).replicates("pcrlv2", "scratch", 10, np.random.default_rng(0))
    assert np.isfinite(found.resampled).all()  # a third of the draws have no positive of the rare one


def of_80():
    rng = np.random.default_rng(3)
    truth = (rng.random(80) < 0.4).astype(float)
    return truth, rng.normal(truth, 1.2)


def test_the_interval_of_an_auroc_is_that_of_another_bootstrap():
    truth, score = of_80()
    found = auroc_interval(truth, score, np.arange(80).astype(str))
    other = stats.bootstrap(
        (truth, score), roc_auc_score, paired=True, vectorized=False, n_resamples=1000, method="percentile", rng=1
    ).confidence_interval
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, score))
    assert (found["low"], found["high"]) == pytest.approx((other.low, other.high), abs=0.02)
    assert (found["known"], found["positive"]) == (80, truth.sum())


def test_the_interval_of_an_auroc_counts_ties_half_as_its_definition_does():
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
