"""pcrl_nnunet_compare on a phantom dataset that nnU-Net planned: its own trainings, in processes of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from pcrl_nnunet.cli import compare, register

ROOT = Path(__file__).parents[2]
DATASET = "Dataset008_PhantomOrgan"
SHORT = {
    "pretrain": {"epochs": 1, "iters_per_epoch": 1},
    "finetune": {"epochs": 2, "iters_per_epoch": 2, "val_iters_per_epoch": 1},
}
COMMAND = ["-d", "8", "-device", "cpu", "-labelled", "2", "-seeds", "1", "-methods", "stock", "pseudo_labels", "pcrlv2"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A dataset of ten cases, planned and preprocessed by nnU-Net, and one scan without labels."""
    home = tmp_path_factory.mktemp("compare")
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    environment = {**kept, **{name: str(home / name) for name in names}, "nnUNet_def_n_proc": "1"}
    environment |= {"nnUNet_compile": "f", "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "Agg"}
    phantom = [sys.executable, str(ROOT / "scripts" / "phantom.py"), "-o", str(home / "nnUNet_raw"), "-d", "8"]
    size = ["-size", "20", "20", "16", "-cases", "10", "-test", "0", "-unlabelled", "1", "-np", "1"]
    bin_folder = Path(sys.executable).parent
    plan = [str(bin_folder / "nnUNetv2_plan_and_preprocess"), "-d", "8", "-c", "3d_fullres", "-np", "1", "-npfp", "1"]
    scans = home / "nnUNet_raw" / DATASET / "imagesUn"
    add = [str(bin_folder / "pcrl_nnunet_preprocess"), "-d", "8", "-i", str(scans), "-np", "1"]
    for command in ([*phantom, *size], plan, add):
        subprocess.run(command, check=True, capture_output=True, env={**environment, "nnUNet_n_proc_DA": "1"})
    file = home / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    content = json.loads(file.read_text())
    network = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [4] * len(network["features_per_stage"])
    file.write_text(json.dumps({**content, "pcrl": SHORT}))
    return {**environment, "nnUNet_n_proc_DA": "0"}


def run(environment, *arguments):
    command = [str(Path(sys.executable).parent / "pcrl_nnunet_compare"), *COMMAND, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=600)


@pytest.mark.slow
def test_a_comparison_from_the_split_to_the_verdict(environment):
    registered = register.is_registered()
    preprocessed = Path(environment["nnUNet_preprocessed"]) / DATASET
    before = {path: path.read_bytes() for path in preprocessed.rglob("*") if path.is_file()}
    try:
        dry = run(environment, "--dry_run")
        assert dry.returncode == 0, dry.stderr
        assert re.search(r"4 runs, 0 of 6 steps are done", dry.stdout)
        assert not (Path(environment["nnUNet_results"]) / "pcrl_compare").exists()
        assert re.search(r"\d\.\d\d s a step of pretraining of pcrlv2, on cpu", dry.stdout)
        assert re.search(r"About \d+ min of training", dry.stdout)
        assert "stock is scratch once more here" in dry.stdout
        assert "Please cite" not in dry.stdout  # nnU-Net's trainers print a page for every kind of training

        done = run(environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "stock is scratch once more here" in done.stdout
        other_part = run(environment, "-scored", "val", "-methods", "pcrlv2")
        assert other_part.returncode == 0, other_part.stdout + other_part.stderr
    finally:
        if not registered:
            register.undo()
    assert {path: path.read_bytes() for path in preprocessed.rglob("*") if path.is_file()} == before

    folder = Path(environment["nnUNet_results"]) / "pcrl_compare" / f"{DATASET}__nnUNetPlans__3d_fullres"
    description = json.loads((folder / "comparison.json").read_text())
    scores = pd.read_csv(folder / "results.csv")
    assert list(scores) == ["method", "labelled", "seed", "case", "label", "dice"]
    assert set(scores["method"]) == {"scratch", "stock", "pseudo_labels", "pcrlv2"}
    assert set(scores["case"]) == set(description["split"]["test"])

    # nnU-Net's own measure of a prediction, against a Dice that is counted here
    fold = list(description["folds"]).index("2_0_test")
    (scratch,) = (folder / "nnUNet_results" / DATASET).glob(
        f"PCRLScratchTrainer__*scratch_2_0__*/fold_{fold}/validation"
    )
    case = description["split"]["test"][0]
    prediction, truth = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for path in (scratch / f"{case}.nii.gz", preprocessed / "gt_segmentations" / f"{case}.nii.gz")
    )
    for row in scores.query("method == 'scratch' and case == @case").itertuples():
        label = json.loads((preprocessed / "dataset.json").read_text())["labels"][row.label]
        p, t = prediction == label, truth == label
        expected = 2 * (p & t).sum() / (p.sum() + t.sum()) if (p | t).any() else np.nan
        assert row.dice == pytest.approx(expected, nan_ok=True)

    table = pd.read_csv(folder / "table.csv")
    points = scores.fillna({"dice": 1}).groupby(["method", "case"])["dice"].mean().mul(100).groupby("method").mean()
    assert table.set_index("method")["mean"].to_dict() == pytest.approx(points.to_dict())
    assert table.set_index("method").loc["pcrlv2", "difference"] == pytest.approx(points["pcrlv2"] - points["scratch"])

    for name in ("label_efficiency", "iterations", "segmentations"):
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{name}.png"))).std() > 10  # more than white
    assert not list(folder.rglob("checkpoint_best.pth"))
    last = done.stdout.strip().splitlines()[-1]
    # chance decides whether a network of a few iterations is better than a guess; the verdict goes with the table
    assert last.startswith("Nothing was learned, and there is no verdict") == (not table["learned"].any())
    (log,) = (folder / "nnUNet_results" / DATASET).glob(f"PCRLFinetuneTrainer__*/fold_{fold}/transfer.json")
    assert json.loads(log.read_text())["validation_cases_seen"] == []

    assert set(pd.read_csv(folder / "results_val.csv")["case"]) == set(description["split"]["val"])
    trained, scored_again = (
        torch.load(file, weights_only=False)["network_weights"]
        for file in sorted(folder.rglob("PCRLFinetuneTrainer__*/fold_*/checkpoint_final.pth"))
    )
    assert all(torch.equal(trained[name], scored_again[name]) for name in trained)

    files = {path: path.stat().st_mtime for path in folder.rglob("*.pth")}
    again = run(environment)
    assert re.search(r"4 runs, 6 of 6 steps are done", again.stdout)
    assert {path: path.stat().st_mtime for path in folder.rglob("*.pth")} == files


def test_what_cannot_be_compared_is_said_in_a_sentence(tiny, monkeypatch, capsys):

    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_compare", "-d", "999", "-device", "cpu", *arguments])
        with pytest.raises(SystemExit) as end:
            compare.main_entry()
        assert end.value.code != 0
        return str(end.value.code) + capsys.readouterr().err

    assert "3d_cascade_fullres takes the labels of 3d_lowres as input" in refused("-c", "3d_cascade_fullres")
    assert "-seeds is 0" in refused("-seeds", "0")
    assert not tiny.results.exists()


@pytest.mark.slow
def test_a_comparison_of_classifications_is_scored_by_auroc_beside_shortcuts(environment):
    raw, out = (Path(environment[name]) / DATASET for name in ("nnUNet_raw", "nnUNet_results"))
    images = sorted((raw / "imagesTr").glob("*.nii.gz"))
    names = [image.name.removesuffix("_0000.nii.gz") for image in images]
    middle = sitk.ReadImage(str(images[0]))
    corner = middle.TransformContinuousIndexToPhysicalPoint([3, 3, 3])
    middle = middle.TransformContinuousIndexToPhysicalPoint([s / 2 for s in middle.GetSize()])
    # the last case is unknown: it is pretrained on, and never scored
    lines = [f"{n},{','.join(map(str, p))},{c}" for n in names[:-1] for p, c in ((middle, 1), (corner, 0))]
    (raw / "candidates.csv").write_text("\n".join(["seriesuid,coordX,coordY,coordZ,class", *lines]))
    settings = raw / "settings.json"
    settings.write_text(json.dumps({"classify": {"crop_mm": 16.0, "batch_size": 2}}))
    registered = register.is_registered()
    command = [str(Path(sys.executable).parent / "pcrl_nnunet_compare"), "-d", "8", "-device", "cpu", "-labelled", "3"]
    command += ["-seeds", "1", "-methods", "position", "pcrlv2", "-task", "classification", "-settings", str(settings)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=600)
    finally:
        if not registered:
            register.undo()
        (raw / "candidates.csv").unlink()
    assert done.returncode == 0, done.stdout + done.stderr
    folder = out.parent / "pcrl_compare" / f"{DATASET}__nnUNetPlans__3d_fullres__classification"
    split = json.loads((folder / "comparison.json").read_text())["split"]
    assert sorted(case for part in split.values() for case in part) == names[:-1]
    (pretraining,) = folder.rglob("PCRLPretrainTrainer__*/fold_*/checkpoint_final.pth")
    seen = {case["name"] for case in torch.load(pretraining, weights_only=True)["cases"]}
    assert not seen & {*split["val"], *split["test"]}
    assert names[-1] in seen
    scores = pd.read_csv(folder / "results.csv")
    assert list(scores) == ["method", "labelled", "seed", "case", "label", "auroc"]
    assert set(scores["method"]) == {"scratch", "position", "pcrlv2"}
    assert scores.set_index("method").loc["position", "auroc"] == 1.0  # all there is to learn
    predictions = pd.read_csv(folder / "predictions.csv")
    assert set(predictions["case"]) == {*split["test"]}
    assert len(predictions) == 3 * 2 * len(split["test"])
    assert {"label_efficiency.png", "iterations.png", "roc.png"} <= {path.name for path in folder.iterdir()}
    assert "A shortcut is as good as the best network: with 3 labels position reaches 100.0" in done.stdout
    last = done.stdout.rstrip().splitlines()[-1]
    assert re.match(r"(Nothing was learned, and t|T)here is no verdict: with 3 labels no network ", last)  # 2 cases
    assert "more scored cases" in last
