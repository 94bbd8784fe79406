"""scripts/benchmark_chest_xrays.py, shortened."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from chest_xray_trees import write_xray

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_it_converts_in_both_ways_and_prints_the_ratio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(variable, raising=False)
    write_xray(tmp_path / "xray.png")
    arguments = ["-i", str(tmp_path), "-images", "8", "-rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmark_chest_xrays.py", *arguments])
    importlib.import_module("benchmark_chest_xrays").main()
    said = capsys.readouterr().out
    assert re.search(r"^median ratio \d+\.\d{3}, on the processor \d+\.\d{3}; 1 rounds with 8 images$", said, re.M)
