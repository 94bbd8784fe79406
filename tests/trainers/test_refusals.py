"""Fine-tuning and classification refuse these inputs before they create anything."""

import json

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_dataset import DATASET, make_plan

from pcrl_nnunet import trainers
from pcrl_nnunet.trainers import (
    PCRLClassificationScratchTrainer,
    PCRLClassificationTrainer,
    PCRLFinetuneTrainer,
    PCRLScratchTrainer,
)

SEGMENTATION = [PCRLFinetuneTrainer, PCRLScratchTrainer]
CLASSIFICATION = [PCRLClassificationTrainer, PCRLClassificationScratchTrainer]
OF_A_METHOD = [trainers.PCRLFinetuneTrainer_mae, trainers.PCRLClassificationTrainer_mae]
ALL = [*SEGMENTATION, *CLASSIFICATION]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda self, folder: None)


@pytest.fixture
def table(tiny):
    (tiny.folder / "classes.csv").write_text("case,odd\ncase_0,0\ncase_1,1\ncase_2,0\ncase_3,1\n")
    return tiny


def make(tiny, trainer, fold=0, continue_training=False, configuration="3d_fullres"):
    plan = {**make_plan(), "continue_training": continue_training}
    return trainer(plan, configuration, fold, tiny.dataset_json, device=torch.device("cpu"))


def refusal(tiny, trainer, **given):
    """Return the sentence of the refusal; the trainer must leave nothing behind."""
    with pytest.raises(SystemExit) as end:
        make(tiny, trainer, **given)
    assert not tiny.results.exists()
    message = str(end.value.code)
    assert message.startswith("Error: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("trainer", ALL)
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_split_with_an_unknown_case_is_refused(table, trainer, part):
    table.splits[0][part].append("Case_2.nii.gz")
    (table.folder / "splits_final.json").write_text(json.dumps(table.splits))
    message = refusal(table, trainer)
    assert f"{table.folder}/splits_final.json names 'Case_2.nii.gz' (probably 'case_2'), which is not among" in message


@pytest.mark.parametrize("trainer", ALL)
@pytest.mark.parametrize(("part", "kind"), [("train", "training"), ("val", "validation")])
def test_a_fold_with_an_empty_part_is_refused(table, trainer, part, kind):
    table.splits[0][part].clear()
    (table.folder / "splits_final.json").write_text(json.dumps(table.splits))
    assert f"fold 0 of splits_final.json has no {kind} case, " in refusal(table, trainer)


@pytest.mark.parametrize(
    ("labels", "regions", "refused"),
    [
        ({"background": 0, "a": 1, "b": 3}, False, "0, 1, 3"),
        ({"background": 0, "a": 1, "ignore": 3}, False, "0, 1, 3"),
        ({"background": 0, "ignore": 1, "a": 2}, False, "0, 1, 2"),
        ({"background": 0, "a": 1, "b": 2, "ignore": 3}, False, ""),
        ({"background": 0, "whole": [1, 3], "core": 3}, True, ""),
    ],
)
@pytest.mark.parametrize("trainer", SEGMENTATION[1:])
def test_a_gap_in_the_labels_is_refused(tiny, trainer, labels, regions, refused):
    tiny.dataset_json = {**tiny.dataset_json, "labels": labels}
    if regions:
        tiny.dataset_json["regions_class_order"] = [1, 3]
    if refused:
        assert f"the labels of {DATASET} are {refused}; nnU-Net needs 0, 1, 2" in refusal(tiny, trainer)
    else:
        make(tiny, trainer)


@pytest.mark.parametrize("trainer", ALL)
def test_a_fold_beyond_the_split_is_refused(table, trainer):
    assert "fold 2 is not among the folds of" in refusal(table, trainer, fold=2)


@pytest.mark.parametrize("trainer", ALL)
def test_a_missing_split_in_a_read_only_folder_is_refused(table, as_users_do, trainer):
    (table.folder / "splits_final.json").unlink()
    for ending in (".b2nd", "_seg.b2nd", ".pkl"):
        (table.data / f"case_4{ending}").symlink_to(table.data / f"case_0{ending}")
    table.folder.chmod(0o555)
    message = refusal(table, trainer)
    table.folder.chmod(0o755)
    assert "there is no" in message
    assert "splits_final.json, which the first training of a fold writes" in message
    assert not (table.folder / "splits_final.json").exists()
    trainer = make(table, trainer)  # the trainer writes the split when it trains
    trainer.do_split()
    assert (table.folder / "splits_final.json").is_file()


@pytest.mark.parametrize("trainer", CLASSIFICATION)
def test_a_new_table_for_a_read_only_folder_is_refused(table, as_users_do, trainer):
    raw = table.folder.parents[1] / "raw" / DATASET
    raw.mkdir(parents=True)
    (table.folder / "classes.csv").rename(raw / "classes.csv")
    table.folder.chmod(0o555)
    message = refusal(table, trainer)
    table.folder.chmod(0o755)
    assert f"{raw}/classes.csv is new and has to be copied to {table.folder}/classes.csv" in message


@pytest.mark.parametrize("trainer", [PCRLScratchTrainer, PCRLClassificationScratchTrainer])
def test_a_finished_training_is_validated_without_its_training_cases_and_not_trained_again(table, trainer, monkeypatch):
    first = make(table, trainer)
    first.run_training()
    for path in table.data.glob("case_0*"):
        path.unlink()
    again = make(table, trainer)
    maybe_load_checkpoint(again, continue_training=False, validation_only=True)  # --val
    assert list(again.do_split()[1]) == ["case_3"]
    with pytest.raises(SystemExit, match="names 'case_0', which is not among the 3 preprocessed cases"):
        make(table, trainer).run_training()
    assert (
        table.results / f"{trainer.__name__}__nnUNetPlans__3d_fullres" / "fold_0" / "checkpoint_final.pth"
    ).is_file()


@pytest.mark.parametrize("trainer", [PCRLScratchTrainer, PCRLClassificationScratchTrainer])
def test_an_interrupted_training_continues(table, trainer):
    first = make(table, trainer)
    first.initialize()
    first.save_checkpoint(f"{first.output_folder}/checkpoint_latest.pth")
    again = make(table, trainer, continue_training=True)
    maybe_load_checkpoint(again, continue_training=True, validation_only=False)  # --c
    again.run_training()


@pytest.mark.parametrize("known_by", ["the preprocessed dataset.json", "the raw folder"])
@pytest.mark.parametrize("trainer", [*SEGMENTATION, OF_A_METHOD[0]])
def test_a_segmentation_without_masks_is_refused_with_the_command_that_classifies(table, trainer, known_by):
    table.dataset_json["labels"] = {"background": 0, "foreground": 1}
    if known_by == "the raw folder":
        raw = table.folder.parents[1] / "raw" / DATASET
        (raw / "imagesTr").mkdir(parents=True)
        (raw / "dataset.json").write_text("{}")
    else:
        table.dataset_json["pcrl_without_masks"] = True
    message = refusal(table, trainer)
    classifies = trainer.__name__.replace("Finetune", "Classification").replace("Scratch", "ClassificationScratch")
    assert f"{DATASET} has no masks, so that a segmentation has nothing to learn; " in message
    assert f"to classify: nnUNetv2_train {DATASET} 3d_fullres 0 -tr {classifies} -p nnUNetPlans -device cpu" in message
    (table.folder / "classes.csv").unlink()
    message = refusal(table, trainer)
    assert "put a classes.csv or candidates.csv into" in message
    assert "pcrl_nnunet_transfer" in message


@pytest.mark.parametrize("masks", [True, False])
def test_a_dataset_with_masks_of_the_same_names_is_segmented(table, monkeypatch, masks):
    table.dataset_json["labels"] = {"background": 0, "foreground": 1}
    raw = table.folder.parents[1] / "raw" / DATASET
    if masks:
        (raw / "labelsTr").mkdir(parents=True)
        (raw / "dataset.json").write_text("{}")
    else:
        monkeypatch.delenv("nnUNet_raw")  # the raw dataset is unknown
    make(table, PCRLScratchTrainer)


@pytest.mark.parametrize("trainer", [PCRLFinetuneTrainer, PCRLClassificationTrainer, *OF_A_METHOD])
def test_a_missing_pretraining_is_answered_with_the_control_trainer(table, trainer):
    with pytest.raises(SystemExit) as end:
        make(table, trainer).on_train_start()
    advised = str(end.value.code).rsplit("or train without: -tr ", 1)[1]
    assert advised == trainer.control.__name__
    assert not issubclass(getattr(trainers, advised), PCRLFinetuneTrainer)
    classifies = issubclass(trainer, PCRLClassificationTrainer)
    assert issubclass(getattr(trainers, advised), PCRLClassificationScratchTrainer) == classifies
