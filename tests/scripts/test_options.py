"""The scripts answer --help at once: without torch, and with an example."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
WITH_OPTIONS = sorted(path.stem for path in SCRIPTS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
# Runs a script; the last line says whether torch was imported.
RUN = """
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print("torch" in sys.modules, end.code)
"""


@pytest.mark.parametrize("script", WITH_OPTIONS)
def test_help_has_an_example_and_imports_no_torch(script: str, tmp_path: Path) -> None:
    path = SCRIPTS / f"{script}.py"
    code = f"import sys; sys.argv = [{str(path)!r}, '--help']; sys.path[0] = {str(SCRIPTS)!r}\n{RUN}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    *printed, last = done.stdout.rstrip().split("\n")
    assert last == "False 0"
    assert any(line.startswith(f"usage: {script}.py") for line in printed)
    assert any(line.strip().startswith(f"python scripts/{script}.py") for line in printed)


def test_the_scripts_with_options_are_found() -> None:
    assert {"convert_lits", "convert_luna16", "learning", "benchmark_step", "phantom"} <= {*WITH_OPTIONS}


def test_the_labels_of_lits_are_those_of_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import convert_lits
    import options

    assert tuple(convert_lits.LABELS) == options.LITS_LABELS
