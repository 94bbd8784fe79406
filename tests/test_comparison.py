import json

import numpy as np
import pandas as pd
import pytest

from pcrl_nnunet.comparison import (
    Comparison,
    Run,
    drawn_by_patient,
    interval,
    methods_of,
    number_of,
    split_by_patient,
    table,
    verdict,
)
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.plans import load_plan

CASES = [f"case_{i:03}" for i in range(200)]
PATIENTS = {case: f"patient_{i // 3}" for i, case in enumerate(CASES)}


@pytest.mark.parametrize("patients", [{}, PATIENTS])
def test_the_split_is_70_10_20_and_keeps_patients_together(patients):
    split = split_by_patient(CASES, patients)
    assert sorted([*split.train, *split.val, *split.test]) == CASES
    assert [len(split.train), len(split.val), len(split.test)] == pytest.approx([140, 20, 40], abs=3 if patients else 0)
    parts = [{patients.get(c, c) for c in part} for part in (split.train, split.val, split.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_draws_differ_by_seed_and_not_by_the_order_of_the_cases():
    assert drawn_by_patient(CASES, {}, 1) == drawn_by_patient(CASES[::-1], {}, 1)
    assert drawn_by_patient(CASES, {}, 1)[:10] != drawn_by_patient(CASES, {}, 2)[:10]


def test_numbers_and_shares_of_labelled_cases():
    assert [number_of(text, 140) for text in ("5", "10%", "12.5%", "all", "0.1%")] == [5, 14, 18, 140, 1]
    for wrong in ("0", "141", "ten", "1.5", "200%"):
        with pytest.raises(UserError, match=f"-labelled has '{wrong}'"):
            number_of(wrong, 140)


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
        "With 10 labels expect +3.0 \N{PLUS-MINUS SIGN} 0."
    )
    assert verdict(table(scores(-0.03)), "pcrlv2").startswith("pcrlv2 costs Dice here: -")
    assert "does not pay" in verdict(table(scores(0.0, noise=0.05)), "pcrlv2")
    assert "no finished pair" in verdict(table(scores(0.0)), "other")


def test_unknown_methods_and_settings_are_named():
    with pytest.raises(UserError, match=r"no method 'best'; expected some of scratch, stock, pcrlv2, mine"):
        methods_of(["best"], {"mine": {}})
    with pytest.raises(UserError, match=r"method mine is .* expected a block with some of trainer, pretrain"):
        methods_of(["mine"], {"mine": {"rate": 1}})
    assert list(methods_of(["mine"], {"mine": {"pretraining": "pcrlv2"}})) == ["scratch", "mine", "pcrlv2"]


@pytest.fixture
def comparison(tiny, tmp_path, monkeypatch):
    cases = [f"case_{i}" for i in range(10)]
    for name in cases[4:]:
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            (tiny.data / f"{name}{ending}").symlink_to(tiny.data / f"case_0{ending}")

    def make(protocol="all", settings=None, methods=("pcrlv2",)):
        plan = load_plan("Dataset999_Tiny", "nnUNetPlans", "3d_fullres")
        return Comparison(str(tmp_path / "out"), plan, methods_of(methods, {}), {}, protocol, "test", settings or {})

    return make


RUNS = [Run(method, labelled, seed) for method in ("scratch", "pcrlv2") for labelled in (2, 3) for seed in (0, 1)]


@pytest.mark.parametrize("protocol", ["all", "semi"])
def test_no_training_and_no_pretraining_sees_what_is_held_out(tiny, comparison, protocol):
    this = comparison(protocol)
    this.prepare(RUNS)
    target = tiny.folder.parent.parent / "out" / "nnUNet_preprocessed" / "Dataset999_Tiny"
    folds = json.loads((target / "splits_final.json").read_text())
    held_out = {*this.split.val, *this.split.test}
    for run in RUNS:
        fold = folds[this.fold(run)]
        assert len(fold["train"]) == run.labelled
        assert set(fold["val"]) == set(this.split.test)
        assert not held_out & set(fold["train"])
        left_out = set(folds[this.pretraining_fold(run)]["val"])
        assert left_out == held_out | (set(fold["train"]) if protocol == "semi" else set())
    assert json.loads((tiny.folder / "splits_final.json").read_text()) == tiny.splits


def test_methods_share_their_labelled_cases_and_larger_subsets_hold_the_smaller(comparison):
    this = comparison()
    this.prepare(RUNS)
    assert this.fold(Run("scratch", 2, 1)) == this.fold(Run("pcrlv2", 2, 1))
    assert set(this.labelled_cases(RUNS[0])) < set(this.labelled_cases(Run("scratch", 3, 0)))


def test_folds_keep_their_numbers_when_runs_are_added(comparison):
    first, second = comparison(), comparison()
    first.prepare(RUNS[:1])
    second.prepare(RUNS[1:])
    third = comparison()
    third.prepare(RUNS)
    assert third.fold(RUNS[0]) == first.fold(RUNS[0])
    assert third.fold(RUNS[3]) == second.fold(RUNS[3])


def test_other_settings_in_the_same_folder_are_refused(comparison):
    comparison().prepare(RUNS)
    with pytest.raises(UserError, match=r"holds runs of method scratch with other settings; give another folder"):
        comparison(settings={"finetune": {"epochs": 7}}).prepare(RUNS)
    with pytest.raises(UserError, match=r"holds a comparison with another protocol \(\"all\", now \"semi\"\)"):
        comparison("semi").prepare(RUNS)


def test_the_fine_tuning_plan_names_the_pretraining_of_its_seed(comparison):
    this = comparison()
    this.prepare(RUNS)
    run = Run("pcrlv2", 2, 1)
    plan = this._plans(run)[this.plans_name(run)]
    assert plan["pcrl"]["checkpoint"] == this.pretrained(run)
    assert this._plans(run)[this.pretraining_plans_name(run)]["pcrl"]["pretrain"]["seed"] == 1
    assert "checkpoint" not in this._plans(RUNS[0])[this.plans_name(RUNS[0])]["pcrl"]


def test_a_transfer_needs_a_checkpoint_of_other_data(comparison):
    with pytest.raises(UserError, match=r"-protocol is transfer and -checkpoint None; .* give its checkpoint_final"):
        comparison("transfer")
