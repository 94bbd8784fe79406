"""Semi-supervised trainers, run like by nnUNetv2_train."""

import json
import os
import shutil
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from finished_pretraining import encoder_of, pretrain
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from steps import parameters_of, random_batch
from tiny_dataset import DATASET, DATASET_JSON, write_preprocessed
from torch import Tensor
from torch._dynamo import OptimizedModule
from unlabelled_scans import make_full_plan, write_scans

from pcrl_nnunet import checkpoint, trainers
from pcrl_nnunet.trainers import (
    PCRLScratchTrainer,
    PCRLSemiSupervisedScratchTrainer,
    PCRLSemiSupervisedTrainer,
)
from pcrl_nnunet.trainers import semi as semi_module
from pcrl_nnunet.transfer.weights import unwrap

DATA = "nnUNetPlans_3d_fullres"
SPLITS = [
    {"train": ["case_0", "case_1"], "val": ["case_3"]},
    {"train": ["case_1", "case_2", "case_0"], "val": ["case_3"]},
]
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
SHORT = {"epochs": 2, "iters_per_epoch": 1, "val_iters_per_epoch": 1}


@pytest.fixture(scope="module")
def preprocessed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnUNet_preprocessed, in which fold 0 leaves out case 2, and one scan without labels; no test writes to it."""
    folder = write_preprocessed(tmp_path_factory.mktemp("preprocessed"))
    (folder / "splits_final.json").write_text(json.dumps(SPLITS))
    write_scans(folder, make_full_plan(), {"scan": 0})
    return folder.parent


@pytest.fixture(autouse=True)
def folders(preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """nnU-Net's folders; results are this test's own. Data are loaded in this process, on one thread."""
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)
    monkeypatch.setattr(MetaLogger, "plot_progress_png", lambda self, folder: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "results" / DATASET
    torch.set_num_threads(threads)


@pytest.fixture
def without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than these trainings."""
    monkeypatch.setattr(semi_module, "draw_pseudo_labels", lambda *args: None)


@pytest.fixture
def own_data(preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The dataset's folder in a copy of nnUNet_preprocessed that the test may damage."""
    shutil.copytree(preprocessed, tmp_path / "preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    return tmp_path / "preprocessed" / DATASET


def make(
    trainer: type[PCRLScratchTrainer] = PCRLSemiSupervisedScratchTrainer,
    plan: dict[str, Any] | None = None,
    configuration: str = "3d_fullres",
    fold: int | str = 0,
    continue_training: bool = False,
    dataset_json: dict[str, Any] | None = None,
    **finetune: Any,
) -> Any:
    plan = {**(plan or make_full_plan(finetune={**SHORT, **finetune})), "continue_training": continue_training}
    # networks here learn nothing, and the cases are few
    semi = {"longest_supervised_share": 0, "mixing_ratio": 0, **plan["pcrl"].get("semi", {})}
    plan["pcrl"] = {**plan["pcrl"], "semi": semi}
    torch.manual_seed(0)
    return trainer(plan, configuration, fold, dataset_json or DATASET_JSON, device=torch.device("cpu"))


def run_training(trainer: Any, c: bool = False) -> Any:
    """Train like nnUNetv2_train, without the final validation."""
    maybe_load_checkpoint(trainer, c, False, None)
    trainer.run_training()
    return trainer


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_of(trainer: Any) -> str:
    with open(trainer.log_file) as file:
        return file.read()


def weights_of(trainer: Any) -> dict[str, Tensor]:
    """Copies of the student's and the teacher's weights."""
    of_teacher = {f"teacher.{name}": value for name, value in trainer._teacher.state_dict().items()}
    return {name: value.clone() for name, value in {**trainer.network.state_dict(), **of_teacher}.items()}


# ------------------------------------------------------------------------------------------------------------- cases


def test_labels_of_unlabelled_cases_are_never_opened(own_data: Path, without_picture: None) -> None:
    steps = {"iters_per_epoch": 2}
    with_labels = run_training(make(**steps))
    assert list(with_labels._cases.unlabelled) == ["case_2", "unlabelled/scan"]
    shutil.rmtree(with_labels.output_folder)
    for ending in ("_seg.b2nd", ".pkl"):
        (own_data / DATA / f"case_2{ending}").unlink()
    without = run_training(make(**steps))
    assert equal(weights_of(with_labels), weights_of(without))
    assert repr(with_labels._history) == repr(without._history)  # Dice may be NaN


def test_labels_of_labelled_cases_are_needed(own_data: Path, without_picture: None, folders: Path) -> None:
    usual = run_training(make())
    before = weights_of(usual)
    shutil.rmtree(usual.output_folder)
    labels = own_data / DATA / "case_0_seg.b2nd"
    shutil.copy(own_data / DATA / "case_1.b2nd", own_data / DATA / "case_0.b2nd")
    other = run_training(make())
    assert not equal(before, weights_of(other))
    labels.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"^Error: case case_0_seg cannot be read"):
        run_training(make(trainer=PCRLSemiSupervisedScratchTrainer, fold=0))


def test_log_and_checkpoint_list_the_cases_and_no_validation_case(without_picture: None) -> None:
    trainer = run_training(make())
    log = log_of(trainer)
    assert "Labelled cases: case_0, case_1\n" in log
    assert "Unlabelled cases (their labels are never read): case_2, unlabelled/scan\n" in log
    assert "Settings of semi-supervised training: " in log
    assert "Labels: a 2.33% of the voxels, 100% of it in its largest piece, b 1.75%" in log
    content = torch.load(os.path.join(trainer.output_folder, checkpoint.FINAL), weights_only=False)["semi"]
    assert content["labelled_cases"] == ["case_0", "case_1"]
    assert content["unlabelled_cases"] == ["case_2", "unlabelled/scan"]
    assert content["settings"] == vars(trainer.semi)
    assert repr(content["history"]) == repr([vars(epoch) for epoch in trainer._history])
    assert equal(content["teacher"], trainer._teacher.state_dict())


def test_the_checkpoint_lists_copies_and_unreadable_cases(own_data: Path, without_picture: None) -> None:
    scans = own_data / f"{DATA}_unlabelled"
    shutil.copy(own_data / DATA / "case_3.b2nd", scans / "copy.b2nd")
    (scans / "empty.b2nd").write_bytes(b"")
    trainer = run_training(make())
    content = torch.load(os.path.join(trainer.output_folder, checkpoint.FINAL), weights_only=False)["semi"]
    assert content["unlabelled_cases"] == ["case_2", "unlabelled/scan"]
    assert content["copies"] == {"unlabelled/copy": "case_3"}
    (sentence,) = content["unreadable"]
    assert sentence.startswith("case empty cannot be read from ")


def test_scans_of_another_kind_are_named_before_the_training(own_data: Path, without_picture: None) -> None:
    warning = "the unlabelled scans do not look like the labelled cases"
    usual = run_training(make())
    assert warning not in log_of(usual)
    shutil.rmtree(usual.output_folder)
    for path in (own_data / DATA / "case_2.b2nd", own_data / f"{DATA}_unlabelled" / "scan.b2nd"):
        voxels = blosc2.open(str(path))[:]
        path.unlink()
        blosc2.asarray(voxels + 5, urlpath=str(path), mode="w")
    log = log_of(run_training(make()))
    assert log.index(warning) < log.index("Epoch 0")


def test_all_cases_are_labelled_with_scans_beside_them(without_picture: None) -> None:
    trainer = run_training(make(fold="all"))
    content = torch.load(os.path.join(trainer.output_folder, checkpoint.FINAL), weights_only=False)["semi"]
    assert content["labelled_cases"] == [f"case_{i}" for i in range(4)]
    assert content["unlabelled_cases"] == ["unlabelled/scan"]
    assert len(trainer._history) == 1


def test_a_case_that_becomes_unreadable_is_named_once_and_set_aside(own_data: Path, without_picture: None) -> None:
    trainer = make(iters_per_epoch=4)
    begins = trainer.on_train_epoch_start

    def damage_in_the_second_phase() -> None:
        begins()
        if trainer.current_epoch == 1:
            (own_data / f"{DATA}_unlabelled" / "scan.b2nd").write_bytes(b"")

    trainer.on_train_epoch_start = damage_in_the_second_phase
    seen = []
    mixed = trainer._mixed
    trainer._mixed = lambda *args: seen.append(mixed(*args)) or seen[-1]
    run_training(trainer)
    assert log_of(trainer).count("WARNING: set aside: case scan cannot be read from ") == 1
    assert {key for batch in seen for key in batch["keys"][2:]} == {"case_2"}
    assert all(torch.isfinite(batch["data"]).all() for batch in seen)


def test_without_a_readable_unlabelled_case_the_training_ends_with_a_sentence(
    own_data: Path, without_picture: None
) -> None:
    trainer = make()
    begins = trainer.on_train_epoch_start

    def damage_in_the_second_phase() -> None:
        begins()
        if trainer.current_epoch == 1:
            for file in (own_data / f"{DATA}_unlabelled" / "scan.b2nd", own_data / DATA / "case_2.b2nd"):
                file.write_bytes(b"")

    trainer.on_train_epoch_start = damage_in_the_second_phase
    with pytest.raises(SystemExit, match=r"^Error: no unlabelled case can be read any more; the last one: case "):
        run_training(trainer)
    assert os.path.isfile(trainer.log_file)  # what was trained stays


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"fold": 1}, r"fold 1 of Dataset999_Tiny has no unlabelled case"),
        ({"fold": "all"}, r"fold all of Dataset999_Tiny has no unlabelled case"),
        ({"configuration": "3d_cascade_fullres"}, r"3d_cascade_fullres is a cascade, .* -tr PCRLScratchTrainer"),
        ({"configuration": "inherits"}, r"inherits is a cascade"),
        ({"epochs": 1}, r"pcrl.finetune.epochs is 1; .* give 2 epochs or more"),
        ({"semi": {"leave_out": ["case_7"]}}, r"pcrl.semi.leave_out names 'case_7'"),
        ({"semi": {"box_share": 2.0}}, r"pcrl.semi.box_share is 2.0; expected "),
        ({"fold": 2}, r"fold 2 is not among the folds"),
    ],
)
def test_an_impossible_training_ends_with_one_sentence_and_leaves_nothing(
    own_data: Path, folders: Path, given: dict[str, Any], sentence: str
) -> None:
    shutil.rmtree(own_data / f"{DATA}_unlabelled")
    plan = make_full_plan(finetune={**SHORT, "epochs": given.pop("epochs", 2)}, semi=given.pop("semi", {}))
    plan["configurations"]["inherits"] = {"inherits_from": "3d_cascade_fullres"}
    with pytest.raises(SystemExit, match=rf"^Error: [^\n]*{sentence}[^\n]*$"):
        make(plan=plan, **given)
    assert not folders.exists()


def test_scans_of_another_plan_are_refused(own_data: Path, folders: Path) -> None:
    plan = make_full_plan(finetune=SHORT)
    plan["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    with pytest.raises(SystemExit, match=r"^Error: .* made with another normalization_schemes than the plan"):
        make(plan=plan)
    assert not folders.exists()


def test_a_finished_training_is_validated_without_the_scans(own_data: Path, without_picture: None) -> None:
    trained = run_training(make())
    (own_data / "splits_final.json").write_text(json.dumps(SPLITS[1:]))
    shutil.rmtree(own_data / f"{DATA}_unlabelled")
    validating = make()
    maybe_load_checkpoint(validating, False, True)
    assert equal(parameters_of(validating.network), parameters_of(trained.network))
    again = make()
    with pytest.raises(SystemExit, match=r"^Error: fold 0 of Dataset999_Tiny has no unlabelled case"):
        run_training(again)
    assert os.path.isfile(os.path.join(trained.output_folder, checkpoint.FINAL))


def test_a_finished_training_is_continued_without_the_scans(own_data: Path, without_picture: None) -> None:
    """nnUNetv2_train --c repeats an aborted validation."""
    trained = run_training(make())
    path = os.path.join(trained.output_folder, checkpoint.FINAL)
    before = torch.load(path, weights_only=False)
    (own_data / "splits_final.json").write_text(json.dumps(SPLITS[1:]))
    shutil.rmtree(own_data / f"{DATA}_unlabelled")
    run_training(make(continue_training=True), c=True)
    after = torch.load(path, weights_only=False)
    assert equal(after["network_weights"], before["network_weights"])
    assert equal(after["semi"].pop("teacher"), before["semi"].pop("teacher"))
    assert repr(after["semi"]) == repr(before["semi"])  # Dice may be NaN
    assert after["current_epoch"] == before["current_epoch"] == 2


@pytest.mark.parametrize(
    ("name", "control"),
    [
        ("PCRLSemiSupervisedScratchTrainer", "PCRLScratchTrainer"),
        ("PCRLSemiSupervisedTrainer", "PCRLFinetuneTrainer"),
        ("PCRLSemiSupervisedTrainer_mae", "PCRLFinetuneTrainer_mae"),
    ],
)
def test_without_unlabelled_cases_the_error_names_the_same_training_without_them(
    own_data: Path, name: str, control: str
) -> None:
    shutil.rmtree(own_data / f"{DATA}_unlabelled")
    with pytest.raises(SystemExit, match=rf"^Error: fold 1 .* or train without: -tr {control}$"):
        make(getattr(trainers, name), fold=1)


def test_one_labelled_case_fills_a_batch_of_two(own_data: Path, without_picture: None) -> None:
    """nnU-Net draws cases with replacement."""
    (own_data / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_3"]}]))
    trainer = make()
    assert trainer.configuration_manager.batch_size == 2
    steps, seen = trainer.train_step, []
    trainer.train_step = lambda batch: seen.append(list(batch["keys"])) or steps(batch)
    run_training(trainer)
    assert seen == [["case_0", "case_0"]] * 2  # a step of each phase
    assert len(trainer._history) == 1


# ------------------------------------------------------------------------------------------------------------- steps


def with_labels_as_image(trainer: Any, seed: int) -> dict[str, Any]:
    """A batch of random labels whose images are the labels."""
    batch = random_batch(trainer, seed)
    batch["target"] = [target.to(torch.int16) for target in batch["target"]]
    return {**batch, "data": batch["target"][0].float()}


@pytest.mark.parametrize("trainer_class", [PCRLScratchTrainer, PCRLSemiSupervisedScratchTrainer])
def test_pasted_patches_have_the_labels_of_their_images(trainer_class: type[PCRLScratchTrainer]) -> None:
    trainer = make(trainer_class, pasted_share=1.0)
    trainer.initialize()
    batch = with_labels_as_image(trainer, 0)
    pasted = trainer.mix(batch, np.random.default_rng(0))
    assert torch.equal(pasted["data"], pasted["target"][0].float())
    own, other = batch["data"], batch["data"].roll(1, 0)
    shows = [(pasted["data"] == image).float().mean().item() for image in (own, other)]
    box = (8 / 12) ** 3
    assert shows == pytest.approx([1 - box + box / 3, box + (1 - box) / 3], abs=0.05)  # three labels
    assert [target.shape for target in pasted["target"]] == [target.shape for target in batch["target"]]


class FakeTeacher:
    """Predicts label 3 - n where the image is n, so that its labels differ from the labelled patches' labels."""

    all_finite = True

    def labels(self, images: Tensor, regions: bool) -> Tensor:
        assert not regions
        return (3 - images).to(torch.int16)


def test_a_mixed_patch_has_the_labels_of_its_voxels() -> None:
    trainer = make()
    trainer.initialize()
    trainer._facts = semi_module.LabelFacts(["a", "b"], [0.1, 0.1], [0.5, 0.5])  # nothing is cleaned
    batch = with_labels_as_image(trainer, 0)
    unlabelled = with_labels_as_image(trainer, 1)["data"] + 10
    trainer.dataloader_unlabelled = iter([{"data": unlabelled, "keys": ["u", "v"], "set_aside": {}}])
    mixed = trainer._mixed(batch, FakeTeacher(), np.random.default_rng(0))
    labelled, pseudo = mixed["target"][0].chunk(2, 1)
    shown = mixed["data"]
    is_labelled = shown < 5
    assert torch.equal(labelled, torch.where(is_labelled, shown, -1).to(torch.int16))
    assert torch.equal(pseudo, torch.where(is_labelled, torch.tensor(-1.0), 3 - shown).to(torch.int16))
    assert torch.equal(shown, torch.where(is_labelled, batch["data"], unlabelled))
    # nnU-Net centres the last patch on a class, so the last patch fills the box, which covers the middle
    assert is_labelled.flatten(1).sum(1).tolist() == [12**3 - 8**3, 8**3]
    assert mixed["keys"] == ["a", "b", "u", "v"]
    for level, (full, like) in enumerate(zip(mixed["target"], batch["target"], strict=True)):
        assert full.shape == (2, 2, *like.shape[2:]), level


@pytest.mark.parametrize("kind", ["label maps", "regions"])
def test_the_teachers_labels_of_a_class_in_one_piece_keep_the_largest(kind: str) -> None:
    trainer = make()
    trainer.initialize()
    trainer._regions = kind == "regions"
    trainer._watch.regions = trainer._regions
    trainer._facts = semi_module.LabelFacts(["a", "b"], [0.1, 0.1], [0.5, 1.0])  # only b is in one piece
    found = torch.zeros(2, 2, 12, 12, 12, dtype=torch.bool)
    for channel, offset in ((0, 0), (1, 6)):
        found[:, channel, offset : offset + 3, :3, :3] = True
        found[:, channel, offset, 8, 8] = True  # a second piece
    labels = found[:, :1] * 1 + found[:, 1:] * 2
    shown: list[Tensor] = []
    trainer._watch.of_teacher = lambda pseudo: shown.append(pseudo)

    class Teacher:
        def labels(self, images: Tensor, regions: bool) -> Tensor:
            return found if regions else labels.to(torch.int16)

    batch = with_labels_as_image(trainer, 0)
    if kind == "regions":
        batch["target"] = [torch.cat([target > 0, target > 1], 1) for target in batch["target"]]
    trainer.dataloader_unlabelled = iter([{"data": batch["data"], "keys": ["u", "v"], "set_aside": {}}])
    trainer._mixed(batch, Teacher(), np.random.default_rng(0))
    (pseudo,) = shown
    a, b = (pseudo[:, 0], pseudo[:, 1]) if kind == "regions" else (pseudo[:, 0] == 1, pseudo[:, 0] == 2)
    assert (a.sum().item(), b.sum().item()) == (2 * 28, 2 * 27)


@pytest.mark.parametrize("kind", ["label maps", "regions in 2d"])
def test_where_labels_are_many_most_steps_are_nnunets(kind: str) -> None:
    finetune = {**SHORT, "iters_per_epoch": 8, "pasted_share": 1.0}
    plan = make_full_plan(finetune=finetune, semi={"mixing_ratio": 1})
    change, dataset_json, _ = KINDS.get(kind, (change_nothing, {}, 1))
    change(plan)
    # 4 labelled cases and 1 scan: 2 of 8 steps
    trainer = make(plan=plan, fold="all", dataset_json={**DATASET_JSON, **dataset_json})
    losses, usual, paste = [], nnUNetTrainer.train_step, PCRLScratchTrainer.mix
    pasted, given = [], []

    def step(self: Any, batch: dict[str, Any]) -> dict[str, Any]:
        losses.append(type(self.loss))
        assert (batch is given[-1]) == (len(losses) % 4 != 0)  # unchanged but for each fourth step
        return usual(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nnUNetTrainer, "train_step", step)
        patch.setattr(PCRLScratchTrainer, "mix", lambda self, batch, rng: pasted.append(1) or paste(self, batch, rng))
        train = trainer.train_step
        trainer.train_step = lambda batch: given.append(batch) or train(batch)
        run_training(trainer)
    assert len(pasted) == 2  # in the first phase
    assert [loss.__name__ for loss in losses[:8]] == ["WatchedLoss"] * 8
    of_nnunet = type(trainer.loss).__name__
    assert [loss.__name__ for loss in losses[8:]] == [*[of_nnunet] * 3, "PartsLoss"] * 2
    assert int(trainer._teacher.average.n_averaged) == 1 + 8  # the teacher follows each step
    assert "Steps of an epoch that may mix patches: 2 of 8. Labelled cases: 4, unlabelled ones: 1, " in log_of(trainer)
    assert "The log will not judge the pseudo-labels: an epoch has 4 unlabelled patches, and 50 are" in log_of(trainer)
    assert [epoch.patches for epoch in trainer._history] == [4]
    assert os.path.isfile(os.path.join(trainer.output_folder, "pseudo_labels.png"))


def test_the_second_phase_has_the_plans_weight_and_momentum() -> None:
    semi = {"pseudo_weight": 0.25, "teacher_momentum": 0.75}
    trainer = make(plan=make_full_plan(finetune=SHORT, semi=semi))
    trainer.initialize()
    assert trainer._loss_of_parts.pseudo_weight == 0.25
    teacher, student = trainer._new_teacher(), unwrap(trainer.network)
    name, before = next((name, p.clone()) for name, p in student.named_parameters())
    for update in range(1, 6):
        with torch.no_grad():
            next(student.parameters()).copy_(before + update)
        teacher.update(student)
    expected = before
    for update, momentum in enumerate((1 / 2, 2 / 3, 3 / 4, 3 / 4, 3 / 4), start=1):  # 1 - 1 / (t + 1), up to 0.75
        expected = momentum * expected + (1 - momentum) * (before + update)
    torch.testing.assert_close(dict(teacher.average.module.named_parameters())[name], expected)


def test_alarms_are_logged_at_once_and_again_after_20_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    trainer.initialize()
    trainer._facts = semi_module.LabelFacts(["a", "b"], [0.1, 0.1], [0.5, 0.5])
    trainer._teacher = FakeTeacher()
    monkeypatch.setattr(PCRLScratchTrainer, "on_train_epoch_end", lambda self, outputs: None)
    monkeypatch.setattr(semi_module, "draw_pseudo_labels", lambda *args: None)
    trainer._shown = torch.zeros(1, 1, 12, 12, 12), torch.zeros(1, 1, 12, 12, 12)
    for epoch in range(25):
        trainer.current_epoch = epoch
        trainer._watch.of_teacher(torch.zeros(semi_module.watch.ENOUGH, 1, 4, 4, 4, dtype=torch.int16))
        trainer.on_train_epoch_end([])
    assert log_of(trainer).count("ALARM: the teacher finds almost no class") == 2  # epochs 2 and 22
    assert "output was not finite" not in log_of(trainer)
    trainer._teacher.all_finite = False
    trainer.on_train_epoch_end([])
    assert "WARNING: the teacher's output was not finite" in log_of(trainer)


def test_the_patches_that_nnunet_centres_on_a_class_show_their_middle() -> None:
    """nnU-Net centres the last patches of a batch on a class; a box of two thirds covers the middle."""
    trainer = make()
    trainer.initialize()
    rng = np.random.default_rng(0)
    assert [trainer._labelled_around(number, rng) for number in (2, 3, 9)] == [1, 1, 4]
    for share, around in ((0.0, 1), (1.0, 0)):  # as nnU-Net sets it where each process has one patch
        trainer.oversample_foreground_percent = share
        assert {trainer._labelled_around(1, rng) for _ in range(10)} == {around}


def test_a_single_patch_is_pasted_into_the_next_batchs() -> None:
    trainer = make(pasted_share=1.0)
    trainer.initialize()
    one, other = (with_labels_as_image(trainer, seed) for seed in (0, 1))
    for batch in (one, other):
        batch |= {"data": batch["data"][:1], "target": [target[:1] for target in batch["target"]]}
    trainer.dataloader_train = iter([other])
    pasted = trainer.mix(one, np.random.default_rng(0))["data"]
    own = (pasted == one["data"]).float().mean().item()
    assert own == pytest.approx(1 - 2 / 3 * (8 / 12) ** 3, abs=0.05)  # a third of the box by chance
    assert torch.equal(pasted, torch.where(pasted == one["data"], one["data"], other["data"]))


def test_a_case_that_several_processes_set_aside_is_named_once() -> None:
    trainer = make()
    trainer.initialize()
    trainer._facts = semi_module.LabelFacts(["a", "b"], [0.1, 0.1], [0.5, 0.5])
    batch = with_labels_as_image(trainer, 0)
    found = {"data": batch["data"], "keys": ["u", "v"], "set_aside": {"unlabelled/bad": "case bad is damaged"}}
    trainer.dataloader_unlabelled = iter([found, {**found, "set_aside": {}}, found])
    for _ in range(3):
        trainer._mixed(batch, FakeTeacher(), np.random.default_rng(0))
    assert log_of(trainer).count("WARNING: set aside: case bad is damaged") == 1


def test_the_first_phase_without_pasting_is_nnunets_training() -> None:
    ends = []
    for trainer_class in (PCRLScratchTrainer, PCRLSemiSupervisedScratchTrainer):
        trainer = make(trainer_class, make_full_plan(finetune={**SHORT, "epochs": 4, "pasted_share": 0.0}))
        torch.manual_seed(0)
        trainer.initialize()
        trainer.on_train_epoch_start()
        for step in range(3):
            trainer.train_step(random_batch(trainer, step))
        ends.append(parameters_of(trainer.network))
    assert equal(*ends)


@pytest.mark.parametrize(
    ("trainer_class", "given", "share"),
    [
        (PCRLScratchTrainer, {}, 0.0),
        (PCRLScratchTrainer, {"pasted_share": 0.5}, 0.5),
        (PCRLSemiSupervisedScratchTrainer, {}, 0.5),
        (PCRLSemiSupervisedScratchTrainer, {"pasted_share": 1.0}, 1.0),
    ],
)
def test_a_share_of_the_steps_is_pasted(
    trainer_class: type[PCRLScratchTrainer], given: dict[str, float], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nnUNetTrainer, "train_step", lambda self, batch: {**batch, "loss": 0.0})
    trainer = make(trainer_class, epochs=4, **given)
    trainer.initialize()
    batch = with_labels_as_image(trainer, 0)
    pasted = 0
    for epoch in (0, 1):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        pasted += sum(trainer.train_step(batch)["data"] is not batch["data"] for _ in range(200))
    assert pasted == pytest.approx(400 * share, abs=40 * (0 < share < 1))


@pytest.mark.parametrize(("needed", "second_phase"), [(0.0, 2), (2.0, 1)])
def test_the_first_phase_goes_on_until_the_network_finds_each_class(
    needed: float, second_phase: int, monkeypatch: pytest.MonkeyPatch, without_picture: None
) -> None:
    monkeypatch.setattr(semi_module.watch, "LEARNED", needed)
    plan = make_full_plan(finetune={**SHORT, "epochs": 3}, semi={"longest_supervised_share": 0.7})
    first = make(plan=plan)
    first.save_every = 1
    ends = first.on_epoch_end

    def stop() -> None:
        ends()
        raise StoppedError

    first.on_epoch_end = stop
    with pytest.raises(StoppedError):
        run_training(first)
    assert "Dice on labelled patches: " in log_of(first)
    resumed = run_training(make(plan=plan, continue_training=True), c=True)  # the Dice comes from the checkpoint
    assert len(resumed._history) == second_phase
    log = log_of(resumed)
    said = "WARNING: after {} epochs the network does not find a, b in the labelled patches. {}"
    assert (said.format(1, "The first phase goes on.") in log) == (second_phase == 1)
    assert (said.format(2, "The second phase begins all the same; train longer") in log) == (second_phase == 1)
    assert "never began" not in log


@pytest.mark.parametrize(("needed_at_the_end", "missing"), [(2.0, "a, b"), (0.0, "each class in time")])
def test_the_second_phase_never_begins_without_a_class(
    needed_at_the_end: float, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pseudo-labels without the class would teach the network that it is nowhere."""
    monkeypatch.setattr(semi_module.watch, "LEARNED", 2.0)
    plan = make_full_plan(finetune={**SHORT, "epochs": 3}, semi={"longest_supervised_share": 1})
    trainer = make(plan=plan)
    end = trainer.on_train_end

    def found_in_the_last_epoch() -> None:
        monkeypatch.setattr(semi_module.watch, "LEARNED", needed_at_the_end)
        end()

    trainer.on_train_end = found_in_the_last_epoch
    run_training(trainer)
    assert trainer._teacher is None
    assert not trainer._history
    (line,) = (line for line in log_of(trainer).splitlines() if "never began" in line)
    assert "WARNING: the second phase never began, because the network did not find " in line
    assert f"did not find {missing}. No unlabelled patch was used" in line
    assert torch.load(Path(trainer.output_folder) / checkpoint.FINAL, weights_only=False)["semi"]["teacher"] is None


# --------------------------------------------------------------------------------------------------- kinds of datasets


def change_to_2d(plan: dict[str, Any]) -> None:
    configuration = plan["configurations"]["3d_fullres"]
    configuration["patch_size"] = [12, 12]
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs |= {"conv_op": "torch.nn.modules.conv.Conv2d", "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d"}
    kwargs |= {"kernel_sizes": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 2]]}


def change_to_anisotropic(plan: dict[str, Any]) -> None:
    configuration = plan["configurations"]["3d_fullres"]
    configuration |= {"patch_size": [4, 16, 16]}  # nnU-Net rotates and scales it in 2D
    kwargs = configuration["architecture"]["arch_kwargs"]
    kwargs |= {"kernel_sizes": [[1, 3, 3]] * 2 + [[3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2]]}


def change_to_batch_norm(plan: dict[str, Any]) -> None:
    kwargs = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"


def change_nothing(plan: dict[str, Any]) -> None:
    pass


IGNORE = {"ignore": 3}
KINDS: dict[str, tuple[Callable[[dict[str, Any]], None], dict[str, Any], int]] = {
    "2d": (change_to_2d, {}, 1),
    "anisotropic": (change_to_anisotropic, {}, 1),
    "batch norm": (change_to_batch_norm, {}, 1),
    "two channels": (change_nothing, {}, 2),
    "ignore label": (change_nothing, {"labels": {**DATASET_JSON["labels"], **IGNORE}}, 1),  # type: ignore[dict-item]
    "regions": (change_nothing, REGIONS, 1),
    "regions in 2d": (change_to_2d, REGIONS, 1),
    "regions with ignore label": (change_nothing, {**REGIONS, "labels": {**REGIONS["labels"], **IGNORE}}, 1),  # type: ignore[dict-item]
}


def write_kind(root: Path, plan: dict[str, Any], dataset_json: dict[str, Any], channels: int) -> None:
    """Write a scan and four cases; the last case is in no part of the fold."""
    folder = write_preprocessed(root)
    data, ignore = folder / DATA, "ignore" in dataset_json["labels"]
    shutil.rmtree(data)
    data.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        image = rng.normal(size=(channels, 14, 14, 14)).astype(np.float32)
        seg = np.zeros((1, 14, 14, 14), np.int8)
        seg[:, 4:8, 4:8, 4:8], seg[:, 8:11, 4:8, 4:8] = 1, 2
        locations: dict[Any, np.ndarray] = {label: np.argwhere(seg == label) for label in (1, 2)}
        if ignore:
            seg[:, :, :, 9:] = 3
            locations[(-1, 0, 1, 2)] = np.argwhere(seg != 3)
        chunks = {name: image.shape for name in ("chunks", "blocks")}
        chunks |= {name: seg.shape for name in ("chunks_seg", "blocks_seg")}
        nnUNetDatasetBlosc2.save_case(image, seg, {"class_locations": locations}, str(data / f"case_{i}"), **chunks)
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_0", "case_1"], "val": ["case_2"]}]))
    write_scans(folder, plan, {"scan": 0}, (channels, 15, 14, 13), dataset_json)


@pytest.mark.parametrize("kind", KINDS)
def test_both_phases_train_each_kind_of_dataset(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    change, of_json, channels = KINDS[kind]
    dataset_json = {**DATASET_JSON, **of_json, "channel_names": {str(c): "MRI" for c in range(channels)}}
    plan = make_full_plan(channels, finetune={**SHORT, "initial_lr": 0.1, "warmup_share": 0.0})
    change(plan)
    write_kind(tmp_path / "own", plan, dataset_json, channels)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "own"))
    if kind != "regions in 2d":
        request.getfixturevalue("without_picture")
    trainer = make(plan=plan, dataset_json=dataset_json)
    begins, epochs = trainer.on_train_epoch_start, []

    def remember() -> None:
        begins()
        epochs.append(parameters_of(trainer.network))

    trainer.on_train_epoch_start = remember
    run_training(trainer)
    after = parameters_of(trainer.network)
    for one, other in ((epochs[0], epochs[1]), (epochs[1], after)):
        moved = {name for name in one if not torch.equal(one[name], other[name])}
        assert {"encoder", "decoder"} <= {name.split(".")[0] for name in moved}
    for name, value in trainer._teacher.average.module.named_parameters():  # one update, at half
        torch.testing.assert_close(value, (epochs[1][name] + after[name]) / 2)
    (pseudo,) = trainer._history
    assert all(0 <= share <= 1 for share in pseudo.shares)
    names = [name for name in dataset_json["labels"] if name not in ("background", "ignore")]
    line = next(line for line in log_of(trainer).splitlines() if "Pseudo-labels: " in line)
    assert [name in line for name in names] == [True, True]
    assert os.path.isfile(os.path.join(trainer.output_folder, "pseudo_labels.png")) == (kind == "regions in 2d")


# -------------------------------------------------------------------------------------- going on, and what comes after


LONG = {"epochs": 4, "iters_per_epoch": 2}


@pytest.mark.parametrize(("processes", "benchmark"), [("0", False), ("2", True)])
def test_the_fastest_blur_is_disabled_without_loading_processes(
    processes: str, benchmark: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest way to blur differs from run to run, and so do its last digits."""
    monkeypatch.setenv("nnUNet_n_proc_DA", processes)
    transforms = PCRLSemiSupervisedScratchTrainer.get_training_transforms((12, 12), (0, 1), None, (0, 1), False)
    inner = [getattr(step, "transform", step) for step in transforms.transforms]
    assert [step.benchmark for step in inner if isinstance(step, GaussianBlurTransform)] == [benchmark]


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Any]:
    """The results of an uninterrupted training, filled by the first test that needs them."""
    return {}


def outcome(trainer: Any) -> dict[str, Any]:
    optimizer = [value.clone() for state in trainer.optimizer.state.values() for value in state.values()]
    return {"weights": weights_of(trainer), "momentum": optimizer, "history": list(map(repr, trainer._history))}


@pytest.mark.parametrize("stopped_after", [1, 3])
@pytest.mark.parametrize(
    ("recipe", "mixing_ratio"),
    [({}, 0), ({"recipe": "pretrained", "optimizer": "adamw", "initial_lr": 0.01}, 100)],  # 2 or 1 of 2 steps mix
)
def test_a_training_goes_on_bit_for_bit_in_either_phase(
    recipe: dict[str, Any],
    mixing_ratio: int,
    stopped_after: int,
    uninterrupted: dict[str, Any],
    without_picture: None,
) -> None:
    plan = make_full_plan(finetune={**SHORT, **LONG, **recipe}, semi={"mixing_ratio": mixing_ratio})
    if repr(recipe) not in uninterrupted:
        trainer = run_training(make(plan=plan))
        uninterrupted[repr(recipe)] = outcome(trainer)
        shutil.rmtree(trainer.output_folder)
    expected = uninterrupted[repr(recipe)]
    first = make(plan=plan)
    assert first.num_iterations_per_epoch == 2
    first.save_every = 1
    ends = first.on_epoch_end

    def stop() -> None:
        ends()
        if first.current_epoch == stopped_after:
            raise StoppedError

    first.on_epoch_end = stop
    with pytest.raises(StoppedError):
        run_training(first)
    assert (first._teacher is None) == (stopped_after == 1)
    torch.manual_seed(7)
    np.random.seed(7)
    resumed = make(plan=plan, continue_training=True)
    run_training(resumed, c=True)
    assert resumed.current_epoch == 4
    assert resumed._mixed_steps == (2 if mixing_ratio == 0 else 1)
    found = outcome(resumed)
    assert equal(found["weights"], expected["weights"])
    assert found["history"] == expected["history"]
    assert len(found["history"]) == 2
    assert all(torch.equal(*pair) for pair in zip(found["momentum"], expected["momentum"], strict=True))


def test_a_continued_training_logs_changed_settings_and_keeps_the_cases_set_aside(
    own_data: Path, without_picture: None
) -> None:
    first = make(**LONG)
    first.save_every = 1
    begins, ends = first.on_train_epoch_start, first.on_epoch_end

    def damage_in_the_second_phase() -> None:
        begins()
        if first.current_epoch == 2:
            (own_data / f"{DATA}_unlabelled" / "scan.b2nd").write_bytes(b"")
            first._mixed = lambda *args: seen.append(mixed(*args)) or seen[-1]

    def stop() -> None:
        ends()
        if first.current_epoch == 3:
            raise StoppedError

    mixed, seen = first._mixed, []
    first.on_train_epoch_start, first.on_epoch_end, first.num_iterations_per_epoch = damage_in_the_second_phase, stop, 4
    with pytest.raises(StoppedError):
        run_training(first)
    assert first._set_aside == {"unlabelled/scan"}
    plan = make_full_plan(finetune={**SHORT, **LONG}, semi={"pseudo_weight": 0.25, "box_share": 0.5})
    resumed = make(plan=plan, continue_training=True)
    maybe_load_checkpoint(resumed, True, False, None)
    assert resumed._set_aside == {"unlabelled/scan"}
    warnings = [
        line.split("WARNING: ")[1].strip() for line in log_of(resumed).splitlines() if "WARNING: pcrl.semi" in line
    ]
    assert warnings == [
        "pcrl.semi.pseudo_weight was 0.5 so far, and is 0.25 from now on",
        f"pcrl.semi.box_share was {2 / 3} so far, and is 0.5 from now on",
    ]
    path = os.path.join(first.output_folder, "checkpoint_latest.pth")
    content = torch.load(path, weights_only=False)
    del content["semi"]["settings"]["mixing_ratio"]  # as an older version wrote it
    older = make(continue_training=True, **LONG)
    older.initialize()
    older._log_changed_settings(content["semi"]["settings"])
    assert "WARNING: pcrl.semi.mixing_ratio did not exist so far, and is 0 from now on" in log_of(older)
    same = make(continue_training=True, **LONG)
    same.log_file = str(own_data / "log.txt")
    maybe_load_checkpoint(same, True, False, None)
    assert not os.path.exists(same.log_file)  # no line was logged


def test_a_sigterm_ends_the_training_at_once_and_it_continues_from_the_last_checkpoint(
    fork: Callable[..., tuple[int, str]], preprocessed: Path, tmp_path: Path, without_picture: None
) -> None:
    plan = make_full_plan(finetune={**SHORT, "epochs": 4}, semi={"longest_supervised_share": 0})
    code = (
        f"import sys; sys.path[:0] = {sys.path}; from pathlib import Path; from steps import semi_until_sigterm; "
        f"semi_until_sigterm({plan}, 3)"
    )
    variables = {"nnUNet_preprocessed": str(preprocessed), "nnUNet_results": str(tmp_path / "results")}
    status, output = fork(code, Path(sysconfig.get_path("purelib")), {**variables, "nnUNet_n_proc_DA": "0"})
    assert abs(status) == signal.SIGTERM, output
    assert "after SIGTERM" not in output
    resumed = run_training(make(plan=plan, continue_training=True), c=True)
    assert resumed.current_epoch == 4
    assert len(resumed._history) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile's own
def test_both_phases_train_compiled_and_with_the_scaler_of_mixed_precision(
    monkeypatch: pytest.MonkeyPatch, without_picture: None
) -> None:
    monkeypatch.setattr(PCRLSemiSupervisedScratchTrainer, "_do_i_compile", lambda self: True)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    trainer = make(plan=make_full_plan(finetune=SHORT))
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    before = parameters_of(trainer.network)
    run_training(trainer)
    after = parameters_of(trainer.network)
    assert isinstance(trainer.network, OptimizedModule)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert [name for name in after if not torch.equal(before[name], after[name])]
    assert set(trainer._teacher.average.module.state_dict()) == set(unwrap(trainer.network).state_dict())


def test_the_checkpoint_names_the_stock_trainer_and_predicts_with_the_student(without_picture: None) -> None:
    trainer = run_training(make())
    path = os.path.join(trainer.output_folder, checkpoint.FINAL)
    content = torch.load(path, weights_only=False)
    assert content["trainer_name"] == "nnUNetTrainer"
    assert our_classes(content) == set()
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), checkpoint.FINAL)
    predicted = predictor.predict_logits_from_preprocessed_data(torch.randn(1, 14, 14, 14))
    assert predicted.shape == (3, 14, 14, 14)
    assert equal(parameters_of(predictor.network), parameters_of(trainer.network))


def our_classes(content: Any) -> set[str]:
    """Names of our own classes in a checkpoint, which stock nnU-Net could not load."""
    if isinstance(content, Mapping):
        return set().union(*(our_classes(value) for value in content.values()), our_classes(list(content)))
    if isinstance(content, (list, tuple)):
        return set().union(*map(our_classes, content))
    module = type(content).__module__
    return {module} if module.startswith("pcrl_nnunet") else set()


def test_cases_are_loaded_in_processes_that_end_with_the_training(
    monkeypatch: pytest.MonkeyPatch, without_picture: None
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    trainer = make(iters_per_epoch=2)
    seen: list[str] = []
    mixed = trainer._mixed

    def remember(*args: Any) -> Any:
        seen.extend((batch := mixed(*args))["keys"][2:])
        return batch

    trainer._mixed = remember
    run_training(trainer)
    assert set(seen) <= {"case_2", "unlabelled/scan"}
    assert len(seen) == 4
    assert len(trainer._history) == 1
    loader = trainer.dataloader_unlabelled
    assert type(loader).__name__ == "NonDetMultiThreadedAugmenter"
    assert not any(process.is_alive() for process in loader._processes)


# -------------------------------------------------------------------------------------------------------- pretraining


def test_a_training_starts_from_the_pretrained_encoder(folders: Path, without_picture: None) -> None:
    path, pretrained = pretrain(folders, plan=make_full_plan())
    trainer = make(PCRLSemiSupervisedTrainer, encoder_lr_factor=0)
    run_training(trainer)
    assert equal(encoder_of(trainer.network), pretrained)  # frozen in both phases
    assert equal(encoder_of(trainer._teacher.average.module), pretrained)
    assert path in log_of(trainer)
    assert (Path(trainer.output_folder) / "transfer.json").is_file()
    assert "The second phase begins" in log_of(trainer)


def test_left_out_cases_that_the_pretraining_saw_are_named(
    own_data: Path, folders: Path, without_picture: None
) -> None:
    """The scan case_2 is another image than the dataset's case_2."""
    scans = write_scans(own_data, make_full_plan(), {"scan": 0, "case_2": 1, "unseen": 2})
    (own_data / "splits_final.json").write_text(json.dumps([{"train": ["case_0"], "val": ["case_3"]}]))
    seen = [(DATA, "case_2", "a"), (scans.name, "scan", "b"), (DATA, "case_0", "c")]
    cases = [{"name": name, "path": f"{DATASET}/{folder}/{name}.b2nd", "sha256": sha} for folder, name, sha in seen]
    pretrain(folders, plan=make_full_plan(), cases=cases)
    leave_out = ["case_2", "unlabelled/scan", "unlabelled/case_2"]
    trainer = run_training(
        make(PCRLSemiSupervisedTrainer, make_full_plan(finetune=SHORT, semi={"leave_out": leave_out}))
    )
    report = json.loads((Path(trainer.output_folder) / "transfer.json").read_text())
    assert report["left_out_cases_seen"] == ["case_2", "unlabelled/scan"]
    assert report["validation_cases_seen"] == []
    said = "Pretraining saw the images of 2 of the 3 cases of pcrl.semi.leave_out: case_2, unlabelled/scan. "
    assert said in log_of(trainer)


def test_a_methods_pretraining_is_taken_by_the_trainers_name(folders: Path, without_picture: None) -> None:
    pretrain(folders, plan=make_full_plan())
    path, pretrained = pretrain(folders, plan=make_full_plan(), method="mae")
    trainer_class = trainers.PCRLSemiSupervisedTrainer_mae
    trainer = make(trainer_class, encoder_lr_factor=0)
    assert issubclass(trainer_class, PCRLSemiSupervisedTrainer)
    run_training(trainer)
    assert equal(encoder_of(trainer.network), pretrained)
    assert path in log_of(trainer)
    assert "PCRLSemiSupervisedTrainer_mae__nnUNetPlans__3d_fullres" in trainer.output_folder
    with pytest.raises(SystemExit, match=r"^Error: .*PCRLSemiSupervisedTrainer_METHOD|PCRLSemiSupervisedTrainer_mae"):
        run_training(make(PCRLSemiSupervisedTrainer))


def test_without_a_pretraining_the_error_names_the_control_and_nothing_is_left(folders: Path) -> None:
    trainer = make(PCRLSemiSupervisedTrainer)
    with pytest.raises(SystemExit, match=r"^Error: .*PCRLSemiSupervisedScratchTrainer"):
        run_training(trainer)
    assert not folders.exists()


# ---------------------------------------------------------------------------------------------------------------- DDP


def test_two_ranks_keep_one_student_and_one_teacher_and_report_the_same_shares(
    fork: Callable[..., tuple[int, str]], preprocessed: Path, tmp_path: Path
) -> None:
    semi = {"supervised_share": 0.3, "mixing_ratio": 0, "longest_supervised_share": 0}
    plan = make_full_plan(finetune={**SHORT, "epochs": 3, "iters_per_epoch": 2}, semi=semi)
    code = (
        f"import sys; sys.path[:0] = {sys.path}; from pathlib import Path; from steps import semi_on_two_ranks; "
        f"semi_on_two_ranks(Path({str(tmp_path)!r}), {plan})"
    )
    status, output = fork(code, Path(sysconfig.get_path("purelib")), {"nnUNet_preprocessed": str(preprocessed)})
    assert status == 0, output
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert equal(one["student"], other["student"])
    assert equal(one["teacher"], other["teacher"])
    assert repr(one["history"]) == repr(other["history"])  # Dice may be NaN
    assert not any(torch.equal(*pair) for pair in zip(one["data"], other["data"], strict=True))
    assert [rank["picture"] for rank in (one, other)] == [True, False]
    for number, epoch in enumerate(one["history"], start=1):
        counts = one["counts"][number] + other["counts"][number]
        voxels = one["voxels"][number] + other["voxels"][number]
        assert epoch["shares"] == pytest.approx((counts / voxels).tolist())
        assert voxels == 2 * 2 * 12**3  # a patch for each rank and step: nnU-Net's batch of two is shared
    assert len(one["history"]) == 2
