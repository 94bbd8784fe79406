"""Every line of docs/public_datasets.md, on small trees in the datasets' own layouts."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from test_readme import environment_in, run, shorten

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "public_datasets.md").read_text(encoding="utf-8")
SIZE = (20, 20, 16)  # voxels X Y Z
SPACING = (1.0, 1.0, 1.5)  # mm


def ball(number: int) -> np.ndarray:
    """(Z, Y, X): a ball of some voxels, each in another place."""
    z, y, x = np.ogrid[: SIZE[2], : SIZE[1], : SIZE[0]]
    inside: np.ndarray = (z - 8) ** 2 + (y - 9 - number % 3) ** 2 + (x - 10) ** 2 < 12
    return inside


def write(path: Path, voxels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with LUNA16, LiTS and BraTS 2021, six cases each."""
    rng = np.random.default_rng(0)
    nodules, candidates = [], []
    for i in range(6):
        body = ball(i)
        hu = (rng.normal(-800, 30, body.shape) + 800 * body).astype(np.int16)
        write(tmp_path / "LUNA16" / f"subset{i % 3}" / f"1.2.{i}.mhd", hu)
        middle = (10.0, 9.0 + i % 3, 8 * 1.5)
        nodules.append((f"1.2.{i}", *middle, 6.0))
        candidates += [(f"1.2.{i}", *middle, 1), (f"1.2.{i}", 3.0, 3.0, 3.0, 0), (f"1.2.{i}", 16.0, 4.0, 20.0, 0)]
        write(tmp_path / "LiTS" / f"volume-{i}.nii", hu)
        tumour = body & (rng.random(body.shape) < 0.3)
        write(tmp_path / "LiTS" / f"segmentation-{i}.nii", body.astype(np.uint8) + tumour)
        name = f"BraTS2021_{i:05}"
        for channel in ("t1", "t1ce", "t2", "flair"):
            write(tmp_path / "BraTS2021" / name / f"{name}_{channel}.nii.gz", (hu + 1000).clip(1).astype(np.int16))
        seg = np.where(body, rng.choice([1, 2, 4], body.shape), 0).astype(np.uint8)
        write(tmp_path / "BraTS2021" / name / f"{name}_seg.nii.gz", seg)
    for file, last, rows in (("annotations", "diameter_mm", nodules), ("candidates_V2", "class", candidates)):
        with open(tmp_path / "LUNA16" / f"{file}.csv", "w", newline="") as table:
            csv.writer(table).writerows([("seriesuid", "coordX", "coordY", "coordZ", last), *rows])
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    return tmp_path


@pytest.mark.long
@pytest.mark.slow
def test_every_command_of_the_page_runs(home: Path, forked_commands: Path) -> None:
    environment = environment_in(home, forked_commands)
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    walk = (ROOT / "docs" / "getting_started.md").read_text(encoding="utf-8")
    exports = re.findall(r'^export nnUNet_\w+="\$HOME/.*"$', walk, re.MULTILINE)
    assert len(exports) == 3
    check = subprocess.run(["pcrl_nnunet_register", "--check"], env=environment, check=False)
    subprocess.run(["pcrl_nnunet_register"], env=environment, check=True, capture_output=True)
    try:
        for command in [line for block in blocks for line in block.splitlines()]:
            if command.startswith("export "):
                exports.append(command)
                continue
            run(command, environment, exports, home)
            shorten(home / "nnUNet_preprocessed", features=4)
    finally:
        if check.returncode != 0:  # leave the environment as it was
            subprocess.run(["pcrl_nnunet_register", "--undo"], env=environment, check=True)
    results = home / "nnUNet_results"
    folds = json.loads((home / "nnUNet_preprocessed" / "Dataset016_LUNA16" / "splits_final.json").read_text())
    assert folds[0]["val"] == ["1.2.0", "1.2.3"]  # the cases of subset 0
    pretrained = results / "Dataset016_LUNA16" / "PCRLPretrainTrainer_pcrlv2__nnUNetPlans__3d_fullres" / "fold_0"
    seen = {case["name"] for case in torch.load(pretrained / "checkpoint_final.pth", weights_only=True)["cases"]}
    assert seen == {*folds[0]["train"]}
    for trainer in ("PCRLClassificationTrainer", "PCRLClassificationScratchTrainer"):
        validation = results / "Dataset016_LUNA16" / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0" / "validation"
        assert len(pd.read_csv(validation / "predictions.csv")) == 6
    assert len(pd.read_csv(home / "luna.csv")) == 18
    for dataset in ("Dataset017_LiTS", "Dataset137_BraTS2021"):
        for name in ("PCRLFinetuneTrainer__nnUNetPlans_luna", "PCRLScratchTrainer__nnUNetPlans"):
            summary = results / dataset / f"{name}__3d_fullres" / "fold_0" / "validation" / "summary.json"
            assert "foreground_mean" in json.loads(summary.read_text())
