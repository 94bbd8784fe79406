"""Our planners' plans compared with the stock planners' plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.planners import PCRLPlanner, PCRLPlannerResEncL, PCRLPlannerResEncM, PCRLPlannerResEncXL
from pcrl_nnunet.pretraining.settings import PretrainSettings, pretrain_settings

DATASET = "Dataset900_Small"
SIBLINGS = [
    (PCRLPlanner, ExperimentPlanner, "PCRLPlans"),
    (PCRLPlannerResEncM, nnUNetPlannerResEncM, "PCRLResEncUNetMPlans"),
    (PCRLPlannerResEncL, nnUNetPlannerResEncL, "PCRLResEncUNetLPlans"),
    (PCRLPlannerResEncXL, nnUNetPlannerResEncXL, "PCRLResEncUNetXLPlans"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Preprocessed folder of a dataset that has only a fingerprint."""
    raw, preprocessed = tmp_path / "raw" / DATASET, tmp_path / "preprocessed" / DATASET
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    preprocessed.mkdir(parents=True)
    volume = sitk.GetImageFromArray(np.zeros((4, 4, 4), np.uint8))
    sitk.WriteImage(volume, str(raw / "imagesTr" / "a_0000.nii.gz"))
    sitk.WriteImage(volume, str(raw / "labelsTr" / "a.nii.gz"))
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    fingerprint = {
        "spacings": [[2.0, 1.0, 1.0]],
        "shapes_after_crop": [[24, 32, 32]],
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0 / 3, "std": 0.1}},
    }
    (raw / "dataset.json").write_text(json.dumps(dataset))
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return preprocessed


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize(("planner", "stock", "name"), SIBLINGS)
def test_our_plan_equals_the_stock_plan_except_for_names_and_block(
    folder: Path, planner: type[PCRLPlanner], stock: type[ExperimentPlanner], name: str
) -> None:
    stock(DATASET).plan_experiment()
    files_before = {path.name: path.read_bytes() for path in folder.iterdir()}
    planner(DATASET).plan_experiment()
    plan = read(folder / f"{name}.json")
    assert set(plan.pop("pcrl")) == {"pretrain", "finetune"}
    assert plan.pop("plans_name") == name
    assert plan.pop("experiment_planner_used") == planner.__name__
    expected = read(folder / f"{planner.stock_plans_name}.json")
    del expected["plans_name"], expected["experiment_planner_used"]
    assert plan == expected
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != f"{name}.json"} == files_before


def test_the_first_plan_uses_the_stock_planners_data_folders(folder: Path) -> None:
    PCRLPlanner(DATASET).plan_experiment()
    ours = read(folder / "PCRLPlans.json")["configurations"]
    ExperimentPlanner(DATASET).plan_experiment()
    stock = read(folder / "nnUNetPlans.json")["configurations"]
    assert {name: c["data_identifier"] for name, c in ours.items()} == {
        name: c["data_identifier"] for name, c in stock.items()
    }


@pytest.mark.parametrize("with_stock_plan", [False, True])
def test_plan_with_another_spacing_has_a_data_folder_of_its_own(folder: Path, with_stock_plan: bool) -> None:
    if with_stock_plan:
        ExperimentPlanner(DATASET).plan_experiment()
    PCRLPlanner(DATASET, overwrite_target_spacing=[1.5, 1.5, 1.5]).plan_experiment()
    plan = read(folder / "PCRLPlans.json")
    assert plan["configurations"]["3d_fullres"]["data_identifier"] == "PCRLPlans_3d_fullres"


def test_data_preprocessed_by_another_fingerprint_are_not_reused(folder: Path) -> None:
    ExperimentPlanner(DATASET).plan_experiment()
    fingerprint = read(folder / "dataset_fingerprint.json")
    fingerprint["foreground_intensity_properties_per_channel"]["0"]["mean"] = 7.0
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    PCRLPlanner(DATASET).plan_experiment()
    plan = read(folder / "PCRLPlans.json")
    assert plan["configurations"]["3d_fullres"]["data_identifier"] == "PCRLPlans_3d_fullres"


def test_low_resolution_data_are_reused_only_at_the_same_spacing(folder: Path) -> None:
    ExperimentPlanner(DATASET, gpu_memory_target_in_gb=0.01).plan_experiment()
    planner = PCRLPlanner(DATASET, gpu_memory_target_in_gb=0.01)
    same = planner.plan_experiment()["configurations"]
    stock_plan = read(folder / "nnUNetPlans.json")
    stock_plan["configurations"]["3d_lowres"]["spacing"][0] *= 1.03
    (folder / "nnUNetPlans.json").write_text(json.dumps(stock_plan))
    other = planner.plan_experiment()["configurations"]
    assert same["3d_fullres"]["data_identifier"] == other["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert same["3d_lowres"]["data_identifier"] == "nnUNetPlans_3d_lowres"
    assert other["3d_lowres"]["data_identifier"] == "PCRLPlans_3d_lowres"
    assert same["3d_cascade_fullres"] == {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}


def test_planning_again_keeps_an_edited_block_and_renews_the_rest(folder: Path) -> None:
    PCRLPlanner(DATASET).plan_experiment()
    plan = read(folder / "PCRLPlans.json")
    first = json.loads(json.dumps(plan))
    plan["pcrl"]["finetune"]["epochs"] = 7
    plan["pcrl"]["checkpoint"] = "/somewhere/checkpoint_final.pth"
    plan["configurations"]["3d_fullres"]["batch_size"] = 99
    (folder / "PCRLPlans.json").write_text(json.dumps(plan))
    PCRLPlanner(DATASET).plan_experiment()
    again = read(folder / "PCRLPlans.json")
    assert again["pcrl"] == plan["pcrl"]
    assert again["configurations"] == first["configurations"]


def settings_of(plan: dict[str, Any], name: str) -> PretrainSettings:
    return pretrain_settings(plan, name, PlansManager(plan).get_configuration(name).configuration)


def without_block(plan: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plan.items() if key != "pcrl"}


def test_the_block_of_a_new_plan_states_the_defaults(folder: Path) -> None:
    plan = PCRLPlanner(DATASET).plan_experiment()
    pretrain = dict(plan["pcrl"]["pretrain"])
    names = [name for name in plan["configurations"] if name != "3d_cascade_fullres"]
    of_configurations = {name: pretrain.pop(name) for name in names}
    assert pretrain == {"method": "pcrlv2", "epochs": 240, "iters_per_epoch": 250, "seed": 0}
    for block in of_configurations.values():
        assert set(block) == {"pcrlv2"}
        assert (block["pcrlv2"]["restoration"], block["pcrlv2"]["levels"]) == ("single", [])
        assert {"global_input_size", "num_local"} < set(block["pcrlv2"]["views"])
    finetune = {"recipe": "nnunet", "epochs": 1000, "iters_per_epoch": 250, "warmup_share": 0.05}
    assert plan["pcrl"]["finetune"] == finetune
    assert FinetuneSettings.from_plan(plan) == FinetuneSettings()
    written = read(folder / "PCRLPlans.json")
    assert written["pcrl"] == plan["pcrl"]
    for name in names:
        assert settings_of(written, name) == settings_of(without_block(written), name)


def test_replanning_keeps_edited_settings_and_renews_the_others(folder: Path) -> None:
    PCRLPlanner(DATASET).plan_experiment()
    plan = read(folder / "PCRLPlans.json")
    edited = plan["pcrl"]["pretrain"]["2d"]
    edited["batch_size"], edited["pcrlv2"]["views"]["num_local"] = 21, 2
    (folder / "PCRLPlans.json").write_text(json.dumps(plan))
    settings = settings_of(plan, "2d")
    assert (settings.own.views.num_local, settings.batch_size) == (2, 21)

    PCRLPlanner(DATASET, overwrite_target_spacing=[2.0, 1.3, 1.3]).plan_experiment()
    again = read(folder / "PCRLPlans.json")
    assert again["pcrl"]["pretrain"]["2d"] == edited
    patches = [p["configurations"]["3d_fullres"]["patch_size"] for p in (plan, again)]
    assert patches[0] != patches[1]
    assert settings_of(again, "3d_fullres") == settings_of(without_block(again), "3d_fullres")


def test_another_plan_name_is_used_as_in_nnunet(folder: Path) -> None:
    PCRLPlanner(DATASET, plans_name="Mine").plan_experiment()
    assert read(folder / "Mine.json")["plans_name"] == "Mine"
    assert not (folder / "PCRLPlans.json").exists()
