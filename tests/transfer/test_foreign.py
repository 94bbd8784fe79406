import argparse
import shlex
import warnings

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from pcrl_nnunet import checkpoint
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.transfer.foreign import read_encoder

RESENC = {
    "n_stages": 3, "features_per_stage": [4, 8, 8], "conv_op": nn.Conv3d, "kernel_sizes": [[3, 3, 3]] * 3,
    "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "n_blocks_per_stage": [1, 2, 2], "n_conv_per_stage_decoder": [1, 1],
    "conv_bias": True, "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True},
}  # fmt: skip


def of_nnssl(prefix="", **changes):
    """The form of nnssl's OpenMind models: a preset's name instead of an architecture, and no plan of ours."""
    network = ResidualEncoderUNet(input_channels=1, num_classes=1, deep_supervision=False, **RESENC)
    return network, {
        "network_weights": {prefix + name: tensor for name, tensor in network.state_dict().items()},
        "citations": [{"type": "Pretraining Method", "name": "MAE", "apa_citations": ["He et al."]}],
        "nnssl_adaptation_plan": {
            "architecture_plans": {
                "arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None
            },
            "pretrain_plan": {"dataset_name": "Dataset745_OpenMind", "configurations": {"onemmiso": {}}},
            "pretrain_num_input_channels": 1,
            "recommended_downstream_patchsize": (160, 160, 160),
            "key_to_encoder": f"{prefix}encoder.stages",
            "key_to_stem": f"{prefix}encoder.stem",
            "keys_to_in_proj": (f"{prefix}encoder.stem.convs.0.conv", f"{prefix}encoder.stem.convs.0.all_modules.0"),
            "key_to_lpe": None,
        },
        **changes,
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_model_of_nnssl_is_read_with_its_encoder_under_nnunets_names(tmp_path, prefix):
    network, given = of_nnssl(prefix)
    torch.save(given, tmp_path / "openmind.pth")
    read = read_encoder(str(tmp_path / "openmind.pth"))
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(read["network_weights"][f"encoder.{name}"], tensor)
    assert not any(name.startswith("decoder") for name in read["network_weights"])
    assert read["num_input_channels"] == 1
    assert (read["method"], read["datasets"], read["configuration"]) == ("nnssl", ["Dataset745_OpenMind"], "onemmiso")
    assert read["citations"] == given["citations"]


def of_nnunet(channels=1, **changes):
    """The form of nnU-Net's checkpoint of a cascade's supervised training."""
    network = ResidualEncoderUNet(input_channels=channels, num_classes=1, deep_supervision=False, **RESENC)
    architecture = {"network_class_name": "x.ResidualEncoderUNet", "arch_kwargs": {}, "_kw_requires_import": []}
    plans = {"dataset_name": "Dataset001_X", "configurations": {"3d_cascade_fullres": {"architecture": architecture}}}
    dataset_json = {"channel_names": {"0": "CT"}}
    arguments = {"plans": plans, "configuration": "3d_cascade_fullres", "fold": 0, "dataset_json": dataset_json}
    weights = network.state_dict()
    return network, {"network_weights": weights, "init_args": arguments, "trainer_name": "T", **changes}


def of_ours():
    network = ResidualEncoderUNet(input_channels=1, num_classes=1, deep_supervision=False, **RESENC)
    random = [name for name in network.state_dict() if name.startswith("decoder.")]
    return network, {
        "format": checkpoint.FORMAT,
        "network_weights": network.state_dict(),
        "random_keys": random,
    }


WRAPPED = {  # DataParallel names tensors as DDP does
    "DDP": nn.DataParallel,
    "compile": lambda network: torch.compile(network, backend="eager"),
    "DDP in compile": lambda network: torch.compile(nn.DataParallel(network), backend="eager"),
    "compile in DDP": lambda network: nn.DataParallel(torch.compile(network, backend="eager")),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("kind", [of_ours, of_nnssl, of_nnunet])
def test_names_of_ddp_and_compile_are_stripped(tmp_path, kind, wrapped):
    network, given = kind()
    torch.save(given, tmp_path / "plain.pth")
    plain = read_encoder(str(tmp_path / "plain.pth"))
    weights = WRAPPED[wrapped](network).state_dict()
    names = {name: other for name, other in zip(given["network_weights"], weights, strict=True)}
    assert not names.keys() & set(names.values())
    given["network_weights"] = weights
    if "random_keys" in given:
        given["random_keys"] = [names[name] for name in given["random_keys"]]
    torch.save(given, tmp_path / "wrapped.pth")
    read = read_encoder(str(tmp_path / "wrapped.pth"))
    assert checkpoint.encoder_hash(read.pop("network_weights")) == checkpoint.encoder_hash(plain.pop("network_weights"))
    assert read == plain


def test_the_keys_of_an_adaptation_plan_may_have_the_names_of_ddp_too(tmp_path):
    network, given = of_nnssl("module.")
    torch.save(given, tmp_path / "c.pth")
    weights = read_encoder(str(tmp_path / "c.pth"))["network_weights"]
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}
    assert checkpoint.encoder_hash(encoder) == checkpoint.encoder_hash(network.encoder)


def test_a_file_with_two_networks_under_one_name_is_refused(tmp_path):
    _, given = of_ours()
    given["network_weights"] |= {f"module.{n}": t + 1 for n, t in given["network_weights"].items()}
    torch.save(given, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c.pth holds two different tensors encoder.stem\S+, with and without"):
        read_encoder(str(tmp_path / "c.pth"))


def pasted(message, program):
    """The words of the command in a message, split like by a shell."""
    return shlex.split(message[message.index(program) :])


def test_torchs_old_format_is_refused_with_a_line_that_converts_the_file(tmp_path):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    network, given = of_nnunet(logging={"scores": [np.float32(0.5)]})
    torch.save(given, folder / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old.pth is in torch's old format.*save it anew") as error:
        read_encoder(str(folder / "old.pth"))
    python, option, line = pasted(str(error.value), "python -c")
    assert (python, option) == ("python", "-c")
    exec(line, {})
    read = read_encoder(str(folder / "old_zip.pth"))
    assert checkpoint.encoder_hash(read["network_weights"]) == checkpoint.encoder_hash(network)
    with pytest.raises(SystemExit, match=r"Error: .*old_zip.pth exists"):
        exec(line, {})


def test_nnssls_script_is_named_if_the_adaptation_plan_is_missing(tmp_path):
    _, given = of_nnssl("backbone.")
    del given["nnssl_adaptation_plan"]
    given["init_args"] = {"plan": {"dataset_name": "Dataset745_OpenMind"}, "configuration_name": "onemmiso", "fold": 0}
    path = str(tmp_path / "of nnssl.pth")
    torch.save(given, path)
    with pytest.raises(UserError, match="is of nnssl and lacks the nnssl_adaptation_plan") as error:
        read_encoder(path)
    command = pasted(str(error.value).partition(" (give it")[0], "python -m")
    assert command[:3] == ["python", "-m", "nnssl.utilities.add_adaptation_plan"]
    parser = argparse.ArgumentParser()  # the same flags as nnssl's script
    for flag in ("-i", "-pl", "-o", "-arch", "-key_to_encoder", "-key_to_stem"):
        parser.add_argument(flag, required=True)
    parser.add_argument("-keys_to_in_proj", nargs="+", required=True)
    arguments = vars(parser.parse_args(command[3:]))
    assert arguments["i"] == path
    keys = of_nnssl("backbone.")[1]["nnssl_adaptation_plan"]
    for key in ("key_to_encoder", "key_to_stem", "keys_to_in_proj"):
        assert arguments[key] == (list(keys[key]) if isinstance(keys[key], tuple) else keys[key])


def test_only_image_channels_of_a_cascades_checkpoint_are_counted(tmp_path):
    torch.save(of_nnunet(channels=1 + 2)[1], tmp_path / "c.pth")
    assert read_encoder(str(tmp_path / "c.pth"))["num_input_channels"] == 1


def test_an_incomplete_nnssl_model_is_refused_in_a_sentence(tmp_path):
    torch.save({"network_weights": {}, "nnssl_adaptation_plan": ["not a block"]}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c.pth lacks what its kind should have"):
        read_encoder(str(tmp_path / "c.pth"))


@pytest.mark.parametrize("key", [None, "state_dict", "network_weights"])
def test_a_file_of_weights_alone_is_refused_as_such(tmp_path, key):
    weights = nn.Conv3d(1, 1, 1).state_dict()
    torch.save(weights if key is None else {"epoch": 3, key: weights}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=rf"holds only weights{rf' .under .{key}' if key else ','}.*take the file that"):
        read_encoder(str(tmp_path / "c.pth"))


def test_a_torchscript_program_is_refused_as_such(tmp_path):
    with warnings.catch_warnings(action="ignore"):  # torch deprecates TorchScript
        torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)), tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c.pth is a TorchScript program and was not run; expected"):
        read_encoder(str(tmp_path / "c.pth"))


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"network_weights": {"a": 1}}, [1, 2]])
def test_any_other_file_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"c.pth holds no "):
        read_encoder(str(tmp_path / "c.pth"))


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(3)])
def test_numbers_of_numpy_in_nnunets_logs_are_read(tmp_path, number):
    torch.save({**of_nnssl()[1], "logging": {"scores": [number]}}, tmp_path / "c.pth")
    assert read_encoder(str(tmp_path / "c.pth"))["method"] == "nnssl"
