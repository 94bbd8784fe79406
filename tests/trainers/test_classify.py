import copy
import json
import os
import pickle
import shutil
import sys
import sysconfig
from functools import partial
from pathlib import Path

import blosc2
import numpy as np
import pandas as pd
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_dataset import make_plan
from tiny_pretraining import make_trainer
from torch._dynamo import OptimizedModule

from pcrl_nnunet import checkpoint
from pcrl_nnunet.classification.folds import split_by_patient
from pcrl_nnunet.classification.label_table import read_labels
from pcrl_nnunet.classification.prediction import table_of, write_evaluation
from pcrl_nnunet.networks import Classifier
from pcrl_nnunet.trainers import PCRLClassificationScratchTrainer, PCRLClassificationTrainer

NUM_CASES = 12
SHORT = {"epochs": 2, "iters_per_epoch": 3, "val_iters_per_epoch": 2}


@pytest.fixture
def classes(tiny):
    """Twelve cases; every second one is positive and has a bright half."""
    for i in range(NUM_CASES):
        path = tiny.data / f"case_{i}"
        if i >= 4:
            for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
                shutil.copy(tiny.data / f"case_0{suffix}", f"{path}{suffix}")
        image = np.random.default_rng(i).normal(size=(1, 14, 14, 14)).astype(np.float32)
        image[:, :, 7:] += 2 * (i % 2)
        os.remove(f"{path}.b2nd")
        blosc2.asarray(image, urlpath=f"{path}.b2nd")
        properties = {
            "sitk_stuff": {"origin": (0.0,) * 3, "spacing": (1.0,) * 3, "direction": tuple(np.eye(3).ravel())},
            "bbox_used_for_cropping": [[0, 14]] * 3,
            "shape_after_cropping_and_before_resampling": (14, 14, 14),
            "class_locations": {1: [], 2: []},
        }
        with open(f"{path}.pkl", "wb") as file:
            pickle.dump(properties, file)
    names = [f"case_{i}" for i in range(NUM_CASES)]
    lines = "".join(f"{name},{i % 2}\n" for i, name in enumerate(names))
    (tiny.folder / "classes.csv").write_text(f"case,bright\n{lines}")
    splits = [{"train": names[:8], "val": names[8:]}, {"train": names[4:], "val": names[:4]}]
    (tiny.folder / "splits_final.json").write_text(json.dumps(splits))
    return tiny


def make(
    tiny,
    cls=PCRLClassificationScratchTrainer,
    fold=0,
    classify=None,
    finetune=None,
    continue_training=False,
    configuration="3d_fullres",
):
    plan = make_plan(finetune={**SHORT, **(finetune or {})}, classify={"patch_mm": 8.0, **(classify or {})})
    plan = {**plan, "continue_training": continue_training}
    flat = copy.deepcopy(plan["configurations"]["3d_fullres"])
    network = flat["architecture"]["arch_kwargs"]
    for where, name in ((flat, "patch_size"), (flat, "spacing"), (flat, "median_image_size_in_voxels")):
        where[name] = where[name][1:]
    for name in ("kernel_sizes", "strides"):
        network[name] = [of_stage[1:] for of_stage in network[name]]
    network |= {name: network[name].replace("3d", "2d") for name in ("conv_op", "norm_op")}
    plan["configurations"]["2d"] = flat
    torch.manual_seed(0)
    return cls(plan, configuration, fold, tiny.dataset_json, torch.device("cpu"))


def log_of(trainer):
    with open(trainer.log_file) as file:
        return file.read()


def validation_of(trainer):
    return os.path.join(trainer.output_folder, "validation")


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_it_learns_to_tell_cases_apart(classes, configuration):
    short = {"epochs": 6, "iters_per_epoch": 25, "initial_lr": 0.01}
    trainer = make(classes, finetune=short, configuration=configuration)
    trainer.run_training()
    trainer.perform_actual_validation()
    table = pd.read_csv(os.path.join(validation_of(trainer), "predictions.csv"))
    assert list(table.columns) == ["case", "p_bright", "bright"]
    assert list(table["case"]) == [f"case_{i}" for i in range(8, 12)]
    assert list(table["bright"]) == [0, 1, 0, 1]
    assert table["p_bright"].between(0, 1).all()
    with open(os.path.join(validation_of(trainer), "auroc.json")) as file:
        assert json.load(file)["bright"]["auroc"] == 1
    assert {"roc.png", "activation_case_8_8.png"} <= set(os.listdir(validation_of(trainer)))
    assert os.path.isfile(os.path.join(trainer.output_folder, "progress.png"))
    assert "AUROC" in log_of(trainer)
    assert "Dice" not in log_of(trainer).split("Training done")[0].split("Please cite")[-1]


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_it_learns_to_tell_points_apart(classes, configuration):
    lines = "".join(f"case_{i},{x},7,7,{int(x > 7 and i % 2)}\n" for i in range(NUM_CASES) for x in (3, 7, 10))
    os.remove(classes.folder / "classes.csv")
    (classes.folder / "candidates.csv").write_text(f"seriesuid,coordX,coordY,coordZ,class\n{lines}")
    for i in range(NUM_CASES):  # bright where x is large, in the last axis of the array
        image = np.random.default_rng(i).normal(size=(1, 14, 14, 14)).astype(np.float32)
        image[..., 9:] += 3 * (i % 2)
        os.remove(classes.data / f"case_{i}.b2nd")
        blosc2.asarray(image, urlpath=str(classes.data / f"case_{i}.b2nd"))
    trainer = make(
        classes,
        finetune={"epochs": 6, "iters_per_epoch": 25, "initial_lr": 0.01},
        classify={"patch_mm": 6.0, "jitter_mm": 0.5},
        configuration=configuration,
    )
    assert trainer.size == ((6, 6, 6) if configuration == "3d_fullres" else (6, 6))
    trainer.initialize()
    of_training, of_validation = (loader.data_loader for loader in trainer.get_dataloaders())
    assert list(of_training.jitter) == [0.5] * len(trainer.size)
    assert not any(of_validation.jitter)  # crops are centred
    assert len(of_training.drawing.groups) == 2  # balanced: positives and negatives
    trainer.run_training()
    trainer.perform_actual_validation()
    table = pd.read_csv(os.path.join(validation_of(trainer), "predictions.csv"))
    assert list(table.columns) == ["seriesuid", "coordX", "coordY", "coordZ", "p_class", "class"]
    assert len(table) == 12
    with open(os.path.join(validation_of(trainer), "auroc.json")) as file:
        assert json.load(file)["class"]["auroc"] > 0.9


def test_classes_that_exclude_each_other_have_probabilities_that_sum_to_one(classes):
    lines = "".join(f"case_{i},{('a', 'b', 'c')[i % 3]}\n" for i in range(NUM_CASES))
    (classes.folder / "classes.csv").write_text(f"case,kind\n{lines}")
    trainer = make(classes, classify={"balanced": False})
    trainer.run_training()
    trainer.perform_actual_validation()
    table = pd.read_csv(os.path.join(validation_of(trainer), "predictions.csv"))
    np.testing.assert_allclose(table[["p_a", "p_b", "p_c"]].sum(axis=1), 1, atol=1e-5)
    assert list(table[["a", "b", "c"]].to_numpy().argmax(1)) == [i % 3 for i in range(8, 12)]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # from torch.compile
@pytest.mark.parametrize("compiled", [False, True])  # on a GPU nnU-Net compiles by default
def test_the_encoder_at_the_first_step_is_the_pretrained_one(classes, monkeypatch, compiled):
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: compiled)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    pretraining = make_trainer(dataset_json=classes.dataset_json, epochs=1, iters_per_epoch=1)
    pretraining.run_training()
    wanted = checkpoint.encoder_hash(pretraining.plan_network.encoder)
    at_first_step = []
    step = PCRLClassificationTrainer.train_step

    def recording(self, batch):
        at_first_step.append(checkpoint.encoder_hash(self.network.encoder))
        return step(self, batch)

    monkeypatch.setattr(PCRLClassificationTrainer, "train_step", recording)
    trainer = make(classes, PCRLClassificationTrainer)
    trainer.run_training()
    assert at_first_step[0] == wanted
    assert len(set(at_first_step)) == len(at_first_step)  # every step changes the encoder
    assert "100.0% of the encoder's parameters are pretrained" in log_of(trainer)
    trainer.perform_actual_validation()
    assert os.path.isfile(os.path.join(validation_of(trainer), "predictions.csv"))
    content = torch.load(os.path.join(trainer.output_folder, "checkpoint_final.pth"), weights_only=False)
    Classifier(pretraining.plan_network, 1).load_state_dict(content["network_weights"])  # new images are classified so
    scratch = make(classes)
    scratch.initialize()
    assert isinstance(scratch.network, OptimizedModule) == compiled
    assert checkpoint.encoder_hash(scratch.network.encoder) != wanted


def test_without_a_pretraining_it_does_not_start(classes):
    with pytest.raises(SystemExit, match="no pretrained encoder for fold 0"):
        make(classes, PCRLClassificationTrainer).on_train_start()


def test_a_continued_training_and_validation_alone_have_the_trained_weights(classes):
    first = make(classes)
    first.run_training()
    trained = {name: tensor.clone() for name, tensor in first.network.state_dict().items()}
    content = torch.load(os.path.join(first.output_folder, "checkpoint_final.pth"), weights_only=False)
    assert content["trainer_name"] == "PCRLClassificationScratchTrainer"
    assert content["pcrl_classification"]["names"] == ["bright"]
    for arguments in ((True, False), (False, True)):
        again = make(classes, finetune={"epochs": 3}, continue_training=arguments[0])
        maybe_load_checkpoint(again, *arguments)
        assert all(torch.equal(tensor, trained[name]) for name, tensor in again.network.state_dict().items())
    again.perform_actual_validation()
    assert os.path.isfile(os.path.join(validation_of(again), "predictions.csv"))


def test_a_training_does_not_score_a_table_that_changed_later(classes):
    table = classes.folder / "classes.csv"
    lines = [f"case_{i},{i % 3}" for i in range(NUM_CASES)]
    table.write_text("\n".join(["case,grade", *lines]))
    trainer = make(classes)
    trainer.run_training()
    final = os.path.join(trainer.output_folder, "checkpoint_final.pth")
    content = checkpoint.read_any(final)  # read without running code, as in pcrl_nnunet_classify
    assert content["pcrl_classification"]["names"] == ["0", "1", "2"]
    table.write_text("\n".join(["case,grade", *(line.replace(",2", ",3") for line in lines)]))
    with pytest.raises(
        SystemExit, match=r"classes.csv or pcrl.classify .* \(names \['0', '1', '2'\], now \['0', '1', '3'\]\)"
    ):
        maybe_load_checkpoint(make(classes), False, True)
    table.write_text("\n".join(["case,b,a", *(f"case_{i},1,0" for i in range(NUM_CASES))]))
    with pytest.raises(SystemExit, match=r"names \['0', '1', '2'\], now \['b', 'a'\]; exclusive True, now False"):
        maybe_load_checkpoint(make(classes), True, False)


def test_the_newer_table_of_the_raw_dataset_is_used(classes):
    raw = classes.folder.parents[1] / "raw" / classes.folder.name
    raw.mkdir(parents=True)
    (raw / "classes.csv").write_text("case,other\n" + "".join(f"case_{i},{i % 2}\n" for i in range(NUM_CASES)))
    trainer = make(classes)
    assert trainer.labels.names == ("other",)
    assert (classes.folder / "classes.csv").read_text() == (raw / "classes.csv").read_text()
    assert "classes.csv was taken from" in log_of(trainer)


def test_patients_are_kept_on_one_side_of_a_split(classes):
    rows = "".join(f"case_{i},{i % 2},p{i // 2}\n" for i in range(NUM_CASES))
    (classes.folder / "classes.csv").write_text(f"case,bright,patient\n{rows}")
    (classes.folder / "splits_final.json").unlink()
    train, validation = make(classes, fold=2).do_split()
    assert not {int(c.split("_")[1]) // 2 for c in train} & {int(c.split("_")[1]) // 2 for c in validation}
    folds = json.loads((classes.folder / "splits_final.json").read_text())
    assert sorted(case for fold in folds for case in fold["val"]) == sorted(f"case_{i}" for i in range(NUM_CASES))
    assert folds == split_by_patient(sorted(train + validation), read_labels(str(classes.folder)))


def test_a_users_split_that_divides_a_patient_is_kept_with_a_warning(classes):
    rows = "".join(f"case_{i},{i % 2},{'p' if i in (0, 9) else i}\n" for i in range(NUM_CASES))
    (classes.folder / "classes.csv").write_text(f"case,bright,patient\n{rows}")
    before = (classes.folder / "splits_final.json").read_bytes()
    trainer = make(classes)
    trainer.do_split()
    assert (classes.folder / "splits_final.json").read_bytes() == before
    assert "has patients on both sides, so that scores will be too good: p" in log_of(trainer)


@pytest.mark.parametrize(
    ("table", "classify", "message"),
    [
        ("case,a\nother_1,1\nother_2,0\n", {}, "classes.csv has no label of the training cases of fold 0"),
        (None, {}, "there is no classes.csv or candidates.csv"),
        (None, {"table": "points"}, "pcrl.classify.table is 'points'; expected 'classes' or 'candidates'"),
    ],
)
def test_mistakes_end_with_a_sentence_and_leave_nothing_behind(classes, table, classify, message):
    if table is None:
        os.remove(classes.folder / "classes.csv")
    else:
        (classes.folder / "classes.csv").write_text(table)
    with pytest.raises(SystemExit, match=message):
        make(classes, classify=classify).on_train_start()
    assert not classes.results.exists()


@pytest.mark.parametrize(
    ("finetune", "message"),
    [
        ({"load_decoder": True}, r"a classification has no decoder; remove pcrl.finetune.load_decoder"),
        ({"pasted_share": 0.5}, r"a classification pastes no masks; remove pcrl.finetune.pasted_share"),
    ],
)
def test_settings_of_a_segmentation_are_refused(classes, finetune, message):
    with pytest.raises(SystemExit, match=message):
        make(classes, PCRLClassificationTrainer, finetune=finetune)
    assert not classes.results.exists()


def test_patches_that_leave_nothing_at_the_bottleneck_are_refused(classes):
    os.remove(classes.folder / "classes.csv")
    (classes.folder / "candidates.csv").write_text("seriesuid,coordX,coordY,coordZ,class\ncase_0,1,1,1,1\n")
    with pytest.raises(SystemExit, match=r"patches of 4.0 mm are 4x4x4 voxels.*stride 4x4x4 leaves 1; .*patch_mm"):
        make(classes, classify={"patch_mm": 4.0})


def test_points_outside_their_image_raise_warnings_or_errors(classes):
    os.remove(classes.folder / "classes.csv")
    head = "seriesuid,coordX,coordY,coordZ,class\n"
    right = "".join(f"case_{i},7,7,{z},{z % 2}\n" for i in range(NUM_CASES) for z in (6, 7))
    (classes.folder / "candidates.csv").write_text(head + right + "case_1,7,7,-70,1\nelsewhere,1,1,1,1\n")
    trainer = make(classes)
    trainer.run_training()
    assert "WARNING: 1 of 25 points of candidates.csv lie outside of their image, such as one of case_1" in log_of(
        trainer
    )
    assert "WARNING: candidates.csv has 1 cases that are not among the 12 preprocessed ones: elsewhere" in log_of(
        trainer
    )
    mirrored = right.replace(",7,7,", ",-7,-7,")
    (classes.folder / "candidates.csv").write_text(head + mirrored)
    trainer = make(classes)
    with pytest.raises(SystemExit, match=r"24 of 24 points .* lie outside .* LPS"):
        trainer.run_training()


def test_a_folds_pretraining_leaves_out_the_classifications_validation_patients(classes):
    os.remove(classes.folder / "splits_final.json")
    rows = "".join(f"case_{i},{i % 2},{i // 3}\n" for i in range(NUM_CASES - 2)) + "case_10,1,8\ncase_11,0,9\n"
    (classes.folder / "classes.csv").write_text(f"case,bright,patient\n{rows}")
    pretraining = make_trainer(0, dataset_json=classes.dataset_json)
    train, validation = make(classes).do_split()
    assert {case.name for case in pretraining.cases} == set(train)
    patients = read_labels(str(classes.folder)).patient
    assert not {patients[name] for name in train} & {patients[name] for name in validation}
    (classes.folder / "classes.csv").write_text("no table of ours")  # the table is not read if there is a split
    again = make_trainer(0, dataset_json=classes.dataset_json)
    assert {case.name for case in again.cases} == set(train)


def test_two_ranks_share_the_batch_the_split_and_the_scores(fork, classes, tmp_path):
    os.remove(classes.folder / "splits_final.json")
    rows = "".join(f"case_{i},{i % 2},{i // 2}\n" for i in range(NUM_CASES))
    (classes.folder / "classes.csv").write_text(f"case,bright,patient\n{rows}")
    code = (
        f"import sys; sys.path[:0] = {sys.path}; from pathlib import Path; from steps import classify_on_two_ranks; "
        f"classify_on_two_ranks(Path({str(tmp_path)!r}), {{'batch_size': 6}})"
    )
    folders = {"nnUNet_preprocessed": str(classes.folder.parent)}
    status, output = fork(code, Path(sysconfig.get_path("purelib")), folders)
    assert status == 0, output
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert (first["batch"], second["batch"]) == (3, 3)
    assert first["split"] == second["split"]
    patients = read_labels(str(classes.folder)).patient
    assert not {patients[name] for name in first["split"][0]} & {patients[name] for name in first["split"][1]}
    assert all(torch.equal(first["parameters"][name], second["parameters"][name]) for name in first["parameters"])
    assert first["auroc"] == second["auroc"]
    assert (first["validated"], second["validated"]) == (True, False)


def test_an_auroc_of_one_class_is_null_in_the_file(tmp_path):
    (tmp_path / "classes.csv").write_text("case,a,b\nx,1,1\ny,1,0\n")
    table = read_labels(str(tmp_path))
    samples, found = np.arange(2), np.array([[0.5, 0.7], [0.6, 0.2]])
    lines = write_evaluation(table_of(table, samples, found), table, samples, str(tmp_path))
    assert "AUROC of a: nan" in lines[0]
    written = json.loads((tmp_path / "auroc.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert (written["a"]["auroc"], written["a"]["low"], written["b"]["auroc"]) == (None, None, 1)


def test_too_few_patients_for_folds_end_with_a_sentence(classes):
    (classes.folder / "splits_final.json").unlink()
    lines = "".join(f"case_{i},{i % 2},p{i % 3}\n" for i in range(NUM_CASES))
    (classes.folder / "classes.csv").write_text(f"case,bright,patient\n{lines}")
    trainer = make(classes)
    with pytest.raises(SystemExit, match="3 patients, too few for nnU-Net's 5 folds"):
        trainer.do_split()
