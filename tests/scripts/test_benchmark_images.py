"""The benchmark of many images runs, and gives both sides the same images; speed itself is not tested."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from pcrl_nnunet.loading.cases import CaseVolume, find_cases

pytest.importorskip("torchvision")
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with few and small batches."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the script sets it for good; monkeypatch resets it
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("benchmark_images")
    for name, value in {"DIFFERENT": 4, "BATCH": 2, "ROUNDS": 1}.items():
        monkeypatch.setattr(module, name, value)
    return module


def test_both_sides_have_the_same_images(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.write_images(tmp_path, 6)
    cases = find_cases(str(tmp_path / "cases"))
    assert [case.name for case in cases] == [f"image_{i:06d}" for i in range(6)]
    for i, case in enumerate(cases):
        grey = np.array(Image.open(tmp_path / "png" / str(i % 2) / f"{case.name}.png"), float)
        expected = (grey - grey.mean()) / grey.std()
        np.testing.assert_allclose(CaseVolume(case)[(slice(None),) * 4][0, 0], expected, atol=1e-5)


def test_the_benchmark_writes_all_numbers(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "numbers.json"
    monkeypatch.setattr(sys, "argv", ["x", "--images", "8", "-o", str(tmp_path), "--json", str(file)])
    benchmark.main()
    found = json.loads(file.read_text())
    ways = ("crops", "whole", "patches", "classification")
    assert all(found[f"{way}_speed_over_torchvision"] > 0 for way in ways)
    assert all(found[f"{way}_images_per_second"] > 0 for way in ways)
    assert not list(tmp_path.glob("tmp*"))  # the images are gone
