import json
import re
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import make_plan

from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.comparison import (
    Comparison,
    Method,
    Run,
    built_in_methods,
    drawn_by_patient,
    methods_of,
    number_of,
    split_by_patient,
    with_settings,
)
from pcrl_nnunet.experiments.scores import COLUMNS, DiceScores
from pcrl_nnunet.finetuning.schedule import WarmupPolyLR
from pcrl_nnunet.methods import PCRLv2
from pcrl_nnunet.plans import load_plan
from pcrl_nnunet.pretraining.settings import pretrain_settings

CASES = [f"case_{i:03}" for i in range(200)]
PATIENTS = {case: f"patient_{i // 3}" for i, case in enumerate(CASES)}


@pytest.mark.parametrize("patients", [{}, PATIENTS])
def test_the_split_is_70_10_20_and_keeps_patients_together(patients):
    split = split_by_patient(CASES, patients)
    assert sorted([*split.train, *split.val, *split.test]) == CASES
    assert [len(split.train), len(split.val), len(split.test)] == pytest.approx([140, 20, 40], abs=3 if patients else 0)
    parts = [{patients.get(c, c) for c in part} for part in (split.train, split.val, split.test)]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_too_few_cases_for_a_split_are_refused():
    with pytest.raises(UserError, match="2 cases of 2 patients are too few for a split"):
        split_by_patient(CASES[:2], {})


def test_draws_differ_by_seed_and_not_by_the_order_of_the_cases():
    assert drawn_by_patient(CASES, {}, 1) == drawn_by_patient(CASES[::-1], {}, 1)
    assert drawn_by_patient(CASES, {}, 1)[:10] != drawn_by_patient(CASES, {}, 2)[:10]


def test_numbers_and_shares_of_labelled_cases():
    assert [number_of(text, 140) for text in ("5", "10%", "12.5%", "all", "0.1%")] == [5, 14, 18, 140, 1]
    for wrong in ("0", "141", "ten", "1.5", "200%"):
        with pytest.raises(UserError, match=f"-labelled has '{wrong}'"):
            number_of(wrong, 140)


def test_unknown_methods_and_settings_are_named():
    known = built_in_methods("3d_fullres", 5, 8)
    with pytest.raises(UserError, match=r"no method 'best'; expected some of scratch, stock, pseudo_labels, .* mine"):
        methods_of(["best"], {"mine": {}}, known)
    with pytest.raises(UserError, match=r"method mine is .* expected a block with some of pretrain, finetune"):
        methods_of(["mine"], {"mine": {"rate": 1}}, known)
    with pytest.raises(UserError, match=r"method mine has pseudo_labels and pretrains; only one"):
        methods_of(["mine"], {"mine": {"pseudo_labels": True}}, known)
    for both in ({"restoration": "full"}, None):
        with pytest.raises(
            UserError, match=r"method mine takes the pretraining of pcrlv2 and has pretrain .* no effect"
        ):
            methods_of(["mine"], {"mine": {"pretraining": "pcrlv2", "pretrain": both}}, known)
    assert list(methods_of(["mine"], {"mine": {"pretraining": "pcrlv2"}}, known)) == ["scratch", "mine", "pcrlv2"]


TABLES = {  # method.md 3: what each ablation restores from and compares in a decoder of 5 levels; local views or none
    "skip_connections": ([(i, i) for i in range(1, 6)], 6),
    "cross_scale": ([(i, i) for i in range(1, 6)], 6),
    "restoration_only": ([(5, None)], 0),
    "comparison_only": ([(None, 0)], 0),
    "one_level": ([(5, 0)], 0),
    "three_levels": ([(1, 1), (3, 3), (5, 5)], 0),
    "all_levels": ([(i, i) for i in range(1, 6)], 0),
    "multi_crop": ([(i, i) for i in range(1, 6)], 6),
    "pcrlv2": ([(i, i) for i in range(1, 6)], 6),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_ablations_are_those_of_the_papers_tables(name):
    plan = make_plan(features=(4, 4, 4, 8, 8, 8))
    plan["configurations"]["3d_fullres"]["patch_size"] = [64, 64, 64]
    plan["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = [90.0, 90.0, 90.0]
    method = built_in_methods("3d_fullres", 5, 8)[name]
    plan["pcrl"]["pretrain"] = dict(method.pretrain)
    configuration = PlansManager(plan).get_configuration("3d_fullres")
    settings = pretrain_settings(plan, "3d_fullres", configuration.configuration)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        3,
    )
    pretraining = PCRLv2.from_settings(network.encoder, 1, settings)
    levels, num_local = TABLES[name]
    drawn = [pretraining.draw_levels(0, step) for step in range(60)]
    assert {(d.restoration, d.comparison) for d in drawn} == set(levels)
    assert settings.views.num_local == num_local
    assert settings.batch_size == 8  # whatever fits
    assert any(d.comparison != d.comparison_of_second for d in drawn) == (name == "cross_scale")
    assert pretraining.decoder.skip_connections == (name == "skip_connections")
    assert (settings.views.crops == "multi_crop") == (name == "multi_crop")


@pytest.fixture
def comparison(tiny, tmp_path, monkeypatch):
    cases = [f"case_{i}" for i in range(10)]
    for number, name in enumerate(cases[4:]):
        for ending in ("_seg.b2nd", ".pkl"):
            (tiny.data / f"{name}{ending}").symlink_to(tiny.data / f"case_0{ending}")
        image = np.random.default_rng(10 + number).normal(size=(1, 14, 14, 14)).astype(np.float32)
        blosc2.asarray(image, urlpath=str(tiny.data / f"{name}.b2nd"))

    def make(protocol="all", settings=None, methods=("pcrlv2", "pseudo_labels"), own=(), patients=(), **given):
        plan = load_plan("Dataset999_Tiny", "nnUNetPlans", given.pop("configuration", "3d_fullres"))
        chosen = methods_of(methods, dict(own), built_in_methods(plan.configuration, 2, 8))
        folder, scored = str(tmp_path / "out"), given.pop("scored", "test")
        return Comparison(folder, plan, chosen, dict(patients), protocol, scored, settings or {}, **given)

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
    Path(first.output(RUNS[0])).mkdir(parents=True)
    second.prepare(RUNS[1:])
    third = comparison()
    third.prepare(RUNS)
    assert third.fold(RUNS[0]) == first.fold(RUNS[0])
    assert third.fold(RUNS[3]) == second.fold(RUNS[3])


def test_other_settings_in_the_same_folder_are_refused_where_something_was_trained(comparison):
    comparison(settings={"finetune": {"epochs": 3}}).prepare(RUNS)
    this = comparison()
    this.prepare(RUNS)  # nothing had been
    for run in RUNS:
        Path(this.output(run)).mkdir(parents=True)
    with pytest.raises(UserError, match=r"another settings.finetune.epochs \(1, now 7\); give another folder"):
        comparison(settings={"finetune": {"epochs": 7}}).prepare(RUNS)
    with pytest.raises(UserError, match=r"holds a comparison with another protocol \(\"all\", now \"semi\"\)"):
        comparison("semi").prepare(RUNS)


@pytest.mark.parametrize("protocol", ["all", "semi"])
def test_other_settings_are_refused_also_for_runs_that_share_nothing_with_those_there(comparison, protocol):
    """One table has one budget, whichever numbers of labels and methods were added by which call."""
    own, same = {"mine": {"pretrain": None, "finetune": {"epochs": 3}}}, {"finetune": {"iters_per_epoch": 4}}
    begun = comparison(protocol, methods=["mine"], own=own, settings=same)
    begun.prepare([Run("scratch", 2, 0), Run("mine", 2, 0)])
    Path(begun.output(Run("mine", 2, 0))).mkdir(parents=True)

    def go_on(own, settings):
        runs = [Run("scratch", 3, 1), *(Run(name, 3, 1) for name in own)]
        comparison(protocol, methods=list(own), own=own, settings=settings).prepare(runs)

    with pytest.raises(UserError, match=r"settings.finetune.iters_per_epoch \(4, now 5\); .* same settings to go on"):
        go_on(own, {"finetune": {"iters_per_epoch": 5}})
    with pytest.raises(UserError, match=r"another settings.pretrain.epochs \(null, now 5\)"):
        go_on({}, {**same, "pretrain": {"epochs": 5}})
    other = {"mine": {"pretrain": None, "finetune": {"epochs": 6}}}
    for _ in range(2):  # also after a call that did not name it
        with pytest.raises(UserError, match=r"another method mine.finetune.epochs \(3, now 6\); .* another name"):
            go_on(other, same)
        go_on({}, same)
    go_on(own, same)


@pytest.mark.parametrize("last", ["stock", "pcrlv2"])
def test_examples_are_of_a_pretrained_method_whichever_was_called_last(tiny, comparison, monkeypatch, last):
    runs = [Run(method, labelled, 0) for method, labelled in (("scratch", 2), ("scratch", 3), ("pcrlv2", 3))]
    first = comparison()
    first.prepare(runs)
    Path(first.output(runs[0])).mkdir(parents=True)
    this = comparison(methods=[last])
    runs.append(Run("stock", 2, 0))
    this.prepare([run for run in runs if run.method in ("scratch", last)])
    if last == "pcrlv2":
        runs.pop()
    raw, truth = tiny.folder.parent.parent / "raw", Path(this.preprocessed) / this.dataset / "gt_segmentations"
    images, labels = raw / this.dataset / "imagesTr", raw / this.dataset / "labelsTr"
    case = this.split.test[0]
    places = [labels, truth, *(Path(this.output(run)) / "validation" for run in runs)]
    for value, folder in enumerate([images, *places]):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{case}{'_0000' * (folder == images)}.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(np.full((2, 2, 2), value, np.uint8)), str(folder / name))
    monkeypatch.setenv("nnUNet_raw", str(raw))
    dice = [(run.method, run.labelled, run.seed, case, "a", 0.5) for run in runs]
    scores = DiceScores(pd.DataFrame(dice, columns=COLUMNS))
    (panels,) = this.examples(runs, scores, {2: ["scratch"], 3: ["scratch"]}).values()
    assert [title.split(":")[0] for title in panels] == ["truth", "scratch", "pcrlv2"]
    assert [labels.flat[0] for _, labels in panels.values()] == [2, 4, 5]  # with 3 labels, as pcrlv2 has


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


def test_pseudo_labels_are_for_the_training_cases_without_labels_and_for_no_held_out_case(tiny, comparison):
    folder = tiny.folder / "nnUNetPlans_3d_fullres_unlabelled"
    folder.mkdir()
    this = comparison()
    shutil.copy(tiny.data / f"{this.split.test[0]}.b2nd", folder / "copy.b2nd")  # of a test case, under another name
    image = np.random.default_rng(99).normal(size=(1, 14, 14, 14)).astype(np.float32)
    blosc2.asarray(image, urlpath=str(folder / "scan.b2nd"))

    this, run = comparison(), Run("pseudo_labels", 2, 1)
    this.prepare([run])
    assert this.left_out == {"copy": f"it is {this.split.test[0]} under another name, which is held out"}
    labelled = this.labelled_cases(run)
    target = tiny.folder.parent.parent / "out" / "nnUNet_preprocessed" / "Dataset999_Tiny"
    fold = json.loads((target / "splits_final.json").read_text())[this.fold(run)]
    assert set(fold["train"]) == {*this.split.train, "unlabelled_scan"}
    assert set(fold["val"]) == set(this.split.test)
    work = this.pseudo_labels(run)
    assert {case.name for case in work.true} == {*labelled, *this.split.test}
    assert set(work.predicted) == {*fold["train"]} - {*labelled}
    # pretraining sees the same unlabelled scans
    assert [path.name for path in (target / folder.name).iterdir()] == ["scan.b2nd"]


def test_the_scored_part_may_change_and_pretrainings_are_kept(comparison):
    on_validation, on_test = comparison(scored="val"), comparison()
    runs = [*RUNS, Run("pseudo_labels", 2, 0)]  # their data hold the scored cases
    on_validation.prepare(runs)
    for run in runs:
        Path(on_validation.output(run)).mkdir(parents=True)
    on_test.prepare(runs)
    assert on_test.pretrained(RUNS[-1]) == on_validation.pretrained(RUNS[-1])
    assert on_test.output(RUNS[-1]) != on_validation.output(RUNS[-1])
    assert on_test.file("results.csv") != on_validation.file("results.csv")


@pytest.mark.parametrize(("first", "then"), [("val", "test"), ("test", "val")])
def test_a_network_that_was_trained_with_the_other_part_scored_is_known(comparison, first, then):
    runs = [RUNS[0], Run("mine", 2, 0)]
    own = {"mine": {"pretrain": None, "pseudo_labels": True, "finetune": {"initial_lr": 0.5}}}
    earlier = comparison(methods=["mine"], own=own, scored=first)
    this = comparison(methods=["mine"], own=own, scored=then)
    earlier.prepare(runs)
    for run in runs:
        Path(earlier.evaluation(run)).parent.mkdir(parents=True)
        Path(earlier.network(run)).write_bytes(b"")
    this.prepare(runs)
    for run in runs:
        assert this.trained_before(run) is None  # not known to have come to its end
        Path(earlier.evaluation(run)).write_text("{}")
        assert this.trained_before(run) == earlier.network(run)
        assert this.trained_before(Run(run.method, 3, 0)) is None
    assert this.trained_before(runs[1]) is not None
    own["mine"]["finetune"]["initial_lr"] = 0.25
    with pytest.raises(UserError, match=r"another method mine.finetune.initial_lr \(0.5, now 0.25\)"):
        comparison(methods=["mine"], own=own, scored=then).prepare(runs)


def test_runs_that_need_cases_that_are_not_there_are_known_before(comparison):
    this = comparison("semi")
    everything = len(this.split.train)
    assert this.why_not(Run("pcrlv2", everything, 0)) == "no case is left for pretraining without the labelled ones"
    assert this.why_not(Run("pseudo_labels", everything, 0)) == "no case is left whose labels could be predicted"
    assert this.why_not(Run("scratch", everything, 0)) is None
    assert this.why_not(Run("pcrlv2", everything - 1, 0)) is None
    assert comparison("all").why_not(Run("pcrlv2", everything, 0)) is None


def test_the_first_stage_of_a_cascade_is_trained_without_the_second(tiny, comparison):
    this = comparison(configuration="3d_lowres")
    this.prepare(RUNS[:1])
    plan = json.loads((Path(this.preprocessed) / this.dataset / f"{this.plans_name(RUNS[0])}.json").read_text())
    assert not PlansManager(plan).get_configuration("3d_lowres").next_stage_names


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"settings": {"pretrian": {}}}, r"-settings has pretrian: {}; expected the blocks"),
        ({"settings": {"finetune": {"epoch": 3}}}, r"pcrl.finetune.epoch is not a setting"),
        ({"own": {"mine": {"pretrain": 5}}, "methods": ["mine"]}, r"method mine has pretrain: 5; expected the blocks"),
        ({"own": {"mine": {"pretrain": {"levels": 3}}}, "methods": ["mine"]}, r"pcrl.pretrain.levels is 3"),
        ({"patients": {"case_0": "p"}}, r"-patients lacks the cases case_1, case_2, case_3 ...; expected one line"),
        (
            {"patients": {f"case_{i}": "p" for i in range(10)} | {"case_0.nii.gz": "p"}},
            r"-patients has cases that the dataset lacks, case_0.nii.gz",
        ),
    ],
)
def test_mistyped_input_is_said_before_anything_is_written(tmp_path, comparison, given, message):
    with pytest.raises(UserError, match=message):
        comparison(**given)
    assert not (tmp_path / "out").exists()


def test_unlabelled_scans_of_held_out_patients_are_left_out(tiny, comparison):
    folder = tiny.folder / "nnUNetPlans_3d_fullres_unlabelled"
    folder.mkdir()
    for number, name in enumerate(("later", "other")):
        image = np.random.default_rng(99 + number).normal(size=(1, 14, 14, 14)).astype(np.float32)
        blosc2.asarray(image, urlpath=str(folder / f"{name}.b2nd"))
    patients = {f"case_{i}": f"patient_{i}" for i in range(10)}
    held_out = comparison(patients=patients).split.test[0]
    this = comparison(patients={**patients, "later": patients[held_out], "other": "someone"})
    assert list(this.left_out) == ["later"]
    assert [case.name for case in this.unlabelled] == ["other"]

    # A start that did not yet know whose scan it is has linked it into the folder that pretraining takes all from.
    first = comparison()
    first.prepare(RUNS)
    linked = Path(first.preprocessed) / "Dataset999_Tiny" / folder.name
    assert {path.name for path in linked.iterdir()} == {"later.b2nd", "other.b2nd"}
    this.prepare(RUNS)
    assert {path.name for path in linked.iterdir()} == {"other.b2nd"}
    assert (folder / "later.b2nd").exists()


def test_a_preview_of_a_comparison_that_has_begun_changes_nothing_in_it(tmp_path, comparison):
    begun = comparison()
    begun.prepare(RUNS)
    Path(begun.output(RUNS[0])).mkdir(parents=True)
    Path(begun.evaluation(RUNS[0])).parent.mkdir()
    Path(begun.evaluation(RUNS[0])).write_text("{}")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = comparison(methods=["mine"], own={"mine": {"finetune": {"epochs": 7}}}.items())
    (tmp_path / "preview").mkdir()
    other.preview_in(str(tmp_path / "preview"))
    runs = [*RUNS[:2], Run("mine", 2, 0)]
    other.prepare(runs)
    assert [other.is_done(run) for run in runs] == [True, False, False]
    assert other.pretrained(runs[-1]).startswith(begun.results)
    plan = tmp_path / "preview/nnUNet_preprocessed/Dataset999_Tiny" / f"{other.plans_name(runs[-1])}.json"
    assert json.loads(plan.read_text())["pcrl"]["finetune"]["epochs"] == 7
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    semi = comparison("semi")
    (tmp_path / "second").mkdir()
    semi.preview_in(str(tmp_path / "second"))
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / 'out'))} holds .* another protocol"):
        semi.prepare(RUNS)  # it names the user's folder, not that of the preview


def test_a_checkpoint_that_saw_held_out_cases_or_fits_not_is_refused(comparison, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"checkpoint /nope.pth does not exist"):
        comparison("transfer", checkpoint="/nope.pth")
    held_out = comparison().split.test[0]
    case = {"name": held_out, "path": f"Dataset999_Tiny/nnUNetPlans_3d_fullres/{held_out}.b2nd", "sha256": "0"}
    weights = {f"encoder.stages.{i}.0.convs.0.conv.weight": torch.zeros(w, 1, 3, 3, 3) for i, w in enumerate((4, 8, 8))}
    content = {"cases": [case], "network_weights": weights}
    monkeypatch.setattr("pcrl_nnunet.experiments.comparison.read_encoder", lambda path: content)
    with pytest.raises(UserError, match=f"was pretrained on 1 of the cases that are held out here \\({held_out}\\)"):
        comparison("transfer", checkpoint="other.pth")
    content["cases"] = []
    begun = comparison("transfer", checkpoint="other.pth")
    begun.prepare(RUNS)
    Path(begun.output(RUNS[0])).mkdir(parents=True)
    content["network_weights"] = {name: weight + 1 for name, weight in weights.items()}
    with pytest.raises(UserError, match=r"holds a comparison with another encoder"):
        comparison("transfer", checkpoint="other.pth").prepare(RUNS)
    with pytest.raises(UserError, match=r"pretraining settings of its own .* cannot take the pretraining"):
        comparison("transfer", checkpoint="other.pth", methods=["cross_scale"])
    content["all_cases_known"] = False
    with pytest.raises(UserError, match=r"other.pth does not list the cases that it was trained on"):
        comparison("transfer", checkpoint="other.pth")
    content["network_weights"] = {"encoder.stages.0.0.convs.0.conv.weight": torch.zeros(5, 1, 3, 3, 3)}
    with pytest.raises(UserError, match=r"other.pth: the checkpoint is of a PlainConvUNet in 3D with 5 features"):
        comparison("transfer", checkpoint="other.pth")


def test_other_runs_stay_in_the_results_and_a_half_written_summary_is_no_result(comparison):
    this = comparison()
    this.prepare(RUNS)
    summary = Path(this.evaluation(RUNS[0]))
    summary.parent.mkdir(parents=True)
    summary.write_text('{"metric_per_case": [')
    assert not this.is_done(RUNS[0])
    counts = {"n_ref": 10, "TP": 6, "FP": 8, "FN": 4, "TN": 22}
    metrics = {
        "1": {"Dice": 0.5, **counts},
        "2": {"Dice": float("nan"), "n_ref": 0, "TP": 0, "FP": 0, "FN": 0, "TN": 40},
    }
    summary.write_text(json.dumps({"metric_per_case": [{"prediction_file": "x/case_1.nii.gz", "metrics": metrics}]}))
    Path(this.file("results.csv")).write_text("method,labelled,seed,case,label,dice\nmine,2,0,case_1,a,0.25\n")
    of_dice = this.write_scores(RUNS)
    assert of_dice.chance == pytest.approx(100 * (2 * 0.25 / 1.25 + 1) / 2)  # a quarter has one label, none the other
    scores = pd.read_csv(this.file("results.csv"))
    assert scores[["method", "label"]].to_numpy().tolist() == [["scratch", "a"], ["scratch", "b"], ["mine", "a"]]


def test_the_curve_of_a_run_is_found_also_where_its_method_is_not_named_again(comparison):
    run = Run("mine", 2, 0)
    own = {"mine": {"pretrain": None, "pseudo_labels": True, "finetune": {"iters_per_epoch": 7}}}
    for scored, dice in (("test", [0.1, 0.2]), ("val", [0.3, 0.4])):
        earlier = comparison(methods=["mine"], own=own, scored=scored)
        earlier.prepare([run, RUNS[0]])
        Path(earlier.output(run)).mkdir(parents=True)
        content = {
            "logging": {"mean_fg_dice": dice},
            "init_args": {"plans": earlier._plans(run)[earlier.plans_name(run)]},
        }
        torch.save(content, Path(earlier.output(run)) / "checkpoint_final.pth")
    this = comparison()
    this.prepare(RUNS)
    iterations, dice = this.curve(run)
    assert iterations.tolist() == [7, 14]
    assert dice.tolist() == [0.1, 0.2]
    assert this.curve(RUNS[0]) is None


def test_the_remedy_of_a_training_too_short_is_a_file_of_settings(comparison):
    this = comparison(settings={"pretrain": {"epochs": 3}, "finetune": {"epochs": 2, "iters_per_epoch": 5}})
    said = this.remedy_for_learning()
    assert "are 2 x 5 iterations (finetune.epochs, finetune.iters_per_epoch)" in said
    assert "-settings" in said
    assert "another folder for -o" in said
    example = json.loads(re.search(r"\{.*\}", said)[0])
    assert example == {"pretrain": {"epochs": 3}, "finetune": {"epochs": 1000, "iters_per_epoch": 5}}
    longer = comparison(settings={"finetune": {"epochs": 5000, "iters_per_epoch": 50}})
    assert '"epochs": 20000' in longer.remedy_for_learning()


def test_settings_for_all_methods_are_merged_into_the_plan_and_a_methods_own_win():
    plan = make_plan(pretrain={"epochs": 1, "views": {"3d_fullres": {"num_local": 2}}}, checkpoint="x")
    given = {"pretrain": {"epochs": 2, "seed": 3, "views": {"3d_fullres": {"min_iou": 0.5}}}}
    merged = with_settings(plan, given, vars(Method(pretrain={"epochs": 4})))["pcrl"]
    assert merged["pretrain"] == {"epochs": 4, "seed": 3, "views": {"3d_fullres": {"num_local": 2, "min_iou": 0.5}}}
    assert "checkpoint" not in merged
    assert plan["pcrl"]["pretrain"]["epochs"] == 1


@pytest.mark.parametrize(("epochs", "the_same"), [(10, True), (19, True), (20, True), (39, True), (40, False)])
def test_stock_is_said_to_be_scratch_where_no_epoch_is_left_to_warm_up_in(comparison, epochs, the_same):
    made = comparison(settings={"finetune": {"epochs": epochs}}, methods=("stock",))
    note = made.note_on_stock()
    assert (note is not None) == the_same
    assert note is None or f"5% of {epochs} epochs leave none to warm up in" in note

    def first_rate(method):
        plan = with_settings(made.plan.plans, made.settings, vars(made.methods[method]))
        settings = FinetuneSettings.from_plan(plan)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], settings.initial_lr)
        WarmupPolyLR(optimizer, settings.initial_lr, settings.epochs, settings.warmup_epochs)
        return optimizer.param_groups[0]["lr"]

    assert (first_rate("scratch") == first_rate("stock")) == the_same


def test_stock_is_no_twin_of_scratch_with_another_rate_or_where_it_is_not_compared(comparison):
    few = {"epochs": 10}
    assert comparison(settings={"finetune": {**few, "initial_lr": 0.001}}, methods=("stock",)).note_on_stock() is None
    assert comparison(settings={"finetune": few}).note_on_stock() is None
    made = comparison(settings={"finetune": few}, methods=("stock",))
    assert made.note_on_stock() is not None
    made.targets = object()  # of a classification, whose own rate the plan does not say
    assert made.note_on_stock() is None
