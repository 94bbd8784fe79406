"""A short pretraining on real images learns; it is judged on unseen cases.

Hippocampus, 2d configuration: slices differ more than volumes of the same organ. A quarter of the plan's width, 300
steps of 24 samples; about two minutes on two cores. Measured by level: error 0.57, 0.58 and 0.64 of the variance within
a view, margin 0.79, 0.83 and 0.82, rank of the features 14.8, 4.7 and 2.1. A network that has learned nothing has an
error of 1 and a margin of 0, also if its features have collapsed. (Half the width,
600 steps: error 0.46 to 0.47, margin 0.82 to 0.93.)
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from pcrl_nnunet import checkpoint
from pcrl_nnunet.loading.cases import find_cases
from pcrl_nnunet.loading.loader import make_loader
from pcrl_nnunet.methods import PlanFacts, method_class
from pcrl_nnunet.pretraining.monitor import Monitor, judge
from pcrl_nnunet.pretraining.settings import pretrain_settings

NAME = "Dataset004_Hippocampus"
NUM_CASES = 60
EPOCHS, STEPS, SAMPLES = 3, 100, 24
ERROR = 0.7  # share of the variance within a view; 1 is chance
MARGIN = 0.4  # matched minus shuffled cosine; 0 is chance


@pytest.fixture
def hippocampus(real_data: Path, tmp_path: Path, forked_commands: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """60 real cases, planned and preprocessed with nnU-Net's commands; a quarter of the network's width."""
    for folder in ("raw", "preprocessed", "results"):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(f"nnUNet_{folder}", str(tmp_path / folder))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    source, target = real_data / NAME, tmp_path / "raw" / NAME
    description = json.loads((source / "dataset.json").read_text())
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True)
        for path in sorted((source / folder).iterdir())[:NUM_CASES]:
            (target / folder / path.name).symlink_to(path)
    (target / "dataset.json").write_text(json.dumps({**description, "numTraining": NUM_CASES}))
    run(forked_commands / "nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "2d", "-np", "2", "-npfp", "2")
    plan_file = tmp_path / "preprocessed" / NAME / "nnUNetPlans.json"
    plan = json.loads(plan_file.read_text())
    network = plan["configurations"]["2d"]["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [width // 4 for width in network["features_per_stage"]]
    plan_file.write_text(json.dumps(plan))
    return tmp_path


def run(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)


@pytest.mark.long
@pytest.mark.slow
def test_a_short_pretraining_restores_and_recognises_images_of_unseen_cases(
    hippocampus: Path, forked_commands: Path
) -> None:
    lengths = ("-epochs", str(EPOCHS), "-iters_per_epoch", str(STEPS), "-batch_size", str(SAMPLES))
    run(forked_commands / "pcrl_nnunet_pretrain", "-d", "4", "-c", "2d", "-f", "0", "-device", "cpu", *lengths)
    folder = hippocampus / "results" / NAME / "PCRLPretrainTrainer_pcrlv2__nnUNetPlans__2d" / "fold_0"
    (log,) = folder.glob("training_log_*.txt")
    assert "ALARM" not in log.read_text()

    content = checkpoint.read(str(folder / checkpoint.FINAL))
    seen = {case["name"] for case in content["cases"]}
    cases = find_cases(os.path.join(hippocampus, "preprocessed", NAME, "nnUNetPlans_2d"))
    unseen = [case for case in cases if case.name not in seen]
    assert len(unseen) == NUM_CASES // 5

    this = PlansManager(content["plans"]).get_configuration("2d")
    network = get_network_from_plans(
        this.network_arch_class_name,
        this.network_arch_init_kwargs,
        this.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=True,
    )
    network.load_state_dict(content["network_weights"])
    settings = pretrain_settings(content["plans"], "2d", this.configuration)
    method = method_class("pcrlv2")(network, 1, settings.own)
    missing, unexpected = method.load_state_dict(content["method_weights"], strict=False)
    assert not unexpected
    assert all(name.startswith("encoder.") for name in missing)

    views = method.views(settings.own, PlanFacts.of("2d", this.configuration), 1, {})
    loader = make_loader(unseen, views, SAMPLES, seed=1)
    levels = method.variants()
    monitor = Monitor(method.quantities)
    with torch.no_grad():
        for _ in range(4):
            batch = {k: torch.as_tensor(v) for k, v in next(loader).items() if k != "cases"}
            for drawn in levels:
                monitor.update(method(batch, drawn))
    summary = monitor.summary()
    assert judge(summary, EPOCHS * STEPS, method.quantities).alarms == ()
    assert summary["restoration_error"][f"level {levels[-1].restoration}"] < ERROR
    assert sum(summary["margin"].values()) / len(levels) > MARGIN
