"""The folder of a comparison."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import DATASET_JSON
from unlabelled_scans import make_full_plan, write_scans

from pcrl_nnunet import trainers
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.preparation import plans_of, prepare, preview_in
from pcrl_nnunet.semi_supervised.cases import SemiCases

RUNS = [Run(arm, labelled, seed) for arm in ("scratch", "pcrlv2") for labelled in (2, 3) for seed in (0, 1)]


def test_folds_keep_their_numbers_when_runs_are_added(layout):
    first, second = layout(), layout()
    prepare(first, RUNS[:1])
    Path(first.output(RUNS[0])).mkdir(parents=True)
    prepare(second, RUNS[1:])
    third = layout()
    prepare(third, RUNS)
    assert third.fold(RUNS[0]) == first.fold(RUNS[0])
    assert third.fold(RUNS[3]) == second.fold(RUNS[3])


def test_other_settings_are_refused_once_something_was_trained(layout):
    prepare(layout(settings={"finetune": {"epochs": 3}}), RUNS)
    this = layout()
    prepare(this, RUNS)  # nothing was trained yet
    for run in RUNS:
        Path(this.output(run)).mkdir(parents=True)
    with pytest.raises(UserError, match=r"another settings.finetune.epochs \(1, now 7\); give another folder"):
        prepare(layout(settings={"finetune": {"epochs": 7}}), RUNS)
    with pytest.raises(UserError, match=r"holds a comparison with another protocol \(\"all\", now \"semi\"\)"):
        prepare(layout("semi"), RUNS)


@pytest.mark.parametrize("protocol", ["all", "semi"])
def test_other_settings_are_refused_for_new_runs_too(layout, protocol):
    """All runs of one table have the same budget, even if several calls added them."""
    own, same = {"mine": {"pretrain": None, "finetune": {"epochs": 3}}}, {"finetune": {"iters_per_epoch": 4}}
    begun = layout(protocol, methods=["mine"], own=own, settings=same)
    prepare(begun, [Run("scratch", 2, 0), Run("mine", 2, 0)])
    Path(begun.output(Run("mine", 2, 0))).mkdir(parents=True)

    def go_on(own, settings):
        runs = [Run("scratch", 3, 1), *(Run(name, 3, 1) for name in own)]
        prepare(layout(protocol, methods=list(own), own=own, settings=settings), runs)

    with pytest.raises(UserError, match=r"settings.finetune.iters_per_epoch \(4, now 5\); .* same settings to go on"):
        go_on(own, {"finetune": {"iters_per_epoch": 5}})
    with pytest.raises(UserError, match=r"another settings.pretrain.epochs \(null, now 5\)"):
        go_on({}, {**same, "pretrain": {"epochs": 5}})
    other = {"mine": {"pretrain": None, "finetune": {"epochs": 6}}}
    for _ in range(2):  # also after a call without the method
        with pytest.raises(UserError, match=r"another method mine.finetune.epochs \(3, now 6\); .* another name"):
            go_on(other, same)
        go_on({}, same)
    go_on(own, same)


def test_the_fine_tuning_plan_names_the_pretraining_of_its_seed(layout):
    this = layout()
    prepare(this, RUNS)
    run = Run("pcrlv2", 2, 1)
    plan = plans_of(this, run)[this.plans_name(run)]
    assert plan["pcrl"]["checkpoint"] == this.pretrained(run)
    assert plans_of(this, run)[this.pretraining_plans_name(run)]["pcrl"]["pretrain"]["seed"] == 1
    assert "checkpoint" not in plans_of(this, RUNS[0])[this.plans_name(RUNS[0])]["pcrl"]


def test_the_first_stage_of_a_cascade_is_trained_without_the_second(tiny, layout):
    this = layout(configuration="3d_lowres")
    prepare(this, RUNS[:1])
    plan = json.loads((Path(this.data_folder) / f"{this.plans_name(RUNS[0])}.json").read_text())
    assert not PlansManager(plan).get_configuration("3d_lowres").next_stage_names


def test_a_preview_changes_nothing_in_a_comparison_that_has_begun(tmp_path, layout):
    begun = layout()
    prepare(begun, RUNS)
    Path(begun.output(RUNS[0])).mkdir(parents=True)
    Path(begun.evaluation(RUNS[0])).parent.mkdir()
    Path(begun.evaluation(RUNS[0])).write_text("{}")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = layout(methods=["mine"], own={"mine": {"finetune": {"epochs": 7}}}.items())
    (tmp_path / "preview").mkdir()
    preview_in(other, str(tmp_path / "preview"))
    runs = [*RUNS[:2], Run("mine", 2, 0)]
    prepare(other, runs)
    assert [other.is_done(run) for run in runs] == [True, False, False]
    assert other.pretrained(runs[-1]).startswith(begun.results)
    plan = tmp_path / "preview/nnUNet_preprocessed/Dataset999_Tiny" / f"{other.plans_name(runs[-1])}.json"
    assert json.loads(plan.read_text())["pcrl"]["finetune"]["epochs"] == 7
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    semi = layout("semi")
    (tmp_path / "second").mkdir()
    preview_in(semi, str(tmp_path / "second"))
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / 'out'))} holds .* another protocol"):
        prepare(semi, RUNS)  # the error names the user's folder, not the preview's


def test_pretrainings_are_kept_when_the_scored_part_changes(layout):
    on_validation, on_test = layout(scored="val"), layout()
    runs = [*RUNS, Run("pseudo_labels", 2, 0)]  # the data of pseudo_labels contain the scored cases
    prepare(on_validation, runs)
    for run in runs:
        Path(on_validation.output(run)).mkdir(parents=True)
    prepare(on_test, runs)
    assert on_test.pretrained(RUNS[-1]) == on_validation.pretrained(RUNS[-1])
    assert on_test.output(RUNS[-1]) != on_validation.output(RUNS[-1])
    assert on_test.file("results.csv") != on_validation.file("results.csv")


@pytest.mark.parametrize(("first", "then"), [("val", "test"), ("test", "val")])
def test_a_network_trained_with_the_other_part_scored_is_found(layout, first, then):
    runs = [RUNS[0], Run("mine", 2, 0)]
    own = {"mine": {"pretrain": None, "pseudo_labels": True, "finetune": {"initial_lr": 0.5}}}
    earlier = layout(methods=["mine"], own=own, scored=first)
    this = layout(methods=["mine"], own=own, scored=then)
    prepare(earlier, runs)
    for run in runs:
        Path(earlier.evaluation(run)).parent.mkdir(parents=True)
        Path(earlier.network(run)).write_bytes(b"")
    prepare(this, runs)
    for run in runs:
        assert this.trained_before(run) is None  # no sign that the training was completed
        Path(earlier.evaluation(run)).write_text("{}")
        assert this.trained_before(run) == earlier.network(run)
        assert this.trained_before(Run(run.arm, 3, 0)) is None
    assert this.trained_before(runs[1]) is not None
    own["mine"]["finetune"]["initial_lr"] = 0.25
    with pytest.raises(UserError, match=r"another method mine.finetune.initial_lr \(0.5, now 0.25\)"):
        prepare(layout(methods=["mine"], own=own, scored=then), runs)


SEMI_METHODS = ["semi", "semi_scratch", "scratch_longer", "scratch_pasted", "pcrlv2"]


@pytest.fixture
def semi(tiny, layout):
    """Makes comparisons of the semi-supervised arms of a dataset that has a scan without labels, too."""
    plan = make_full_plan(finetune={"epochs": 10, "iters_per_epoch": 1, "val_iters_per_epoch": 1})
    (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(plan))
    write_scans(tiny.folder, plan, {"scan": 0})
    return lambda **given: layout(**{"methods": SEMI_METHODS, **given})


def test_a_semi_supervised_arm_sees_no_held_out_case(semi, tiny, monkeypatch):
    write_scans(tiny.folder, make_full_plan(), {"other": 1})
    this = semi(settings={"semi": {"pseudo_weight": 0.25, "leave_out": ["unlabelled/scan"]}})
    run = Run("semi_scratch", 2, 1)
    prepare(this, [run])
    cases = this.comparison.cases
    held_out = [*cases.split.val, *cases.split.test]
    plan = json.loads((Path(this.data_folder) / f"{this.plans_name(run)}.json").read_text())
    assert plan["pcrl"]["semi"] == {"pseudo_weight": 0.25, "leave_out": held_out, "seed": 1}
    manifest = Path(this.data_folder) / "nnUNetPlans_3d_fullres_unlabelled" / "cases.json"
    assert manifest.read_bytes() == (tiny.folder / "nnUNetPlans_3d_fullres_unlabelled" / "cases.json").read_bytes()
    monkeypatch.setenv("nnUNet_preprocessed", this.preprocessed)
    found = SemiCases.find(plan, "3d_fullres", DATASET_JSON, this.fold(run), plan["pcrl"]["semi"]["leave_out"])
    labelled = this.comparison.labelled_cases(run)
    assert [case.name for case in found.labelled] == labelled
    assert list(found.unlabelled) == [*sorted({*cases.split.train} - {*labelled}), "unlabelled/other"]
    assert len(found.unlabelled) == 10 - len(held_out) - 2 + 1


def test_no_arm_trains_on_the_cases_to_leave_out_or_on_their_copies(semi, tiny, monkeypatch):
    usual = semi().comparison.cases
    test, train = usual.split.test[0], usual.split.train[0]
    scans = write_scans(tiny.folder, make_full_plan(), {"scan": 0, "other": 1})
    for copy, name in (("of_test", test), ("of_train", train)):
        shutil.copy(tiny.data / f"{name}.b2nd", scans / f"{copy}.b2nd")
    shutil.copy(scans / "scan.b2nd", scans / "of_scan.b2nd")
    leave_out = [train, test, "unlabelled/of_test", "unlabelled/scan"]
    this = semi(settings={"semi": {"leave_out": leave_out}})
    with_pseudo_labels = semi(methods=["pseudo_labels"], settings={"semi": {"leave_out": leave_out}}).comparison
    with pytest.raises(UserError, match=r"pcrl.semi.leave_out names 'case_77', which is not among the 15 preprocessed"):
        semi(settings={"semi": {"leave_out": ["case_77"]}})
    cases = this.comparison.cases
    assert cases.split == replace(usual.split, train=usual.split.train[1:])
    assert cases.left_out == {
        "of_scan": "it is scan under another name, which is held out",
        "of_test": "pcrl.semi.leave_out names it",
        "of_train": f"it is {train} under another name, which is held out",
        "scan": "pcrl.semi.leave_out names it",
    }
    runs = [Run(arm, 2, 0) for arm in ("scratch", "semi_scratch", "semi", "pcrlv2")]
    prepare(this, runs)
    fold = this.folds[this.pretraining_fold_name(runs[-1])]
    assert train not in fold["train"]
    assert train in fold["val"]
    assert train not in this.folds[this.fold_name(runs[0])]["train"]
    assert {file.stem for file in (Path(this.data_folder) / scans.name).glob("*.b2nd")} == {"other"}
    monkeypatch.setenv("nnUNet_preprocessed", this.preprocessed)
    plan = plans_of(this, runs[1])[this.plans_name(runs[1])]
    found = SemiCases.find(plan, "3d_fullres", DATASET_JSON, this.fold(runs[1]), plan["pcrl"]["semi"]["leave_out"])
    labelled = this.comparison.labelled_cases(runs[1])
    assert list(found.unlabelled) == [*sorted({*usual.split.train} - {train, *labelled}), "unlabelled/other"]
    predicted = with_pseudo_labels.pseudo_labelled(Run("pseudo_labels", 2, 0))
    assert list(predicted) == [*sorted({*usual.split.train} - {train, *labelled}), "unlabelled_other"]


def test_the_trainer_of_a_semi_supervised_arm_takes_its_plan(semi, tmp_path, monkeypatch):
    this = semi()
    for arm in ("semi", "semi_scratch"):
        run = Run(arm, 2, 0)
        prepare(this, [run])
        plan = json.loads((Path(this.data_folder) / f"{this.plans_name(run)}.json").read_text())
        assert plan["pcrl"].get("checkpoint") == (this.pretrained(run) if arm == "semi" else None)
        monkeypatch.setenv("nnUNet_preprocessed", this.preprocessed)
        monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
        trainer_class = getattr(trainers, this.trainer(run))
        plan["continue_training"] = False
        trainer = trainer_class(plan, "3d_fullres", this.fold(run), DATASET_JSON, torch.device("cpu"))
        assert trainer.num_epochs == 10
        assert type(trainer).__name__.startswith("PCRLSemiSupervised")
        assert ("Scratch" in type(trainer).__name__) == (arm == "semi_scratch")


def test_other_arms_have_no_semi_supervised_settings_and_one_has_more_epochs(semi):
    this = semi(settings={"semi": {"pseudo_weight": 0.25}})
    epochs, pasted = {}, {}
    for arm in ("scratch", "scratch_longer", "scratch_pasted", "pcrlv2", "semi_scratch", "semi"):
        plans = plans_of_all(this, Run(arm, 2, 0))
        for name, plan in plans.items():
            of_semi = arm.startswith("semi") and "pretrain_" not in name
            assert ("semi" in plan["pcrl"]) == of_semi, (arm, name)
        (plan,) = [plan for name, plan in plans.items() if "pretrain_" not in name]
        epochs[arm] = plan["pcrl"]["finetune"]["epochs"]
        pasted[arm] = plan["pcrl"]["finetune"].get("pasted_share")
    longer = {"scratch_longer": 16, "scratch_pasted": 16}
    assert epochs == {"scratch": 10, **longer, "pcrlv2": 10, "semi_scratch": 10, "semi": 10}
    assert pasted == {**dict.fromkeys(epochs), "scratch_pasted": 0.5}
    assert this.pretrained(Run("semi", 2, 0)) == this.pretrained(Run("pcrlv2", 2, 0))
    assert this.trainer(Run("scratch_longer", 2, 0)) == "PCRLScratchTrainer"


def plans_of_all(layout, run):
    prepare(layout, [run])
    return plans_of(layout, run)


def test_a_comparison_begun_by_an_older_version_accepts_semi_supervised_arms(layout):
    settings = {"finetune": {"epochs": 2}}
    begun = layout(methods=["pcrlv2"], settings=settings)
    prepare(begun, RUNS[:1])
    Path(begun.output(RUNS[0])).mkdir(parents=True)
    path = Path(begun.folder) / "comparison.json"
    description = json.loads(path.read_text())
    for arm in description["methods"].values():
        del arm["semi"], arm["epochs_factor"]
    path.write_text(json.dumps(description))
    again = layout(methods=["pcrlv2", "semi_scratch"], settings=settings)
    prepare(again, [*RUNS[:1], Run("semi_scratch", 2, 0)])
    assert json.loads(path.read_text())["methods"].keys() == {"scratch", "pcrlv2", *SEMI_METHODS[1:4]}
