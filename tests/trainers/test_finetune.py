import copy
import json
import os
import pickle
import shutil
import sys
import sysconfig
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from finished_pretraining import encoder_of, pretrain
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from steps import EPOCHS, parameters_of, random_batch, train_epochs
from tiny_dataset import DATASET, DATASET_JSON, make_plan, write_preprocessed
from torch import Tensor

from pcrl_nnunet import checkpoint, trainers
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.finetuning import pretrained as pretrained_module
from pcrl_nnunet.finetuning.schedule import WarmupPolyLR
from pcrl_nnunet.loading.cases import find_cases, fingerprint
from pcrl_nnunet.networks import Decoder
from pcrl_nnunet.trainers import PCRLFinetuneTrainer, PCRLScratchTrainer

FEATURES = [4, 8, 8]


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnUNet_preprocessed, shared by the tests; none of them writes to it."""
    return write_preprocessed(tmp_path_factory.mktemp("preprocessed")).parent


@pytest.fixture(autouse=True)
def folders(preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders; results are this test's own. Data are loaded in this process."""
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda self, folder: None)  # takes seconds, and is nnU-Net's
    return tmp_path / "results" / DATASET


@pytest.fixture
def own_data(preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cases in a copy of nnUNet_preprocessed that the test may damage."""
    shutil.copytree(preprocessed, tmp_path / "preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return tmp_path / "preprocessed" / DATASET / "nnUNetPlans_3d_fullres"


def make(
    trainer: type[PCRLScratchTrainer] = PCRLFinetuneTrainer,
    plan: dict[str, Any] | None = None,
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    continue_training: bool = False,
) -> Any:
    plan = {**(plan or make_plan()), "continue_training": continue_training}
    return trainer(plan, configuration, fold, DATASET_JSON, device=torch.device("cpu"))


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_training(
    trainer: Any, monkeypatch: pytest.MonkeyPatch, c: bool = False, pretrained_weights: str | None = None
) -> dict[str, Tensor]:
    """Train like nnUNetv2_train, without the final validation. Returns the encoder at the first step."""
    at_first_step: list[dict[str, Tensor]] = []
    step = type(trainer).train_step

    def recording_step(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        at_first_step.append(encoder_of(self.network))
        return step(self, batch)

    monkeypatch.setattr(type(trainer), "train_step", recording_step)
    maybe_load_checkpoint(trainer, c, False, pretrained_weights)
    trainer.run_training()
    return at_first_step[0]


def log_of(trainer: Any) -> str:
    with open(trainer.log_file) as file:
        return file.read()


def test_the_encoder_at_the_first_step_is_the_checkpoints(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pretrained = pretrain(folders)
    trainer = make()
    assert equal(run_training(trainer, monkeypatch), pretrained)
    report = json.loads((folders / "PCRLFinetuneTrainer__nnUNetPlans__3d_fullres/fold_0/transfer.json").read_text())
    assert report["checkpoint"] == path
    assert report["encoder_share"] == 1
    assert set(report["loaded"]) == {n for n, _ in trainer.network.named_parameters() if n.startswith("encoder.")}
    assert "100.0% of the encoder" in log_of(trainer)
    assert path in log_of(trainer)


def test_scratch_is_the_same_training_without_the_weights(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pretrained = pretrain(folders)
    scratch, finetune_trainer = make(PCRLScratchTrainer), make()
    assert not equal(run_training(scratch, monkeypatch), pretrained)
    assert not os.path.exists(os.path.join(scratch.output_folder, "transfer.json"))
    assert scratch.settings == finetune_trainer.settings


def test_a_continued_training_keeps_its_own_weights(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(folders)
    longer = make_plan(finetune={"epochs": 2, "iters_per_epoch": 1, "val_iters_per_epoch": 1})
    first = make()
    run_training(first, monkeypatch)
    trained = encoder_of(first.network)
    resumed = make(plan=longer, continue_training=True)
    assert equal(run_training(resumed, monkeypatch, c=True), trained)
    assert resumed.current_epoch == 2
    assert "no pretrained encoder is loaded" in log_of(resumed)


def test_continuing_without_a_checkpoint_is_a_new_training_that_loads(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, pretrained = pretrain(folders)
    assert equal(run_training(make(continue_training=True), monkeypatch, c=True), pretrained)


def test_validation_alone_loads_the_trained_weights_only(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(folders)
    first = make()
    run_training(first, monkeypatch)
    validating = make()
    monkeypatch.setattr(pretrained_module, "load_encoder", None)  # calling it would fail
    maybe_load_checkpoint(validating, False, True)
    assert equal(encoder_of(validating.network), encoder_of(first.network))


def test_a_checkpoint_with_other_kernels_strides_and_stages_loads_with_notes(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_plan(features=[4, 8, 8, 16])
    kwargs = other["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["kernel_sizes"][0], kwargs["strides"][1] = [1, 3, 3], [1, 2, 2]
    path, _ = pretrain(folders, plan=other)
    trainer = make()
    started = run_training(trainer, monkeypatch)
    given = checkpoint.read(path)["network_weights"]
    name = "stages.0.0.convs.0.conv.weight"
    assert torch.equal(started[name][:, :, 1], given[f"encoder.{name}"][:, :, 0])  # in the middle, between zeros
    assert not started[name][:, :, [0, 2]].any()
    assert torch.equal(started["stages.2.0.convs.0.conv.weight"], given["encoder.stages.2.0.convs.0.conv.weight"])
    log = log_of(trainer)
    for part in ("kernel 1x3x3 made 3x3x3", "Note, pretrained on another network: strides", "100.0% of the encoder"):
        assert part in log


def test_a_model_of_nnssl_loads_into_a_resenc_plan(
    folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The form of nnssl's OpenMind models: a preset's name instead of an architecture; here with fewer stages."""
    plan = make_plan(features=[4, 8, 8])
    architecture = plan["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    kwargs = architecture["arch_kwargs"]
    kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    network = get_network_from_plans(
        architecture["network_class_name"], kwargs, architecture["_kw_requires_import"], 1, 3, deep_supervision=False
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    of_preset = {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    adaptation_plan = {
        "architecture_plans": of_preset,
        "pretrain_plan": {
            "dataset_name": "Dataset745_OpenMind",
            "configurations": {"onemmiso": {"spacing": [1, 1, 1]}},
        },
        "pretrain_num_input_channels": 1,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
        "key_to_lpe": None,
    }
    content = {"network_weights": network.state_dict(), "citations": [], "nnssl_adaptation_plan": adaptation_plan}
    torch.save(content, tmp_path / "openmind.pth")
    plan["pcrl"]["checkpoint"] = str(tmp_path / "openmind.pth")
    trainer = make(plan=plan)
    assert equal(run_training(trainer, monkeypatch), encoder_of(network))
    log = log_of(trainer)
    for part in ("100.0% of the encoder", "method nnssl", "only a name: ResEncL", "does not list the cases"):
        assert part in log


def test_a_supervised_training_of_nnunet_loads_with_a_warning_about_cases(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = make(PCRLScratchTrainer, fold=1)
    run_training(stock, monkeypatch)
    plan = make_plan(checkpoint=os.path.join(stock.output_folder, "checkpoint_final.pth"))
    trainer = make(plan=plan)
    assert equal(run_training(trainer, monkeypatch), encoder_of(stock.network))
    log = log_of(trainer)
    assert "supervised training (nnUNetTrainer)" in log
    assert "does not list the cases that it was trained on" in log


def test_a_checkpoint_with_fewer_stages_needs_a_setting(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(folders, plan=make_plan(features=[4, 8]))
    with pytest.raises(SystemExit, match=r"covers \d+\.\d% of the encoder.*allow_partial_encoder"):
        make().on_train_start()
    asked = make_plan()
    asked["pcrl"]["finetune"]["allow_partial_encoder"] = True
    trainer = make(plan=asked)
    run_training(trainer, monkeypatch)
    assert "not in the checkpoint" in log_of(trainer)


def test_weights_from_nnunets_flag_are_not_replaced(
    folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretrain(folders)
    other, given = pretrain(tmp_path / "elsewhere")
    trainer = make()
    assert equal(run_training(trainer, monkeypatch, pretrained_weights=other), given)
    assert "-pretrained_weights were given: they stay" in log_of(trainer)


def test_a_missing_pretraining_is_one_sentence_with_the_paths_tried(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(fold=1)
    monkeypatch.setattr(trainer, "get_dataloaders", None)  # calling it would fail: loaders' processes would be left
    with pytest.raises(SystemExit) as error:
        trainer.on_train_start()
    message = str(error.value.code)
    assert "PCRLPretrainTrainer_*__nnUNetPlans__3d_fullres/fold_1/checkpoint_final.pth" in message
    assert "PCRLPretrainTrainer_*__nnUNetPlans__3d_fullres/fold_all/checkpoint_final.pth" in message
    assert f"pcrl_nnunet_pretrain -d {DATASET} -p nnUNetPlans -c 3d_fullres" in message
    assert "PCRLScratchTrainer" in message
    assert "\n" not in message
    assert not folders.exists()


def test_earlier_results_survive_a_training_that_cannot_start(folders: Path) -> None:
    kept = folders / "PCRLFinetuneTrainer__nnUNetPlans__3d_fullres" / "fold_0" / "checkpoint_final.pth"
    kept.parent.mkdir(parents=True)
    kept.write_text("a result")
    with pytest.raises(SystemExit):
        make().on_train_start()
    assert kept.read_text() == "a result"


def test_another_folds_pretraining_is_not_taken(folders: Path) -> None:
    pretrain(folders, fold=1)
    with pytest.raises(SystemExit, match="no pretrained encoder for fold 0"):
        make(fold=0).on_train_start()


def test_the_folds_own_pretraining_comes_before_that_on_all_cases(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(folders, fold="all")
    _, own = pretrain(folders, fold=0)
    assert equal(run_training(make(fold=0), monkeypatch), own)


def test_pretrainings_of_several_methods_are_listed_with_the_trainer_of_each(folders: Path) -> None:
    paths = {method: pretrain(folders, method=method)[0] for method in ("mae", "pcrlv2")}
    with pytest.raises(SystemExit) as error:
        make().on_train_start()
    listed = " or ".join(f"-tr PCRLFinetuneTrainer_{method} for {path}" for method, path in paths.items())
    assert error.value.code == f"Error: there are pretrainings of 2 methods for fold 0; give {listed}"


def test_a_methods_trainer_takes_its_pretraining_and_names_the_results(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain(folders)
    _, encoder = pretrain(folders, method="mae_2")
    trainer = make(trainers.PCRLFinetuneTrainer_mae_2)
    assert equal(run_training(trainer, monkeypatch), encoder)
    assert Path(trainer.output_folder) == folders / "PCRLFinetuneTrainer_mae_2__nnUNetPlans__3d_fullres" / "fold_0"


def test_a_missing_pretraining_of_a_method_names_methods_with_one(folders: Path) -> None:
    pretrain(folders)
    with pytest.raises(SystemExit) as error:
        make(trainers.PCRLFinetuneTrainer_mae).on_train_start()
    message = str(error.value.code)
    assert "there is no" in message
    assert "PCRLPretrainTrainer_mae__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth" in message
    assert "take -tr PCRLFinetuneTrainer_pcrlv2, or run pcrl_nnunet_pretrain" in message
    assert "-c 3d_fullres -method mae, or train without: -tr PCRLScratchTrainer" in message


@pytest.mark.parametrize("name", ["PCRLFinetuneTrainer_mae", "PCRLClassificationTrainer_swin_2"])
def test_a_methods_trainer_is_one_class_for_nnunet_and_for_pickle(name: str) -> None:
    found = getattr(trainers, name)
    assert found is getattr(trainers, name)
    assert pickle.loads(pickle.dumps(found)) is found
    assert found.__name__ == name


@pytest.mark.parametrize("name", ["PCRLFinetuneTrainer_", "PCRLFinetuneTrainer__mae", "PCRLScratchTrainer_mae", "x"])
def test_unknown_trainer_names_raise_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
        getattr(trainers, name)


def test_an_unfinished_pretraining_is_named(folders: Path) -> None:
    path, _ = pretrain(folders)
    os.rename(path, os.path.join(os.path.dirname(path), checkpoint.LATEST))
    with pytest.raises(SystemExit, match="not finished"):
        make().on_train_start()


def test_the_plans_checkpoint_comes_first(folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretrain(folders)
    path, named = pretrain(tmp_path / "elsewhere")
    plan = make_plan(checkpoint=path)
    assert equal(run_training(make(plan=plan), monkeypatch), named)


def test_a_checkpoint_that_the_plan_names_and_that_is_missing_is_an_error(folders: Path) -> None:
    pretrain(folders)
    with pytest.raises(SystemExit, match=r"pcrl\.checkpoint /nowhere/x\.pth does not exist"):
        make(plan=make_plan(checkpoint="/nowhere/x.pth")).on_train_start()


def test_a_checkpoint_of_another_width_is_refused_with_the_differences(folders: Path) -> None:
    pretrain(folders, plan=make_plan(features=[4, 8, 16]))
    with pytest.raises(
        SystemExit,
        match=r"checkpoint is of a PlainConvUNet in 3D with 4, 8, 16 features, 3d_fullres of nnUNetPlans of a",
    ):
        make().on_train_start()
    assert not list(folders.glob("PCRLFinetuneTrainer*"))


def test_a_checkpoint_of_another_width_is_used_in_part_if_asked_for(folders: Path) -> None:
    _, pretrained = pretrain(folders, plan=make_plan(features=[4, 8, 16]))
    trainer = make(plan=make_plan(finetune={"allow_partial_encoder": True}))
    trainer.on_train_start()
    assert torch.equal(
        encoder_of(trainer.network)["stages.0.0.convs.0.conv.weight"], pretrained["stages.0.0.convs.0.conv.weight"]
    )


def test_a_damaged_checkpoint_is_refused_in_one_sentence(folders: Path) -> None:
    path, _ = pretrain(folders)
    with open(path, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(SystemExit, match=r"checkpoint_final\.pth cannot be read"):
        make().on_train_start()


def test_a_cascade_takes_the_full_resolutions_encoder_and_zero_for_its_label_channels(folders: Path) -> None:
    _, pretrained = pretrain(folders)
    trainer = make(configuration="3d_cascade_fullres")
    trainer.initialize()
    trainer._load_pretrained()
    first = trainer.network.encoder.stages[0][0].convs[0].conv.weight
    assert first.shape[1] == 3
    assert torch.equal(first[:, :1], pretrained["stages.0.0.convs.0.conv.weight"])
    assert not first[:, 1:].any()


def test_a_cascades_own_pretraining_comes_first(folders: Path) -> None:
    pretrain(folders)
    _, own = pretrain(folders, configuration="3d_cascade_fullres")
    trainer = make(configuration="3d_cascade_fullres")
    trainer.initialize()
    trainer._load_pretrained()
    first = trainer.network.encoder.stages[0][0].convs[0].conv.weight
    assert torch.equal(first[:, :1], own["stages.0.0.convs.0.conv.weight"])


def test_low_resolution_does_not_take_a_full_resolution_pretraining(folders: Path) -> None:
    pretrain(folders)
    with pytest.raises(SystemExit, match="3d_lowres"):
        make(configuration="3d_lowres").on_train_start()


def test_validation_cases_that_pretraining_saw_are_named(
    folders: Path, preprocessed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case_3 = find_cases(str(preprocessed / DATASET / "nnUNetPlans_3d_fullres"))[3]
    pretrain(
        folders, cases=[{"name": "renamed", "path": "Dataset001_X/folder/renamed.b2nd", "sha256": fingerprint(case_3)}]
    )
    trainer = make()
    trainer.on_train_start()
    assert "1 of this fold's 1 validation cases: case_3 (as renamed)" in log_of(trainer)


@pytest.mark.parametrize("recipe", [{}, {"recipe": "pretrained", "optimizer": "adamw"}])
def test_stock_nnunet_predicts_with_our_checkpoints(
    folders: Path, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any]
) -> None:
    pretrain(folders)
    trainer = make(plan=make_plan(finetune={"epochs": 1, "iters_per_epoch": 1, "val_iters_per_epoch": 1, **recipe}))
    run_training(trainer, monkeypatch)
    assert sorted(f for f in os.listdir(trainer.output_folder) if "checkpoint" in f) == [
        "checkpoint_best.pth",
        "checkpoint_final.pth",
    ]
    content = torch.load(os.path.join(trainer.output_folder, checkpoint.FINAL), weights_only=False)
    assert content["trainer_name"] == "nnUNetTrainer"

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, use_folds=(0,))
    logits = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 14, 14, 14))
    assert logits.shape == (3, 14, 14, 14)
    assert equal(parameters_of(predictor.network), parameters_of(trainer.network))


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_good_one(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(PCRLScratchTrainer)
    trainer.initialize()
    path = os.path.join(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(path)
    with open(path, "rb") as file:
        before = file.read()

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(SystemExit, match="No space left on device"):
        trainer.save_checkpoint(path)
    with open(path, "rb") as file:
        assert file.read() == before
    assert [name for name in os.listdir(trainer.output_folder) if "checkpoint" in name] == ["checkpoint_latest.pth"]


def test_disabled_checkpointing_writes_none(folders: Path) -> None:
    trainer = make(PCRLScratchTrainer)
    trainer.disable_checkpointing = True
    trainer.initialize()
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_latest.pth"))
    assert not [name for name in os.listdir(trainer.output_folder) if "checkpoint" in name]


def test_the_plans_settings_are_used_and_logged(folders: Path) -> None:
    given = {
        "epochs": 9,
        "iters_per_epoch": 3,
        "val_iters_per_epoch": 2,
        "initial_lr": 0.5,
        "weight_decay": 0.25,
        "warmup_share": 0.5,
    }
    trainer = make(PCRLScratchTrainer, plan=make_plan(finetune=given))
    trainer.on_train_start()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (9, 3, 2)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.25
    trainer.lr_scheduler.step(3)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.5
    assert ", initial_lr 0.5 (default 0.01), " in log_of(trainer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, r"pcrl\.finetune\.epoch is not a setting.*epochs"),
        ({"epochs": "3"}, r"pcrl\.finetune\.epochs is \"3\"; expected a value like 1000"),
        ({"warmup_share": 1.0}, r"warmup_share is 1.0; expected 0 or more, below 1"),
        ({"initial_lr": -1.0}, r"initial_lr is -1.0; expected a number above 0"),
        ({"initial_lr": float("nan")}, r"pcrl\.finetune\.initial_lr is nan; expected a finite number"),
    ],
)
def test_a_wrong_setting_is_an_error_before_a_folder_is_made(
    folders: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        make(plan=make_plan(finetune=given))
    assert not folders.exists()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"finetun": {}},
            r"pcrl\.finetun is no part of the plan's settings; expected pretrain, finetune, semi, classify, checkpoint",
        ),
        ({"checkpoint": 5}, r"pcrl\.checkpoint is 5; expected the path"),
    ],
)
def test_a_wrong_block_is_refused_before_a_folder_is_made(folders: Path, block: dict[str, Any], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        make(plan=make_plan(**block))
    assert not folders.exists()


def test_a_results_folder_that_is_a_file_is_named(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders.parent.mkdir()
    folders.write_text("")
    with pytest.raises(SystemExit, match="cannot be written to"):
        make(PCRLScratchTrainer)


@pytest.mark.parametrize("name", ["case_1.b2nd", "case_1_seg.b2nd"])
def test_a_case_that_cannot_be_read_is_named_and_nothing_is_left_behind(
    folders: Path, own_data: Path, name: str
) -> None:
    path = own_data / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=f"case {path.stem} cannot be read"):
        make(PCRLScratchTrainer).on_train_start()
    assert not list(folders.glob("PCRLScratch*"))


def test_a_case_that_is_not_finite_stops_the_training_before_a_checkpoint(
    folders: Path, own_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in own_data.glob("case_?.b2nd"):
        blosc2.asarray(np.full((1, 14, 14, 14), np.nan, np.float32), urlpath=str(path), mode="w")
    with pytest.raises(SystemExit, match=r"not finite in a step with the cases case_\d.*the weights are lost"):
        run_training(make(PCRLScratchTrainer), monkeypatch)
    assert not list(folders.rglob("*.pth"))


def test_a_damaged_checkpoint_of_the_training_itself_ends_with_a_sentence(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint_latest.pth").write_text("x")
    with pytest.raises(SystemExit, match=r"checkpoint_latest\.pth cannot be used .* remove it"):
        make(PCRLScratchTrainer).load_checkpoint(str(tmp_path / "checkpoint_latest.pth"))


def test_weights_that_are_not_finite_are_refused(folders: Path) -> None:
    path, _ = pretrain(folders)
    content = checkpoint.read(path)
    next(t for n, t in content["network_weights"].items() if n.startswith("encoder."))[0] = np.nan
    checkpoint.write(path, content)
    with pytest.raises(SystemExit, match="weights that are not finite numbers; take another"):
        make().on_train_start()


def test_using_an_older_pretraining_beside_an_unfinished_one_is_logged(folders: Path) -> None:
    path, _ = pretrain(folders)
    newer = Path(path).with_name(checkpoint.LATEST)
    newer.touch()
    os.utime(newer, (os.path.getmtime(path) + 5,) * 2)
    trainer = make()
    trainer.on_train_start()
    assert "is of an earlier pretraining; a newer one is not finished" in log_of(trainer)


def test_differences_from_the_pretrainings_data_are_logged(folders: Path) -> None:
    pretrain(folders)
    plan = make_plan()
    plan["configurations"]["3d_fullres"].update(spacing=[5.0, 1.0, 1.0], normalization_schemes=["CTNormalization"])
    trainer = make(plan=plan)
    trainer.on_train_start()
    report = json.loads((Path(trainer.output_folder) / "transfer.json").read_text())
    assert [line.split(":")[0] for line in report["data_differences"]] == ["spacing", "normalization_schemes"]
    assert "pretrained on other data: spacing" in log_of(trainer)


def test_a_configuration_that_the_plan_lacks_is_an_error(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/nnUNetv2_train", "999", "2d", "0", "-tr", "PCRLFinetuneTrainer"])
    command = "nnUNetv2_train 999 3d_fullres 0 -tr PCRLFinetuneTrainer"
    with pytest.raises(SystemExit, match=rf"configuration '2d' is not in nnUNetPlans; it has .*: {command}$"):
        make(configuration="2d")
    assert not folders.exists()


def test_a_missing_gpu_is_an_error(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="add -device cpu"):
        PCRLScratchTrainer(make_plan(), "3d_fullres", 0, DATASET_JSON)
    assert not folders.exists()


def test_an_unset_results_folder_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(SystemExit, match="nnUNet_results is not set"):
        make()


def test_the_callers_plan_is_not_changed(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrain(folders)
    plan = {**make_plan(), "continue_training": False}
    before = copy.deepcopy(plan)
    trainer = PCRLFinetuneTrainer(plan, "3d_fullres", 0, DATASET_JSON, device=torch.device("cpu"))
    trainer.on_train_start()
    assert plan == before


def rates(scheduler: Any, optimizer: torch.optim.Optimizer, epochs: int) -> list[float]:
    result = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        result.append(optimizer.param_groups[0]["lr"])
    return result


def test_the_rate_rises_linearly_and_then_falls_as_nnunets() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    warmed = rates(WarmupPolyLR(optimizer, 1.0, 10, 4), optimizer, 10)
    assert warmed[:4] == [0.25, 0.5, 0.75, 1.0]
    assert warmed[4:] == rates(PolyLRScheduler(optimizer, 1.0, 6), optimizer, 6)


def test_without_warm_up_the_rate_is_nnunets() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], 1.0)
    stock = rates(PolyLRScheduler(optimizer, 0.1, 10), optimizer, 10)
    assert rates(WarmupPolyLR(optimizer, 0.1, 10, 0), optimizer, 10) == stock


@pytest.mark.parametrize("factor", [0.0, 0.1])
def test_the_encoders_rate_is_a_share_of_the_other_rates(folders: Path, factor: float) -> None:
    plan = make_plan(finetune={"epochs": 20, "encoder_lr_factor": factor})
    trainer = make(plan=plan)
    trainer.initialize()
    encoder = {id(p) for p in trainer.network.encoder.parameters()}
    for epoch in (0, 7, 19):
        trainer.lr_scheduler.step(epoch)
        rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        assert rates.keys() == {id(p) for p in trainer.network.parameters()}
        (of_encoder,) = {rate for p, rate in rates.items() if p in encoder}
        (of_others,) = {rate for p, rate in rates.items() if p not in encoder}
        assert of_encoder == pytest.approx(factor * of_others)
        assert of_others > 0


def test_the_controls_encoder_has_the_rate_of_the_rest(folders: Path) -> None:
    given = {"epochs": EPOCHS, "encoder_lr_factor": 0.1, "frozen_epochs": 2, "layer_lr_decay": 0.5}
    trainer = make(PCRLScratchTrainer, make_plan(finetune=given))
    trainer.initialize()
    assert len(trainer.optimizer.param_groups) == 1
    before, after = train_epochs(trainer, 0, 1)
    assert moved(before, after) == learning(trainer)


@pytest.mark.parametrize(
    ("before", "after", "factors"),
    [
        ({"encoder_lr_factor": 0.1}, {}, [1.0]),
        ({}, {"encoder_lr_factor": 0.1}, [0.1, 1.0]),
        ({"encoder_lr_factor": 0.1}, {"encoder_lr_factor": 0.5}, [0.5, 1.0]),
        ({}, {"encoder_lr_factor": 0.0}, [0.0, 1.0]),
        ({"encoder_lr_factor": 0.0}, {}, [1.0]),
        ({}, {"layer_lr_decay": 0.5}, [0.25, 0.5, 1.0, 1.0]),
        ({"layer_lr_decay": 0.5}, {"layer_lr_decay": 0.5, "encoder_lr_factor": 0.1}, [0.025, 0.05, 0.1, 1.0]),
        ({}, {"frozen_epochs": 1}, [1.0, 1.0]),
        ({"layer_lr_decay": 0.5}, {"frozen_epochs": 1}, [1.0, 1.0]),
    ],
)
def test_the_encoders_rate_may_change_when_a_training_resumes(
    folders: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, Any], after: dict[str, Any], factors: list[float]
) -> None:
    pretrain(folders)
    short = {"iters_per_epoch": 1, "val_iters_per_epoch": 1}
    first = make(plan=make_plan(finetune={"epochs": 1, **before, **short}))
    run_training(first, monkeypatch)
    for val in (False, True):
        resumed = make(plan=make_plan(finetune={"epochs": 2, **after, **short}), continue_training=True)
        maybe_load_checkpoint(resumed, not val, val)
        for before_it, now in zip(first.network.parameters(), resumed.network.parameters(), strict=True):
            moments = [t.optimizer.state[p] for t, p in ((first, before_it), (resumed, now))]
            assert moments[0].keys() == moments[1].keys()  # a head without loss or with rate 0 has none in either
            assert all(torch.equal(value, moments[1][name]) for name, value in moments[0].items())
        assert [group.get("factor", 1.0) for group in resumed.optimizer.param_groups] == pytest.approx(factors)


def test_a_short_training_resumes_near_the_stop(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(finetune={"epochs": 20, "iters_per_epoch": 1, "val_iters_per_epoch": 1})
    trainer = make(PCRLScratchTrainer, plan)
    start = trainer.on_epoch_start

    def stopped_at_the_third() -> None:
        if trainer.current_epoch == 3:
            raise KeyboardInterrupt
        start()

    monkeypatch.setattr(trainer, "on_epoch_start", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    resumed = make(PCRLScratchTrainer, plan, continue_training=True)
    maybe_load_checkpoint(resumed, True, False)
    assert resumed.current_epoch == 3
    assert make(PCRLScratchTrainer, make_plan(finetune={"epochs": 1000})).save_every == 50  # nnU-Net's


def plan_with(network: str = "PlainConvUNet", dim: int = 3, **finetune: Any) -> dict[str, Any]:
    """A plan of a tiny network of three stages, for trainings of `EPOCHS`."""
    plan = make_plan(finetune={"epochs": EPOCHS, "weight_decay": 0.1, **finetune})
    configuration = plan["configurations"]["3d_fullres"]
    configuration["patch_size"] = [12] * dim
    architecture = configuration["architecture"]
    architecture["network_class_name"] = f"dynamic_network_architectures.architectures.unet.{network}"
    kwargs = architecture["arch_kwargs"]
    kwargs["conv_op"] = f"torch.nn.modules.conv.Conv{dim}d"
    kwargs["norm_op"] = f"torch.nn.modules.instancenorm.InstanceNorm{dim}d"
    kwargs["kernel_sizes"], kwargs["strides"] = [[3] * dim] * 3, [[1] * dim, [2] * dim, [2] * dim]
    if network == "ResidualEncoderUNet":
        kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    return plan


def double(plan: dict[str, Any]) -> Any:
    """A trainer with fixed random weights in double precision, so that differences of weights are exact enough."""
    trainer = make(plan=plan)
    trainer.initialize()
    trainer.network.double()  # in place: the optimiser has these very parameters
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return trainer


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in after if not torch.equal(before[name], after[name])}


def learning(trainer: Any, part: str = "") -> set[str]:
    """The names of a part's trained parameters: all but the head whose loss has no weight."""
    names = {name for name in parameters_of(trainer.network) if name.startswith(part)}
    return {name for name in names if not name.startswith("decoder.seg_layers.0.")}


ALL, DECODER, SEG_LAYERS = "", "decoder.", "decoder.seg_layers."


@pytest.mark.parametrize(
    ("finetune", "parts"),
    [
        ({}, [ALL, ALL, ALL]),
        ({"encoder_lr_factor": 0}, [DECODER, DECODER, DECODER]),
        ({"frozen_epochs": 2}, [DECODER, DECODER, ALL]),
        ({"seg_layers_only_epochs": 1}, [SEG_LAYERS, ALL, ALL]),
        ({"seg_layers_only_epochs": 1, "frozen_epochs": 2}, [SEG_LAYERS, DECODER, ALL]),
        ({"layer_lr_decay": 0.5}, [ALL, ALL, ALL]),
        ({"frozen_epochs": 1, "layer_lr_decay": 0.5, "encoder_lr_factor": 0.1}, [DECODER, ALL, ALL]),
    ],
)
@pytest.mark.parametrize("network", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_each_setting_trains_the_parameters_that_it_names(
    network: str, finetune: dict[str, Any], parts: list[str]
) -> None:
    trainer = double(plan_with(network, **finetune))
    states = train_epochs(trainer, 0, EPOCHS)
    assert [moved(*pair) for pair in pairwise(states)] == [learning(trainer, part) for part in parts]


@pytest.mark.parametrize("trainer", [PCRLFinetuneTrainer, PCRLScratchTrainer])
def test_without_deep_supervision_only_the_last_segmentation_layer_is_trained(
    folders: Path, trainer: type[PCRLScratchTrainer]
) -> None:
    made = make(trainer, plan_with(recipe="pretrained"))
    made.initialize()
    assert [p.requires_grad for layer in made.network.decoder.seg_layers for p in layer.parameters()] == [
        *[False] * 2 * (len(made.network.decoder.seg_layers) - 1),
        *[True] * 2,
    ]
    before, after = train_epochs(made, 0, 1)
    names = {name for name in after if not name.startswith("decoder.seg_layers.") or ".1." in name}
    assert moved(before, after) == names


def test_the_loss_without_deep_supervision_is_the_full_resolutions() -> None:
    trainers = [make(PCRLScratchTrainer, plan_with(deep_supervision=on, initial_lr=1e-9)) for on in (True, False)]
    for trainer in trainers:
        trainer.initialize()
    supervised, plain = trainers
    plain.network.load_state_dict(supervised.network.state_dict())
    batch = random_batch(supervised, 0)
    output = supervised.network(batch["data"])[0]
    expected = supervised.loss.loss(output, batch["target"][0])
    got = plain.train_step({**batch, "target": batch["target"][0]})["loss"]
    assert got == pytest.approx(expected.item(), rel=1e-5)


def test_a_training_resumes_only_with_the_same_kind_of_optimiser(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"iters_per_epoch": 1, "val_iters_per_epoch": 1}
    first = make(PCRLScratchTrainer, make_plan(finetune={"epochs": 1, "optimizer": "adamw", **short}))
    run_training(first, monkeypatch)
    assert isinstance(first.optimizer, torch.optim.AdamW)
    kept = first.optimizer.state_dict()["state"]
    longer = {"epochs": 2, **short}
    resumed = make(PCRLScratchTrainer, make_plan(finetune={**longer, "optimizer": "adamw"}), continue_training=True)
    maybe_load_checkpoint(resumed, True, False)
    for number, moments in resumed.optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(value), kept[number][name]) for name, value in moments.items())
    other = make(PCRLScratchTrainer, make_plan(finetune=longer), continue_training=True)
    maybe_load_checkpoint(other, True, False)  # the same call as for --val, which needs no momentum
    assert equal(parameters_of(other.network), parameters_of(first.network))
    with pytest.raises(SystemExit, match=r"has the optimiser adamw, and the plan's pcrl.finetune has sgd; set"):
        other.on_train_start()


def test_a_frozen_encoder_is_the_pretrained_one_to_the_end(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pretrained = pretrain(folders)
    trainer = make(plan=plan_with(encoder_lr_factor=0, iters_per_epoch=2, val_iters_per_epoch=1))
    run_training(trainer, monkeypatch)
    assert equal(encoder_of(trainer.network), pretrained)
    assert "Rate of the encoder, from its first stage on: 0; rest: 0.01" in log_of(trainer)


def test_an_encoder_is_frozen_with_mixed_precisions_scaler_too() -> None:
    trainer = double(plan_with(frozen_epochs=1))
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    states = train_epochs(trainer, 0, 2)
    assert [moved(*pair) for pair in pairwise(states)] == [learning(trainer, DECODER), learning(trainer)]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # from torch.compile
def test_an_encoder_is_frozen_in_a_compiled_network_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PCRLFinetuneTrainer, "_do_i_compile", lambda self: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    trainer = make(plan=plan_with(dim=2, frozen_epochs=1, layer_lr_decay=0.5))
    trainer.initialize()
    states = train_epochs(trainer, 0, 2)
    decoder_only, all_parts = (moved(*pair) for pair in pairwise(states))
    assert learning(trainer, DECODER) <= decoder_only  # also a head without loss: compiled, its gradient is 0
    assert not decoder_only & learning(trainer, "encoder.")
    assert learning(trainer) <= all_parts
    assert [group["factor"] for group in trainer.optimizer.param_groups] == [0.25, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("network", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_the_first_steps_of_the_stages_are_in_the_ratio_of_their_rates(network: str, dim: int) -> None:
    steps = []
    for decay in (1.0, 0.5):
        trainer = double(plan_with(network, dim, encoder_lr_factor=0.8, layer_lr_decay=decay))
        trainer.on_train_epoch_start()
        before = parameters_of(trainer.network)
        trainer.train_step(random_batch(trainer, 0))
        steps.append({name: value - before[name] for name, value in parameters_of(trainer.network).items()})
    ratios = {"encoder.stem.": 0.25, "encoder.stages.0.": 0.25, "encoder.stages.1.": 0.5, "encoder.stages.2.": 1.0}
    for name, step in steps[1].items():
        (ratio,) = [ratio for part, ratio in {**ratios, DECODER: 1.0}.items() if name.startswith(part)]
        torch.testing.assert_close(step, ratio * steps[0][name], rtol=1e-9, atol=1e-15)
        assert step.any() == (name in learning(trainer))


def step_from_rest(trainer: Any, batch: dict[str, Any], part: str) -> dict[str, Tensor]:
    """The parameters of one part after a step of nnU-Net's SGD on that part alone, without earlier momentum."""
    parameters = {name: p for name, p in trainer.network.named_parameters() if name in learning(trainer, part)}
    loss = trainer.loss(trainer.network(batch["data"]), batch["target"])
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert norm > 12  # nnU-Net's clipping takes effect
    return {
        name: p.detach() - 0.01 * (1 + 0.99) * (12 / norm * g + 0.1 * p.detach())
        for (name, p), g in zip(parameters.items(), gradients, strict=True)
    }


def test_a_frozen_encoder_counts_neither_for_clipping_nor_momentum() -> None:
    trainer = double(plan_with(frozen_epochs=1, warmup_share=0.0))
    loss = trainer.loss
    trainer.loss = lambda output, target: 1e4 * loss(output, target)

    def assert_next_step_is_one_from_rest(seed: int, of: str, clipped_with: str) -> None:
        batch = random_batch(trainer, seed)
        expected = step_from_rest(trainer, batch, clipped_with)
        trainer.train_step(batch)
        now = parameters_of(trainer.network)
        for name in learning(trainer, of):
            torch.testing.assert_close(now[name], expected[name], rtol=1e-6, atol=1e-12)

    trainer.on_train_epoch_start()
    assert_next_step_is_one_from_rest(0, of=DECODER, clipped_with=DECODER)
    trainer.train_step(random_batch(trainer, 1))
    trainer.current_epoch = 1
    trainer.on_train_epoch_start()
    for group in trainer.optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.01 * (1 - 1 / EPOCHS) ** 0.9)
        group["lr"] = 0.01
    assert_next_step_is_one_from_rest(2, of="encoder.", clipped_with=ALL)


@pytest.mark.parametrize("stopped_after", [1, 2])
@pytest.mark.parametrize("recipe", [{}, {"recipe": "pretrained", "optimizer": "adamw", "seg_layers_only_epochs": 1}])
def test_a_resumed_training_with_a_frozen_phase_equals_an_uninterrupted_one(
    stopped_after: int, recipe: dict[str, Any]
) -> None:
    plan = plan_with(frozen_epochs=2, layer_lr_decay=0.5, **recipe)
    whole = double(plan)
    expected = train_epochs(whole, 0, EPOCHS)[-1]
    first = double(plan)
    train_epochs(first, 0, stopped_after)
    path = os.path.join(first.output_folder, "checkpoint_latest.pth")
    first.save_checkpoint(path)
    resumed = double(plan)
    maybe_load_checkpoint(resumed, True, False)
    assert resumed.current_epoch == stopped_after
    assert equal(train_epochs(resumed, resumed.current_epoch, EPOCHS)[-1], expected)
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert equal(whole.optimizer.state[a], resumed.optimizer.state[b])


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({"frozen_epochs": 2}, 2),
        ({"encoder_lr_factor": 0.0}, 3),
        ({"layer_lr_decay": 0.5}, 0),
        ({"recipe": "pretrained", "optimizer": "adamw"}, 0),
    ],
)
def test_ddp_freezes_the_encoder_as_set_and_keeps_ranks_equal(
    fork: Callable[..., tuple[int, str]],
    preprocessed: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    frozen: int,
) -> None:
    finetune = {"epochs": EPOCHS, "weight_decay": 0.1, **settings}
    code = (
        f"import sys; sys.path[:0] = {sys.path}; from pathlib import Path; from steps import train_on_two_ranks; "
        f"train_on_two_ranks(Path({str(tmp_path)!r}), {finetune})"
    )
    status, output = fork(code, Path(sysconfig.get_path("purelib")), {"nnUNet_preprocessed": str(preprocessed)})
    assert status == 0, output
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for states in ranks:
        without_loss = "decoder.seg_layers.0." if "recipe" in settings else "none"  # no deep supervision: no loss
        names = {name for name in states[0] if not name.startswith(without_loss)}
        decoder = {name for name in names if name.startswith(DECODER)}
        assert [moved(*pair) for pair in pairwise(states)] == [decoder] * frozen + [names] * (EPOCHS - frozen)
    for states in zip(*ranks, strict=True):
        assert not moved(*states)


@pytest.mark.parametrize(("factor", "frozen_epochs"), [(0, 0), (0.1, 0), (1, 1)])
def test_freezing_random_parts_for_the_whole_training_is_refused(
    folders: Path, factor: float, frozen_epochs: int
) -> None:
    finetune = {"epochs": 2, "encoder_lr_factor": factor, "frozen_epochs": frozen_epochs, "allow_partial_encoder": True}
    pretrain(folders, plan=make_plan(features=[4, 8, 16]))
    pretrain(folders, fold=1)
    partly = make(plan=make_plan(finetune=finetune))
    cascade = make(plan=make_plan(finetune=finetune), configuration="3d_cascade_fullres", fold=1)
    for trainer, left in ((partly, "random weights"), (cascade, "weights of the cascade's labels at zero")):
        trainer.initialize()
        if factor:
            trainer._load_pretrained()
        else:
            with pytest.raises(UserError, match=rf"has {left} that would never learn; set a factor above 0"):
                trainer._load_pretrained()


@pytest.mark.parametrize("trains_decoder", [True, False])
def test_a_decoder_that_the_method_trained_is_loaded_too(folders: Path, trains_decoder: bool) -> None:
    path, _ = pretrain(folders, method="mae", trains_decoder=trains_decoder)
    trainer = make()
    trainer.initialize()
    before = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    trainer._load_pretrained()
    given = checkpoint.read(path)["network_weights"]
    for name, value in trainer.network.state_dict().items():
        pretrained = name.startswith("encoder.") or (trains_decoder and ".seg_layers." not in name)
        if "encoder." not in name or name.startswith("encoder."):
            assert torch.equal(value, given[name] if pretrained else before[name]), name
    report = json.loads((Path(trainer.output_folder) / "transfer.json").read_text())
    trained = ["encoder", "decoder"] if trains_decoder else ["encoder"]
    assert report["trained_by_method"] == trained
    assert (0.9 < report["decoder_share"] < 1) == trains_decoder
    assert f"Pretrained {' and '.join(trained)} {path}" in log_of(trainer)
    assert ("of the decoder's parameters are pretrained" in log_of(trainer)) == trains_decoder


def test_the_pretrainings_decoder_is_loaded_if_asked_for(folders: Path) -> None:
    path, _ = pretrain(folders)
    trainer = make(plan=make_plan(finetune={"load_decoder": True}))
    trainer.initialize()
    decoder = Decoder(trainer.network.encoder)
    checkpoint.write(path, {**checkpoint.read(path), "method_weights": decoder.state_dict(prefix="decoder.")})
    trainer._load_pretrained()
    assert torch.equal(trainer.network.decoder.transpconvs[0].weight, decoder.upsample[0].weight)
    report = json.loads((Path(trainer.output_folder) / "transfer.json").read_text())
    assert "decoder.transpconvs.0.weight" in report["loaded"]
