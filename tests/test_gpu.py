"""The differences of a GPU: mixed precision, pinned batches, torch.compile. Skipped without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steps import parameters_of
from tiny_dataset import make_plan
from tiny_pretraining import make_trainer

from pcrl_nnunet import checkpoint, registration
from pcrl_nnunet.cli import pretrain
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.trainers import PCRLFinetuneTrainer, PCRLPretrainTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SHORT = ["-epochs", "2", "-iters_per_epoch", "4", "-batch_size", "4"]
FOLDER = "PCRLPretrainTrainer_pcrlv2__nnUNetPlans__3d_fullres/fold_all"


def pretraining(tiny: Any, device: str) -> Any:
    """A trainer before its first step; its network is wide enough for rounding errors to average out in gradients."""
    trainer = make_trainer(plan=make_plan(features=(16, 32, 32)), device=device, batch_size=8)
    trainer.initialize()
    return trainer


def pretrained(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the command in this process."""
    monkeypatch.setattr(registration, "is_registered", lambda: True)
    monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_pretrain", "-d", "999", *SHORT, *arguments])
    pretrain.main()


def changes(trainer: Any, batch: dict[str, Any], levels: Any) -> tuple[float, torch.Tensor]:
    """The loss of a step, and the changes of all parameters."""
    before = parameters_of(trainer.network)
    loss = trainer.train_step(batch, 0, levels)["loss"]
    after = parameters_of(trainer.network)
    return loss, torch.cat([(after[name] - before[name]).flatten().cpu() for name in before])


@pytest.mark.parametrize("level", [1, 2])
def test_a_mixed_precision_step_agrees_with_the_cpu(tiny: Any, level: int) -> None:
    on_cpu, on_gpu = pretraining(tiny, "cpu"), pretraining(tiny, "cuda")
    batch = next(on_cpu.get_dataloaders())
    (levels,) = (levels for levels in on_cpu.network.variants() if levels.deepest == level)
    on_gpu.grad_scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)  # else the first steps find their scale
    loss, expected = changes(on_cpu, batch, levels)
    loss_on_gpu, change = changes(on_gpu, batch, levels)
    assert loss_on_gpu == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(change, expected, dim=0) > 0.98
    assert change.norm() / expected.norm() == pytest.approx(1, abs=0.05)


def test_pretraining_uses_the_gpu_by_default_and_continues_its_gradient_scale(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")  # pinned batches of other processes
    train_step, devices = PCRLPretrainTrainer.train_step, set()

    def stopped(self: Any, batch: Any, step: int, *rest: Any) -> dict[str, float]:
        devices.add(next(self.network.parameters()).device.type)
        if step == 4:
            raise KeyboardInterrupt
        return train_step(self, batch, step, *rest)

    monkeypatch.setattr(PCRLPretrainTrainer, "train_step", stopped)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        pretrained(monkeypatch)
    monkeypatch.setattr(PCRLPretrainTrainer, "train_step", train_step)
    state = torch.load(tiny.results / FOLDER / checkpoint.LATEST, map_location="cpu", weights_only=False)
    assert devices == {"cuda"}
    assert state["grad_scaler"]["scale"] > 1
    assert state["device_rng"].dtype == torch.uint8
    pretrained(monkeypatch, "--c")
    content = checkpoint.read(str(tiny.results / FOLDER / checkpoint.FINAL))
    assert content["steps"] == 8
    assert all(torch.isfinite(value).all() for value in content["network_weights"].values())
    assert (tiny.results / FOLDER / "report.html").is_file()


def test_a_dry_run_measures_the_gpus_memory(tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tiny.folder)
    pretrained(monkeypatch, "--dry_run")
    out = capsys.readouterr().out
    assert "GB measured on cuda" in out
    assert "s a step on cuda" in out


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's own
@pytest.mark.parametrize("compiled", ["f", "t"])
def test_nnunets_gpu_network_gets_the_encoder_compiled_or_not(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, compiled: str
) -> None:
    monkeypatch.setattr(Report, "write", lambda *_: None)
    pretrained(monkeypatch)
    monkeypatch.setenv("nnUNet_compile", compiled)
    plan = {**make_plan(), "continue_training": False}
    trainer: Any = PCRLFinetuneTrainer(plan, "3d_fullres", 0, tiny.dataset_json, torch.device("cuda"))
    started: list[dict[str, torch.Tensor]] = []

    def first_batch(batch: Any, step: Any = trainer.train_step) -> Any:
        started.append({name: value.cpu() for name, value in parameters_of(trainer.network).items()})
        return step(batch)

    trainer.train_step = first_batch
    trainer.run_training()
    assert hasattr(trainer.network, "_orig_mod") == (compiled == "t")
    content = checkpoint.read(str(tiny.results / FOLDER / checkpoint.FINAL))
    encoder = {name: v for name, v in content["network_weights"].items() if name in started[0] and "encoder" in name}
    assert encoder
    for name, value in encoder.items():
        if name not in content["random_keys"]:
            np.testing.assert_array_equal(started[0][name], value)
    (report,) = tiny.results.glob("PCRLFinetuneTrainer*/fold_0/transfer.json")
    assert json.loads(Path(report).read_text())["encoder_share"] == 1
