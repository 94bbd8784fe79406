"""From a dataset without masks to predictions for new images, with nnU-Net's own planning and preprocessing."""

import json
import os
import subprocess
import sys

import blosc2
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from pcrl_nnunet.cli import classify, preprocess
from pcrl_nnunet.trainers import PCRLClassificationScratchTrainer

NAME = "Dataset777_NoMasks"
SHORT = {"epochs": 1, "iters_per_epoch": 2, "val_iters_per_epoch": 1}


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
    described = {"channel_names": {"0": "MRI"}, "labels": {"background": 0}, "numTraining": 8, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(described))
    (raw / "classes.csv").write_text("case,odd\n" + "".join(f"case_{i},{i % 2}\n" for i in range(8)))
    points = "".join(f"case_{i},{-36 + k},{44 + k},{20 - k},{k % 2}\n" for i in range(8) for k in range(3))
    (raw / "candidates.csv").write_text(f"seriesuid,coordX,coordY,coordZ,class\n{points}")
    before = {path: path.stat().st_mtime_ns for path in raw.rglob("*")}
    (home / "preprocessed").mkdir()
    folders = {f"nnUNet_{name}": str(home / name) for name in ("raw", "preprocessed", "results")}
    command = [sys.executable, "-m", "pcrl_nnunet.cli.preprocess", "-d", "777", "-np", "1", "-c", "3d_fullres"]
    environment = {**os.environ, **folders, "nnUNet_def_n_proc": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classes", "candidates"])
def test_new_images_are_classified_as_validation_would(folder, monkeypatch, tmp_path, capsys, kind):
    """The same images, from their files: the command's probabilities are those of the trainer's validation."""
    plan = json.loads((folder / "nnUNetPlans.json").read_text())
    kwargs = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [4] * len(kwargs["features_per_stage"])
    plan |= {"pcrl": {"finetune": SHORT, "classify": {"target": kind, "crop_mm": 14.0}}, "plans_name": f"P{kind}"}
    names = [f"case_{i}" for i in range(8)]
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[:5], "val": names[5:]}]))
    dataset_json = json.loads((folder / "dataset.json").read_text())
    plan["continue_training"] = False
    trainer = PCRLClassificationScratchTrainer(plan, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    trainer.run_training()
    trainer.perform_actual_validation()
    expected = pd.read_csv(os.path.join(trainer.output_folder, "validation", "predictions.csv"))

    out = tmp_path / "out.csv"
    arguments = ["-d", "777", "-i", str(folder.parents[1] / "raw" / NAME / "imagesTr"), "-o", str(out), "-f", "0"]
    arguments += ["-c", "3d_fullres", "-p", f"P{kind}", "-tr", "PCRLClassificationScratchTrainer", "-device", "cpu"]
    points = str(folder / "candidates.csv")
    given = ["-points", points] if kind == "candidates" else []
    monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_classify", *arguments, *given])
    classify.main()
    found = pd.read_csv(out)
    key = "case" if kind == "classes" else "seriesuid"
    assert sorted(set(found[key])) == names
    of_validation = found[found[key].isin(names[5:])].reset_index(drop=True)
    column = next(name for name in found if name.startswith("p_"))
    np.testing.assert_allclose(of_validation[column], expected[column], atol=1e-4)
    assert expected[column].std() > 0
    assert "images a second" in capsys.readouterr().out

    wrong = ["-points", points] if kind == "classes" else []
    monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_classify", *arguments, *wrong])
    with pytest.raises(SystemExit, match="leave -points out" if kind == "classes" else "give the points with -points"):
        classify.main_entry()


@pytest.mark.slow
def test_a_dataset_without_masks_is_preprocessed_by_an_edited_plan(folder, monkeypatch):
    plan = json.loads((folder / "nnUNetPlans.json").read_text())
    edited = plan["configurations"]["3d_fullres"]
    spacing = [2 * s for s in edited["spacing"]]
    edited |= {"spacing": spacing, "data_identifier": "Coarse_3d"}
    (folder / "Coarse.json").write_text(json.dumps({**plan, "plans_name": "Coarse"}))
    before = (folder / "nnUNetPlans.json").read_bytes()
    command = [sys.executable, "-m", "pcrl_nnunet.cli.preprocess", "-d", "777", "-np", "1", "-p", "Coarse"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    fine, coarse = (
        [blosc2.open(str(path)).shape for path in sorted((folder / name).glob("case_?.b2nd"))]
        for name in ("nnUNetPlans_3d_fullres", "Coarse_3d")
    )
    assert [tuple(round(n / 2) for n in shape[1:]) for shape in fine] == [shape[1:] for shape in coarse]
    assert (folder / "nnUNetPlans.json").read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_preprocess", "-d", "777", "-p", "Other"])
    with pytest.raises(SystemExit, match=r"Other.json does not exist; .* name one of its plans with -p"):
        preprocess.main_entry()
