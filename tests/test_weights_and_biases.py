"""A run of Weights & Biases begins with the training; a refused trainer does not change another run."""

from pathlib import Path

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.logging import nnunet_logger
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_dataset import make_plan
from tiny_pretraining import make_trainer

from pcrl_nnunet import weights_and_biases
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.trainers import PCRLClassificationTrainer, PCRLFinetuneTrainer, PCRLPretrainTrainer, PCRLScratchTrainer


@pytest.fixture(autouse=True)
def quick(tiny, monkeypatch):
    """Without pictures, which take seconds each and have their own tests."""
    monkeypatch.setattr(Report, "write", lambda *_: None)
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda self, folder: None)


def make(tiny, trainer, continues=False):
    if trainer is PCRLPretrainTrainer:
        return make_trainer(0, continues=continues, epochs=1, iters_per_epoch=1)
    plan = {**make_plan(), "continue_training": continues}
    return trainer(plan, "3d_fullres", 0, tiny.dataset_json, torch.device("cpu"))


def a_run_at_work(tiny, trainer) -> Path:
    """The output folder of a training in its first epoch."""
    folder = tiny.results / f"{trainer.__name__}__nnUNetPlans__3d_fullres" / "fold_0"
    (folder / "wandb" / "latest-run").mkdir(parents=True)
    (folder / "wandb" / "latest-run" / "run-abc.wandb").write_text("curves")
    (folder / "training_log_1.txt").write_text("log")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("trainer", [PCRLPretrainTrainer, PCRLScratchTrainer])
def test_a_training_begins_one_run_which_gets_all_that_was_logged(tiny, wandb, trainer):
    made = make(tiny, trainer)
    assert wandb == []
    assert not (Path(made.output_folder) / "wandb").exists()
    made.run_training()
    (run,) = wandb
    assert run.given["dir"] == made.output_folder
    assert run.config["fold"] == 0
    assert run.config["plans"]["plans_name"] == "nnUNetPlans"
    assert ("hparas" in run.config) == (trainer is PCRLScratchTrainer)
    if trainer is PCRLPretrainTrainer:
        assert run.config["pretrain"]["epochs"] == 1
        assert run.logged["restoration_error", 0] == made.logger.get_value("restoration_error", 0)
    assert run.logged["train_losses", 0] == made.logger.get_value("train_losses", 0)


@pytest.mark.parametrize("at_work", [True, False])
def test_a_refused_fine_tuning_begins_no_run_and_changes_no_file(tiny, wandb, at_work):
    folder = a_run_at_work(tiny, PCRLFinetuneTrainer) if at_work else tiny.results
    before = files(folder)
    with pytest.raises(SystemExit, match="no pretrained encoder for fold 0"):
        make(tiny, PCRLFinetuneTrainer).on_train_start()
    assert wandb == []
    assert files(folder) == before
    assert tiny.results.exists() == at_work


def test_validation_alone_leaves_the_trainings_run(tiny, wandb):
    make(tiny, PCRLScratchTrainer).run_training()
    folder = tiny.results / "PCRLScratchTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    (folder / "wandb" / "curves").write_text("curves")
    maybe_load_checkpoint(make(tiny, PCRLScratchTrainer), False, True)
    assert len(wandb) == 1
    assert (folder / "wandb" / "curves").read_text() == "curves"


def test_a_resumed_training_continues_its_run(tiny, wandb):
    folder = a_run_at_work(tiny, PCRLScratchTrainer)
    make(tiny, PCRLScratchTrainer, continues=True).on_train_start()
    (run,) = wandb
    assert (run.given["id"], run.given["resume"]) == ("abc", "allow")
    assert (folder / "wandb" / "latest-run" / "run-abc.wandb").exists()


def test_a_missing_run_to_continue_is_named(tiny, wandb):
    folder = a_run_at_work(tiny, PCRLScratchTrainer)
    (folder / "wandb" / "latest-run" / "run-abc.wandb").unlink()
    with pytest.raises(SystemExit, match=r"wandb has no run of Weights & Biases to go on with .*; remove that folder"):
        make(tiny, PCRLScratchTrainer, continues=True).on_train_start()


def test_only_the_first_process_has_a_run(tiny, wandb):
    trainer = make(tiny, PCRLScratchTrainer)
    trainer.local_rank = 1
    weights_and_biases.begin(trainer)
    trainer.logger.log("train_losses", 1.0, 0)
    assert wandb == []


@pytest.mark.parametrize("trainer", [PCRLFinetuneTrainer, PCRLScratchTrainer, PCRLClassificationTrainer])
def test_without_the_package_one_sentence_says_so_before_anything_is_made(tiny, monkeypatch, trainer):
    (tiny.folder / "classes.csv").write_text("case,a\ncase_0,1\ncase_1,0\n")
    monkeypatch.setattr(nnunet_logger, "wandb", None)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    with pytest.raises(SystemExit, match="nnUNet_wandb_enabled is 1, and the package wandb is not installed: run pip"):
        make(tiny, trainer)
    assert not tiny.results.exists()


def test_a_wrong_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "yes")
    with pytest.raises(UserError, match="nnUNet_wandb_enabled is 'yes'; set it to 1"):
        weights_and_biases.check()


def test_a_run_that_fails_to_begin_stops_fine_tuning_and_leaves_nothing(tiny, wandb, monkeypatch):
    def refuses(**_):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(nnunet_logger.wandb, "init", refuses)
    with pytest.raises(
        SystemExit, match=r"did not begin a run \(RuntimeError: api_key not configured\); run wandb login"
    ):
        make(tiny, PCRLScratchTrainer).on_train_start()
    assert not tiny.results.exists()
