"""A pretraining is refused before anything is created or deleted; results and states are never lost."""

import json
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from nnunetv2.training.logging import nnunet_logger
from tiny_dataset import make_plan
from tiny_method import PLACE
from tiny_pretraining import folder_of

from pcrl_nnunet import checkpoint, method_names, output_folder
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.pretraining.interruption import command_to_go_on
from pcrl_nnunet.report.page import NAME as REPORT
from pcrl_nnunet.trainers import PCRLFinetuneTrainer, PCRLPretrainTrainer

SHORT = ["-d", "999", "-epochs", "1", "-iters_per_epoch", "1", "-batch_size", "4", "-device", "cpu"]


def files(folder):
    """All files below a folder: name -> content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def seed_of(path):
    return checkpoint.read(str(path))["seed"]


@pytest.fixture
def no_trainer(monkeypatch):
    """Building a trainer fails."""

    def built(*_, **__):
        raise AssertionError("a trainer was built")

    monkeypatch.setattr(PCRLPretrainTrainer, "__init__", built)


@pytest.fixture
def quick_views(monkeypatch):
    """The pictures of views are empty: they take seconds each."""
    monkeypatch.setattr("pcrl_nnunet.report.pictures.views_of_a_case", lambda *given: Path(given[-1]).touch())


def an_earlier_run(tiny, kind):
    """The folder of a running, unfinished, finished or fitted pretraining, as nnU-Net and the command leave it."""
    folder = folder_of(tiny)
    if kind == "fitted":  # transfer's folder has no method in its name
        folder = folder.parents[1] / folder.parent.name.replace("_pcrlv2", "") / folder.name
    (folder / "wandb" / "latest-run").mkdir(parents=True)
    (folder / "wandb" / "latest-run" / "run-abc.wandb").write_text("curves")
    (folder / "training_log_1.txt").write_text("log")
    (folder / REPORT).write_text("report")
    if kind == "unfinished":
        (folder / checkpoint.LATEST).write_text("days of work")
    if kind in ("finished", "fitted"):
        content = {"format": checkpoint.FORMAT, "epochs": 240, "adapted": {} if kind == "finished" else {"from": "x"}}
        checkpoint.write(str(folder / checkpoint.FINAL), content)
    return folder


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("at work", [], "Another pcrl_nnunet_pretrain is at work on"),
        ("at work", ["--c"], "Another pcrl_nnunet_pretrain is at work on"),
        ("at work", ["--overwrite"], "Another pcrl_nnunet_pretrain is at work on"),
        ("finished", [], "is a finished pretraining of 240 epochs: fine-tune it (--c has nothing left to do)"),
        ("unfinished", [], "is the state of an unfinished pretraining: go on with it by --c, pretrain"),
        ("fitted", [], "was fitted by pcrl_nnunet_transfer"),
        ("fitted", ["--overwrite"], "was fitted by pcrl_nnunet_transfer"),
        ("unfinished", ["--c"], "checkpoint_latest.pth cannot be read"),
        ("finished", ["-f", "9"], "fold 9 is not among"),
        ("finished", ["--overwrite", "-batch_size", "2"], "batch_size is 2"),
        ("finished", ["--overwrite", "-init", "nowhere.pth"], "-init is nowhere.pth, which does not exist"),
        ("finished", ["--overwrite", "--c"], "--c goes on with a pretraining and --overwrite starts anew"),
    ],
)  # fmt: skip
def test_a_refused_pretraining_leaves_the_folder_as_it_was(command, tiny, wandb, no_trainer, kind, more, message):
    folder = an_earlier_run(tiny, kind)
    with open(folder / ".lock", "w") if kind == "at work" else nullcontext() as lock:
        if lock:
            pytest.importorskip("fcntl").flock(lock, 2)  # LOCK_EX
        before = files(folder)
        said = command(*SHORT, *more)
    assert message in said
    assert "\n" not in said
    assert files(folder) == before
    assert wandb == []


def test_without_the_package_of_weights_and_biases_nothing_is_made(command, tiny, monkeypatch, no_trainer):
    monkeypatch.setattr(nnunet_logger, "wandb", None)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    assert "nnUNet_wandb_enabled is 1, and the package wandb is not installed: run pip install" in command(*SHORT)
    assert not tiny.results.exists()


@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_a_refusal_to_start_over_offers_another_name_and_overwrite(command, tiny, no_trainer, kind):
    said = command(*SHORT) if an_earlier_run(tiny, kind) else ""
    for offer in ("--c", "-name NAME", "--overwrite, which keeps its files in", "/old_1"):
        assert offer in said


def test_c_with_other_settings_or_cases_is_refused_before_a_trainer_is_built(command, tiny, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PCRLPretrainTrainer, "on_train_end", lambda self: None)
        assert command(*SHORT) == 0
    before = files(folder_of(tiny))
    monkeypatch.setattr(PCRLPretrainTrainer, "__init__", None)
    said = [command(*SHORT, "--c", "-seed", "7")]
    plan_file = tiny.folder / "nnUNetPlans.json"
    unchanged = plan_file.read_text()
    plan_file.write_text(json.dumps(make_plan(pretrain={"pcrlv2": {"restoration": "full"}})))
    said.append(command(*SHORT, "--c"))
    plan_file.write_text(unchanged)
    for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
        (tiny.data / f"case_3{suffix}").unlink()
    said.append(command(*SHORT, "--c"))
    expected = "settings ['seed']", "settings ['pcrlv2.restoration']", "cases ['case_3']"
    for sentence, differing in zip(said, expected, strict=True):
        assert f"the {differing} differ from those that " in sentence
        assert "or start anew with --overwrite in the place of --c" in sentence
    assert files(folder_of(tiny)) == before


def test_pretrainings_by_two_methods_have_folders_of_their_own(command, tiny, capsys, monkeypatch):
    monkeypatch.setitem(method_names.BUILT_IN, "mean", PLACE)
    assert command(*SHORT) == 0
    before = files(folder_of(tiny))
    assert "-tr PCRLFinetuneTrainer -p nnUNetPlans" in capsys.readouterr().out.rstrip().splitlines()[-1]
    assert command(*SHORT, "-method", "mean") == 0
    assert "-tr PCRLFinetuneTrainer_mean -p nnUNetPlans" in capsys.readouterr().out.rstrip().splitlines()[-1]
    assert files(folder_of(tiny)) == before
    assert checkpoint.read(str(folder_of(tiny, method="mean") / checkpoint.FINAL))["method"] == "mean"
    assert "is a finished pretraining" in command(*SHORT, "-method", "mean")
    assert command(*SHORT, "--c", "-method", "mean") == 0
    assert "This pretraining is finished" in capsys.readouterr().out


def as_version_0_1_0_wrote_it(tiny):
    """Give the result of a pretraining the form and the place that version 0.1.0 gave it; return its path."""
    folder = folder_of(tiny)
    content = checkpoint.read(str(folder / checkpoint.FINAL))
    own = content["settings"].pop("pcrlv2")
    del content["verdict"], content["settings"]["method"]
    own["views"]["pairs_per_read"] = 1
    content["settings"] |= {**own, "probe_every": 0}
    place = tiny.results / "PCRLPretrainTrainer__nnUNetPlans__3d_fullres" / "fold_all" / checkpoint.FINAL
    place.parent.mkdir(parents=True)
    shutil.rmtree(folder.parent)
    checkpoint.write(str(place), content)
    return place


def test_c_accepts_a_finished_checkpoint_of_version_0_1_0(command, tiny, capsys):
    assert command(*SHORT) == 0
    place = as_version_0_1_0_wrote_it(tiny)
    capsys.readouterr()
    assert command(*SHORT, "--c") == 0
    assert f"This pretraining is finished: {place}" in capsys.readouterr().out
    assert not folder_of(tiny).parent.exists()
    (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(make_plan(pretrain={"pcrlv2": {"restoration": "full"}})))
    said = command(*SHORT, "--c")
    assert "is finished, with other settings (pcrlv2.restoration single, now full)" in said
    (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(make_plan()))

    before = checkpoint.read(str(place))
    assert "is a finished pretraining" in command(*SHORT)
    assert command(*SHORT, "--overwrite", "-init", str(place)) == 0
    own = len(before["method_weights"])
    assert f"{own} of {own} tensors of the method's own weights are taken over" in capsys.readouterr().out
    after = checkpoint.read(str(folder_of(tiny) / checkpoint.FINAL))
    assert after["init"]["checkpoint"] == str(place)
    assert after["init"]["encoder_share"] == 1


def test_c_refuses_an_unfinished_pretraining_of_version_0_1_0(command, tiny):
    state = tiny.results / "PCRLPretrainTrainer__nnUNetPlans__3d_fullres" / "fold_all" / checkpoint.LATEST
    state.parent.mkdir(parents=True)
    state.write_bytes(b"of another version")
    for flags in ([], ["--c"]):
        assert f"{state} is the unfinished pretraining of an older version; finish it with" in command(*SHORT, *flags)
    assert state.read_bytes() == b"of another version"
    assert command(*SHORT, "--overwrite") == 0


def test_overwrite_keeps_the_earlier_pretraining_until_the_new_result_is_written(command, tiny, monkeypatch):
    assert command(*SHORT) == 0
    folder = folder_of(tiny)
    (folder / REPORT).write_text("the first one's")
    first = files(folder)
    found = {}

    def step(self, *given):
        found.update(files(folder))
        return train_step(self, *given)

    train_step = PCRLPretrainTrainer.train_step
    monkeypatch.setattr(PCRLPretrainTrainer, "train_step", step)
    assert command(*SHORT, "--overwrite", "-seed", "1") == 0
    assert found[checkpoint.FINAL] == first[checkpoint.FINAL]  # the file while the second pretraining ran
    kept = files(folder / "old_1")
    assert kept == {name: content for name, content in first.items() if name != ".lock"}
    assert seed_of(folder / checkpoint.FINAL) == 1
    assert seed_of(folder / "old_1" / checkpoint.FINAL) == 0
    (log,) = folder.glob("training_log_*.txt")
    assert f"the files of the pretraining that was here are kept in {folder / 'old_1'}" in log.read_text()
    assert not (folder / REPORT).exists()  # these tests write no report

    assert command(*SHORT, "--overwrite", "-seed", "2") == 0
    assert [seed_of(folder / name / checkpoint.FINAL) for name in ("", "old_1", "old_2")] == [2, 0, 1]


def test_overwriting_twice_before_the_end_keeps_each_pretrainings_files_apart(command, tiny, monkeypatch):
    assert command(*SHORT) == 0
    folder = folder_of(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(PCRLPretrainTrainer, "on_train_end", lambda self: None)
        assert command(*SHORT, "--overwrite", "-seed", "1") == 0
    assert "is the state of an unfinished pretraining" in command(*SHORT, "-seed", "2")
    assert command(*SHORT, "--overwrite", "-seed", "2") == 0
    assert seed_of(folder / checkpoint.FINAL) == 2
    assert seed_of(folder / "old_1" / checkpoint.FINAL) == 0
    state = checkpoint.read(str(folder / "old_2" / checkpoint.LATEST), checkpoint.STATE_FORMAT)
    assert state["settings"]["seed"] == 1
    assert not (folder / "old_2" / checkpoint.FINAL).exists()


def test_c_continues_an_interrupted_overwriting(command, tiny, monkeypatch):
    assert command(*SHORT) == 0
    folder = folder_of(tiny)
    with monkeypatch.context() as patch:
        patch.setattr(PCRLPretrainTrainer, "on_train_end", lambda self: None)
        assert command(*SHORT, "--overwrite", "-seed", "1") == 0
    assert seed_of(folder / checkpoint.FINAL) == 0
    assert command(*SHORT, "--c", "-seed", "1") == 0
    assert seed_of(folder / checkpoint.FINAL) == 1


def test_overwriting_that_cannot_start_brings_everything_back(command, tiny, monkeypatch):
    assert command(*SHORT) == 0
    folder = folder_of(tiny)
    (folder / REPORT).write_text("report")
    before = files(folder)

    def refused(self):
        raise UserError("no")

    monkeypatch.setattr(PCRLPretrainTrainer, "on_train_start", refused)
    assert command(*SHORT, "--overwrite") == "Error: no"
    assert files(folder) == before


def test_an_overwriting_that_was_stopped_before_its_first_state_brings_everything_back(command, tiny, monkeypatch):
    assert command(*SHORT) == 0
    before = files(folder_of(tiny))

    def stopped(trainer):
        trainer.print_to_log_file("Stopped by SIGTERM")
        raise SystemExit(0)

    with monkeypatch.context() as patch:
        patch.setattr(PCRLPretrainTrainer, "run_training", stopped)
        assert command(*SHORT, "--overwrite", "-seed", "1") == 0
    assert files(folder_of(tiny)) == before


def test_c_restarts_an_overwriting_killed_before_its_first_state(command, tiny):
    """The result in the folder is still the earlier one, which --c must not take for the new one."""
    assert command(*SHORT) == 0
    output_folder.set_overwriting(folder_of(tiny), True)  # a killed start leaves this, and the files put aside
    assert command(*SHORT, "--c", "-seed", "1") == 0
    assert seed_of(folder_of(tiny) / checkpoint.FINAL) == 1
    assert not output_folder.is_overwriting(folder_of(tiny))
    assert command(*SHORT, "--c", "-seed", "1") == 0  # finished now


def test_an_encoder_that_saw_the_folds_validation_cases_is_refused(command, tiny):
    assert command(*SHORT) == 0
    final = str(folder_of(tiny) / checkpoint.FINAL)
    said = command(*SHORT, "-f", "0", "-init", final)
    assert f"-init {final} has seen validation cases of fold 0, which -f leaves out: case_3; take a checkpoint" in said
    assert not folder_of(tiny, fold=0).exists()
    assert command(*SHORT, "-f", "1") == 0
    assert command(*SHORT, "-f", "1", "-name", "again", "-init", str(folder_of(tiny, fold=1) / checkpoint.FINAL)) == 0


def test_failed_start_of_weights_and_biases_is_named_and_leaves_nothing(command, tiny, wandb, monkeypatch):
    def refuses(**_):
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(nnunet_logger.wandb, "init", refuses)
    said = command(*SHORT)
    assert "Weights & Biases did not begin a run (RuntimeError: api_key not configured); run wandb login" in said
    assert not folder_of(tiny).exists()


def test_the_command_to_resume_overwrites_nothing(command, tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/pcrl_nnunet_pretrain", "-d", "999", "--overwrite", "-init", "a b.pth"])
    assert shlex.split(command_to_go_on()) == ["pcrl_nnunet_pretrain", "-d", "999", "-init", "a b.pth", "--c"]


def test_c_without_a_state_announces_a_new_pretraining(command, tiny, capsys):
    assert command("-d", "999", "-epochs", "2", "-iters_per_epoch", "3", *SHORT[6:], "--c") == 0
    (log,) = folder_of(tiny).glob("training_log_*.txt")
    for said in (capsys.readouterr().out, log.read_text()):
        block = said.split("#" * 80)[1]
        assert block.count("\n") > 3
        assert f"--c found nothing to continue in {folder_of(tiny)}" in block
        assert "STARTS FROM NOTHING: 2 epochs of 3 steps, 6 steps in all" in block


def test_the_next_command_has_the_fold_and_device_of_the_pretraining(command, capsys):
    assert command(*SHORT, "-f", "1") == 0
    line = "nnUNetv2_train Dataset999_Tiny 3d_fullres 1 -tr PCRLFinetuneTrainer -p nnUNetPlans -device cpu"
    assert capsys.readouterr().out.rstrip().endswith(f"Fine-tune fold 1 with: {line}")


# ------------------------------------------------------------------------------------------------------------- -name


def test_another_name_pretrains_beside_the_first_and_fine_tuning_finds_it(command, tiny, capsys):
    plan = make_plan(checkpoint="/of/another.pth")
    (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(plan))
    assert command(*SHORT) == 0
    before = files(folder_of(tiny))
    capsys.readouterr()
    assert command(*SHORT, "-name", "second", "-seed", "1") == 0
    assert files(folder_of(tiny)) == before
    copy = json.loads((tiny.folder / "nnUNetPlans_second.json").read_text())
    assert copy["configurations"] == plan["configurations"]
    assert "checkpoint" not in copy["pcrl"]
    line = capsys.readouterr().out.rstrip().rsplit("with: ", 1)[1]
    assert "-p nnUNetPlans_second " in line
    assert seed_of(fine_tuning(copy, tiny)._find_checkpoint()) == 1
    assert "is a finished pretraining" in command(*SHORT, "-name", "second")
    assert command(*SHORT, "-p", "nnUNetPlans_second", "--c", "-seed", "1") == 0


def fine_tuning(plan, tiny):
    plan = {**plan, "continue_training": False}
    return PCRLFinetuneTrainer(plan, "3d_fullres", 0, tiny.dataset_json, torch.device("cpu"))


def test_a_copy_of_a_plan_has_its_own_settings(command, tiny):
    assert command(*SHORT, "-name", "low") == 0
    path = tiny.folder / "nnUNetPlans_low.json"
    copy = json.loads(path.read_text())
    copy["pcrl"]["pretrain"] = {"initial_lr": 0.001}
    path.write_text(json.dumps(copy))
    assert command(*SHORT, "-name", "low", "--overwrite") == 0
    settings = checkpoint.read(str(folder_of(tiny, plans="nnUNetPlans_low") / checkpoint.FINAL))["settings"]
    assert settings["initial_lr"] == 0.001
    assert json.loads(path.read_text()) == copy


@pytest.mark.parametrize("name", ["a b", "../x", "", "é"])
def test_a_name_with_characters_unfit_for_a_folder_is_refused(command, tiny, name):
    before = files(tiny.folder)
    assert f"-name is '{name}'; expected letters, digits, - and _" in command(*SHORT, "-name", name)
    assert files(tiny.folder) == before
    assert not tiny.results.exists()


def plan_again(tiny, **changed):
    plan = make_plan()
    plan["configurations"]["3d_fullres"] |= changed
    (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(plan))


def test_a_copy_of_a_plan_that_was_planned_again_is_refused_by_name(command, tiny, no_trainer):
    copy = {**make_plan(), "plans_name": "nnUNetPlans_second", "pcrl_copy_of": "nnUNetPlans"}
    (tiny.folder / "nnUNetPlans_second.json").write_text(json.dumps(copy))
    (tiny.folder / "nnUNetPlans_liver.json").write_text(json.dumps({**copy, "pcrl_fitted": "x"}))
    assert "nnUNetPlans_liver.json is " in command(*SHORT, "-name", "liver")
    plan_again(tiny, batch_size=3)
    said = command(*SHORT, "-name", "second")
    assert "nnUNetPlans_second.json is a copy of nnUNetPlans from before that plan was changed; give another" in said
    assert not tiny.results.exists()


def test_every_command_refuses_a_plan_copy_with_outdated_spacing(command, tiny, no_trainer):
    copy = {**make_plan(), "plans_name": "nnUNetPlans_second", "pcrl_copy_of": "nnUNetPlans"}
    (tiny.folder / "nnUNetPlans_second.json").write_text(json.dumps(copy))
    plan_again(tiny, spacing=[2.0, 1.0, 1.0])
    expected = (
        "nnUNetPlans_second is a copy of nnUNetPlans, which was planned again since and has other values of spacing"
    )
    assert expected in command(*SHORT, "-p", "nnUNetPlans_second")
    with pytest.raises(SystemExit, match=expected):
        fine_tuning(copy, tiny)
    assert not tiny.results.exists()


def test_an_unwritable_plan_leaves_nothing_behind(command, tiny, as_users_do, no_trainer):
    tiny.folder.chmod(0o555)
    said = command(*SHORT, "-name", "second")
    tiny.folder.chmod(0o755)
    assert "-name writes the plan " in said
    assert "nnUNetPlans_second.json, which cannot be written (Permission denied); make that folder writable" in said
    assert not tiny.results.exists()


def test_a_named_pretraining_that_cannot_start_and_a_dry_run_leave_no_plan(command, tiny, monkeypatch, quick_views):
    def refused(self):
        raise UserError("no")

    before = files(tiny.folder)
    assert command(*SHORT, "-name", "second", "--dry_run") == 0
    monkeypatch.setattr(PCRLPretrainTrainer, "on_train_start", refused)
    assert command(*SHORT, "-name", "second") == "Error: no"
    assert files(tiny.folder) == before
    assert not tiny.results.exists()


def test_a_plan_under_another_file_name_is_not_rewritten(command, tiny):
    (tiny.folder / "nnUNetPlans.json").rename(tiny.folder / "Mine.json")
    before = files(tiny.folder)
    assert command(*SHORT, "-p", "Mine") == 0
    assert files(tiny.folder) == before


# ----------------------------------------------------------------------------------------------- the dry run's folder


def test_a_dry_run_replaces_its_pictures_and_nothing_that_is_not_its_own(command, tiny, quick_views):
    assert command(*SHORT, "--dry_run") == 0
    pictures = tiny.cwd / "pcrl_views_Dataset999_Tiny_nnUNetPlans_3d_fullres"
    (pictures / "mine.png").write_text("mine")
    (pictures / "notes").mkdir()
    for suffix in (".b2nd", "_seg.b2nd", ".pkl"):
        (tiny.data / f"case_3{suffix}").rename(tiny.data / f"case_9{suffix}")
    assert command(*SHORT, "--dry_run") == 0
    assert sorted(p.name for p in pictures.glob("*")) == [
        "mine.png", "notes", "views_of_case_0.png", "views_of_case_2.png", "views_of_case_9.png",
    ]  # fmt: skip
    assert (pictures / "mine.png").read_text() == "mine"


def test_dry_runs_of_two_plans_have_a_folder_each(command, tiny, quick_views):
    shutil.copy(tiny.folder / "nnUNetPlans.json", tiny.folder / "Other.json")
    (tiny.folder / "Other.json").write_text(json.dumps({**make_plan(), "plans_name": "Other"}))
    for plan in ("nnUNetPlans", "Other"):
        assert command(*SHORT, "--dry_run", "-p", plan) == 0
    assert {path.name for path in tiny.cwd.iterdir()} == {
        f"pcrl_views_Dataset999_Tiny_{plan}_3d_fullres" for plan in ("nnUNetPlans", "Other")
    }
    assert not tiny.results.exists()
