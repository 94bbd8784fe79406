import json
import os
import re
import sys

import blosc2
import numpy as np
import pytest
import torch
from tiny_dataset import make_plan

from pcrl_nnunet import checkpoint
from pcrl_nnunet.cli import pretrain, register
from pcrl_nnunet.comparison import built_in_methods
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.trainers import PCRLPretrainTrainer

SHORT = ["-epochs", "1", "-iters_per_epoch", "2", "-batch_size", "4"]


@pytest.fixture
def command(tiny, monkeypatch):
    """Runs the command in this process; returns its exit status."""
    monkeypatch.setattr(register, "is_registered", lambda: True)
    tiny.cwd = tiny.folder.parents[1] / "here"
    tiny.cwd.mkdir()
    monkeypatch.chdir(tiny.cwd)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_pretrain", *arguments])
        try:
            pretrain.main_entry()
        except SystemExit as end:
            return end.code
        return 0

    return run


def results(tiny):
    return sorted(path.name for path in tiny.results.rglob("*.pth"))


@pytest.mark.parametrize("dataset", ["999", "Dataset999_Tiny"])
def test_it_pretrains_by_id_and_by_name(command, tiny, dataset):
    assert command("-d", dataset, *SHORT) == 0
    assert results(tiny) == [checkpoint.FINAL]


def test_a_dry_run_prints_sizes_memory_and_hours_and_writes_pictures_alone(command, tiny, capsys):
    assert command("-d", "999", "--dry_run", *SHORT, "-device", "cpu") == 0
    out = capsys.readouterr().out
    sizes = ("global input          4x8x8 voxels", "batch                 4 pairs")
    for part in (*sizes, "GB estimated", "GB measured", "hours"):
        assert part in out
    assert not tiny.results.exists()
    pictures = tiny.cwd / "pcrl_views_Dataset999_Tiny_3d_fullres"
    assert {p.name for p in pictures.iterdir()} == {"case_0.png", "case_2.png", "case_3.png"}
    assert str(pictures) in out
    assert list(tiny.cwd.iterdir()) == [pictures]
    assert {p.name for p in tiny.folder.iterdir()} == {
        "dataset.json", "dataset_fingerprint.json", "nnUNetPlans.json", "nnUNetPlans_3d_fullres", "splits_final.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", [n for n, m in built_in_methods("3d_fullres", 2, 4).items() if m.pretrain])
def test_the_ablations_of_a_comparison_are_settings_that_pretrain(command, tiny, monkeypatch, name):
    plan = make_plan(pretrain=dict(built_in_methods("3d_fullres", 2, 4)[name].pretrain))
    (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(plan))
    assert command("-d", "999", *SHORT, "-device", "cpu") == 0
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    settings = checkpoint.read(str(path))["settings"]
    assert settings["restoration"] == "single"
    if name == "restoration_only":
        assert command("-d", "999", "--dry_run", *SHORT, "-device", "cpu") == 0


def test_the_device_is_said_when_it_was_not_asked_for(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert command("-d", "999", *SHORT) == 0
    assert "Using device cpu: no GPU was found" in capsys.readouterr().out


def test_freed_memory_is_kept_before_the_trainer_is_made_on_a_cpu(command, monkeypatch):
    calls = []
    monkeypatch.setattr("pcrl_nnunet.memory.keep_freed_memory", lambda: calls.append("kept"))
    trainer = pretrain._trainer
    monkeypatch.setattr(pretrain, "_trainer", lambda *a, **k: (calls.append("made"), trainer(*a, **k))[1])
    assert command("-d", "999", *SHORT, "-device", "cpu") == 0
    assert calls == ["kept", "made"]


def test_continuing_a_finished_pretraining_changes_nothing(command, tiny, capsys):
    command("-d", "999", *SHORT)
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    before = path.read_bytes()
    assert command("-d", "999", *SHORT, "--c") == 0
    assert path.read_bytes() == before
    assert "This pretraining is finished" in capsys.readouterr().out
    assert "is finished, with other settings (seed 0, now 1): leave --c out" in command(
        "-d", "999", *SHORT, "--c", "-seed", "1"
    )
    assert path.read_bytes() == before


def test_a_file_from_before_a_setting_is_finished_all_the_same(command, tiny, capsys):
    command("-d", "999", *SHORT)
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    content = checkpoint.read(str(path))
    for name in ("levels", "comparison", "skip_connections", "optimizer"):
        del content["settings"][name]
    checkpoint.write(str(path), content)
    assert command("-d", "999", *SHORT, "--c") == 0
    assert "This pretraining is finished" in capsys.readouterr().out


def test_an_unfinished_pretraining_is_kept_where_c_was_forgotten(command, tiny, capsys):
    command("-d", "999", *SHORT)
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    path.with_name(checkpoint.LATEST).write_text("days of work")
    assert command("-d", "999", *SHORT) == 0
    assert path.with_name("checkpoint_latest_old.pth").read_text() == "days of work"
    assert "--c was not given: starting anew. Its state is kept as" in capsys.readouterr().out


def test_a_damaged_state_falls_back_on_the_one_before_and_says_so(command, tiny, capsys, monkeypatch):
    def stop_in_the_last_epoch(trainer, batch, step, *levels):
        if step == 4:
            raise UserError("stopped")
        return train_step(trainer, batch, step, *levels)

    three_epochs = ["-d", "999", "-epochs", "3", *SHORT[2:]]
    train_step = PCRLPretrainTrainer.train_step
    command(*three_epochs)
    (final,) = tiny.results.rglob(checkpoint.FINAL)
    expected = checkpoint.read(str(final))["encoder_hash"]
    final.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(PCRLPretrainTrainer, "train_step", stop_in_the_last_epoch)
        assert command(*three_epochs) == "Error: stopped"
    latest, previous = final.with_name(checkpoint.LATEST), final.with_name(checkpoint.PREVIOUS)
    whole, before = latest.read_bytes(), previous.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"\0" * len(whole), b""):
        latest.write_bytes(damaged)
        previous.write_bytes(before)
        capsys.readouterr()
        assert command(*three_epochs, "--c") == 0
        said = capsys.readouterr().out
        assert f"WARNING: checkpoint {latest}" in said
        assert f"Going on from the state before, {previous}, instead" in said
        assert "Continuing after step 2" in said
        assert checkpoint.read(str(final))["encoder_hash"] == expected
        assert results(tiny) == [checkpoint.FINAL]
        final.unlink()
    latest.write_bytes(whole[:100])
    previous.write_bytes(before[:100])
    assert f"checkpoint {previous}" in command(*three_epochs, "--c")
    assert (latest.read_bytes(), previous.read_bytes()) == (whole[:100], before[:100])  # nothing is lost


def test_two_pretrainings_of_one_folder_are_refused(command, tiny):
    fcntl = pytest.importorskip("fcntl")
    command("-d", "999", *SHORT)
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    path.unlink()
    path.with_name("progress.png").unlink()  # as in the first epoch
    (log,) = path.parent.glob("training_log_*.txt")
    with open(path.with_name(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "Another pcrl_nnunet_pretrain is at work on" in command("-d", "999", *SHORT)
    assert log.exists()  # of the one at work


def test_it_registers_where_that_has_not_been_done_and_says_so(command, monkeypatch, capsys):
    monkeypatch.setattr(register, "is_registered", lambda: False)
    monkeypatch.setattr(register, "register", lambda: ["Registered with nnU-Net: wrote bridge.py"])
    assert command("-d", "999", *SHORT) == 0
    assert "Registered with nnU-Net: wrote bridge.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "998"], "dataset '998' was not found in"),
        (["-d", "Dataset998_No"], "dataset Dataset998_No is not in"),
        (["-d", "liver"], "dataset 'liver' was not found in"),
        (["-d", "999", "-p", "OtherPlans"], "OtherPlans.json does not exist; run nnUNetv2_plan_and_preprocess -d 999"),
        (["-d", "999", "-c", "2d"], "configuration '2d' is not in nnUNetPlans; it has 3d_fullres, 3d_lowres"),
        (["-d", "999", "-c", "3d_cascade_fullres"], "3d_cascade_fullres .* take its 3d_fullres"),
        (["-d", "999", "-f", "x"], "-f is 'x'; expected the number of a fold, or all"),
        (["-d", "999", "-device", "tpu"], "-device is 'tpu'; expected cuda, cpu or mps"),
        (["-d", "999", "-batch_size", "2"], "batch_size is 2; .* at least 4 pairs"),
        (["-d", "999", "-epochs", "0"], "epochs is 0; expected 1 or more"),
        (["-d", "999", "-f", "9"], "fold 9 is not among the 2 folds"),
        (["-d", "999", "-f", "²"], "-f is '²'; expected the number of a fold, or all"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(command, tiny, arguments, message):
    status = command(*arguments, *[a for a in SHORT if a not in arguments] if "-epochs" not in arguments else [])
    assert isinstance(status, str)
    assert status.startswith("Error: ")
    assert "\n" not in status
    assert re.search(message, status), status
    assert not tiny.results.exists()


def test_a_gpu_that_was_asked_for_and_is_not_there_is_an_error(command, tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "-device cuda was asked for, but torch finds none" in command("-d", "999", "-device", "cuda")
    assert not tiny.results.exists()


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_a_variable_that_is_not_set_is_named(command, monkeypatch, variable):
    monkeypatch.delenv(variable)
    assert f"the variable {variable} is not set" in command("-d", "999")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(make_plan())[:-20].encode(), "is not valid JSON .*: mend it"),
        (json.dumps(make_plan()).encode("utf-16"), "is not valid JSON"),
        (b"[]", "holds no block of names and values"),
        (b"{}", "has no configurations, dataset_name, plans_name"),
        (json.dumps(make_plan()).replace("patch_size", "path_size").encode(), "has no patch_size; put it back"),
    ],
)
def test_a_damaged_plan_is_named(command, tiny, content, message):
    (tiny.folder / "nnUNetPlans.json").write_bytes(content)
    assert re.search(f"nnUNetPlans.json .*{message.replace(': mend', '; mend')}", command("-d", "999"))
    assert not tiny.results.exists()


@pytest.mark.parametrize("content", ["[{'train': []}]", '[{"train": ["case_0"]}]', '{"0": 1}', "[1, 2]"])
def test_a_damaged_split_file_is_named(command, tiny, content):
    (tiny.folder / "splits_final.json").write_text(content)
    assert "splits_final.json is no list of folds" in command("-d", "999", "-f", "0")
    assert not tiny.results.exists()


def test_a_results_folder_that_is_none_is_named(command, tiny, monkeypatch):
    file = tiny.folder / "a_file"
    file.touch()
    monkeypatch.setenv("nnUNet_results", str(file))
    assert re.search("a_file.* cannot be written to .*nnUNet_results.* has to be a folder", command("-d", "999"))


@pytest.mark.parametrize("damage", ["truncated", "nan"])
def test_a_pretraining_that_cannot_start_leaves_nothing_behind(command, tiny, damage):
    for path in tiny.data.glob("case_?.b2nd"):
        if damage == "truncated":
            os.truncate(path, 100)
        else:
            blosc2.asarray(np.full((1, 14, 14, 14), np.nan, np.float32), urlpath=str(path), mode="w")
    assert re.search(r"case case_\d (cannot be read|has voxels that are not finite)", command("-d", "999", *SHORT))
    assert not tiny.results.exists()


def test_a_dry_run_is_no_run_of_weights_and_biases(command, monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    assert command("-d", "999", "--dry_run", *SHORT, "-device", "cpu") == 0  # wandb is not installed, or would ask


def test_a_dataset_that_is_planned_but_not_preprocessed_is_named(command, tiny):
    for path in tiny.data.iterdir():
        path.unlink()
    assert "no preprocessed images in" in command("-d", "999")
    assert not tiny.results.exists()


def test_a_wrong_init_is_said_before_anything_is_touched(command, tiny):
    folder = tiny.results / "PCRLPretrainTrainer__nnUNetPlans__3d_fullres" / "fold_all"
    folder.mkdir(parents=True)
    (folder / checkpoint.LATEST).write_text("an interrupted pretraining")
    for more in ([], ["--dry_run"]):
        assert "-init nowhere.pth: checkpoint nowhere.pth does not exist" in command(
            "-d", "999", "-init", "nowhere.pth", *SHORT, *more
        )
    assert [path.name for path in folder.iterdir()] == [checkpoint.LATEST]


@pytest.mark.parametrize("more", [[], ["--c"]])
def test_what_transfer_has_fitted_is_not_pretrained_over(command, tiny, more):
    folder = tiny.results / "PCRLPretrainTrainer__nnUNetPlans__3d_fullres" / "fold_all"
    folder.mkdir(parents=True)
    path = folder / checkpoint.FINAL
    checkpoint.write(str(path), {"format": checkpoint.FORMAT, "adapted": {"checkpoint": "elsewhere"}})
    before = path.read_bytes()
    assert "was fitted by pcrl_nnunet_transfer" in command("-d", "999", *SHORT, *more)
    assert path.read_bytes() == before
