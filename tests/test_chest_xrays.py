"""Chest X-rays from the download to scores: docs/chest_xrays.md, on small trees in the layouts of NIH and CheXpert."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from chest_xray_trees import write_chexpert, write_nih
from test_readme import environment_in, run, shorten

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "chest_xrays.md").read_text(encoding="utf-8")
LABELS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
PATIENTS = range(1, 31)
TEST = [f"{patient:08d}" for patient in PATIENTS if patient % 5 == 0]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with NIH ChestX-ray14 and CheXpert: 30 patients with two images, and 12 with one."""
    findings = {
        f"{patient:08d}_{i:03d}": "|".join(sorted({LABELS[(patient + i) % 14], *["Mass"] * (patient % 2)}))
        for patient in PATIENTS
        for i in range(2)
    }
    write_nih(tmp_path / "NIH", findings, TEST, size=(80, 72))
    labels = {
        f"{'valid' if i > 9 else 'train'}/patient{i:05d}/study1/view1_frontal.jpg": {"Edema": f"{i % 2}.0"}
        for i in range(1, 13)
    }
    write_chexpert(tmp_path / "CheXpert", labels, size=(90, 72))
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
    said = {}
    check = subprocess.run(["pcrl_nnunet_register", "--check"], env=environment, check=False)
    subprocess.run(["pcrl_nnunet_register"], env=environment, check=True, capture_output=True)
    try:
        for command in [line for block in blocks for line in block.splitlines()]:
            if command.startswith("export "):
                exports.append(command)
                continue
            said[command] = run(command, environment, exports, home)
            shorten(home / "nnUNet_preprocessed", features=4)
    finally:
        if check.returncode != 0:  # leave the environment as it was
            subprocess.run(["pcrl_nnunet_register", "--undo"], env=environment, check=True)
    results, preprocessed = home / "nnUNet_results", home / "nnUNet_preprocessed"
    folds = json.loads((preprocessed / "Dataset061_NIHChestXray" / "splits_final.json").read_text())
    trained = results / "Dataset061_NIHChestXray"
    for method in ("pcrlv2", "mae"):
        pretrained = trained / f"PCRLPretrainTrainer_{method}__nnUNetPlans__2d" / "fold_0" / "checkpoint_final.pth"
        seen = {case["name"] for case in torch.load(pretrained, weights_only=True)["cases"]}
        assert seen
        assert seen <= {*folds[0]["train"]}  # neither validation nor test images
    for name in ("PCRLClassificationTrainer__nnUNetPlans_chexpert", "PCRLClassificationTrainer_mae__nnUNetPlans"):
        assert (trained / f"{name}__2d" / "fold_0" / "validation" / "auroc.json").is_file()
    for name in ("nih", "nih_scratch"):
        check_scores(home / name)
    compared = [text for command, text in said.items() if command.startswith("pcrl_nnunet_compare")]
    assert len(compared) == 2
    assert all(re.search(r"labelled cases +2, 3, 7, 10, 14, 17\n", text) for text in compared)


def check_scores(prefix: Path) -> None:
    """Check the table and the scores of the official test images."""
    table = pd.read_csv(f"{prefix}.csv")
    assert list(table.columns) == ["case", *(f"p_{label}" for label in LABELS), *LABELS]
    assert {name.split("_")[0] for name in table["case"]} == {*TEST}
    assert len(table) == 2 * len(TEST)
    np.testing.assert_array_equal(table["Mass"], [int(name[:8]) % 2 for name in table["case"]])
    scores = json.loads(Path(f"{prefix}_auroc.json").read_text())
    assert [*scores][:14] == [*LABELS]
    mass, mean = scores["Mass"], scores["mean over the labels"]
    assert (mass["known"], mass["positive"]) == (12, 6)
    assert 0 <= mass["low"] <= mass["auroc"] <= mass["high"] <= 1
    with_interval = [scores[label]["auroc"] for label in LABELS if scores[label]["low"] is not None]
    assert mean["labels"] == len(with_interval)
    assert mean["auroc"] == pytest.approx(np.mean(with_interval))
    assert Path(f"{prefix}_roc.png").is_file()
