"""Cases, runs and checks of a comparison."""

import json
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments import comparison as comparison_module
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.preparation import prepare

RUNS = [Run(arm, labelled, seed) for arm in ("scratch", "pcrlv2") for labelled in (2, 3) for seed in (0, 1)]


@pytest.mark.parametrize("protocol", ["all", "semi"])
def test_no_training_sees_held_out_cases(tiny, layout, protocol):
    this = layout(protocol)
    prepare(this, RUNS)
    target = tiny.folder.parent.parent / "out" / "nnUNet_preprocessed" / "Dataset999_Tiny"
    folds = json.loads((target / "splits_final.json").read_text())
    held_out = {*this.comparison.cases.split.val, *this.comparison.cases.split.test}
    for run in RUNS:
        fold = folds[this.fold(run)]
        assert len(fold["train"]) == run.labelled
        assert set(fold["val"]) == set(this.comparison.cases.split.test)
        assert not held_out & set(fold["train"])
        left_out = set(folds[this.pretraining_fold(run)]["val"])
        assert left_out == held_out | (set(fold["train"]) if protocol == "semi" else set())
    assert json.loads((tiny.folder / "splits_final.json").read_text()) == tiny.splits


def test_arms_share_labelled_cases_and_larger_subsets_contain_smaller_ones(layout):
    this = layout()
    prepare(this, RUNS)
    assert this.fold(Run("scratch", 2, 1)) == this.fold(Run("pcrlv2", 2, 1))
    assert set(this.comparison.labelled_cases(RUNS[0])) < set(this.comparison.labelled_cases(Run("scratch", 3, 0)))


def test_pseudo_labels_are_for_training_cases_without_labels_only(tiny, layout):
    folder = tiny.folder / "nnUNetPlans_3d_fullres_unlabelled"
    folder.mkdir()
    this = layout()
    shutil.copy(
        tiny.data / f"{this.comparison.cases.split.test[0]}.b2nd", folder / "copy.b2nd"
    )  # a copy of a test case under another name
    image = np.random.default_rng(99).normal(size=(1, 14, 14, 14)).astype(np.float32)
    blosc2.asarray(image, urlpath=str(folder / "scan.b2nd"))

    this, run = layout(), Run("pseudo_labels", 2, 1)
    prepare(this, [run])
    assert this.comparison.cases.left_out == {
        "copy": f"it is {this.comparison.cases.split.test[0]} under another name, which is held out"
    }
    labelled = this.comparison.labelled_cases(run)
    target = tiny.folder.parent.parent / "out" / "nnUNet_preprocessed" / "Dataset999_Tiny"
    fold = json.loads((target / "splits_final.json").read_text())[this.fold(run)]
    assert set(fold["train"]) == {*this.comparison.cases.split.train, "unlabelled_scan"}
    assert set(fold["val"]) == set(this.comparison.cases.split.test)
    work = this.pseudo_labels(run)
    assert {case.name for case in work.true} == {*labelled, *this.comparison.cases.split.test}
    assert set(work.predicted) == {*fold["train"]} - {*labelled}
    # pretraining sees the same unlabelled scans
    assert [path.name for path in (target / folder.name).iterdir()] == ["scan.b2nd"]


def test_unlabelled_scans_of_held_out_patients_are_left_out(tiny, layout):
    folder = tiny.folder / "nnUNetPlans_3d_fullres_unlabelled"
    folder.mkdir()
    for number, name in enumerate(("later", "other")):
        image = np.random.default_rng(99 + number).normal(size=(1, 14, 14, 14)).astype(np.float32)
        blosc2.asarray(image, urlpath=str(folder / f"{name}.b2nd"))
    patients = {f"case_{i}": f"patient_{i}" for i in range(10)}
    held_out = layout(patients=patients).comparison.cases.split.test[0]
    this = layout(patients={**patients, "later": patients[held_out], "other": "someone"})
    assert list(this.comparison.cases.left_out) == ["later"]
    assert [case.name for case in this.comparison.cases.unlabelled] == ["other"]

    # A start without the list of patients links the scan into the folder, and pretraining takes all of the folder.
    first = layout()
    prepare(first, RUNS)
    linked = Path(first.preprocessed) / "Dataset999_Tiny" / folder.name
    assert {path.name for path in linked.iterdir()} == {"later.b2nd", "other.b2nd"}
    prepare(this, RUNS)
    assert {path.name for path in linked.iterdir()} == {"other.b2nd"}
    assert (folder / "later.b2nd").exists()


def test_a_run_that_lacks_cases_is_refused_with_the_reason(layout):
    this = layout("semi")
    everything = len(this.comparison.cases.split.train)
    assert (
        this.comparison.why_not(Run("pcrlv2", everything, 0))
        == "no case is left for pretraining without the labelled ones"
    )
    assert (
        this.comparison.why_not(Run("pseudo_labels", everything, 0))
        == "no case is left whose labels could be predicted"
    )
    semi = layout(methods=["semi_scratch"], settings={"finetune": {"epochs": 2}}).comparison
    assert semi.why_not(Run("semi_scratch", everything, 0)) == "no case is left whose labels could be predicted"
    assert semi.why_not(Run("semi_scratch", everything - 1, 0)) is None
    assert this.comparison.why_not(Run("scratch", everything, 0)) is None
    assert this.comparison.why_not(Run("pcrlv2", everything - 1, 0)) is None
    assert layout("all").comparison.why_not(Run("pcrlv2", everything, 0)) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"settings": {"pretrian": {}}}, r"-settings has pretrian: {}; expected the blocks"),
        ({"settings": {"finetune": {"epoch": 3}}}, r"pcrl.finetune.epoch is not a setting"),
        ({"settings": {"semi": {"box_share": 2}}}, r"pcrl.semi.box_share is 2; expected "),
        ({"own": {"mine": {"semi": {"box": 2}}}, "methods": ["mine"]}, r"pcrl.semi.box is not a setting"),
        ({"own": {"mine": {"semi": 5}}, "methods": ["mine"]}, r"method mine has semi: 5; expected the blocks"),
        ({"methods": ["semi"]}, r"pcrl.finetune.epochs is 1; a semi-supervised training has two phases"),
        ({"own": {"mine": {"pretrain": 5}}, "methods": ["mine"]}, r"method mine has pretrain: 5; expected the blocks"),
        (
            {"own": {"mine": {"pretrain": {"pcrlv2": {"levels": 3}}}}, "methods": ["mine"]},
            r"pcrl.pretrain.pcrlv2.levels is 3",
        ),
        ({"patients": {"case_0": "p"}}, r"-patients lacks the cases case_1, case_2, case_3 ...; expected one line"),
        (
            {"patients": {f"case_{i}": "p" for i in range(10)} | {"case_0.nii.gz": "p"}},
            r"-patients has cases that the dataset lacks, case_0.nii.gz",
        ),
    ],
)
def test_mistyped_input_is_refused_before_anything_is_written(tmp_path, layout, given, message):
    with pytest.raises(UserError, match=message):
        layout(**given)
    assert not (tmp_path / "out").exists()


def test_a_transfer_needs_a_checkpoint_of_other_data(layout):
    with pytest.raises(UserError, match=r"-protocol is transfer and -checkpoint None; .* give its checkpoint_final"):
        layout("transfer")


def test_a_checkpoint_that_saw_held_out_cases_or_does_not_fit_is_refused(layout, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"checkpoint /nope.pth does not exist"):
        layout("transfer", checkpoint="/nope.pth")
    held_out = layout().comparison.cases.split.test[0]
    case = {"name": held_out, "path": f"Dataset999_Tiny/nnUNetPlans_3d_fullres/{held_out}.b2nd", "sha256": "0"}
    weights = {f"encoder.stages.{i}.0.convs.0.conv.weight": torch.zeros(w, 1, 3, 3, 3) for i, w in enumerate((4, 8, 8))}
    content = {"cases": [case], "network_weights": weights}
    monkeypatch.setattr(comparison_module, "read_encoder", lambda path: content)
    with pytest.raises(UserError, match=f"was pretrained on 1 of the cases that are held out here \\({held_out}\\)"):
        layout("transfer", checkpoint="other.pth")
    content["cases"] = []
    begun = layout("transfer", checkpoint="other.pth")
    prepare(begun, RUNS)
    Path(begun.output(RUNS[0])).mkdir(parents=True)
    content["network_weights"] = {name: weight + 1 for name, weight in weights.items()}
    with pytest.raises(UserError, match=r"holds a comparison with another encoder"):
        prepare(layout("transfer", checkpoint="other.pth"), RUNS)
    with pytest.raises(UserError, match=r"pretraining settings of its own .* cannot take the pretraining"):
        layout("transfer", checkpoint="other.pth", methods=["cross_scale"])
    content["all_cases_known"] = False
    with pytest.raises(UserError, match=r"other.pth does not list the cases that it was trained on"):
        layout("transfer", checkpoint="other.pth")
    content["network_weights"] = {"encoder.stages.0.0.convs.0.conv.weight": torch.zeros(5, 1, 3, 3, 3)}
    with pytest.raises(UserError, match=r"other.pth: the checkpoint is of a PlainConvUNet in 3D with 5 features"):
        layout("transfer", checkpoint="other.pth")
