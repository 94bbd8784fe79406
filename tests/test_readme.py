"""The commands of the README and of the pages under docs/, run word for word on a tiny dataset.

Other tests check claims of these pages.

`PAGES` lists the pages in the order in which their commands are run. A line that an earlier page has is run once.

===========================  ======================================================================================
Page                         Where its commands run
===========================  ======================================================================================
docs/getting_started.md      `test_every_command_of_the_pages_runs`, on dataset 4
docs/unlabelled_scans.md     the same line as in docs/getting_started.md, which has it before pretraining
docs/another_dataset.md      `test_every_command_of_the_pages_runs`, on datasets 16 and 4
docs/another_network.md      `test_every_command_of_the_pages_runs`, with the pretraining that was made so far
docs/classification.md       `test_every_command_of_the_pages_runs`, on dataset 60
docs/compare.md              `test_every_command_of_the_pages_runs`, shortened by `SHORTER`
docs/settings.md             `test_every_command_of_the_pages_runs`
README.md                    the same lines as on the pages above, in the same order
CONTRIBUTING.md              elsewhere: `RUN_ELSEWHERE`
docs/public_datasets.md      tests/test_public_datasets.py
docs/chest_xrays.md          tests/test_chest_xrays.py
docs/several_gpus.md         tests/pretraining/test_distributed.py, with processes on a CPU
docs/adding_a_method.md      tests/methods/test_example.py
===========================  ======================================================================================
"""

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

from pcrl_nnunet.config import RECIPES, FinetuneSettings
from pcrl_nnunet.methods import DEFAULT, method_class
from pcrl_nnunet.pretraining.settings import PretrainSettings, pretrain_settings

ROOT = Path(__file__).parents[1]
PAGES = (
    "docs/getting_started.md",
    "docs/unlabelled_scans.md",
    "docs/another_dataset.md",
    "docs/another_network.md",
    "docs/classification.md",
    "docs/compare.md",
    "docs/settings.md",
    "README.md",
    "CONTRIBUTING.md",
)
# Pages that test_public_datasets.py runs, and pages on methods, whose commands differ from PAGES only in the method.
NOT_IN_PAGES = {
    *("docs/public_datasets.md", "docs/methods.md", "docs/semi_supervised.md", "docs/adding_a_method.md"),
    "docs/chest_xrays.md",  # tests/test_chest_xrays.py
    "docs/features.md",  # tests/cli/test_embed.py
}

# Commands that install or run for long, with the place that runs them instead.
RUN_ELSEWHERE = {
    "bash scripts/demo.sh": "tests/scripts/test_demo.py runs it, shortened",
    "bash scripts/test.sh": "this test is a part of it, with --long",
    "bash scripts/test.sh --long": ".ci/run starts it",
    "pip install .": "scripts/test.sh installs the package so",
    'pip install ".[benchmark]"': "scripts/test.sh installs the same packages with [test]",
    "python scripts/readme_picture.py": "tests/scripts/test_readme_picture.py draws it, shortened",
    "python scripts/benchmark_views.py": "tests/scripts/test_benchmark_views.py runs it, shortened",
    "python scripts/benchmark_images.py": "tests/scripts/test_benchmark_images.py runs it, shortened",
    "python scripts/benchmark_step.py": "tests/scripts/test_benchmark_step.py runs it, shortened",
}
# nnU-Net's commands need a GPU by default; docs/getting_started.md says to add this flag without a GPU.
NEEDS_DEVICE = ("nnUNetv2_train", "nnUNetv2_predict")
# These commands would take half an hour even with trainings of one step; tests/cli/test_compare.py tests more.
FROZEN = "pcrl_nnunet_compare -d 4 -c 2d -methods pcrlv2 mae simsiam -labelled 5 10 -seeds 5 -frozen"
# the last of equal flags counts
SHORTER = dict.fromkeys(("pcrl_nnunet_compare -d 4", FROZEN), " -labelled 2 -seeds 1 -methods pcrlv2")
SHORT = {
    "pretrain": {"epochs": 1, "iters_per_epoch": 1},
    "finetune": {"epochs": 1, "iters_per_epoch": 1, "val_iters_per_epoch": 1},
}


def read(page: str) -> str:
    """A page of the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language on a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", read(page), re.MULTILINE | re.DOTALL)


def commands(*pages: str) -> list[str]:
    """The lines of the bash blocks of pages, in order, each once."""
    lines = [line for page in pages for block in blocks(page, "bash") for line in block.splitlines() if line.strip()]
    return [*dict.fromkeys(lines)]


@pytest.fixture
def home(tmp_path: Path, forked_commands: Path) -> Path:
    """A user's home folder with everything that the pages assume.

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
    """Return the environment of a user with this home folder."""
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
    """Run one line in bash as a user would; return its output."""
    if command.startswith(NEEDS_DEVICE) and not torch.cuda.is_available():
        command += " -device cpu"
    command += SHORTER.get(command, "")
    if command.startswith("nnUNetv2_plan_and_preprocess"):
        command += " -npfp 1 -np 1"  # nnU-Net starts eight processes by default, and each takes seconds
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
    """Write a `pcrl` block, and optionally a width, into every plan, as docs/settings.md describes."""
    for file in preprocessed.glob("Dataset*/*Plans*.json"):
        plan = json.loads(file.read_text())
        plan["pcrl"] = {**plan.get("pcrl", {}), **SHORT}
        for configuration in plan["configurations"].values() if features else ():
            network = configuration["architecture"]["arch_kwargs"]
            network["features_per_stage"] = [features] * len(network["features_per_stage"])
        file.write_text(json.dumps(plan))


@pytest.mark.long
@pytest.mark.slow
def test_every_command_of_the_pages_runs(home: Path, environment: dict[str, str]) -> None:
    check = subprocess.run(["pcrl_nnunet_register", "--check"], env=environment, check=False)
    exports: list[str] = []
    unlabelled_done = False
    try:
        for command in commands(*PAGES):
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
    """Copy the pretraining made so far to the path of another dataset's one in docs/another_network.md."""
    (made,) = home.glob(
        "nnUNet_results/Dataset004_*/PCRLPretrainTrainer_pcrlv2__nnUNetPlans__*/fold_all/checkpoint_final.pth"
    )
    (home / "pretrained_on_liver").mkdir()
    shutil.copy(made, home / "pretrained_on_liver")


def folders_and_files() -> dict[str, list[str]]:
    """The folders of docs/files.md with the files from its tables."""
    found = {}
    for section in read("docs/files.md").split("\n## ")[1:]:
        (folder,) = re.findall(r"^`(nnUNet_\S+)`$", section, re.MULTILINE)
        rows = re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE)
        found[folder] = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return found


def check_where_files_land(home: Path) -> None:
    """Every folder and file of docs/files.md exists."""
    while_it_runs_or_if_any = {"checkpoint_latest.pth", "checkpoint_previous.pth", "checkpoint_damaged.pth"}
    # -hours writes hours.json, and a classification the last two
    if_any = {"bad_cases.txt", "old_1", "old_2", "hours.json", "roc.png", "predictions.csv"}
    for folder, names in folders_and_files().items():
        (place,) = home.glob(folder.replace("Dataset004_...", "Dataset004_*"))
        for name in names:
            assert name in while_it_runs_or_if_any | if_any or [*place.glob(name)], (folder, name)


def test_files_md_names_five_folders_with_files() -> None:
    found = folders_and_files()
    assert len(found) == 5
    assert all(found.values())
    assert sum(map(len, found.values())) >= 20


def test_commands_that_are_run_elsewhere_are_still_on_the_pages() -> None:
    assert set(RUN_ELSEWHERE) <= set(commands(*PAGES))
    scripts = [line.split()[1] for line in RUN_ELSEWHERE if line.startswith(("bash ", "python "))]
    tests = [
        word for where in RUN_ELSEWHERE.values() for word in where.split() if word.startswith(("tests/", "scripts/"))
    ]
    assert len(scripts) == 7
    assert all((ROOT / file).is_file() for file in scripts + tests)


def test_every_page_with_commands_is_run() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]
    with_commands = {name for page in pages if blocks(name := str(page.relative_to(ROOT)), "bash")}
    assert with_commands == {*PAGES} | NOT_IN_PAGES


def test_the_readme_has_the_pages_commands_in_the_tested_order() -> None:
    run_in_order = commands(*PAGES)
    places = [run_in_order.index(line) for line in commands("README.md") if line not in RUN_ELSEWHERE]
    assert len(places) >= 12
    assert places == sorted(places)
    assert set(commands("README.md")) <= set(commands(*PAGES[: PAGES.index("README.md")]))


def test_the_readme_is_short() -> None:
    assert len(read("README.md").split()) <= 1300


def test_the_settings_that_settings_md_shows_are_settings() -> None:
    (block,) = blocks("docs/settings.md", "json")
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


def test_the_defaults_that_settings_md_states_are_the_defaults() -> None:
    stated = re.search(
        r"Pretraining: (\d+) epochs of (\d+) steps\.\s+- Fine-tuning: (\d+) epochs of (\d+) steps.*?"
        r"the first (\d+) epochs\.",
        read("docs/settings.md"),
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
    assert f"| {method_class(DEFAULT).defaults['initial_lr']:g}, cosine decay" in read("docs/methods/pcrlv2.md")


def test_the_recipes_that_settings_md_lists_are_the_recipes() -> None:
    rows = re.findall(r'^\| `"(\w+)"`(?: \(default\))? \| (\S+) \| (yes|no) \|', read("docs/settings.md"), re.MULTILINE)
    found = {recipe: (float(rate), deep == "yes") for recipe, rate, deep in rows}
    assert {*found} == {*RECIPES}
    for recipe in RECIPES:
        settings = FinetuneSettings.from_plan({"pcrl": {"finetune": {"recipe": recipe}}})
        assert found[recipe] == (settings.initial_lr, settings.deep_supervision)


def test_the_messages_of_the_trouble_table_are_ours_or_nnunets() -> None:
    found = re.findall(r"^\| `([^`]+)`", read("docs/troubleshooting.md"), re.MULTILINE)
    messages = [message.removesuffix(" PCRL...") for message in found]
    assert len(messages) >= 18
    not_in_sources = {"'NoneType' object is not callable", "CUDA out of memory"}  # messages of Python and torch
    import nnunetv2

    nnunet = Path(nnunetv2.__file__).parent
    folders = [ROOT / "pcrl_nnunet", ROOT / "trainers", nnunet / "utilities", nnunet / "run"]
    files = [nnunet / "paths.py", *(file for folder in folders for file in folder.rglob("*.py"))]
    source = " ".join(file.read_text(encoding="utf-8") for file in files)
    joined = re.sub(r'"\s*f?"', "", source)  # joins sentences that span lines
    assert [m for m in messages if m not in joined and m not in not_in_sources] == []


def sections(document: Path) -> set[str]:
    """The anchors that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "document",
    [pytest.param(path, id=path.name) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))],
)
def test_linked_files_and_sections_of_a_document_exist(document: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8"))
    wrong = []
    for link in links:
        file, _, section = link.partition("#")
        target = document.parent / file if file else document
        if not link.startswith("http") and not (target.is_file() and (not section or section in sections(target))):
            wrong.append(link)
    assert wrong == []
