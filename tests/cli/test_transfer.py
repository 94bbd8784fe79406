import copy
import csv
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch
from nnunetv2.run import run_training
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_dataset import make_plan
from tiny_pretraining import make_trainer

from pcrl_nnunet import checkpoint
from pcrl_nnunet.cli import transfer
from pcrl_nnunet.pretraining.initial import load_initial
from pcrl_nnunet.trainers import PCRLFinetuneTrainer


@pytest.fixture
def command(monkeypatch):
    """Runs the command in this process; returns its exit status."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_transfer", *arguments])
        try:
            transfer.main_entry()
        except SystemExit as end:
            return end.code
        return 0

    return run


DEEPER = (4, 8, 8, 16)


def pretrained(tiny, tmp_path, plan=None, seed=0, init=None):
    """The file of a real, short pretraining of the tiny dataset, elsewhere."""
    plan = plan or make_plan()
    given = {"epochs": 1, "iters_per_epoch": 1, "seed": seed}
    trainer = make_trainer(plan=plan, dataset_json=tiny.dataset_json, **given)
    trainer.initialize()
    if init is not None:
        trainer.init, _ = load_initial(init, trainer.plan_network, trainer.network, trainer.request.plan)
    path = str(tmp_path / f"pretrained_{seed}.pth")
    checkpoint.write(path, trainer.final_content())
    return path


def two_channel_target(tiny):
    """The tiny dataset with two channels, and a plan with other kernels and one stage fewer than DEEPER."""
    plan = make_plan()
    plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["kernel_sizes"][0] = [1, 3, 3]
    plan["configurations"]["3d_fullres"]["normalization_schemes"] *= 2
    plan["configurations"]["3d_fullres"]["use_mask_for_norm"] *= 2
    (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(plan))
    tiny.dataset_json["channel_names"]["1"] = "PET"
    (tiny.folder / "dataset.json").write_text(json.dumps(tiny.dataset_json))
    return plan


def target_file(tiny, name):
    return tiny.results / f"PCRLPretrainTrainer__nnUNetPlans_{name}__3d_fullres" / "fold_all" / checkpoint.FINAL


def trainer_of(cls, tiny, plan):
    plan = {**copy.deepcopy(plan), "continue_training": False}
    trainer = cls(plan, "3d_fullres", 0, tiny.dataset_json, torch.device("cpu"))
    trainer.initialize()
    return trainer


def test_transfer_writes_plan_fitted_file_and_table(command, tiny, tmp_path, capsys):
    source = pretrained(tiny, tmp_path, make_plan(features=DEEPER))
    plan = two_channel_target(tiny)
    stock = (tiny.folder / "nnUNetPlans.json").read_bytes()
    assert command("-i", source, "-d", "999", "-name", "luna") == 0
    out = capsys.readouterr().out

    new = json.loads((tiny.folder / "nnUNetPlans_luna.json").read_text())
    assert new["plans_name"] == "nnUNetPlans_luna"
    assert new["configurations"] == plan["configurations"]  # data_identifier included
    assert new["pcrl"] == plan["pcrl"]
    assert new["pcrl_fitted"] == source
    assert (tiny.folder / "nnUNetPlans.json").read_bytes() == stock

    with open(target_file(tiny, "luna").with_name("transfer.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    network = trainer_of(nnUNetTrainer, tiny, new).network
    sizes = {name: p.numel() for name, p in network.named_parameters()}
    assert {row["tensor"]: int(row["elements"]) for row in rows if row["what"] != "skipped"} == sizes
    summary, tensors = out.split("100.0% of the encoder's parameters are pretrained", 1)
    assert not any(row["tensor"] in summary for row in rows)
    of_encoder = {row["tensor"]: row["what"] for row in rows if row["tensor"].startswith("encoder.")}
    assert {name for name in of_encoder if name in tensors} == {n for n, what in of_encoder.items() if what != "loaded"}
    how = {row["tensor"]: row["how"] for row in rows if row["what"] == "adapted"}
    assert how == {"encoder.stages.0.0.convs.0.conv.weight": "1 input channels made 2, kernel 3x3x3 made 1x3x3"}
    assert {row["tensor"].split(".")[2] for row in rows if row["what"] == "skipped"} == {"3"}


def test_our_trainer_and_stock_nnunet_start_from_the_same_encoder(command, tiny, tmp_path):
    source = pretrained(tiny, tmp_path, make_plan(features=DEEPER))
    two_channel_target(tiny)
    assert command("-i", source, "-d", "Dataset999_Tiny", "-name", "luna") == 0
    new = json.loads((tiny.folder / "nnUNetPlans_luna.json").read_text())
    ours = trainer_of(PCRLFinetuneTrainer, tiny, new)
    ours._load_pretrained()
    stock = trainer_of(nnUNetTrainer, tiny, new)
    random = checkpoint.encoder_hash(stock.network.encoder)
    load_pretrained_weights(stock.network, str(target_file(tiny, "luna")))
    fitted = checkpoint.read(str(target_file(tiny, "luna")))
    hashes = {checkpoint.encoder_hash(network.encoder) for network in (ours.network, stock.network)}
    assert hashes == {fitted["encoder_hash"]} != {random}
    given = checkpoint.read(source)["network_weights"]["encoder.stages.1.0.convs.0.conv.weight"]
    assert torch.equal(stock.network.encoder.stages[1][0].convs[0].conv.weight, given)
    with open(ours.log_file) as log:
        assert f"Adapted by pcrl_nnunet_transfer from {source}" in log.read()


def test_repeating_the_command_succeeds_and_another_encoder_needs_another_name(command, tiny, tmp_path):
    first, second = pretrained(tiny, tmp_path), pretrained(tiny, tmp_path, seed=1)
    assert command("-i", first, "-d", "999", "-name", "a") == 0
    before = target_file(tiny, "a").read_bytes()
    assert command("-i", first, "-d", "999", "-name", "a") == 0
    assert "holds another encoder; give another -name" in command("-i", second, "-d", "999", "-name", "a")
    assert target_file(tiny, "a").read_bytes() == before
    assert command("-i", second, "-d", "999", "-name", "b") == 0


def test_an_edited_block_is_kept_when_the_command_is_repeated(command, tiny, tmp_path):
    source = pretrained(tiny, tmp_path)
    assert command("-i", source, "-d", "999", "-name", "a") == 0
    file = tiny.folder / "nnUNetPlans_a.json"
    plan = json.loads(file.read_text())
    plan["pcrl"]["finetune"]["epochs"] = 7
    file.write_text(json.dumps(plan))
    assert command("-i", source, "-d", "999", "-name", "a") == 0
    assert json.loads(file.read_text()) == plan


def test_another_plan_of_that_name_is_not_replaced(command, tiny, tmp_path):
    source = pretrained(tiny, tmp_path)
    (tiny.folder / "nnUNetPlans_mine.json").write_text(json.dumps({"plans_name": "mine"}))
    assert "is another plan; give another -name" in command("-i", source, "-d", "999", "-name", "mine")
    assert not target_file(tiny, "mine").exists()


def test_the_new_plan_allows_a_partial_encoder_if_stages_are_missing(command, tiny, tmp_path, capsys):
    source = pretrained(tiny, tmp_path, make_plan(features=(4, 8)))
    assert command("-i", source, "-d", "999", "-name", "short") == 0
    assert "not in the checkpoint" in capsys.readouterr().out
    new = json.loads((tiny.folder / "nnUNetPlans_short.json").read_text())
    assert new["pcrl"]["finetune"]["allow_partial_encoder"] is True
    trainer = trainer_of(PCRLFinetuneTrainer, tiny, new)
    deepest = copy.deepcopy(trainer.network.encoder.stages[2].state_dict())
    trainer._load_pretrained()  # loads the pretrained part; the rest keeps its random weights
    for name, tensor in trainer.network.encoder.stages[2].state_dict().items():
        assert torch.equal(tensor, deepest[name])


@pytest.mark.parametrize("how", ["repeat", "first", "mean"])
def test_the_flag_chooses_how_channels_are_adapted(command, tiny, tmp_path, how):
    source = pretrained(tiny, tmp_path)
    two_channel_target(tiny)
    assert command("-i", source, "-d", "999", "-name", how, "-input_channels", how) == 0
    given = checkpoint.read(source)["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"].sum(2, keepdim=True)
    made = checkpoint.read(str(target_file(tiny, how)))["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"]
    factors = {"repeat": (0.5, 0.5), "first": (1, 0), "mean": (1, 1)}[how]
    torch.testing.assert_close(made, torch.cat([factor * given for factor in factors], 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-i", "nowhere.pth"], "-i is nowhere.pth, which does not exist"),
        (["-c", "2d"], "configuration '2d' is not in nnUNetPlans"),
        (["-c", "3d_cascade_fullres"], "takes the labels of 3d_lowres as input; take its 3d_fullres"),
        (["-name", "a/b"], "expected letters, digits"),
        (["-p", "Wide"], "Wide of a PlainConvUNet in 3D with 4, 8, 32 features; it fits -c 3d_fullres"),
    ],
)
def test_mistakes_end_with_a_sentence_and_nothing_is_written(command, tiny, tmp_path, arguments, message):
    source = pretrained(tiny, tmp_path)
    wide = {**make_plan(features=(4, 8, 32)), "plans_name": "Wide"}
    (tiny.folder / "Wide.json").write_text(json.dumps(wide))
    before = {path for folder in (tiny.folder, tiny.results) for path in folder.rglob("*")}
    given = {"-i": source, "-d": "999", "-name": "x", **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    assert message in command(*[part for item in given.items() for part in item])
    assert {path for folder in (tiny.folder, tiny.results) for path in folder.rglob("*")} == before


def everything_in(tiny):
    return {path: path.is_file() and path.read_bytes() for path in tiny.folder.parents[1].rglob("*")}


@pytest.mark.parametrize("again", [False, True])
def test_an_unwritable_plan_is_named_and_leaves_no_checkpoint(command, tiny, tmp_path, as_users_do, again):
    source = pretrained(tiny, tmp_path)
    if again:  # an earlier call left its checkpoint, and its plan was removed
        assert command("-i", source, "-d", "999", "-name", "a") == 0
        (tiny.folder / "nnUNetPlans_a.json").unlink()
    before = everything_in(tiny)
    tiny.folder.chmod(0o555)
    error = command("-i", source, "-d", "999", "-name", "a")
    tiny.folder.chmod(0o755)
    assert error == (
        f"Error: {tiny.folder / 'nnUNetPlans_a.json'} cannot be written (Permission denied), so no plan and no "
        f"checkpoint were written; make room or the folder writable, and run this again"
    )
    assert everything_in(tiny) == before


@pytest.mark.parametrize("what", ["table", "checkpoint", "folder"])
def test_unwritable_results_leave_no_plan(command, tiny, tmp_path, as_users_do, monkeypatch, what):
    source = pretrained(tiny, tmp_path)
    tiny.results.mkdir(exist_ok=True, parents=True)
    before = everything_in(tiny)

    def full(*_, **__):
        raise OSError(28, "No space left on device", "transfer.csv")

    with monkeypatch.context() as patch:
        if what == "table":
            patch.setattr(csv, "writer", full)
        elif what == "checkpoint":
            patch.setattr(torch, "save", full)
        else:
            tiny.results.chmod(0o555)
        error = command("-i", source, "-d", "999", "-name", "a")
        tiny.results.chmod(0o755)
    assert re.search(r"PCRLPretrainTrainer__\S* .*Permission denied" if what == "folder" else "No space left", error)
    assert "draft" not in error
    assert "--c" not in error
    assert everything_in(tiny) == before


@pytest.mark.parametrize("gpu", [True, False])
def test_the_printed_commands_can_be_pasted(command, tiny, tmp_path, monkeypatch, capsys, gpu):
    results = tmp_path / "it's mine" / "results"
    monkeypatch.setenv("nnUNet_results", str(results))
    source = pretrained(tiny, tmp_path)
    assert command("-i", source, "-d", "999", "-name", "a") == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    capsys.readouterr()
    assert command("-i", source, "-d", "999", "-name", "a") == 0
    out = capsys.readouterr().out
    assert "Fine-tune fold 0, and the other folds alike, with: " in out
    given = []
    monkeypatch.setattr(run_training, "run_training", lambda *arguments, **named: given.append((arguments, named)))
    for name in ("set_num_threads", "set_num_interop_threads"):
        monkeypatch.setattr(torch, name, lambda _: None)
    for line in re.findall("with(?: nnU-Net alone)?: (nnUNetv2_train .*)", out):
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        run_training.run_training_entry()  # nnU-Net's own parser
    (ours, of_ours), (stock, of_stock) = given
    assert ours[:6] == ("Dataset999_Tiny", "3d_fullres", "0", "PCRLFinetuneTrainer", "nnUNetPlans_a", None)
    assert stock[:5] == ("Dataset999_Tiny", "3d_fullres", "0", "nnUNetTrainer", "nnUNetPlans_a")
    assert stock[5].startswith(str(results))
    checkpoint.read(stock[5])
    assert of_ours["device"] == of_stock["device"] == torch.device("cuda" if gpu else "cpu")


def test_every_command_reads_a_supervised_training_saved_within_ddp_and_compile(command, tiny, tmp_path):
    stock = trainer_of(nnUNetTrainer, tiny, make_plan())
    for key, value in (("mean_fg_dice", 0.5), ("epoch_end_timestamps", 1.0)):
        stock.logger.log(key, np.float32(value), 0)
    path = str(tmp_path / "checkpoint_best.pth")
    stock.save_checkpoint(path)
    content = torch.load(path, weights_only=False)
    content["network_weights"] = {f"module._orig_mod.{n}": t for n, t in content["network_weights"].items()}
    torch.save(content, path)
    wanted = checkpoint.encoder_hash(stock.network.encoder)

    assert command("-i", path, "-d", "999", "-name", "a") == 0
    fitted = checkpoint.read(str(target_file(tiny, "a")))
    assert fitted["encoder_hash"] == wanted
    assert {name.split(".")[1] for name in fitted["random_keys"]} == {"seg_layers"}  # the decoder was trained, too

    fine_tuning = trainer_of(PCRLFinetuneTrainer, tiny, make_plan(checkpoint=path))
    fine_tuning._load_pretrained()
    assert checkpoint.encoder_hash(fine_tuning.network.encoder) == wanted

    assert checkpoint.read(pretrained(tiny, tmp_path, init=path))["encoder_hash"] == wanted
