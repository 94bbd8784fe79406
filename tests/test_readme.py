"""The README's commands, run word for word on a tiny dataset, and its other claims that can be checked by machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from time import time
from typing import Any

import numpy as np
import pytest
import torch
from skimage.io import imsave

from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.methods import DEFAULT, method_class
from pcrl_nnunet.pretraining.settings import PretrainSettings, pretrain_settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Commands that install, or that are whole runs of their own: where they are run instead.
RUN_ELSEWHERE = {
    "bash scripts/demo.sh": "tests/scripts/test_demo.py runs it, shortened",
    "bash scripts/test.sh": "this test is a part of it, with --long",
    "pip install .": "scripts/test.sh installs the package so",
}
# nnU-Net's commands ask for a GPU by default; the README says to add this where there is none.
NEEDS_DEVICE = ("nnUNetv2_train", "nnUNetv2_predict")
# What would take half an hour also for trainings of one step; tests/cli/test_compare.py has more of it.
SHORTER = {"pcrl_nnunet_compare -d 4": " -labelled 2 -seeds 1 -methods pcrlv2"}
SHORT = {
    "pretrain": {"epochs": 1, "iters_per_epoch": 1},
    "finetune": {"epochs": 1, "iters_per_epoch": 1, "val_iters_per_epoch": 1},
}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The lines of the bash blocks, in order."""
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture
def home(tmp_path: Path, forked_commands: Path) -> Path:
    """A user's home folder with what the README takes for granted.

    Datasets 4 and 16, new and unlabelled scans; dataset 60 without masks and images to classify.
    """
    phantom = [forked_commands / "python", ROOT / "scripts" / "phantom.py", "-o", tmp_path / "nnUNet_raw", "-np", "1"]
    for number, cases in (("4", "6"), ("16", "3")):
        counts = ["-d", number, "-cases", cases, "-test", "1", "-unlabelled", "2"]
        subprocess.run([*phantom, *counts, "-size", "20", "20", "16"], check=True, capture_output=True)
    raw = tmp_path / "nnUNet_raw" / "Dataset004_PhantomOrgan"
    shutil.move(raw / "imagesTs", tmp_path / "new_scans")
    shutil.move(raw / "imagesUn", tmp_path / "unlabelled_scans")
    write_photographs(tmp_path / "nnUNet_raw" / "Dataset060_Photographs", tmp_path / "IMAGES")
    return tmp_path


def write_photographs(raw: Path, new: Path) -> None:
    """A 2D dataset without masks: discs, of which some are large."""
    y, x = np.ogrid[:64, :64]
    for i in range(8):
        folder = new if i > 6 else raw / "imagesTr"
        folder.mkdir(parents=True, exist_ok=True)
        disc = 200.0 * ((y - 32) ** 2 + (x - 32) ** 2 < (10 + 10 * (i % 2)) ** 2)
        noise = np.random.default_rng(i).normal(20, 5, disc.shape)
        imsave(folder / f"photo_{i}_0000.png", (disc + noise).clip(0, 255).astype(np.uint8), check_contrast=False)
    (raw / "dataset.json").write_text(json.dumps({"channel_names": {"0": "grey"}, "file_ending": ".png"}))
    (raw / "classes.csv").write_text("case,large\n" + "".join(f"photo_{i},{i % 2}\n" for i in range(7)))


@pytest.fixture
def environment(home: Path, forked_commands: Path) -> dict[str, str]:
    """That of a user with this home folder."""
    return environment_in(home, forked_commands)


def environment_in(home: Path, commands: Path) -> dict[str, str]:
    """A user's environment on a small machine, with a folder of commands first on PATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    return {
        **kept,
        "HOME": str(home),
        "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}",
        "OMP_WAIT_POLICY": "PASSIVE",
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
        "MPLBACKEND": "Agg",
    }


def run(command: str, environment: dict[str, str], exports: list[str], folder: Path) -> str:
    """Run one line in bash as a user would; its output."""
    if command.startswith(NEEDS_DEVICE) and not torch.cuda.is_available():
        command += " -device cpu"
    command += SHORTER.get(command, "")
    if command.startswith("nnUNetv2_plan_and_preprocess"):
        command += " -npfp 1 -np 1"  # every process of nnU-Net's takes seconds to start, and eight are its default
    if command.startswith("nnUNetv2_extract_fingerprint"):
        command += " -np 1"
    if "_plan_" in command or "preprocess" in command:
        environment = {**environment, "nnUNet_n_proc_DA": "1"}  # nnU-Net's planning takes it for a number of threads
    script = "\n".join(["set -euo pipefail", *exports, command])
    start = time()
    options = {"env": environment, "cwd": folder, "capture_output": True, "check": False, "timeout": 600}
    done = subprocess.run(["bash", "-c", script], encoding="utf-8", **options)
    print(f"{time() - start:5.1f} s  {command}")  # noqa: T201  (shown by pytest -rP)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def shorten(preprocessed: Path, features: int | None = None) -> None:
    """Write a `pcrl` block into every plan, as the README says a user may; and if wanted a width."""
    for file in preprocessed.glob("Dataset*/*Plans*.json"):
        plan = json.loads(file.read_text())
        plan["pcrl"] = {**plan.get("pcrl", {}), **SHORT}
        for configuration in plan["configurations"].values() if features else ():
            network = configuration["architecture"]["arch_kwargs"]
            network["features_per_stage"] = [features] * len(network["features_per_stage"])
        file.write_text(json.dumps(plan))


@pytest.mark.long
@pytest.mark.slow
def test_every_command_of_the_readme_runs(home: Path, environment: dict[str, str]) -> None:
    check = subprocess.run(["pcrl_nnunet_register", "--check"], env=environment, check=False)
    exports: list[str] = []
    unlabelled_done = False
    try:
        for command in ordered(commands()):
            if command.startswith("export "):
                exports.append(command)
            elif command not in RUN_ELSEWHERE:
                if command.startswith("pcrl_nnunet_transfer"):
                    take_for_another_datasets(home)
                output = run(command, environment, exports, home)
                unlabelled_done = unlabelled_done or "2 made" in output
                shorten(home / "nnUNet_preprocessed")
    finally:
        if check.returncode != 0:  # leave the environment as it was
            subprocess.run(["pcrl_nnunet_register", "--undo"], env=environment, check=True)

    assert unlabelled_done
    assert len(list((home / "predictions").glob("case_ts_*.nii.gz"))) == 1
    assert (home / "predictions.csv").read_text().startswith("case,p_large\nphoto_7,0.")
    check_where_files_land(home)


def take_for_another_datasets(home: Path) -> None:
    """The pretraining made so far, where the README has one of another dataset."""
    (made,) = home.glob(
        "nnUNet_results/Dataset004_*/PCRLPretrainTrainer_pcrlv2__nnUNetPlans__*/fold_all/checkpoint_final.pth"
    )
    (home / "pretrained_on_liver").mkdir()
    shutil.copy(made, home / "pretrained_on_liver")


def ordered(lines: list[str]) -> list[str]:
    """The README explains scans without labels after the main way, and says to do them between steps 4 and 5."""
    extra = next(line for line in lines if line.startswith("pcrl_nnunet_preprocess"))
    rest = [line for line in lines if line != extra]
    planned = next(i for i, line in enumerate(rest) if line.startswith("nnUNetv2_plan_and_preprocess"))
    return [*rest[: planned + 1], extra, *rest[planned + 1 :]]


def check_where_files_land(home: Path) -> None:
    """Every folder and file that the table names is there."""
    section = README.split("## Where files land")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(nnUNet_\S+)` \| (.*) \|$", section, re.MULTILINE)
    assert len(rows) == 5
    for folder, what in rows:
        (place,) = home.glob(folder.replace("Dataset004_...", "Dataset004_*"))
        for name in re.findall(r"`(\S+\.(?:html|json|png|pth|txt))`", what):
            while_it_runs_or_if_any = name in (
                "checkpoint_latest.pth",
                "checkpoint_damaged.pth",
                "checkpoint_previous.pth",
                "bad_cases.txt",
                "roc.png",  # of a classification
            )
            assert while_it_runs_or_if_any or (place / name).is_file(), (folder, name)


def test_commands_that_are_run_elsewhere_are_still_in_the_readme() -> None:
    assert set(RUN_ELSEWHERE) <= set(commands())
    assert all((ROOT / line.split()[1]).is_file() for line in RUN_ELSEWHERE if line.startswith("bash "))


def test_the_settings_that_the_readme_shows_are_settings() -> None:
    (block,) = blocks("json")
    plan = json.loads(block)
    configuration: dict[str, Any] = {
        "patch_size": [32, 32, 32],
        "batch_size": 4,
        "median_image_size_in_voxels": [32, 32, 32],
        "spacing": [1, 1, 1],
        "architecture": {"arch_kwargs": {"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}},
    }
    plan["configurations"] = {"3d_fullres": configuration, "2d": {}}
    assert pretrain_settings(plan, "3d_fullres", configuration).own.augmentation.rotation_degrees == 15
    assert FinetuneSettings.from_plan(plan).epochs == 500
    assert set(plan["pcrl"]) == {"pretrain", "finetune", "checkpoint"}


def test_the_defaults_that_the_readme_states_are_the_defaults() -> None:
    stated = re.search(
        r"pretraining (\d+) epochs of (\d+) steps;\s+fine-tuning\s+(\d+) epochs of (\d+) steps .* the first (\d+)\.",
        README,
        re.DOTALL,
    )
    assert stated is not None
    finetune = FinetuneSettings()
    assert [int(number) for number in stated.groups()] == [
        PretrainSettings.__dataclass_fields__["epochs"].default,
        PretrainSettings.__dataclass_fields__["iters_per_epoch"].default,
        finetune.epochs,
        finetune.iters_per_epoch,
        finetune.warmup_epochs,
    ]
    assert f"| {method_class(DEFAULT).defaults['initial_lr']:g}, cosine decay" in README


def test_the_messages_of_the_trouble_table_are_ours_or_nnunets() -> None:
    section = README.split("## When something goes wrong")[1].split("\n## ")[0]
    messages = [m.removesuffix(" PCRL...") for m in re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)]
    assert len(messages) >= 8
    not_in_sources = {"'NoneType' object is not callable", "CUDA out of memory"}  # Python's and torch's own
    import nnunetv2

    nnunet = Path(nnunetv2.__file__).parent
    folders = [ROOT / "pcrl_nnunet", ROOT / "trainers", nnunet / "utilities"]
    files = [nnunet / "paths.py", *(file for folder in folders for file in folder.rglob("*.py"))]
    source = " ".join(file.read_text(encoding="utf-8") for file in files)
    joined = re.sub(r'"\s*f?"', "", source)  # sentences that are broken over lines
    assert [m for m in messages if m not in joined and m not in not_in_sources] == []


def sections(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, id=path.name) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))],
)
def test_the_files_and_sections_that_a_document_links_are_there(document: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8"))
    wrong = []
    for link in links:
        file, _, section = link.partition("#")
        target = document.parent / file if file else document
        if not link.startswith("http") and not (target.is_file() and (not section or section in sections(target))):
            wrong.append(link)
    assert wrong == []
