"""The benchmark runs and measures the right things; speed itself is not tested."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("torchio")
pytest.importorskip("monai")
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with small sizes and few rounds."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "1")  # the script sets it for good; monkeypatch resets it
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("benchmark_views")
    small = replace(
        module.SETTINGS[0].views,
        global_crop_sizes=((16, 16, 16), (24, 24, 24)),
        local_crop_sizes=((8, 8, 8),),
        global_input_size=(16, 16, 16),
        local_input_size=(8, 8, 8),
    )
    settings = [replace(setting, views=small, volume=(40, 40, 40), rounds=2) for setting in module.SETTINGS]
    monkeypatch.setattr(module, "SETTINGS", settings)
    sizes = {"CASES": 2, "SHAPE": (40, 40, 40), "PATCH": 24, "SAMPLES": 2, "TURNS": 1, "BATCHES": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(module, f"LOADER_{name}", value)
    plan = replace(module.benchmark_methods.PLAN, patch_size=(16, 32, 32), median_size=(20, 40, 40))
    monkeypatch.setattr(module.benchmark_methods, "PLAN", plan)
    monkeypatch.setattr(module.benchmark_methods, "MEDIAN", (20, 40, 40))
    monkeypatch.setattr(module.benchmark_methods, "ROUNDS", 1)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from torchio
def test_the_benchmark_writes_all_ratios(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark_views.py", "--json", str(tmp_path / "ratios.json")])
    benchmark.main()
    ratios = json.loads((tmp_path / "ratios.json").read_text())
    assert set(ratios) == {
        "paper_vs_torchio", "paper_vs_batchgenerators_linear", "large_vs_batchgenerators_cubic",
        "large_vs_batchgenerators_linear", "loader_vs_transform", "vs_limit", "slowest_method_vs_pcrlv2",
        "genesis_vs_monai_paper", "genesis_vs_monai_large",
    }  # fmt: skip
    assert all(ratio > 0 for ratio in ratios.values())
    assert "ours by stage" in capsys.readouterr().out


def test_all_ways_make_the_same_number_of_views_of_the_same_sizes(benchmark: ModuleType) -> None:
    setting, rng = benchmark.SETTINGS[0], np.random.default_rng(0)
    volume = benchmark.volume_of(setting.volume, rng)
    boxes = benchmark.sample_view_boxes(setting.volume, setting.views, rng)
    whole, local = (1, *setting.views.global_input_size), (1, *setting.views.local_input_size)
    ours = benchmark.by_us(setting.views)(volume, boxes)()
    assert ours["input"].shape == (2, *whole)
    assert ours["local"].shape == (6, *local)
    for prepare in (benchmark.by_torchio(setting.views), benchmark.by_limit(setting.views)):
        *_, big, small = prepare(volume, boxes)()
        assert [tuple(view.shape) for view in big] == [whole] * 2
        assert [tuple(view.shape) for view in small] == [local] * 6
    big, small = benchmark.by_batchgenerators(setting.views, 1)(volume, boxes)()
    assert [view.shape[1:] for _, view in big] == [whole] * 2
    assert [view.shape[1:] for _, view in small] == [local] * 6
    assert volume.shape == (1, *setting.volume)
