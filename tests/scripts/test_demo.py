"""`bash scripts/demo.sh`, the README's first command, shortened."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

ROOT = Path(__file__).parents[2]


def without_pip(commands: Path, venv: Path) -> Path:
    """An environment with these commands, but with a pip that does nothing.

    scripts/test.sh has installed the package. Another installation would remove it briefly while other tests run.
    """
    (venv / "bin").mkdir(parents=True)
    for command in commands.iterdir():
        (venv / "bin" / command.name).symlink_to(command)
    (venv / "bin" / "pip").write_text("#!/bin/sh\n")
    (venv / "bin" / "pip").chmod(0o755)
    return venv


@pytest.mark.long
@pytest.mark.slow
def test_the_demo_runs_again_and_ends_with_a_table_of_dice_and_pictures(tmp_path: Path, forked_commands: Path) -> None:
    folder = tmp_path / "a folder"
    for left in ("made_by_demo.sh", "nnUNet_raw/Dataset901_PhantomOrgan/imagesTr/broken_0000.nii.gz", "predictions/x"):
        (folder / left).parent.mkdir(parents=True, exist_ok=True)
        (folder / left).write_text("of an earlier run")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    environment |= {
        "PCRL_VENV": str(without_pip(forked_commands, tmp_path / "venv")),
        "PCRL_DEMO_QUICK": "1",
        "MPLBACKEND": "Agg",
    }
    check = subprocess.run([forked_commands / "pcrl_nnunet_register", "--check"], check=False)
    demo = ["bash", str(ROOT / "scripts" / "demo.sh"), str(folder)]
    try:
        done = subprocess.run(demo, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    finally:
        if check.returncode != 0:  # leave the environment as it was
            subprocess.run([forked_commands / "pcrl_nnunet_register", "--undo"], check=True)
    table = done.stdout.split("Dice on the test cases")[1]
    assert re.search(r"^organ +\d\.\d{3} +\d\.\d{3}$", table, re.MULTILINE)
    assert re.search(r"^The pretraining does not restore images: the error is \d\.\d\d of", table, re.MULTILINE)
    assert re.search(r"^The pretrained network (finds|does not find) the lesion \(Dice 0\.\d{3}\)", table, re.MULTILINE)
    assert "One run proves nothing" in table
    pictures = [Path(line.split(maxsplit=1)[1]) for line in table.splitlines() if line.endswith((".png", ".html"))]
    assert len(pictures) == 4
    assert all(picture.is_file() for picture in pictures)


def report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, scratch: float, pretrained: float
) -> int | str | None:
    """Run demo_report.py on results with these values; return the exit status."""
    raw, fold = tmp_path / "raw", tmp_path / "fold_all"
    fold.mkdir()
    (fold / "training_log_1.txt").write_text(
        f"epoch 1/2: restoration_error 1.2, x\nepoch 2/2: restoration_error {error}, x"
    )
    for folder in ("imagesTs", "labelsTs"):
        (raw / folder).mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organ": 1, "lesion": 2}}))
    image = sitk.GetImageFromArray(np.arange(27).reshape(3, 3, 3).astype(np.uint8) % 3)
    sitk.WriteImage(image, str(raw / "imagesTs" / "case_0000.nii.gz"))
    for folder in (raw / "labelsTs", tmp_path / "scratch", tmp_path / "pretrained"):
        folder.mkdir(exist_ok=True)
        sitk.WriteImage(image, str(folder / "case.nii.gz"))
    for name, lesion in (("scratch", scratch), ("pretrained", pretrained)):
        mean = {"1": {"Dice": 0.9}, "2": {"Dice": lesion}}
        summary = {"mean": mean, "foreground_mean": {"Dice": (0.9 + lesion) / 2}}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    command = ["demo_report.py", "-raw", str(raw), "-pretraining", str(fold), "-o", str(tmp_path / "x.png")]
    command += ["-predictions", *(f"{name}={tmp_path / name}" for name in ("scratch", "pretrained"))]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "demo_report.py"), run_name="__main__")
    assert (tmp_path / "x.png").is_file()
    return end.value.code


@pytest.mark.parametrize(
    ("error", "scratch", "pretrained", "status", "better"),
    [
        (0.25, 0.8, 0.7, 0, "scratch is better than pretrained by 0.050 Dice"),
        (0.25, 0.7, 0.8, 0, "pretrained is better than scratch by 0.050 Dice"),
        (0.25, 0.7, 0.7, 0, "all are alike"),
        (1.03, 0.7, 0.8, 1, "pretrained is better"),
        (0.25, 0.7, 0.0, 1, "scratch is better"),
        (0.25, 0.0, 0.7, 1, "pretrained is better"),
        (0.25, 0.7, float("nan"), 1, ""),
    ],
)
def test_the_demo_fails_without_restoration_or_a_found_lesion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: float, scratch: float,
    pretrained: float, status: int, better: str,
) -> None:  # fmt: skip
    assert report(tmp_path, monkeypatch, error, scratch, pretrained) == status
    said = capsys.readouterr().out
    assert f"the error is {error:.2f} of their variance" in said
    assert f"In this run {better}" in said
    assert "One run proves nothing" in said
    assert ("The pretrained network finds the lesion" in said) == (pretrained > 0.6)
    assert ("does not show what the demo is for" in said) == bool(status)


def test_the_demo_leaves_a_folder_that_it_did_not_make_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = subprocess.run(["bash", ROOT / "scripts" / "demo.sh", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not empty and was not made by this script" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
