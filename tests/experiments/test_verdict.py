"""Verdicts, and notes on networks that learned nothing."""

import re

import numpy as np
import pandas as pd
import pytest
from example_scores import OF_THREE, dice_table, nothing_found, predictions, together

from pcrl_nnunet.experiments import intervals
from pcrl_nnunet.experiments.notes import note_on_learning, shortcut_warning
from pcrl_nnunet.experiments.scores import AurocScores, DiceScores
from pcrl_nnunet.experiments.side_by_side import notes, side_by_side
from pcrl_nnunet.experiments.table import networks_that_learned, table
from pcrl_nnunet.experiments.verdict import note_on_pretraining, what_to_use
from pcrl_nnunet.experiments.verdict import verdict as verdict_on

REMEDY = "Lengthen the trainings."


def verdict(scores, method, *controls):
    return verdict_on(scores, method, networks_that_learned(table(scores)), *controls)


def test_the_verdict_names_gains_and_costs():
    assert verdict(together((10, 0.03, 1e-4)), "pcrlv2") == (
        "pcrlv2 pays: with 10 labelled cases expect +3.0 Dice over scratch (+3.0 to +3.0, 5 subsets)."
    )
    mixed = verdict(together((10, 0.03, 1e-4), (20, -0.02, 1e-4), (40, 0.01, 0.3)), "pcrlv2")
    assert mixed.startswith("pcrlv2 pays with 10 labelled cases, and costs with 20: with 10 labelled cases expect +3.0")
    assert "with 20 labelled cases it costs -2.0" in mixed
    assert "with 40 labelled cases undecided, -1." in mixed  # drawn with a spread of 30
    assert verdict(together((10, -0.03, 1e-4)), "pcrlv2").startswith(
        "pcrlv2 does not pay here: with 10 labelled cases it costs"
    )
    assert verdict(together((10, 0.0, 1e-3)), "pcrlv2").startswith("pcrlv2 does not pay here: ")
    sure = together((10, 0.002, 1e-4))
    assert verdict(sure, "pcrlv2").startswith(
        "pcrlv2 does not pay here: with 10 labelled cases expect +0.2 Dice over scratch ("
    )
    undecided = together((10, 0.0, 0.5), (20, 0.0, 0.2))
    highest = max(undecided.gain("pcrlv2", "scratch", labelled)["high"] for labelled in (10, 20))
    assert verdict(undecided, "pcrlv2").startswith(
        f"It is undecided whether pcrlv2 pays (at most {highest:+.1f} Dice), more subsets"
    )
    assert verdict(DiceScores(dice_table(0.03, seeds=1, noise=1e-4)), "pcrlv2").startswith(
        "It is undecided whether pcrlv2 pays, more subsets"
    )
    assert "no finished pair" in verdict(DiceScores(dice_table(0.0)), "other")


def test_the_gain_of_semi_over_semi_scratch_is_what_the_pretraining_adds():
    """`scratch`, which is worse or better than both, plays no part."""
    names = {"pcrlv2": "semi", "scratch": "semi_scratch"}
    semi = pd.concat([dice_table(0.03, noise=1e-4).replace({"method": names}).assign(labelled=n) for n in (10, 20)])
    for of_scratch in (0.2, -0.2):
        scratch = semi[semi["method"] == "semi_scratch"].assign(method="scratch")
        both = DiceScores(pd.concat([scratch.assign(dice=scratch["dice"] + of_scratch), semi]))
        learned = networks_that_learned(table(both))
        of_twenty = "with 20 labelled cases expect +3.0 Dice over semi_scratch (+3.0 to +3.0, 5 subsets)"
        assert note_on_pretraining(both, learned) == (
            "What the pretraining adds to semi: with 10 labelled cases expect +3.0 Dice over semi_scratch "
            f"(+3.0 to +3.0, 5 subsets); {of_twenty}."
        )
        told = note_on_pretraining(both, {20: ["semi"]})
        assert told == (
            "What the pretraining adds to semi: "
            f"{of_twenty}; with 10 labelled cases neither semi nor semi_scratch surely learned anything."
        )
    for lacking in names.values():
        assert note_on_pretraining(DiceScores(semi[semi["method"] != lacking]), {}) is None


def several(**gains):
    """Scores of scratch and of other methods with these gains, 10 labelled cases, five subsets."""
    of_scratch = dice_table(0.0).query("method == 'scratch'")
    others = [
        dice_table(gain, noise=1e-4).query("method == 'pcrlv2'").assign(method=name) for name, gain in gains.items()
    ]
    return DiceScores(pd.concat([of_scratch, *others]))


def advice(scores):
    controls = {arm: ["scratch"] for arm in scores.runs["method"].unique() if arm != "scratch"}
    return what_to_use(scores, networks_that_learned(table(scores)), controls)


def test_the_report_names_the_method_to_use():
    assert advice(several(a=0.03, b=0.05, c=-0.02)) == "What to use: with 10 labelled cases b."
    equal = several(a=0.03, b=0.03, c=0.002)
    assert advice(equal) == "What to use: with 10 labelled cases a (perhaps no better than b)."
    none = "What to use: with 10 labelled cases scratch, as no method surely pays."
    assert advice(several(a=-0.03, b=0.002)) == none  # +0.2 is sure, but surely not worth it
    assert advice(together((10, 0.03, 0.5))) == none
    single = advice(DiceScores(dice_table(0.03, seeds=1)))
    assert single == (
        "What to use: with 10 labelled cases nothing can be said, as a single subset has no interval "
        "(add subsets: -seeds)."
    )
    assert advice(DiceScores(nothing_found(2))) is None
    two = advice(together((10, 0.03, 1e-4), (20, -0.03, 1e-4)))
    assert two == (
        "What to use: with 10 labelled cases pcrlv2; with 20 labelled cases scratch, as no method surely pays."
    )


def test_the_table_has_a_row_a_method_and_a_column_a_number_and_marks_the_surely_best():
    found = side_by_side(together((10, 0.03, 1e-4), (20, 0.0, 0.2)))
    assert list(found.index) == ["scratch", "pcrlv2"]
    assert list(found.columns) == ["10 labelled cases", "20 labelled cases"]
    assert found.loc["pcrlv2", "10 labelled cases"].endswith(") *")
    assert not any(cell.endswith("*") for cell in found["20 labelled cases"])
    mean, low, high = map(float, re.findall(r"[\d.]+", found.loc["scratch", "10 labelled cases"]))
    points = 100 * dice_table(0.0).query("method == 'scratch'").groupby("seed")["dice"].mean()
    assert mean == pytest.approx(points.mean(), abs=0.06)
    assert low < mean < high
    told = "\n".join(notes(together((10, 0.03, 1e-4), (20, 0.0, 0.2))))
    assert "* surely the best" in told
    assert "No method is surely the best with 20 labelled cases." in told


def test_the_verdict_takes_the_better_control():
    stock = dice_table(0.025, noise=1e-4).replace({"method": {"pcrlv2": "stock"}}).query("method == 'stock'")
    told = verdict(DiceScores(pd.concat([dice_table(0.01, noise=1e-4), stock])), "pcrlv2")
    assert told.startswith("pcrlv2 does not pay here: with 10 labelled cases it costs -1.5 Dice over stock (")
    both = DiceScores(pd.concat([dice_table(0.01, noise=1e-4), stock]))
    over_scratch = verdict(both, "pcrlv2", ("scratch",))
    assert over_scratch.startswith("pcrlv2 pays: with 10 labelled cases expect +1.0 Dice over scratch (")
    of_control = verdict(DiceScores(pd.concat([dice_table(0.01, noise=1e-4), stock])), "stock")
    assert of_control.startswith("stock pays: with 10 labelled cases expect +2.5")


@pytest.mark.parametrize(("of_scratch", "of_stock"), [(range(5), [4]), (range(5), [7, 8, 9]), ([0, 1], [3, 4])])
def test_a_control_with_few_or_other_subsets_decides_nothing(of_scratch, of_stock):
    """On these easy subsets the control has a higher mean than scratch on all subsets."""
    given = dice_table(0.03, noise=1e-4)
    scratch = given.query("method == 'scratch'")
    stock = scratch[scratch["seed"] < len(of_stock)].assign(method="stock")
    stock = stock.assign(seed=stock["seed"].map(dict(enumerate(of_stock))), dice=stock["dice"] + 0.1)
    scratch = scratch[scratch["seed"].isin(of_scratch)]
    told = verdict(DiceScores(pd.concat([given.query("method == 'pcrlv2'"), scratch, stock])), "pcrlv2")
    assert told.startswith("pcrlv2 pays: with 10 labelled cases expect +3.0")
    assert told.endswith(f"{len(of_scratch)} subsets).")


def said(scores, shortcuts=()):
    return note_on_learning(scores, networks_that_learned(table(scores), shortcuts), REMEDY, shortcuts)


def test_networks_that_learned_nothing_get_no_verdict():
    scores = DiceScores(nothing_found(2))
    assert not table(scores)["learned"].any()
    assert said(scores) == (
        "Nothing was learned, and there is no verdict: with 2 labelled cases no network learned anything (the best, "
        "scratch: 0.0); without a look at the images a prediction reaches up to 0.0 Dice. Lengthen the trainings."
    )
    assert verdict(scores, "pcrlv2") == (
        "Nothing can be said about pcrlv2: with 2 labelled cases neither pcrlv2 nor scratch surely learned anything."
    )


def test_the_verdict_leaves_out_subset_sizes_without_learning():
    scores = DiceScores(pd.concat([nothing_found(2), dice_table(-0.03, noise=1e-4)]))
    assert re.fullmatch(
        r"pcrlv2 does not pay with 10 labelled cases: with 10 labelled cases it costs -3\.0 .*\); "
        r"with 2 labelled cases neither pcrlv2 nor scratch surely learned anything\.",
        verdict(scores, "pcrlv2"),
    )
    assert said(scores).startswith(
        "With 2 labelled cases no network learned anything (the best, scratch: 0.0); without"
    )
    assert said(DiceScores(dice_table(0.0))) is None
    pays = DiceScores(pd.concat([nothing_found(2), dice_table(0.03, noise=1e-4)]))
    assert verdict(pays, "pcrlv2").startswith("pcrlv2 pays with 10 labelled cases: ")


def test_networks_that_learned_nothing_are_named_beside_others():
    given = dice_table(0.0)
    given.loc[given["method"] == "scratch", "dice"] = 0.0
    third = nothing_found(10).query("method == 'pcrlv2'").assign(method="other")
    scores = DiceScores(pd.concat([given, third]))
    assert verdict(scores, "pcrlv2").startswith("pcrlv2 pays: with 10 labelled cases expect +")
    assert verdict(scores, "other").startswith("Nothing can be said about other: with 10 labelled cases neither")
    assert said(scores).startswith(
        "With 10 labelled cases some networks learned nothing (scratch: 0.0, other: 0.0); without"
    )


def test_a_shortcut_does_not_count_as_a_learned_network():
    given = predictions()
    given.loc[given["method"] == "scratch", "score"] = 0.5
    scores = AurocScores(given.replace({"method": {"pcrlv2": "thumbnail"}}), OF_THREE)
    assert table(scores).set_index("method")["learned"].to_dict() == {"scratch": False, "thumbnail": True}
    assert said(scores, ["thumbnail"]).startswith("Nothing was learned")


def test_right_order_of_one_patient_may_be_chance():
    given = predictions(cases=2, points=4)
    right = AurocScores(given.assign(score=given["truth"]))
    assert (right.runs["points"] == 100).all()
    assert not table(right)["learned"].any()
    assert said(right).startswith(
        "There is no verdict: with 10 labelled cases no network is surely better than chance (the best, scratch: 100.0)"
    )


def test_the_verdict_on_a_classification_is_in_auroc():
    given = predictions(cases=200)
    told = verdict(AurocScores(given), "pcrlv2")
    assert told.startswith("pcrlv2 pays: with 10 labelled cases expect +")
    assert re.search(r"[\d.]+ AUROC over scratch \(\+[\d.]+ to \+[\d.]+, 3 subsets\)", told)
    shortcut = given[given["method"] == "pcrlv2"].assign(method="thumbnail")
    assert shortcut_warning(AurocScores(given), ["thumbnail"]) is None
    both = pd.concat([given[given["method"] == "scratch"], shortcut])
    assert "with 10 labelled cases, thumbnail reaches" in shortcut_warning(AurocScores(both), ["thumbnail"])


def test_an_auroc_around_chance_is_nothing_learned(monkeypatch):
    given = predictions(better=1.5)
    assert networks_that_learned(table(AurocScores(given, OF_THREE)), ["scratch"]) == {10: ["pcrlv2"]}
    same = AurocScores(given.assign(score=0.5), OF_THREE)
    assert said(same) == (
        "Nothing was learned, and there is no verdict: with 10 labelled cases no network learned anything (the best, "
        "scratch: 50.0); without a look at the images a prediction reaches up to 50.0 AUROC. Lengthen the trainings."
    )
    monkeypatch.setattr(intervals, "BOOTSTRAPS", 400)
    by_luck = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        chance = AurocScores(given[given["method"] == "scratch"].assign(score=lambda x, r=rng: r.normal(size=len(x))))
        by_luck.append(chance.has_learned("scratch", 10))
    assert np.mean(by_luck) <= 0.1  # one tail of a 95 % interval: 0.025 expected
