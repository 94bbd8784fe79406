"""`bash scripts/demo.sh`, the README's first command, shortened."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent


def without_pip(venv: Path) -> Path:
    """The running environment's commands in another folder, of which pip does nothing.

    scripts/test.sh has installed the package; once more would take it away for a moment, from under other tests.
    """
    (venv / "bin").mkdir(parents=True)
    for command in SCRIPTS.iterdir():
        if command.name.startswith("python"):  # through a link it would look for its packages beside that
            (venv / "bin" / command.name).write_text(f'#!/bin/sh\nexec "{command}" "$@"\n')
            (venv / "bin" / command.name).chmod(0o755)
        elif command.name != "pip":
            (venv / "bin" / command.name).symlink_to(command)
    (venv / "bin" / "pip").write_text("#!/bin/sh\n")
    (venv / "bin" / "pip").chmod(0o755)
    return venv


@pytest.mark.slow
def test_the_demo_runs_again_and_ends_with_a_table_of_dice_and_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    for left in ("made_by_demo.sh", "nnUNet_raw/Dataset901_PhantomOrgan/imagesTr/broken_0000.nii.gz", "predictions/x"):
        (folder / left).parent.mkdir(parents=True, exist_ok=True)
        (folder / left).write_text("of an earlier run")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    environment |= {"PCRL_VENV": str(without_pip(tmp_path / "venv")), "PCRL_DEMO_QUICK": "1", "MPLBACKEND": "Agg"}
    check = subprocess.run([SCRIPTS / "pcrl_nnunet_register", "--check"], check=False)
    demo = ["bash", str(ROOT / "scripts" / "demo.sh"), str(folder)]
    try:
        done = subprocess.run(demo, env=environment, capture_output=True, encoding="utf-8", check=False, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    finally:
        if check.returncode != 0:  # leave the environment as it was
            subprocess.run([SCRIPTS / "pcrl_nnunet_register", "--undo"], check=True)
    table = done.stdout.split("Dice on the test cases")[1]
    assert re.search(r"^organ +\d\.\d{3} +\d\.\d{3}$", table, re.MULTILINE)
    pictures = [Path(line.split(maxsplit=1)[1]) for line in table.splitlines() if line.endswith((".png", ".html"))]
    assert len(pictures) == 4
    assert all(picture.is_file() for picture in pictures)


def test_the_demo_leaves_a_folder_that_it_did_not_make_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = subprocess.run(["bash", ROOT / "scripts" / "demo.sh", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is not empty and was not made by this script" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
