"""The example of `docs/adding_a_method.md`, installed as its own package, through all commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "pcrl_denoising"
COMMANDS = """
import sys
import torch
from nnunetv2.run.run_training import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from pcrl_nnunet.cli import pretrain

torch.set_num_threads(1)
nnUNetTrainer.perform_actual_validation = lambda *_: None  # the tiny dataset has no geometry to predict in
sys.argv = ["pcrl_nnunet_pretrain", "-d", "999", "-method", "denoising", "-device", "cpu", "-epochs", "2",
            "-iters_per_epoch", "2", "-batch_size", "4"]
pretrain.main()
run_training("Dataset999_Tiny", "3d_fullres", "0", "PCRLFinetuneTrainer_denoising", device=torch.device("cpu"))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Variables of a process that has the example installed."""
    source, target = tmp_path_factory.mktemp("source") / "example", tmp_path_factory.mktemp("packages")
    shutil.copytree(EXAMPLE, source)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
    subprocess.run([*install, "--target", str(target), str(source)], check=True, timeout=300)
    return {**os.environ, "PYTHONPATH": str(target)}


def test_the_example_is_short():
    lines = (EXAMPLE / "pcrl_denoising.py").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if line.strip()]) < 100


def test_it_pretrains_and_is_fine_tuned_by_stock_commands(tiny, environment, forked_commands):
    folders = {name: os.environ[name] for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    run = subprocess.run(
        [forked_commands / "python", "-P", "-c", COMMANDS],
        env={**environment, **folders, "nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results = tiny.results
    pretrained = results / "PCRLPretrainTrainer_denoising__nnUNetPlans__3d_fullres" / "fold_all"
    assert "Pretraining by Denoising" in (pretrained / "report.html").read_text(encoding="utf-8")
    tuned = results / "PCRLFinetuneTrainer_denoising__nnUNetPlans__3d_fullres" / "fold_0"
    assert torch.load(tuned / "checkpoint_final.pth", weights_only=False)["trainer_name"] == "nnUNetTrainer"
    content = torch.load(pretrained / "checkpoint_final.pth", weights_only=True)
    assert content["method"] == "denoising"
    assert '"method": "denoising"' in (tuned / "transfer.json").read_text(encoding="utf-8")


def test_the_example_passes_the_tests_of_the_contract(environment, forked_commands):
    run = subprocess.run(
        [
            forked_commands / "python",
            "-P",
            "-m",
            "pytest",
            "-q",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",  # the server has imported a plugin
            "tests/methods/test_contract.py",
            "-k",
            "denoising and not 2D and not four and not residual",
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert "passed" in run.stdout
