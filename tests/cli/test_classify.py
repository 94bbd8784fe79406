"""From a dataset without masks to predictions for new images, with nnU-Net's own planning and preprocessing."""

import gzip
import json
import multiprocessing
import os
import subprocess
import sys
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import blosc2
import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import skimage.io
import torch
from in_this_process import InThisProcess
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from sklearn.metrics import roc_auc_score

from pcrl_nnunet.cli import classify, compare, preprocess, pretrain
from pcrl_nnunet.ingest import maskless, workers
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.trainers import PCRLClassificationScratchTrainer, PCRLClassificationTrainer

NAME = "Dataset777_NoMasks"
SHORT = {"epochs": 1, "iters_per_epoch": 2, "val_iters_per_epoch": 1}


@contextmanager
def one_process():
    """Let pcrl_nnunet_preprocess, and nnU-Net within it, start no process: each would spend seconds on imports."""

    @contextmanager
    def worker_pool(num_processes):
        yield InThisProcess()

    def nnunet(command, env, check):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["nnUNetv2", *command[3:]])
            patch.setenv("nnUNet_raw", env["nnUNet_raw"])
            exec(command[2])
        return SimpleNamespace(returncode=0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=ThreadPool))
        patch.setattr(workers, "worker_pool", worker_pool)
        patch.setattr(maskless, "subprocess", SimpleNamespace(run=nnunet))
        patch.setenv("nnUNet_def_n_proc", "1")
        patch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planning takes it for a number of threads
        yield patch


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Eight anisotropic images with a shifted origin and a flipped axis, planned and preprocessed without masks."""
    home = tmp_path_factory.mktemp("home")
    raw = home / "raw" / NAME
    (raw / "imagesTr").mkdir(parents=True)
    rng = np.random.default_rng(0)
    z, y, x = np.ogrid[:20, :36, :32]
    inside = ((z - 10) / 9) ** 2 + ((y - 18) / 16) ** 2 + ((x - 16) / 14) ** 2 < 1
    for i in range(8):
        voxels = np.where(inside, 100.0, 0.0) + rng.normal(scale=8, size=inside.shape)
        image = sitk.GetImageFromArray(voxels.astype(np.float32))
        image.SetSpacing([1.0, 1.0, 1.5])
        image.SetOrigin([-20.0, 30.0, 5.0])
        image.SetDirection([-1.0, 0, 0, 0, 1, 0, 0, 0, 1])
        sitk.WriteImage(image, str(raw / "imagesTr" / f"case_{i}_0000.nii.gz"))
    described = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz"}  # masks would need labels here
    (raw / "dataset.json").write_text(json.dumps(described))
    (raw / "classes.csv").write_text("case,odd\n" + "".join(f"case_{i},{i % 2}\n" for i in range(8)))
    points = "".join(f"case_{i},{-36 + k},{44 + k},{20 - k},{k % 2}\n" for i in range(8) for k in range(3))
    (raw / "candidates.csv").write_text(f"seriesuid,coordX,coordY,coordZ,class\n{points}")
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    (home / "preprocessed").mkdir()
    with one_process() as patch:
        for name in ("raw", "preprocessed", "results"):
            patch.setenv(f"nnUNet_{name}", str(home / name))
        assert run(patch, preprocess, "-d", "777", "-np", "1", "-c", "3d_fullres") is None
    assert {path: path.stat().st_mtime_ns for path in raw.rglob("*")} == before
    return home


@pytest.fixture
def folder(home, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(home / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return home / "preprocessed" / NAME


@pytest.mark.slow
def test_a_dataset_without_masks_is_planned_and_preprocessed_as_nnunet_does(folder):
    names = {"dataset.json", "dataset_fingerprint.json", "nnUNetPlans.json", "gt_segmentations"}
    assert names <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {"background": 0, "foreground": 1}
    assert len(list((folder / "nnUNetPlans_3d_fullres").glob("case_?.b2nd"))) == 8
    assert not (folder.parent / "pcrl_masks").exists()
    fingerprint = json.loads((folder / "dataset_fingerprint.json").read_text())
    assert 95 < fingerprint["foreground_intensity_properties_per_channel"]["0"]["mean"] < 105


CASES = [f"case_{i}" for i in range(8)]


def plan_of(folder, kind):
    """A plan of a small network for one table, with its own file and two folds."""
    plan = json.loads((folder / "nnUNetPlans.json").read_text())
    kwargs = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [4] * len(kwargs["features_per_stage"])
    plan |= {"pcrl": {"finetune": SHORT, "classify": {"table": kind, "patch_mm": 14.0}}, "plans_name": f"P{kind}"}
    (folder / f"P{kind}.json").write_text(json.dumps(plan))
    splits = [{"train": CASES[:5], "val": CASES[5:]}, {"train": CASES[3:], "val": CASES[:3]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    return plan


def trainer_of(folder, kind, fold, cls=PCRLClassificationScratchTrainer):
    plan = {**plan_of(folder, kind), "continue_training": False}
    dataset_json = json.loads((folder / "dataset.json").read_text())
    return cls(plan, "3d_fullres", fold, dataset_json, torch.device("cpu"))


def run(monkeypatch, command, *arguments):
    """Run a command; return its exit message, or None."""
    monkeypatch.setattr(sys, "argv", [f"pcrl_nnunet_{command.__name__.rsplit('.', 1)[1]}", *arguments])
    try:
        command.main_entry()
    except SystemExit as end:
        return str(end.code)
    return None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classes", "candidates"])
def test_new_images_are_classified_as_validation_would(folder, monkeypatch, tmp_path, capsys, kind):
    """For the same images, the command's probabilities equal the trainer's validation."""
    for fold in (1, 0):
        trainer = trainer_of(folder, kind, fold)
        trainer.run_training()
    trainer.perform_actual_validation()
    expected = pd.read_csv(os.path.join(trainer.output_folder, "validation", "predictions.csv"))
    key, column = ("case", "p_odd") if kind == "classes" else ("seriesuid", "p_class")
    images, out = str(folder.parents[1] / "raw" / NAME / "imagesTr"), tmp_path / "out.csv"
    arguments = ["-d", "777", "-o", str(out), "-c", "3d_fullres", "-p", f"P{kind}", "-device", "cpu"]
    arguments += ["-tr", "PCRLClassificationScratchTrainer"]
    points = pd.read_csv(folder / "candidates.csv").drop(columns="class")
    points.loc[len(points)] = ["elsewhere", 0, 0, 0]
    points.to_csv(tmp_path / "points.csv", index=False)
    given, wrong = ["-points", str(tmp_path / "points.csv")], []
    if kind == "classes":
        given, wrong = wrong, given

    def classified(*more):
        assert run(monkeypatch, classify, *arguments, "-i", images, *given, *more) is None
        return pd.read_csv(out)

    found = classified("-f", "0")
    said = capsys.readouterr().out
    assert "images a second" in said
    if kind == "candidates":
        assert "points a second" in said
        assert "Left out: the points of 1 images that are not in" in said
    assert sorted(set(found[key])) == CASES
    of_validation = found[found[key].isin(CASES[5:])].reset_index(drop=True)
    np.testing.assert_allclose(of_validation[column], expected[column], atol=1e-4)
    assert expected[column].std() > 0
    both = classified("-f", "0", "1")
    np.testing.assert_allclose(both[column], (found[column] + classified("-f", "1")[column]) / 2, atol=1e-5)

    labels = ["-labels", str(folder / "classes.csv")]
    if kind == "candidates":
        assert "trained on points" in run(monkeypatch, classify, *arguments, "-i", images, *given, "-f", "0", *labels)
    else:
        check_scores(classified("-f", "0", *labels), tmp_path, capsys.readouterr().out)

    folds = run(monkeypatch, classify, *arguments, "-i", images, *given)
    assert "fold 2 is not trained" in folds
    message = "leave -points out" if kind == "classes" else "give the points with -points"
    assert message in run(monkeypatch, classify, *arguments, "-i", images, *wrong, "-f", "0")
    if kind == "candidates":
        return

    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("good_0000", "odd_0000", "odd_0001", "named_otherwise"):
        (scans / f"{name}.nii.gz").symlink_to(os.path.join(images, "case_0_0000.nii.gz"))
    whole = Path(images, "case_0_0000.nii.gz")
    half = gzip.decompress(whole.read_bytes())[:-5000]
    (scans / "half_0000.nii.gz").write_bytes(gzip.compress(half))
    nan = nibabel.load(whole)
    voxels = nan.get_fdata(dtype=np.float32)
    voxels[3, 4, 5] = np.nan
    nibabel.save(nibabel.Nifti1Image(voxels, nan.affine), scans / "nan_0000.nii.gz")
    (scans / "packed_0000.nii").symlink_to(whole)
    message = run(monkeypatch, classify, *arguments, "-i", str(scans), "-f", "0")
    assert "5 images could not be classified" in message
    for said in (
        "named_otherwise.nii.gz: no channel's number in its name; expected named_otherwise_0000.nii.gz",
        "packed_0000.nii: another ending than the dataset's .nii.gz",
        "odd_0000.nii.gz: channels 0000, 0001; expected 0000",
        "half_0000.nii.gz: the file ends too early",
        "nan_0000.nii.gz: 1 voxels are NaN or infinite",
    ):
        assert said in message
    assert list(pd.read_csv(out)["case"]) == ["good"]  # the other images are classified
    run_case, calls = DefaultPreprocessor.run_case_npy, []

    def with_holes(self, *arguments):
        data, *more = run_case(self, *arguments)
        calls.append(data)
        if len(calls) == 4:
            data[0, 0, 0, 0] = np.nan
        return data, *more

    monkeypatch.setattr(DefaultPreprocessor, "run_case_npy", with_holes)
    message = run(monkeypatch, classify, *arguments, "-i", images, "-f", "0")
    assert "case_3_0000.nii.gz: voxels became NaN or infinite in preprocessing" in message
    assert len(pd.read_csv(out)) == len(CASES) - 1


def check_scores(found, folder, said):
    """Check the truth and the scores that -labels adds to a table of predictions."""
    assert list(found.columns) == ["case", "p_odd", "odd"]
    assert list(found["odd"]) == [int(case[-1]) % 2 for case in found["case"]]
    scores = json.loads((folder / "out_auroc.json").read_text())
    assert list(scores) == ["odd"]
    assert scores["odd"]["auroc"] == pytest.approx(roc_auc_score(found["odd"], found["p_odd"]))
    assert (scores["odd"]["known"], scores["odd"]["positive"]) == (8, 4)
    assert (folder / "out_roc.png").is_file()
    assert f"AUROC of odd: {scores['odd']['auroc']:.3f}, 95 % interval" in said


@pytest.mark.slow
def test_a_dataset_without_masks_pretrains_and_its_classification_starts_from_that(folder, monkeypatch):
    monkeypatch.setattr(Report, "write", lambda *_: None)  # takes seconds
    plan_of(folder, "classes")
    short = ["-epochs", "1", "-iters_per_epoch", "1", "-batch_size", "4", "-device", "cpu"]
    assert run(monkeypatch, pretrain, "-d", "777", "-p", "Pclasses", "-f", "0", *short) is None
    trainer = trainer_of(folder, "classes", 0, PCRLClassificationTrainer)
    trainer.run_training()
    with open(os.path.join(trainer.output_folder, "transfer.json")) as file:
        taken = json.load(file)
    assert taken["encoder_share"] == 1
    assert taken["checkpoint"].endswith("__Pclasses__3d_fullres/fold_0/checkpoint_final.pth")
    assert taken["validation_cases_seen"] == []


@pytest.mark.slow
def test_a_dataset_without_masks_takes_unlabelled_scans_and_is_compared(folder, monkeypatch, capsys):
    plan_of(folder, "classes")
    images = folder.parents[1] / "more"
    images.mkdir()
    image = sitk.ReadImage(str(folder.parents[1] / "raw" / NAME / "imagesTr" / "case_0_0000.nii.gz"))
    sitk.WriteImage(2 * image + 7, str(images / "scan.nii.gz"))  # the same after normalisation
    assert run(monkeypatch, preprocess, "-d", "777", "-c", "3d_fullres", "-i", str(images), "-np", "1") is None
    (scan,) = (folder / "nnUNetPlans_3d_fullres_unlabelled").glob("*.b2nd")
    own = blosc2.open(str(folder / "nnUNetPlans_3d_fullres" / "case_0.b2nd"))[:]
    np.testing.assert_allclose(blosc2.open(str(scan))[:], own, atol=1e-4)
    capsys.readouterr()
    arguments = ["-d", "777", "-p", "Pclasses", "-c", "3d_fullres", "-labelled", "2", "-seeds", "1", "-device", "cpu"]
    assert run(monkeypatch, compare, *arguments, "--dry_run") is None
    assert "__classification" in capsys.readouterr().out  # a dataset without masks is compared by AUROC


@pytest.mark.slow
def test_our_planner_plans_a_dataset_without_masks(folder, monkeypatch):
    before = (folder / "dataset.json").read_text()
    with one_process() as patch:
        assert run(patch, preprocess, "-d", "777", "-pl", "PCRLPlanner") is None
    assert json.loads((folder / "dataset.json").read_text()) == json.loads(before)  # has the foreground's label
    plan = json.loads((folder / "PCRLPlans.json").read_text())
    assert plan["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert os.environ["nnUNet_raw"] == str(folder.parents[1] / "raw")


@pytest.mark.slow
def test_a_dataset_without_masks_is_preprocessed_by_an_edited_plan(folder, monkeypatch):
    plan = json.loads((folder / "nnUNetPlans.json").read_text())
    edited = plan["configurations"]["3d_fullres"]
    spacing = [2 * s for s in edited["spacing"]]
    edited |= {"spacing": spacing, "data_identifier": "Coarse_3d"}
    (folder / "Coarse.json").write_text(json.dumps({**plan, "plans_name": "Coarse"}))
    before = (folder / "nnUNetPlans.json").read_bytes()
    with one_process() as patch:
        assert run(patch, preprocess, "-d", "777", "-np", "1", "-p", "Coarse") is None
    fine, coarse = (
        [blosc2.open(str(path)).shape for path in sorted((folder / name).glob("case_?.b2nd"))]
        for name in ("nnUNetPlans_3d_fullres", "Coarse_3d")
    )
    assert [tuple(round(n / 2) for n in shape[1:]) for shape in fine] == [shape[1:] for shape in coarse]
    assert (folder / "nnUNetPlans.json").read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_preprocess", "-d", "777", "-p", "Other"])
    with pytest.raises(SystemExit, match=r"Other.json does not exist; .* with -p: Coarse, "):
        preprocess.main_entry()


@pytest.mark.long
def test_colours_of_one_file_are_the_channels_of_a_photograph(tmp_path, monkeypatch, forked_commands):
    """From RGB pictures without masks to predictions, by the commands."""
    name, names = "Dataset778_Photographs", [f"{i:03d}" for i in range(6)]
    raw = tmp_path / "raw" / name
    (raw / "imagesTr").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, case in enumerate(names):
        picture = rng.integers(0, 100 + 100 * (i % 2), (40, 36, 3)).astype(np.uint8)
        skimage.io.imsave(raw / "imagesTr" / f"{case}_0000.png", picture)
    described = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    (raw / "dataset.json").write_text(json.dumps(described))
    (raw / "classes.csv").write_text("case,bright\n" + "".join(f"{case},{i % 2}\n" for i, case in enumerate(names)))
    (tmp_path / "preprocessed").mkdir()
    for folder in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{folder}", str(tmp_path / folder))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    command = [forked_commands / "pcrl_nnunet_preprocess", "-d", "778", "-np", "1", "-c", "2d"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    folder = tmp_path / "preprocessed" / name
    plan = json.loads((folder / "nnUNetPlans.json").read_text())
    kwargs = plan["configurations"]["2d"]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [4] * len(kwargs["features_per_stage"])
    plan |= {"pcrl": {"finetune": SHORT}, "continue_training": False}
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[:4], "val": names[4:]}]))
    dataset_json = json.loads((folder / "dataset.json").read_text())
    trainer = PCRLClassificationScratchTrainer(plan, "2d", 0, dataset_json, torch.device("cpu"))
    trainer.run_training()
    trainer.perform_actual_validation()
    expected = pd.read_csv(os.path.join(trainer.output_folder, "validation", "predictions.csv"), dtype={"case": str})
    arguments = ["-d", "778", "-i", str(raw / "imagesTr"), "-o", str(tmp_path / "out.csv"), "-c", "2d", "-f", "0"]
    arguments += ["-tr", "PCRLClassificationScratchTrainer", "-device", "cpu"]
    assert run(monkeypatch, classify, *arguments) is None
    found = pd.read_csv(tmp_path / "out.csv", dtype={"case": str}).set_index("case")
    assert list(found.index) == names
    skimage.io.imsave(raw / "imagesTr" / "grey_0000.png", picture[..., 0])
    assert "grey_0000.png: 1 channels, the dataset has 3" in run(monkeypatch, classify, *arguments)
    np.testing.assert_allclose(found.loc[expected["case"], "p_bright"], expected["p_bright"], atol=1e-4)
