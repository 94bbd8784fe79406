import csv
import json
import multiprocessing
import os
import re
import signal
import time
from contextlib import nullcontext
from functools import partialmethod

import blosc2
import numpy as np
import pytest
import torch
from tiny_dataset import make_plan
from tiny_method import PLACE
from tiny_pretraining import folder_of

from pcrl_nnunet import checkpoint, method_names, progress, registration
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods import PlanFacts, method_class
from pcrl_nnunet.plans import resolve
from pcrl_nnunet.pretraining import distributed
from pcrl_nnunet.report.progress import PretrainLogger
from pcrl_nnunet.trainers import PCRLPretrainTrainer
from pcrl_nnunet.trainers import pretrain as trainers_pretrain

PLOT = PretrainLogger.plot_progress_png
SHORT = ["-epochs", "1", "-iters_per_epoch", "2", "-batch_size", "4"]


def results(tiny):
    return sorted(path.name for path in tiny.results.rglob("*.pth"))


@pytest.mark.parametrize("dataset", ["999", "Dataset999_Tiny"])
def test_it_pretrains_by_id_and_by_name(command, tiny, dataset):
    assert command("-d", dataset, *SHORT) == 0
    assert results(tiny) == [checkpoint.FINAL]


def test_a_dry_run_prints_sizes_memory_and_hours_and_writes_pictures_alone(command, tiny, capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")  # wandb is not installed, or would ask for a login
    assert command("-d", "999", "--dry_run", *SHORT, "-device", "cpu") == 0
    out = capsys.readouterr().out
    sizes = ("global input          4x8x8 voxels", "batch                 4 samples")
    for part in (*sizes, "GB estimated", "GB measured", "in all"):
        assert part in out
    assert re.search(r"\n  background            \d+ % of global views \(.*\), \d+ % of local .*; \d+ samples\n", out)
    assert not tiny.results.exists()
    pictures = tiny.cwd / "pcrl_views_Dataset999_Tiny_nnUNetPlans_3d_fullres"
    assert {p.name for p in pictures.glob("*.png")} == {f"views_of_case_{i}.png" for i in (0, 2, 3)}
    assert str(pictures) in out
    assert list(tiny.cwd.iterdir()) == [pictures]
    assert {p.name for p in tiny.folder.iterdir()} == {
        "dataset.json", "dataset_fingerprint.json", "nnUNetPlans.json", "nnUNetPlans_3d_fullres", "splits_final.json",
    }  # fmt: skip


def test_a_dry_run_measures_the_methods_preparation(command, tiny, capsys, monkeypatch):
    monkeypatch.setattr("pcrl_nnunet.report.pictures.views_of_a_case", lambda *_: None)
    monkeypatch.setitem(method_names.BUILT_IN, "mean", PLACE)
    assert command("-d", "999", "--dry_run", *SHORT, "-device", "cpu", "-method", "mean") == 0
    out = capsys.readouterr().out
    assert re.search(r"before the training +0\.\d minutes in which Means prepares it", out)
    assert "  method                Means" in out
    assert not tiny.results.exists()


def test_a_dry_run_of_several_processes_measures_the_part_of_one(command, capsys, monkeypatch):
    monkeypatch.setattr(PCRLPretrainTrainer, "train_step", lambda *_: {})
    monkeypatch.setattr("pcrl_nnunet.report.pictures.views_of_a_case", lambda *_: None)
    estimates = []
    for number in ("1", "2"):
        arguments = (*SHORT, "-batch_size", "32", "-device", "cpu", "-num_gpus", number)
        assert command("-d", "999", "--dry_run", *arguments) == 0
        out = capsys.readouterr().out
        assert "batch                 32 samples" in out
        assert ("memory and time are for one process with 16 samples" in out) == (number == "2")
        estimates.append(float(re.search(r"([\d.]+) GB estimated", out)[1]))
    assert estimates[1] == pytest.approx(estimates[0] / 2, abs=0.006)  # the output has two decimals
    refused = command("-d", "999", "--dry_run", *SHORT, "-device", "cpu", "-num_gpus", "3")
    assert "3 processes share a batch of 4 samples, and each needs 2" in str(refused)


def ablations():
    facts = PlanFacts.of("3d_fullres", resolve(make_plan(), "3d_fullres"))
    return method_class("pcrlv2").ablations(facts, 4)


@pytest.mark.parametrize("name", ablations())
def test_the_ablations_of_a_comparison_are_settings_that_pretrain(command, tiny, monkeypatch, name):
    monkeypatch.setattr("pcrl_nnunet.report.pictures.views_of_a_case", lambda *_: None)
    (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(make_plan(pretrain=dict(ablations()[name]))))
    assert command("-d", "999", *SHORT, "-device", "cpu") == 0
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    assert checkpoint.read(str(path))["settings"]["pcrlv2"]["restoration"] == "single"
    if name == "restoration_only":
        assert command("-d", "999", "--dry_run", *SHORT, "-device", "cpu") == 0


def test_the_device_is_named_once(command, tiny, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert command("-d", "999", *SHORT) == 0
    out = capsys.readouterr().out
    assert "Using device cpu: no GPU was found" in out
    assert len(re.findall(r"\bdevice\b", out, re.IGNORECASE)) == 2  # the other one is an option of the next command
    assert "Please cite" in out  # nnU-Net's line on its device came before
    assert max(map(len, out.replace(str(tiny.results), "").splitlines())) < 300  # no Python repr of the settings


def test_the_first_lines_name_method_plan_and_changed_settings(command, tiny, capsys):
    assert command("-d", "999", *SHORT, "-seed", "3", "-device", "cpu") == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "Pretraining on Dataset999_Tiny, plan nnUNetPlans, configuration 3d_fullres\nLoading PyTorch and nnU-Net\n"
    )
    assert "PCRLv2: 1 epochs of 2 steps, 4 samples a step\n" in out
    assert re.search(
        r"\nSettings: batch_size 4 \(default \d+\), epochs 1 \(default 240\), [^\n]*, seed 3 \(default 0\)\n", out
    )


def test_speed_and_time_left_are_printed_and_logged_after_twenty_steps(command, tiny, capsys):
    assert command("-d", "999", "-epochs", "2", "-iters_per_epoch", "15", "-batch_size", "4", "-device", "cpu") == 0
    pattern = r"\d{4}-\S+ \S+ step 21 of 30: \d\.\d\d s a step, \d+ s left"
    assert len(re.findall(pattern, capsys.readouterr().out)) == 1
    (log,) = tiny.results.rglob("training_log_*.txt")
    assert len(re.findall(pattern, log.read_text())) == 1


def slowly(self, original, *given):
    time.sleep(0.35)
    return original(self, *given)


def test_a_slow_preparation_and_slow_steps_print_progress(command, tiny, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.1)
    for name in ("on_train_start", "train_step", "on_train_end"):
        original = getattr(PCRLPretrainTrainer, name)
        monkeypatch.setattr(PCRLPretrainTrainer, name, partialmethod(slowly, original))
    assert command("-d", "999", *SHORT, "-device", "cpu") == 0
    out = capsys.readouterr().out
    lines = ("still preparing the training", "step 0 of 2; the next one began 0 s ago", "still writing the checkpoint")
    assert [line in out for line in lines] == [True] * 3


def test_a_dry_run_prints_no_page_of_nnunet(command, capsys, monkeypatch):
    monkeypatch.setattr("pcrl_nnunet.report.pictures.views_of_a_case", lambda *_: None)
    assert command("-d", "999", "--dry_run", *SHORT, "-device", "cpu") == 0
    out = capsys.readouterr().out
    assert "Drawing views, and measuring the steps\n" in out
    assert "Please cite" not in out


def test_metrics_csv_has_the_values_of_the_log(command, tiny, capsys):
    assert command("-d", "999", "-epochs", "2", *SHORT[2:], "-device", "cpu") == 0
    (path,) = tiny.results.rglob("metrics.csv")
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "2"), ("2", "4")]
    lines = re.findall(r"epoch \d/2: (.*), \d+\.\d\d s a step", capsys.readouterr().out)
    for row, line in zip(rows, lines, strict=True):
        logged = {name: float(value) for name, value in (part.split() for part in line.split(", "))}
        assert {name: float(row[name]) for name in logged} == pytest.approx(logged, abs=1e-4)


def test_freed_memory_is_kept_before_the_trainer_is_made_on_a_cpu(command, monkeypatch):
    calls = []
    monkeypatch.setattr("pcrl_nnunet.pretraining.memory.keep_freed_memory", lambda: calls.append("kept"))
    made = trainers_pretrain.pretrain_trainer
    monkeypatch.setattr(trainers_pretrain, "pretrain_trainer", lambda *given: (calls.append("made"), made(*given))[1])
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


def test_a_finished_pretraining_of_another_plan_or_other_cases_is_refused(command, tiny):
    command("-d", "999", *SHORT)
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    before, file = path.read_bytes(), tiny.folder / "nnUNetPlans.json"
    plan = file.read_text()
    changed = json.loads(plan)
    changed["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["n_conv_per_stage"][0] += 1
    file.write_text(json.dumps(changed))
    assert "is finished, with other plans (configurations): leave --c out" in command("-d", "999", *SHORT, "--c")
    file.write_text(plan)
    (tiny.data / "case_0.b2nd").rename(tiny.data / "case_9.b2nd")
    message = command("-d", "999", *SHORT, "--c")
    folder = f"{tiny.folder.name}/{tiny.data.name}"
    assert f"is finished, with other cases ({folder}/case_0, {folder}/case_9): leave --c out" in message
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "of an older version"])
def test_only_overwrite_replaces_a_damaged_final_file(command, tiny, damage):
    command("-d", "999", *SHORT)
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    content = checkpoint.read(str(path))
    checkpoint.write(str(path), {**content, "format": "pcrl_nnunet/0"})
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    damaged = path.read_bytes()
    assert "pretrain again" in command("-d", "999", *SHORT, "--c")  # no state is left to resume from
    assert "in its place with --overwrite" in command("-d", "999", *SHORT)
    assert path.read_bytes() == damaged
    assert command("-d", "999", *SHORT, "--overwrite") == 0
    assert checkpoint.read(str(path))["encoder_hash"] == content["encoder_hash"]
    assert (path.parent / "old_1" / path.name).read_bytes() == damaged


@pytest.mark.parametrize("during", ["preparation", "_write_report", "final_content"])
def test_sigterm_before_the_first_and_after_the_last_step_is_handled(command, tiny, capsys, monkeypatch, during):
    command("-d", "999", *SHORT)
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    expected = checkpoint.read(str(path))["encoder_hash"]
    path.unlink()
    function, before = getattr(PCRLPretrainTrainer, during), signal.getsignal(signal.SIGTERM)

    def terminated(trainer, **options):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # several arrive if scheduler, torchrun and -num_gpus all send one
        return function(trainer, **options)

    with monkeypatch.context() as patch:
        patch.setattr(PCRLPretrainTrainer, during, terminated)
        assert command("-d", "999", *SHORT) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    step = 0 if during == "preparation" else 2
    said = capsys.readouterr().out.rstrip()
    assert f"Stopped by SIGTERM after step {step}; nothing is lost. To go on: " in said
    assert said.endswith(" --c")
    assert not path.exists()
    assert command("-d", "999", *SHORT, "--c") == 0
    assert checkpoint.read(str(path))["encoder_hash"] == expected
    assert results(tiny) == [checkpoint.FINAL]


def test_ctrl_c_exits_with_130_and_c_continues(command, tiny, monkeypatch):
    command("-d", "999", *SHORT)
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    expected = checkpoint.read(str(path))["encoder_hash"]
    path.unlink()
    train_step = PCRLPretrainTrainer.train_step

    def interrupted(trainer, batch, step, *levels):
        if step == 1:
            raise KeyboardInterrupt  # Python turns SIGINT into this, unless it runs in the background
        return train_step(trainer, batch, step, *levels)

    with monkeypatch.context() as patch:
        patch.setattr(PCRLPretrainTrainer, "train_step", interrupted)
        assert command("-d", "999", *SHORT) == 130
    assert command("-d", "999", *SHORT, "--c") == 0
    assert checkpoint.read(str(path))["encoder_hash"] == expected


def test_a_finished_file_that_lacks_a_newer_setting_counts_as_finished(command, tiny, capsys):
    command("-d", "999", *SHORT)
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    content = checkpoint.read(str(path))
    del content["settings"]["optimizer"]
    for name in ("levels", "comparison", "comparison_weight", "skip_connections"):
        del content["settings"]["pcrlv2"][name]
    checkpoint.write(str(path), content)
    assert command("-d", "999", *SHORT, "--c") == 0
    assert "This pretraining is finished" in capsys.readouterr().out


def test_a_damaged_state_falls_back_to_the_state_before_with_a_warning(command, tiny, capsys, monkeypatch):
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
    pickled = bytearray(whole)
    pickled[whole.index(b"\x80\x02}") + 60] ^= 1  # damages the names and values
    for damaged in (whole[: len(whole) // 2], b"\0" * len(whole), b"", bytes(pickled)):
        latest.write_bytes(damaged)
        previous.write_bytes(before)
        capsys.readouterr()
        if len(damaged) == len(whole) // 2:
            with monkeypatch.context() as patch:  # reach the next save
                patch.setattr(PCRLPretrainTrainer, "train_step", stop_in_the_last_epoch)
                assert command(*three_epochs, "--c") == "Error: stopped"
            assert latest.with_name(checkpoint.DAMAGED).read_bytes() == damaged
            assert previous.read_bytes() == before  # the damaged state did not replace the good one
            checkpoint.read(str(latest), checkpoint.STATE_FORMAT)
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
    assert (latest.read_bytes(), previous.read_bytes()) == (whole[:100], before[:100])  # both files are unchanged


def test_two_pretrainings_of_one_folder_are_refused(command, tiny):
    fcntl = pytest.importorskip("fcntl")
    command("-d", "999", *SHORT)
    (path,) = tiny.results.rglob(checkpoint.FINAL)
    path.unlink()
    (log,) = path.parent.glob("training_log_*.txt")
    with open(path.with_name(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "Another pcrl_nnunet_pretrain is at work on" in command("-d", "999", *SHORT)
    assert log.exists()  # the log of the running pretraining


def test_a_running_pretraining_is_unharmed_by_a_refused_second_one(command, tiny, monkeypatch):
    pytest.importorskip("fcntl")
    refused = []
    train_step = PCRLPretrainTrainer.train_step

    def step(self, batch, number, *rest):
        if number == 1 and not refused:
            refused.append("")
            refused.append(command("-d", "999", *SHORT, "-device", "cpu"))
        return train_step(self, batch, number, *rest)

    def weights():
        (path,) = tiny.results.rglob(f"fold_all/{checkpoint.FINAL}")
        return checkpoint.read(str(path))["encoder_hash"]

    assert command("-d", "999", *SHORT, "-device", "cpu") == 0
    undisturbed = weights()
    monkeypatch.setattr(PCRLPretrainTrainer, "train_step", step)
    assert command("-d", "999", *SHORT, "-device", "cpu", "--overwrite") == 0
    assert "Another pcrl_nnunet_pretrain is at work on" in refused[1]
    assert weights() == undisturbed


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # from the killed worker's queue
@pytest.mark.parametrize("fault", ["worker", "truncated", "vanished"])
def test_after_a_fault_of_the_data_in_the_second_epoch_c_continues(command, tiny, monkeypatch, fault):
    steps = 12 if fault == "worker" else 8  # batches made before the fault come first
    longer = ["-epochs", "2", "-iters_per_epoch", str(steps), "-batch_size", "4", "-device", "cpu"]
    monkeypatch.setenv("nnUNet_n_proc_DA", "1" if fault == "worker" else "0")
    train_step = PCRLPretrainTrainer.train_step
    images = {path: path.read_bytes() for path in tiny.data.glob("case_?.b2nd")}

    def step(self, batch, number, *rest):
        if number == steps + 1:  # in the second epoch
            if fault == "worker":
                for worker in multiprocessing.active_children():
                    worker.kill()
            for path in images if fault != "worker" else ():
                os.truncate(path, 100) if fault == "truncated" else path.unlink()
        return train_step(self, batch, number, *rest)

    monkeypatch.setattr(PCRLPretrainTrainer, "train_step", step)
    said = {"worker": "a process that loads data has ended", "vanished": "the file is missing"}
    assert said.get(fault, "cannot be read from") in command("-d", "999", *longer)
    assert results(tiny) == [checkpoint.LATEST]
    for path, data in images.items():
        path.write_bytes(data)
    monkeypatch.setattr(PCRLPretrainTrainer, "train_step", train_step)
    assert command("-d", "999", *longer, "--c") == 0
    assert results(tiny) == [checkpoint.FINAL]


def test_a_progress_picture_that_cannot_be_written_is_a_warning(command, tiny, capsys, monkeypatch):
    monkeypatch.setattr(PretrainLogger, "plot_progress_png", PLOT)
    (folder_of(tiny) / "progress.png").mkdir(parents=True)
    assert command("-d", "999", *SHORT, "-device", "cpu") == 0
    assert "WARNING: progress.png could not be written" in capsys.readouterr().out
    assert results(tiny) == [checkpoint.FINAL]


def test_pretraining_registers_the_package_if_needed_and_reports_it(command, monkeypatch, capsys):
    monkeypatch.setattr(registration, "is_registered", lambda: False)
    monkeypatch.setattr(registration, "register", lambda: ["Registered with nnU-Net: wrote bridge.py"])
    assert command("-d", "999", *SHORT) == 0
    assert "Registered with nnU-Net: wrote bridge.py" in capsys.readouterr().out


@pytest.mark.parametrize(("local_rank", "calls"), [("0", 1), ("1", 0)])
def test_only_the_first_process_of_a_machine_registers(command, monkeypatch, local_rank, calls):
    made: list[str] = []
    monkeypatch.setattr(registration, "is_registered", lambda: False)
    monkeypatch.setattr(registration, "register", lambda: made.append("bridge") or [])
    monkeypatch.setattr(distributed, "launched", lambda: True)
    monkeypatch.setattr(distributed, "process_group", nullcontext)  # without other processes
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert command("-d", "999", *SHORT) == 0
    assert len(made) == calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "999", "-p", "OtherPlans"], "OtherPlans.json does not exist; run nnUNetv2_plan_and_preprocess -d 999"),
        (["-d", "999", "-c", "2d"], "configuration '2d' is not in nnUNetPlans; it has 3d_fullres, 3d_lowres"),
        (["-d", "999", "-c", "3d_cascade_fullres"], "3d_cascade_fullres .* take its 3d_fullres"),
        (["-d", "999", "-f", "x"], "-f is 'x'; expected the number of a fold, or all"),
        (["-d", "999", "-device", "tpu"], "-device is 'tpu'; expected cuda, cpu or mps"),
        (["-d", "999", "-batch_size", "2"], "batch_size is 2; .* at least 4 samples"),
        (["-d", "999", "-epochs", "0"], "epochs is 0; expected 1 or more"),
        (["-d", "999", "-f", "9"], "fold 9 is not among the folds"),
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


def test_a_missing_gpu_given_by_flag_is_an_error(command, tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "-device is cuda, but torch finds no such device" in command("-d", "999", "-device", "cuda")
    assert not tiny.results.exists()


def test_too_few_cases_for_the_method_are_refused(command, tiny, monkeypatch):
    monkeypatch.setattr(method_class("cpc"), "min_cases", (99, "the comparison"))
    expected = "cases; the comparison needs at least 99: add cases, or choose another method"
    assert expected in str(command("-d", "999", "-method", "cpc", *SHORT))
    assert not tiny.results.exists()


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_a_variable_that_is_not_set_is_named(command, monkeypatch, variable):
    monkeypatch.delenv(variable)
    assert f"the variable {variable} is not set; set it as for nnU-Net: export {variable}=" in command("-d", "999")
    monkeypatch.delenv("nnUNet_raw")
    assert f"not set, nor is nnUNet_raw; set them as for nnU-Net: export {variable}=FOLDER" in command("-d", "999")


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


def test_a_results_folder_that_is_a_file_is_named(command, tiny, monkeypatch):
    file = tiny.folder / "a_file"
    file.touch()
    monkeypatch.setenv("nnUNet_results", str(file))
    assert re.search("a_file.* cannot be written to .*nnUNet_results.* has to be a folder", command("-d", "999"))


def test_a_read_only_results_folder_is_named_and_nothing_is_left_behind(command, tiny, as_users_do):
    results_folder = tiny.results.parent
    results_folder.mkdir()
    results_folder.chmod(0o555)
    error = command("-d", "999", *SHORT)
    results_folder.chmod(0o755)
    assert re.search(r"results\S* cannot be written to \(Permission denied\); nnUNet_results.* has to be", error)
    assert not list(results_folder.iterdir())


@pytest.mark.parametrize("lock", [True, False])
def test_an_output_folder_that_is_read_only_is_refused_before_the_first_step(command, tiny, as_users_do, lock):
    folder = folder_of(tiny)
    folder.mkdir(parents=True)
    if lock:
        (folder / ".lock").touch()
    folder.chmod(0o555)
    error = command("-d", "999", *SHORT)
    folder.chmod(0o755)
    assert re.search(r"fold_all cannot be written to, .*\(Permission denied\); it has to be a folder", error)
    assert results(tiny) == []


def test_a_results_folder_that_becomes_read_only_keeps_the_last_state(command, tiny, as_users_do, monkeypatch):
    folder = folder_of(tiny)
    train_step = PCRLPretrainTrainer.train_step

    def step(self, batch, number, *rest):
        if number == 3:  # in the second epoch
            folder.chmod(0o555)
        return train_step(self, batch, number, *rest)

    monkeypatch.setattr(PCRLPretrainTrainer, "train_step", step)
    longer = ["-epochs", "2", "-iters_per_epoch", "2", "-batch_size", "4"]
    error = command("-d", "999", *longer)
    folder.chmod(0o755)
    assert re.search(r"could not write \S*checkpoint_latest.pth \(Permission denied\); .* continue with --c", error)
    assert results(tiny) == [checkpoint.LATEST]
    monkeypatch.setattr(PCRLPretrainTrainer, "train_step", train_step)
    assert command("-d", "999", *longer, "--c") == 0
    assert results(tiny) == [checkpoint.FINAL]


@pytest.mark.parametrize("damage", ["truncated", "nan"])
def test_a_pretraining_that_cannot_start_leaves_nothing_behind(command, tiny, damage):
    for path in tiny.data.glob("case_?.b2nd"):
        if damage == "truncated":
            os.truncate(path, 100)
        else:
            blosc2.asarray(np.full((1, 14, 14, 14), np.nan, np.float32), urlpath=str(path), mode="w")
    assert re.search(r"case case_\d (cannot be read|has voxels that are not finite)", command("-d", "999", *SHORT))
    assert not tiny.results.exists()


def test_a_dataset_that_is_planned_but_not_preprocessed_is_named(command, tiny):
    for path in tiny.data.iterdir():
        path.unlink()
    assert "no preprocessed images in" in command("-d", "999")
    assert not tiny.results.exists()


def test_a_wrong_init_is_refused_before_anything_changes(command, tiny):
    folder = folder_of(tiny)
    folder.mkdir(parents=True)
    (folder / checkpoint.LATEST).write_text("an interrupted pretraining")
    for more in ([], ["--dry_run"]):
        assert "-init is nowhere.pth, which does not exist" in command(
            "-d", "999", "-init", "nowhere.pth", *SHORT, *more
        )
    assert [path.name for path in folder.iterdir()] == [checkpoint.LATEST]


@pytest.mark.parametrize("more", [[], ["--c"]])
def test_pretraining_does_not_overwrite_a_fitted_checkpoint(command, tiny, more):
    folder = tiny.results / "PCRLPretrainTrainer__nnUNetPlans__3d_fullres" / "fold_all"
    folder.mkdir(parents=True)
    path = folder / checkpoint.FINAL
    checkpoint.write(str(path), {"format": checkpoint.FORMAT, "adapted": {"checkpoint": "elsewhere"}})
    before = path.read_bytes()
    assert "was fitted by pcrl_nnunet_transfer" in command("-d", "999", *SHORT, *more)
    assert path.read_bytes() == before
