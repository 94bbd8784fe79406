import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from tiny_dataset import make_plan
from tiny_method import PLACE, Mean
from tiny_pretraining import folder_of, make_trainer

from pcrl_nnunet import checkpoint, method_names
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest.unlabelled import unlabelled_folder
from pcrl_nnunet.loading.cases import find_cases
from pcrl_nnunet.pretraining import distributed
from pcrl_nnunet.pretraining.initial import load_initial
from pcrl_nnunet.pretraining.preparation import PREPARED
from pcrl_nnunet.report import examples
from pcrl_nnunet.report.page import NAME, Report
from pcrl_nnunet.report.progress import PretrainLogger
from pcrl_nnunet.trainers import PCRLPretrainTrainer, pretrain
from pcrl_nnunet.views import kernels

WRITE_REPORT, PLOT = Report.write, PretrainLogger.plot_progress_png


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Without pictures, which take seconds each and have their own tests."""
    monkeypatch.setattr(Report, "write", lambda *_: None)
    monkeypatch.setattr(PretrainLogger, "plot_progress_png", lambda *_: None)


def has_whole_report(folder):
    (log,) = folder.glob("training_log_*.txt")
    return (folder / NAME).is_file() and "WARNING" not in log.read_text()


def make(tiny, fold="all", **given):
    return make_trainer(fold, dataset_json=tiny.dataset_json, **given)


def final(tiny, fold="all"):
    return checkpoint.read(str(folder_of(tiny, fold) / checkpoint.FINAL))


def run(trainer):
    trainer.run_training()
    return trainer.logger.get_value("train_losses", None)


def test_a_finished_pretraining_leaves_the_file_the_log_and_the_curves(tiny, monkeypatch):
    monkeypatch.setattr(PretrainLogger, "plot_progress_png", PLOT)
    monkeypatch.setattr(kernels, "compiled", False)
    run(make(tiny))
    names = {path.name for path in folder_of(tiny).iterdir()}
    assert {checkpoint.FINAL, "progress.png"} <= names
    assert checkpoint.LATEST not in names
    (log,) = folder_of(tiny).glob("training_log_*.txt")
    text = log.read_text()
    assert "epoch 2/2: restoration" in text
    assert "Views are computed by scipy, several times slower than numba" in text
    assert "nnUNetv2_train Dataset999_Tiny 3d_fullres 0 -tr PCRLFinetuneTrainer -p nnUNetPlans -device cpu" in text


@pytest.mark.parametrize(
    ("table", "advised"),
    [
        ("classes.csv", "-tr PCRLClassificationTrainer -p nnUNetPlans"),
        ("candidates.csv", "-tr PCRLClassificationTrainer -p nnUNetPlans"),
        (None, "neither masks nor a table of classes; .* with: pcrl_nnunet_transfer -i FINAL -d DATASET -name "),
    ],
)
def test_without_masks_the_next_command_classifies_or_transfers_the_encoder(tiny, table, advised):
    tiny.dataset_json |= {"labels": {"background": 0, "foreground": 1}, "pcrl_without_masks": True}
    if table is not None:
        (tiny.folder / table).touch()
    line = make(tiny)._next_command("FINAL")
    assert re.search(advised, line)
    assert "Finetune" not in line


def test_the_next_command_segments_a_dataset_with_masks_and_tables(tiny):
    (tiny.folder / "classes.csv").touch()
    assert "-tr PCRLFinetuneTrainer -p nnUNetPlans" in make(tiny)._next_command("FINAL")


def test_a_first_step_skipped_by_the_gradient_scaler_raises_no_warning(tiny):
    trainer = make(tiny)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)  # the gradients overflow, as on a GPU
    trainer.initialize()
    before = checkpoint.encoder_hash(trainer.network.encoder)
    batch = next(trainer.get_dataloaders())
    trainer.train_step(batch, 0)  # warnings are errors here
    assert trainer.grad_scaler.get_scale() < 2.0**126
    assert checkpoint.encoder_hash(trainer.network.encoder) == before


def test_the_plans_comparison_weight_is_used_in_training(tiny):
    trainer = make(tiny, plan=make_plan(pretrain={"pcrlv2": {"comparison_weight": 0.1}}))
    trainer.initialize()
    of_step = trainer.train_step(next(trainer.get_dataloaders()), 0)
    compared = of_step["comparison_global"] + of_step["comparison_local"]
    assert of_step["loss"] == pytest.approx(of_step["restoration"] + 0.1 * compared, rel=1e-5)


def variant(tiny, kind):
    """Another plan for the tiny dataset, and its data: configuration, number of channels."""
    plan = make_plan(features=(4, 8, 8, 8))
    this = plan["configurations"]["3d_fullres"]
    kwargs = this["architecture"]["arch_kwargs"]
    shape = [1, 14, 14, 14]
    if kind == "residual encoder":
        this["architecture"]["network_class_name"] = this["architecture"]["network_class_name"].replace(
            "PlainConvUNet", "ResidualEncoderUNet"
        )
        kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    elif kind == "anisotropic, thin volumes":
        shape = [1, 3, 20, 17]
        this.update(patch_size=[4, 24, 24], median_image_size_in_voxels=[3.0, 20.0, 17.0], spacing=[6.0, 1.0, 1.0])
        kwargs["strides"] = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [1, 2, 2]]
        kwargs["kernel_sizes"] = [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    elif kind == "four channels":
        shape[0] = 4
        tiny.dataset_json["channel_names"] = {str(i): "MRI" for i in range(4)}
    elif kind == "volumes smaller than every view":
        shape = [1, 2, 3, 2]
    elif kind == "2d":
        this.update(patch_size=[16, 16], batch_size=20, median_image_size_in_voxels=[14.0, 14.0], spacing=[1.0, 1.0])
        kwargs.update(strides=[[1, 1], [2, 2], [2, 2], [2, 2]], kernel_sizes=[[3, 3]] * 4)
        kwargs["conv_op"] = kwargs["conv_op"].replace("3d", "2d")
        kwargs["norm_op"] = kwargs["norm_op"].replace("3d", "2d")
    elif kind == "six stages":
        kwargs.update(n_stages=6, features_per_stage=[4, 8, 8, 8, 8, 8], kernel_sizes=[[3, 3, 3]] * 6)
        kwargs.update(n_conv_per_stage=[1] * 6, n_conv_per_stage_decoder=[1] * 5)
        kwargs["strides"] = [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 1]]
        this.update(patch_size=[16, 32, 16])
    rng = np.random.default_rng(1)
    for path in tiny.data.glob("case_?.b2nd"):
        blosc2.asarray(rng.normal(size=shape).astype(np.float32), urlpath=str(path), mode="w")
    return plan, shape[0]


KINDS = {  # with the restoration that the default tests use
    "residual encoder": "single",
    "anisotropic, thin volumes": "full",
    "four channels": "single",
    "volumes smaller than every view": "full",
    "2d": "full",
    "six stages": "single",
}


@pytest.mark.parametrize(
    ("kind", "restoration"),
    [
        pytest.param(kind, restoration, marks=[pytest.mark.long] if restoration != usual else [])
        for kind, usual in KINDS.items()
        for restoration in ("single", "full")
    ],
)
def test_it_pretrains_on_any_plan_of_nnunet(tiny, monkeypatch, kind, restoration):
    monkeypatch.setattr(Report, "write", WRITE_REPORT)
    monkeypatch.setattr(examples, "NUM_EXAMPLES", 1)
    plan, channels = variant(tiny, kind)
    plan["pcrl"] = {"pretrain": {"pcrlv2": {"restoration": restoration}}}
    trainer = make(tiny, plan=plan, epochs=1, iters_per_epoch=6)
    assert np.isfinite(run(trainer)).all()
    content = final(tiny)
    assert content["num_input_channels"] == channels
    assert has_whole_report(folder_of(tiny))


def test_an_older_preprocessing_is_unpacked_and_gives_the_same_losses(tiny):
    expected = run(make(tiny, epochs=1))
    shutil.rmtree(tiny.results)
    for path in tiny.data.glob("case_?.b2nd"):
        np.savez_compressed(path.with_suffix(".npz"), data=blosc2.open(str(path))[:])  # without labels
        path.unlink()
    for path in tiny.data.glob("*_seg.b2nd"):
        path.unlink()
    assert run(make(tiny, epochs=1)) == expected
    assert {case["path"].rsplit(".")[-1] for case in final(tiny)["cases"]} == {"npy"}


def test_labels_are_never_read(tiny):
    before = run(make(tiny, epochs=1))
    for path in (*tiny.data.glob("*_seg.b2nd"), *tiny.data.glob("*.pkl")):
        path.unlink()
    assert run(make(tiny, epochs=1)) == before


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_pretraining_equals_an_uninterrupted_one(tiny, monkeypatch, optimizer):
    torch.set_num_threads(1)
    whole = run(make(tiny, epochs=3, optimizer=optimizer))
    expected = final(tiny)
    shutil.rmtree(folder_of(tiny))

    interrupted = make(tiny, epochs=3, optimizer=optimizer)
    steps = []

    def train_step(batch, step):
        if step == 3:
            raise KeyboardInterrupt
        steps.append(step)
        return PCRLPretrainTrainer.train_step(interrupted, batch, step)

    monkeypatch.setattr(interrupted, "train_step", train_step)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run_training()
    assert not (folder_of(tiny) / checkpoint.FINAL).exists()

    torch.manual_seed(12345)
    resumed = make(tiny, continues=True, epochs=3, optimizer=optimizer)
    resumed.load_checkpoint(str(folder_of(tiny) / checkpoint.LATEST))
    assert resumed.step == 2
    assert run(resumed) == whole
    actual = final(tiny)
    assert actual["encoder_hash"] == expected["encoder_hash"]
    for name, tensor in expected["network_weights"].items():
        assert torch.equal(tensor, actual["network_weights"][name]), name


def test_resuming_with_other_settings_another_plan_or_other_cases_is_refused(tiny):
    trainer = make(tiny)
    trainer.initialize()
    latest = str(folder_of(tiny) / checkpoint.LATEST)
    trainer.save_checkpoint(latest)
    with pytest.raises(UserError, match=r"the settings \['seed'\] differ from those that .* was trained with"):
        make(tiny, seed=1).load_checkpoint(latest)
    plan = make_plan(pretrain={"pcrlv2": {"restoration": "full"}})
    with pytest.raises(UserError, match=r"the settings \['pcrlv2.restoration'\] differ"):
        make(tiny, plan=plan).load_checkpoint(latest)
    plan = make_plan()
    plan["configurations"]["3d_fullres"]["batch_size"] = 3
    with pytest.raises(UserError, match=r"the plans \['configurations.3d_fullres.batch_size'\] differ"):
        make(tiny, plan=plan).load_checkpoint(latest)
    other = make(tiny)
    other.request = replace(other.request, cases=replace(other.request.cases, other_plans={"Dataset017_Other": "a"}))
    other.initialize()
    other.save_checkpoint(latest)
    other.request = replace(other.request, cases=replace(other.request.cases, other_plans={"Dataset017_Other": "b"}))
    with pytest.raises(UserError, match=r"the other plans \['Dataset017_Other'\] differ"):
        other.load_checkpoint(latest)
    trainer.save_checkpoint(latest)
    (tiny.data / "case_3.b2nd").rename(tiny.data / "case_9.b2nd")
    with pytest.raises(UserError, match=r"the cases \['case_3', 'case_9'\] differ"):
        make(tiny).load_checkpoint(latest)


def test_the_random_state_of_the_device_is_part_of_the_state(tiny, monkeypatch):
    restored, latest = [], str(folder_of(tiny) / checkpoint.LATEST)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append((state.tolist(), device)))
    trainers = make(tiny), make(tiny)
    for trainer in trainers:
        trainer.initialize()
        trainer.device = torch.device("cuda", 1)  # from now on as on a machine with this device
    trainers[0].save_checkpoint(latest)
    trainers[1].load_checkpoint(latest)
    assert restored == [(list(range(16)), torch.device("cuda", 1))]
    trainers[0].device = torch.device("cpu")
    trainers[0].save_checkpoint(latest)
    trainers[1].load_checkpoint(latest)  # the file has no random state of a GPU
    assert len(restored) == 1


def test_an_interrupted_epoch_does_not_count_the_time_between_runs(tiny, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(pretrain, "time", lambda: now)
    trainer = make(tiny)
    trainer.initialize()
    trainer.logger.log("epoch_start_timestamps", 990.0, 0)
    trainer.outputs = [{"loss": 1.0}]
    latest = str(folder_of(tiny) / checkpoint.LATEST)
    trainer.save_checkpoint(latest)
    now += 3600
    resumed = make(tiny)
    resumed.load_checkpoint(latest)
    assert resumed.logger.get_value("epoch_start_timestamps", 0) == 990 + 3600


@pytest.fixture
def mean(monkeypatch):
    """A user's own method, unknown to the engine."""
    monkeypatch.setitem(method_names.BUILT_IN, "mean", PLACE)
    monkeypatch.setattr(Mean, "prepared_for", [])
    return Mean


def test_a_users_own_method_pretrains_with_its_settings_and_a_report(tiny, mean, monkeypatch):
    monkeypatch.setattr(Report, "write", WRITE_REPORT)
    losses = run(make(tiny, plan=make_plan(pretrain={"method": "mean", "mean": {"scale": 0.5}, "pcrlv2": {"x": 1}})))
    assert np.isfinite(losses).all()
    content = checkpoint.read(str(folder_of(tiny, method="mean") / checkpoint.FINAL))
    assert (content["method"], content["settings"]["mean"]) == ("mean", {"scale": 0.5})
    assert content["citations"][0]["apa_citations"] == ["Nobody (2026). Means."]
    assert not {"pcrlv2"} & content["settings"].keys()
    assert has_whole_report(folder_of(tiny, method="mean"))


def test_a_preparation_is_made_once_and_read_by_c(tiny, mean, monkeypatch):
    folder = folder_of(tiny, method="mean")
    trainer = make(tiny, method="mean")
    prepare, missing = Mean.prepare.__func__, []

    def watched(cls, preparation):
        missing.append((folder / PREPARED).exists())
        return prepare(cls, preparation)

    with monkeypatch.context() as patch:
        patch.setattr(Mean, "prepare", classmethod(watched))
        patch.setattr(trainer, "on_train_end", lambda: None)
        run(trainer)
    assert (mean.prepared_for, missing) == (["PlainConvUNet"], [False])
    assert [path.name for path in folder.glob("*prepared*")] == [PREPARED]
    resumed = make(tiny, method="mean", continues=True)
    resumed.load_checkpoint(str(folder / checkpoint.LATEST))
    run(resumed)
    assert mean.prepared_for == ["PlainConvUNet"]
    assert {name: float(mean[0]) for name, mean in resumed.prepared["means"].items()} == {
        f"case_{number}": number for number in range(4)
    }
    assert not (folder / PREPARED).exists()  # the training is finished

    (folder / PREPARED).write_bytes(b"damaged")
    with pytest.raises(UserError, match=PREPARED):
        run(make(tiny, method="mean", continues=True))


def test_a_preparation_of_another_training_is_made_again(tiny, mean, monkeypatch):
    """The other training was killed before it saved anything."""
    killed = make(tiny, method="mean", seed=1)
    monkeypatch.setattr(killed, "get_dataloaders", None)
    with pytest.raises(TypeError):
        run(killed)
    assert (folder_of(tiny, method="mean") / PREPARED).exists()
    run(make(tiny, method="mean"))
    assert len(mean.prepared_for) == 2


def test_c_refuses_a_changed_preparation(tiny, mean, monkeypatch):
    folder = folder_of(tiny, method="mean")
    trainer = make(tiny, method="mean")
    monkeypatch.setattr(trainer, "on_train_end", lambda: None)
    run(trainer)
    (folder / PREPARED).unlink()
    monkeypatch.setattr(Mean, "prepare", classmethod(lambda cls, preparation: {"means": {}}))
    resumed = make(tiny, method="mean", continues=True)
    resumed.load_checkpoint(str(folder / checkpoint.LATEST))
    with pytest.raises(UserError, match=r"preparation differs from the one that the training in .* began with"):
        run(resumed)


def test_torchs_random_numbers_continue_after_a_stop(tiny, mean, monkeypatch):
    """The method's dropout draws from torch's generator, which the state keeps."""
    whole = run(make(tiny, method="mean", epochs=3))
    shutil.rmtree(folder_of(tiny, method="mean"))
    stopped = make(tiny, method="mean", epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "on_any_rank", lambda *_: stopped.step == 3)
        with pytest.raises(SystemExit):
            run(stopped)
    resumed = make(tiny, method="mean", epochs=3, continues=True)
    resumed.load_checkpoint(str(folder_of(tiny, method="mean") / checkpoint.LATEST))
    assert run(resumed) == whole


def test_views_without_an_input_are_refused_before_the_training(tiny, mean, monkeypatch):
    views = Mean.views.__func__

    def without(cls, *given):
        made = views(cls, *given)
        del made.arrays["input"]
        return made

    monkeypatch.setattr(Mean, "views", classmethod(without))
    with pytest.raises(TypeError, match="the views of mean lack the array 'input'"):
        run(make(tiny, method="mean"))


def test_the_next_command_names_the_method_beside_another_methods_pretraining(tiny, mean):
    run(make(tiny))
    assert "-tr PCRLFinetuneTrainer -p" in make(tiny)._next_command("FINAL")
    second = make(tiny, method="mean")
    run(second)
    assert "-tr PCRLFinetuneTrainer_mean -p" in second._next_command("FINAL")
    assert "-tr PCRLFinetuneTrainer_pcrlv2 -p" in make(tiny)._next_command("FINAL")
    for method in ("pcrlv2", "mean"):
        assert checkpoint.read(str(folder_of(tiny, method=method) / checkpoint.FINAL))["method"] == method


def test_insufficient_memory_ends_with_a_sentence(tiny, monkeypatch):
    trainer = make(tiny)
    trainer.initialize()

    def step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(trainer.stepper, "_step", step)
    with pytest.raises(UserError, match=r"suffice for a step of 4 samples \(CUDA out of .* smaller -batch_size"):
        trainer.run_training()


def test_stock_nnunet_loads_the_file_as_pretrained_weights(tiny):
    trainer = make(tiny)
    run(trainer)
    network = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.label_manager.num_segmentation_heads
    )
    load_pretrained_weights(network, str(folder_of(tiny) / checkpoint.FINAL))
    assert checkpoint.encoder_hash(network.encoder) == final(tiny)["encoder_hash"]


RESENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"


def res_enc_plan():
    """The tiny plan with another network."""
    plan = make_plan()
    architecture = plan["configurations"]["3d_fullres"]["architecture"]
    kwargs = architecture["arch_kwargs"]
    kwargs["n_blocks_per_stage"] = kwargs.pop("n_conv_per_stage")
    architecture["network_class_name"] = RESENC
    return plan


# nnU-Net warns: the main branch names the network without its module, so nnU-Net searches for it.
@pytest.mark.filterwarnings("ignore:Network class .* not found:UserWarning")
@pytest.mark.parametrize("plan", [make_plan(), res_enc_plan()], ids=["PlainConv", "ResEnc"])
def test_nnunets_main_branch_rebuilds_the_encoder_from_the_file_alone(tiny, plan):
    """Like its commands: build a network from the plan in the file, and load the weights strictly into its parts."""
    trainer = make(tiny, plan=plan)
    trainer.initialize()
    with torch.no_grad():
        for parameter in trainer.plan_network.parameters():
            parameter.copy_(torch.randn_like(parameter))
    path = str(tiny.folder / checkpoint.FINAL)
    checkpoint.write(path, trainer.final_content())
    settings, patch_size = trainer.settings, list(trainer.configuration_manager.patch_size)
    del trainer, plan

    content = torch.load(path, weights_only=True)
    weights, adaptation = content["network_weights"], content["nnssl_adaptation_plan"]
    assert all(tensor.device.type == "cpu" for tensor in weights.values())  # the branch moves them to no device
    pretrained_on = next(iter(adaptation["pretrain_plan"]["configurations"].values()))
    for_the_plan = {  # `pretrain_info`, which becomes a part of a plan's JSON
        **{key: adaptation[key] for key in ("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe")},
        "pt_num_in_channels": adaptation["pretrain_num_input_channels"],
        "pt_used_patchsize": pretrained_on["patch_size"],
        "pt_recommended_downstream_patchsize": adaptation["recommended_downstream_patchsize"],
        "citations": content["citations"],
        "pt_architecture_kwargs": adaptation["architecture_kwargs"],
        "spacing": pretrained_on["spacing"],
        "architecture": adaptation["architecture_plans"],
    }
    assert json.loads(json.dumps(for_the_plan)) == for_the_plan
    assert for_the_plan["spacing"] == [1, 1, 1]
    assert for_the_plan["pt_used_patchsize"] == list(settings.own.views.global_input_size)
    assert for_the_plan["pt_recommended_downstream_patchsize"] == patch_size
    assert all(citation.keys() >= {"type", "name", "apa_citations"} for citation in for_the_plan["citations"])
    for kwargs in (for_the_plan["pt_architecture_kwargs"], content["architecture_kwargs"]):  # read for the stages
        assert kwargs["n_stages"] == 3
        assert kwargs["kernel_sizes"] == [[3, 3, 3]] * 3

    architecture = for_the_plan["architecture"]
    network = get_network_from_plans(
        architecture["arch_class_name"],
        architecture["arch_kwargs"],
        architecture["arch_kwargs_requiring_import"],
        for_the_plan["pt_num_in_channels"],
        2,
        allow_init=True,
        deep_supervision=False,
    )
    for theirs, ours in (("key_to_encoder", network.key_to_encoder), ("key_to_stem", network.key_to_stem)):
        prefix = f"{for_the_plan[theirs]}."
        part = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        network.get_submodule(ours).load_state_dict(part)  # strictly
    assert checkpoint.encoder_hash(network.encoder) == content["encoder_hash"]
    assert all(f"{name}.weight" in weights for name in for_the_plan["keys_to_in_proj"])
    assert for_the_plan["key_to_lpe"] is None


def supervised(tiny, fold=0):
    """A checkpoint of nnU-Net's own training, in its own format."""
    stock = nnUNetTrainer(
        {**make_plan(), "continue_training": False}, "3d_fullres", fold, tiny.dataset_json, torch.device("cpu")
    )
    stock.initialize()
    stock.logger.log("mean_fg_dice", np.float32(0.5), 0)
    path = os.path.join(stock.output_folder, "checkpoint_final.pth")
    stock.logger.log("epoch_end_timestamps", 1.0, 0)
    stock.save_checkpoint(path)
    return path, stock.network.encoder


def encoder_hash_of(method):
    return checkpoint.encoder_hash(method.encoder)


@pytest.mark.parametrize("kind", ["ours", "nnU-Net's"])
def test_it_starts_from_another_checkpoints_encoder(tiny, kind, monkeypatch):
    if kind == "ours":
        run(make(tiny, fold=0, seed=3))
        path = str(folder_of(tiny, 0) / checkpoint.FINAL)
        wanted = checkpoint.read(path)["encoder_hash"]
    else:
        path, encoder = supervised(tiny)
        wanted = checkpoint.encoder_hash(encoder)
    trainer = make(tiny, fold=1, init=path)
    followed = []
    with monkeypatch.context() as patch:
        patch.setattr(trainer.method, "after_loading", lambda method: followed.append(encoder_hash_of(method)))
        trainer.on_train_start()
    trainer.dataloader_train.close()
    assert followed == [wanted]  # a momentum copy would get these weights
    fresh = make(tiny, fold=1)
    fresh.initialize()
    decoders = [made.plan_network.decoder.transpconvs.state_dict() for made in (trainer, fresh)]
    assert all(torch.equal(value, decoders[1][name]) for name, value in decoders[0].items())  # decoder not loaded
    assert checkpoint.encoder_hash(trainer.plan_network.encoder) == wanted
    assert checkpoint.encoder_hash(trainer.network.encoder) == wanted
    if kind == "ours":  # decoder and heads are loaded, too
        heads = checkpoint.read(path)["method_weights"]
        now = trainer.network.state_dict()
        assert all(torch.equal(now[name], tensor) for name, tensor in heads.items())
    else:
        log = Path(trainer.log_file)  # there may be another trainer's log
        assert "does not list the cases that it was trained on" in log.read_text()
        assert trainer.final_content()["all_cases_known"] is False  # fine-tuning will report it


def test_a_continued_second_pretraining_lists_the_first_ones_cases_as_seen(tiny, monkeypatch):
    run(make(tiny, fold=0))
    path = str(folder_of(tiny, 0) / checkpoint.FINAL)
    trainer = make(tiny, fold=1, init=path)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "on_any_rank", lambda *_: trainer.step == 1)  # within the first epoch
        with pytest.raises(SystemExit):
            run(trainer)
    resumed = make(tiny, fold=1, continues=True, init=path)  # -init is not loaded again: the state has the weights
    resumed.load_checkpoint(str(folder_of(tiny, 1) / checkpoint.LATEST))
    monkeypatch.setattr(pretrain, "load_initial", None)  # calling it would fail
    run(resumed)
    content = final(tiny, 1)
    assert {case["name"] for case in content["cases"]} == {f"case_{i}" for i in range(4)}
    assert content["init"]["checkpoint"] == path
    assert content["init"]["encoder_share"] == 1
    assert content["all_cases_known"] is True


def test_a_fitted_checkpoints_decoder_of_other_stages_is_not_loaded(tiny):
    """The fitted network has the plan's stages, but its decoder has the stages of the original pretraining."""
    deeper = make(tiny, plan=make_plan(features=(4, 8, 8, 8)))
    deeper.initialize()
    same = make(tiny, fold=0)
    same.initialize()
    content = {**same.final_content(), "method_weights": deeper.final_content()["method_weights"]}
    path = tiny.folder.parent / "fitted.pth"
    checkpoint.write(str(path), content)
    trainer = make(tiny, fold=1, init=str(path))
    trainer.initialize()
    before = {name: tensor.clone() for name, tensor in trainer.network.decoder.state_dict().items()}
    load_initial(str(path), trainer.plan_network, trainer.network, trainer.request.plan)
    assert checkpoint.encoder_hash(trainer.plan_network.encoder) == content["encoder_hash"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.network.decoder.state_dict().items())


def test_init_says_that_another_methods_pretraining_gives_its_encoder_alone(tiny):
    trainer = make(tiny)
    trainer.initialize()
    said = []
    for method in ("pcrlv2", "mae"):
        path = str(tiny.folder.parent / f"{method}.pth")
        checkpoint.write(path, {**trainer.final_content(), "method": method})
        said.append(load_initial(path, trainer.plan_network, trainer.network, trainer.request.plan)[1])
    own, other = said
    assert len(own) == 1
    assert other[1] == (
        "This is a pretraining by mae, so only its encoder is taken over; a pretraining by pcrlv2 fits as a whole."
    )


def test_a_checkpoint_that_cannot_load_stops_before_anything_is_trained(tiny):
    other = tiny.folder.parent / "other.pth"
    checkpoint.write(str(other), {"format": checkpoint.FORMAT, "network_weights": {}})
    with pytest.raises(UserError, match=r"-init .*other.pth: the checkpoint has no encoder with stages"):
        make(tiny, init=str(other)).run_training()


def test_the_encoder_learns_and_the_rest_is_listed_as_random(tiny):
    trainer = make(tiny)
    trainer.initialize()
    start = {name: tensor.clone() for name, tensor in trainer.plan_network.state_dict().items()}
    run(trainer)
    content = final(tiny)
    random = set(content["random_keys"])
    changed = {name for name, tensor in content["network_weights"].items() if not torch.equal(tensor, start[name])}
    weights = {name for name, tensor in start.items() if tensor.ndim > 1}
    assert changed & random == set()
    assert weights - random <= changed
    assert not any(name.startswith(("encoder.", "decoder.encoder.")) for name in random)
    assert any(name.startswith("decoder.seg_layers") for name in random)


def test_the_final_file_describes_the_pretraining(tiny):
    run(make(tiny, seed=5))
    content = final(tiny)
    assert content["finished"] is True
    assert (content["method"], content["fold"], content["seed"], content["epochs"]) == ("pcrlv2", "all", 5, 2)
    assert content["settings"]["batch_size"] == 4
    assert [case["name"] for case in content["cases"]] == [f"case_{i}" for i in range(4)]
    assert len({case["sha256"] for case in content["cases"]}) == 4
    assert np.isfinite(content["loss"])
    assert content["plans_hash"] == checkpoint.plans_hash(make_plan(finetune={"epochs": 3}))
    other = make_plan()
    other["configurations"]["3d_fullres"]["spacing"] = [5, 1, 1]
    assert content["plans_hash"] != checkpoint.plans_hash(other)
    for citation in content["citations"]:  # nnU-Net prints both
        assert citation["type"]
        assert citation["name"]
        assert all("PCRL" in text or "Zhou" in text for text in citation["apa_citations"])
    assert {"torch", "nnunetv2", "pcrl_nnunet"} <= set(content["versions"])
    assert content["nnssl_adaptation_plan"]["key_to_encoder"] == "encoder.stages"


def test_a_folds_validation_cases_are_left_out_without_changing_the_split_file(tiny):
    split_file = tiny.folder / "splits_final.json"
    before = split_file.read_bytes()
    run(make(tiny, fold=0, epochs=1))
    assert [case["name"] for case in final(tiny, 0)["cases"]] == tiny.splits[0]["train"]
    assert split_file.read_bytes() == before


def test_folds_without_a_split_file_match_nnunets_later_split(tiny):
    for i in (4, 5):
        image = np.random.default_rng(i).normal(size=(1, 14, 14, 14)).astype(np.float32)
        blosc2.asarray(image, urlpath=str(tiny.data / f"case_{i}.b2nd"))
    (tiny.folder / "splits_final.json").unlink()
    trainer = make(tiny, fold=1)
    trainer.initialize()
    assert not (tiny.folder / "splits_final.json").exists()
    for path in tiny.data.glob("case_[45].b2nd"):
        shutil.copy(tiny.data / "case_0_seg.b2nd", path.with_name(f"{path.stem}_seg.b2nd"))
        shutil.copy(tiny.data / "case_0.pkl", path.with_suffix(".pkl"))
    stock = nnUNetTrainer(
        {**make_plan(), "continue_training": False}, "3d_fullres", 1, tiny.dataset_json, torch.device("cpu")
    )
    assert [case.name for case in trainer.cases] == sorted(stock.do_split()[0])


def test_a_fold_that_does_not_exist_is_named(tiny):
    with pytest.raises(UserError, match=r"fold 7 is not among the folds of .*splits_final.json; give one of 0, 1"):
        make(tiny, fold=7).initialize()


def test_unlabelled_cases_are_used_too(tiny):
    folder = unlabelled_folder(str(tiny.folder), "nnUNetPlans_3d_fullres")
    shutil.copytree(tiny.data, folder, ignore=shutil.ignore_patterns("*_seg*", "*.pkl", "case_[123]*"))
    trainer = make(tiny)
    trainer.initialize()
    assert len(trainer.cases) == 5
    assert trainer.cases[-1].path.startswith(folder)


def test_unlabelled_cases_alone_suffice_without_folds(tiny):
    tiny.data.rename(unlabelled_folder(str(tiny.folder), "nnUNetPlans_3d_fullres"))
    run(make(tiny, epochs=1))
    assert [case["name"] for case in final(tiny)["cases"]] == [f"case_{i}" for i in range(4)]
    with pytest.raises(UserError, match=r"fold 0 was asked for, but .* has only unlabelled cases.*; leave -f out"):
        make(tiny, fold=0)
    tiny.data.mkdir()  # a failed preprocessing leaves an empty folder
    with pytest.raises(UserError, match="no preprocessed images in"):
        make(tiny)


def test_a_folder_without_usable_unlabelled_cases_is_ignored(tiny):
    folder = tiny.folder / "nnUNetPlans_3d_fullres_unlabelled"
    folder.mkdir()
    (folder / "bad_cases.txt").write_text("all of them")
    assert len(make(tiny).cases) == 4


def test_a_case_that_is_not_finite_stops_the_training_and_is_named(tiny):
    path = next(case.path for case in find_cases(str(tiny.data)) if case.name == "case_2")
    array = blosc2.open(path)[:]
    array[0, 7, 7, 7] = np.nan
    blosc2.asarray(array, urlpath=path, mode="w")
    with pytest.raises(UserError, match="case case_2 has voxels that are not finite"):
        run(make(tiny, epochs=20))


@pytest.mark.parametrize("value", [0.0, -3.5])
def test_constant_cases_give_finite_losses_and_weights(tiny, value):
    for case in find_cases(str(tiny.data))[:2]:
        blosc2.asarray(np.full(blosc2.open(case.path).shape, value, np.float32), urlpath=case.path, mode="w")
    log = run(make(tiny, epochs=2, iters_per_epoch=6))
    assert np.isfinite(log).all()
    assert all(torch.isfinite(tensor).all() for tensor in final(tiny)["network_weights"].values())


def test_a_case_that_disappears_at_the_end_does_not_fail_the_training(tiny):
    trainer = make(tiny, epochs=1)
    on_epoch_end = trainer.on_epoch_end
    trainer.on_epoch_end = lambda bar: (on_epoch_end(bar), (tiny.data / "case_1.b2nd").unlink())
    run(trainer)
    assert [case["sha256"] is None for case in final(tiny)["cases"]] == [False, True, False, False]


def test_a_non_finite_loss_stops_before_the_update(tiny):
    trainer = make(tiny)
    trainer.initialize()
    trainer.dataloader_train = trainer.get_dataloaders()
    batch = next(trainer.dataloader_train)
    weights = dict(trainer.network.named_parameters())
    before = checkpoint.encoder_hash(weights)
    batch["target"][0, 0, 0, 0, 0, 0] = np.inf
    with pytest.raises(UserError, match=r"the loss of step 3 is inf; .* cases case_\d"):
        trainer.train_step(batch, 3)
    assert checkpoint.encoder_hash(weights) == before
    batch["target"][0, 0, 0, 0, 0, 0] = 0
    trainer.train_step(batch, 3)
    assert checkpoint.encoder_hash(weights) != before


def test_a_non_finite_gradient_stops_before_the_update(tiny):
    trainer = make(tiny)
    trainer.initialize()
    trainer.dataloader_train = trainer.get_dataloaders()
    before = checkpoint.encoder_hash(trainer.network.encoder)
    next(trainer.network.encoder.parameters()).register_hook(lambda gradient: gradient * np.inf)
    with pytest.raises(UserError, match=r"the gradient of step 3 is (inf|nan); .* cases case_\d"):
        trainer.train_step(next(trainer.dataloader_train), 3)
    assert checkpoint.encoder_hash(trainer.network.encoder) == before


def test_settings_of_fine_tuning_may_change_while_a_pretraining_is_interrupted(tiny):
    trainer = make(tiny)
    trainer.initialize()
    latest = str(folder_of(tiny) / checkpoint.LATEST)
    trainer.save_checkpoint(latest)
    make(tiny, plan=make_plan(finetune={"epochs": 7})).load_checkpoint(latest)


def test_the_trainers_docstring_lists_its_overrides():
    own = {
        name for name, value in vars(PCRLPretrainTrainer).items() if callable(value) and hasattr(nnUNetTrainer, name)
    }
    listed = PCRLPretrainTrainer.__doc__.split("Overrides: ")[1].split(". ")[0]
    assert own - {"__doc__"} == set(re.findall(r"\w+", listed))


def test_the_callers_plan_is_not_changed(tiny):
    plan = make_plan(pretrain={"seed": 4})
    before = json.dumps(plan)
    run(make(tiny, plan=plan, epochs=1))
    assert json.dumps(plan) == before


def test_nnunets_command_names_the_command_to_use_instead(tiny):
    plan = {**make_plan(), "continue_training": False}
    with pytest.raises(SystemExit, match="run pcrl_nnunet_pretrain -d Dataset999_Tiny -c 3d_fullres -p nnUNetPlans"):
        PCRLPretrainTrainer(plan, "3d_fullres", 0, tiny.dataset_json, torch.device("cpu"))
    assert not tiny.results.exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_losses_do_not_depend_on_the_number_of_loading_processes(tiny, monkeypatch, workers):
    torch.set_num_threads(1)
    expected = run(make(tiny, epochs=1))
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    assert run(make(tiny, epochs=1)) == expected
