import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case, fingerprint
from pcrl_nnunet.methods import PCRLv2
from pcrl_nnunet.transfer import weights as transfer

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESENC = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
NEEDS_IMPORT = ["conv_op", "norm_op", "dropout_op", "nonlin"]


def arch_kwargs(name: str = PLAIN, dim: int = 3, features: Sequence[int] = (4, 8, 8), **changes: Any) -> dict[str, Any]:
    blocks = "n_conv_per_stage" if name == PLAIN else "n_blocks_per_stage"
    n = len(features)
    return {
        "n_stages": n,
        "features_per_stage": list(features),
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[3] * dim] * n,
        "strides": [[1] * dim] + [[2] * dim] * (n - 1),
        blocks: [2] * n,
        "n_conv_per_stage_decoder": [1] * (n - 1),
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
        **changes,
    }


def build(name: str = PLAIN, channels: int = 1, **changes: Any) -> Any:
    return get_network_from_plans(name, arch_kwargs(name, **changes), NEEDS_IMPORT, channels, 2, deep_supervision=True)


def content_of(network: Any, channels: int = 1, name: str = PLAIN, **changes: Any) -> dict[str, Any]:
    """What a pretraining writes, as far as transfer reads it; no parameter has its initial value."""
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.add_(torch.rand_like(parameter))
    state = copy.deepcopy(network.state_dict())  # aliases stay aliases
    return {
        "network_weights": state,
        "random_keys": [key for key in state if key.startswith("decoder.") and not key.startswith("decoder.encoder.")],
        "num_input_channels": channels,
        "cases": [],
        "nnssl_adaptation_plan": {
            "architecture_plans": {
                "arch_class_name": name.rsplit(".", 1)[-1],
                "arch_kwargs": arch_kwargs(name, **changes),
                "arch_kwargs_requiring_import": NEEDS_IMPORT,
            }
        },
    }


def encoder_of(network: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.encoder.state_dict().items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", [PLAIN, RESENC])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_encoder_becomes_the_checkpoints_and_the_decoder_stays(name: str, dim: int) -> None:
    pretrained, network = build(name, dim=dim), build(name, dim=dim)
    decoder = copy.deepcopy(network.decoder.seg_layers.state_dict())
    report = transfer.load_encoder(network, content_of(pretrained, name=name, dim=dim))
    assert equal(encoder_of(network), encoder_of(pretrained))
    assert equal(network.decoder.seg_layers.state_dict(), decoder)
    assert report.encoder_share == 1
    assert not report.adapted
    assert not report.skipped
    assert not report.notes


@pytest.mark.parametrize("name", [PLAIN, RESENC])
def test_the_report_counts_every_parameter_once(name: str) -> None:
    network = build(name)
    report = transfer.load_encoder(network, content_of(build(name), name=name))
    assert sum(report.loaded.values()) == sum(p.numel() for p in network.encoder.parameters())
    everything = sum(p.numel() for p in network.parameters())
    assert sum(report.loaded.values()) + sum(report.random.values()) == everything
    assert report.as_dict()["totals"]["loaded"] == {
        "tensors": len(list(network.encoder.parameters())),
        "elements": sum(p.numel() for p in network.encoder.parameters()),
    }


def test_a_compiled_network_is_loaded_in_place() -> None:
    pretrained, network = build(), build()
    compiled: Any = torch.compile(network, backend="eager")
    transfer.load_encoder(compiled, content_of(pretrained))
    assert equal(encoder_of(network), encoder_of(pretrained))


def test_a_network_wrapped_by_ddp_is_loaded_in_place(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        pretrained, network = build(), build()
        wrapped = DistributedDataParallel(torch.compile(network, backend="eager"))
        transfer.load_encoder(wrapped, content_of(pretrained))
        assert equal(encoder_of(network), encoder_of(pretrained))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("given", "wanted"), [(1, 4), (4, 1), (2, 3)])
def test_identical_input_channels_give_the_same_response_after_adapting(given: int, wanted: int) -> None:
    weight, image = torch.randn(5, given, 3, 3), torch.randn(2, 1, 8, 8)
    adapted = transfer.adapt_input_channels(weight, wanted)
    assert adapted.shape == (5, wanted, 3, 3)
    before = torch.nn.functional.conv2d(image.expand(-1, given, -1, -1), weight)
    after = torch.nn.functional.conv2d(image.expand(-1, wanted, -1, -1), adapted)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_one_channel_is_repeated_and_divided() -> None:
    weight = torch.randn(5, 1, 3, 3, 3)
    torch.testing.assert_close(transfer.adapt_input_channels(weight, 4), weight.repeat(1, 4, 1, 1, 1) / 4)


def test_the_first_channels_are_taken_one_for_one_and_further_ones_get_zero() -> None:
    weight = torch.randn(5, 3, 3, 3)
    assert torch.equal(transfer.adapt_input_channels(weight, 2, how="first"), weight[:, :2])
    more = transfer.adapt_input_channels(weight, 4 + 1, label_channels=1, how="first")
    assert torch.equal(more[:, :3], weight)
    assert not more[:, 3:].any()


@pytest.mark.parametrize("wanted", [1, 4])
def test_every_channel_gets_the_mean(wanted: int) -> None:
    weight = torch.randn(5, 2, 3, 3)
    adapted = transfer.adapt_input_channels(weight, wanted, how="mean")
    assert adapted.shape == (5, wanted, 3, 3)
    for channel in range(wanted):
        torch.testing.assert_close(adapted[:, channel], (weight[:, 0] + weight[:, 1]) / 2)


@pytest.mark.parametrize("how", ["repeat", "first", "mean"])
def test_as_many_channels_stay_what_they_are(how: str) -> None:
    weight = torch.randn(5, 3, 3, 3)
    assert torch.equal(transfer.adapt_input_channels(weight, 3, how=how), weight)


def test_a_longer_kernel_is_the_same_convolution_also_at_the_border_and_back_it_is_exact() -> None:
    weight, image = torch.randn(5, 2, 1, 3, 3), torch.randn(1, 2, 6, 6, 6)
    longer = transfer.adapt_kernel_size(weight, (3, 3, 5))
    assert longer.shape == (5, 2, 3, 3, 5)
    conv = torch.nn.functional.conv3d
    torch.testing.assert_close(conv(image, longer, padding="same"), conv(image, weight, padding="same"))
    assert torch.equal(transfer.adapt_kernel_size(longer, (1, 3, 3)), weight)


@pytest.mark.parametrize(("given", "wanted"), [(3, 1), (5, 3), (7, 1), (4, 2)])
def test_a_shorter_kernel_responds_the_same_where_the_image_does_not_change_along_it(given: int, wanted: int) -> None:
    weight, image = torch.randn(5, 2, given, 3, 3), torch.randn(1, 2, 1, 6, 6).expand(-1, -1, 12, -1, -1)
    shorter = transfer.adapt_kernel_size(weight, (wanted, 3, 3))
    assert shorter.shape == (5, 2, wanted, 3, 3)
    conv = torch.nn.functional.conv3d
    before, after = conv(image, weight), conv(image, shorter)  # not padded: no border
    torch.testing.assert_close(after[:, :, :1], before[:, :, :1], rtol=1e-4, atol=1e-5)


def test_from_an_even_kernel_to_an_odd_one_there_is_no_way() -> None:
    weight = torch.randn(5, 2, 2, 3, 3)
    assert torch.equal(transfer.adapt_kernel_size(weight, (3, 3, 3)), weight)


@pytest.mark.parametrize("name", [PLAIN, RESENC])
def test_other_kernels_are_adapted_and_reported_tensor_by_tensor(name: str) -> None:
    flat = {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}
    pretrained, network = build(name, **flat), build(name)
    report = transfer.load_encoder(network, content_of(pretrained, name=name, **flat))
    assert report.encoder_share == 1
    assert report.adapted.keys() == {
        key for key, value in pretrained.encoder.named_parameters(prefix="encoder") if value.shape[2:] == (1, 3, 3)
    }
    assert all("kernel 1x3x3 made 3x3x3" in report.notes[key] for key in report.adapted)
    image = torch.randn(1, 1, 16, 16, 16)
    for a, b in zip(pretrained.encoder(image), network.encoder(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_stages_that_the_checkpoint_lacks_stay_random_if_asked_for() -> None:
    shallower, network = build(features=(4, 8)), build(features=(4, 8, 8))
    deepest = copy.deepcopy(network.encoder.stages[2].state_dict())
    report = transfer.load_encoder(network, content_of(shallower), allow_partial=True)
    assert equal(network.encoder.stages[2].state_dict(), deepest)
    assert equal(network.encoder.stages[1].state_dict(), shallower.encoder.stages[1].state_dict())
    missing = sum(p.numel() for p in network.encoder.stages[2].parameters())
    assert report.encoder_share == 1 - missing / sum(p.numel() for p in network.encoder.parameters())


def test_the_table_has_every_tensor_of_both_sides_once() -> None:
    deeper, network = build(features=(4, 8, 8)), build(features=(4, 8), channels=2)
    rows = transfer.load_encoder(network, content_of(deeper)).rows()
    ours = {name for name, _ in network.named_parameters(remove_duplicate=True)}
    assert {name for name, what, *_ in rows if what != "skipped"} == ours
    assert len(rows) == len({name for name, *_ in rows})
    assert {what for _, what, *_ in rows} == {"loaded", "adapted", "skipped", "random"}
    assert [how for _, what, _, how in rows if what == "adapted"] == ["1 input channels made 2"]


def plan_with(name: str = PLAIN, plans_name: str = "P", **changes: Any) -> dict[str, Any]:
    architecture = {"network_class_name": name, "arch_kwargs": arch_kwargs(name, **changes), "_kw_requires_import": []}
    configuration = "2d" if changes.get("dim") == 2 else "3d_fullres"
    return {"plans_name": plans_name, "configurations": {configuration: {"architecture": architecture}}}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (RESENC, {}, r"of a ResidualEncoderUNet in 3D with 4, 8, 8 features, 3d_fullres of P of a PlainConvUNet in 3D"),
        (
            PLAIN,
            {"dim": 2},
            r"of a PlainConvUNet in 2D with 4, 8, 8 features, 3d_fullres of P of a PlainConvUNet in 3D",
        ),
        (PLAIN, {"features": (4, 8, 16)}, r"with 4, 8, 16 features, 3d_fullres of P of .* with 4, 8, 8 features"),
    ],
)
def test_what_cannot_load_is_refused_and_a_plan_that_fits_is_named(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    content, plan = content_of(build(name, **changes), name=name, **changes), plan_with()
    for file, other in (("P", plan), ("Q", plan_with(name, "Q", **changes))):
        (tmp_path / f"{file}.json").write_text(json.dumps(other))
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    for file, key in (("A", "pcrl_fitted"), ("B", "pcrl_target")):  # of transfers: nothing to choose
        (tmp_path / f"{file}.json").write_text(json.dumps({**plan_with(name, file, **changes), key: "something"}))
    configuration = "2d" if changes.get("dim") == 2 else "3d_fullres"
    with pytest.raises(UserError, match=rf"{message}.*it would load into -c {configuration} -p Q$"):
        transfer.check_architecture(content, plan, "3d_fullres", str(tmp_path))
    (tmp_path / "Q.json").unlink()
    with pytest.raises(UserError, match=rf"{message}.*none of the dataset's plans fits: it needs a "):
        transfer.check_architecture(content, plan, "3d_fullres", str(tmp_path))


def test_more_and_fewer_stages_can_load(tmp_path: Path) -> None:
    for features in ((4, 8), (4, 8, 8), (4, 8, 8, 16)):
        content = content_of(build(features=features), features=features)
        transfer.check_architecture(content, plan_with(), "3d_fullres", str(tmp_path))


def test_a_checkpoint_without_stages_is_refused(tmp_path: Path) -> None:
    content = {"network_weights": {"eva.blocks.0.weight": torch.zeros(2, 2)}}
    with pytest.raises(UserError, match="has no encoder with stages"):
        transfer.check_architecture(content, plan_with(), "3d_fullres", str(tmp_path))


@pytest.mark.parametrize("name", [PLAIN, RESENC])
def test_a_network_of_more_channels_takes_the_encoder(name: str) -> None:
    pretrained, network = build(name, channels=1), build(name, channels=4)
    report = transfer.load_encoder(network, content_of(pretrained, name=name))
    image = torch.randn(1, 1, 16, 16, 16)
    for a, b in zip(pretrained.encoder(image), network.encoder(image.expand(-1, 4, -1, -1, -1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert len(report.adapted) == 1
    assert report.encoder_share == 1


@pytest.mark.parametrize("given", [1, 3])
def test_label_channels_of_a_cascade_have_no_effect_at_first(given: int) -> None:
    """Also where image and label channels together are as many as the checkpoint's image channels."""
    pretrained, network = build(channels=given), build(channels=1 + 2)
    transfer.load_encoder(network, content_of(pretrained, channels=given), label_channels=2)
    image, labels = torch.randn(1, 1, 16, 16, 16), torch.ones(1, 2, 16, 16, 16)
    expected = pretrained.encoder(image.expand(-1, given, -1, -1, -1))
    for a, b in zip(expected, network.encoder(torch.cat([image, labels], 1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_encoder_that_is_not_covered_is_refused_and_nothing_is_copied() -> None:
    network = build(features=(4, 8, 8))
    before = encoder_of(network)
    with pytest.raises(UserError, match=r"covers \d+\.\d% of the encoder.*stages\.2.*\(16, .*\(8, .*allow_partial"):
        transfer.load_encoder(network, content_of(build(features=(4, 8, 16))))
    assert equal(encoder_of(network), before)


def test_what_fits_is_loaded_if_asked_for() -> None:
    pretrained, network = build(features=(4, 8, 16)), build(features=(4, 8, 8))
    report = transfer.load_encoder(network, content_of(pretrained), allow_partial=True)
    assert equal(network.encoder.stages[0].state_dict(), pretrained.encoder.stages[0].state_dict())
    assert 0 < report.encoder_share < 1
    assert set(report.skipped) == {name for name in report.random if name.startswith("encoder.")}
    assert f"{report.encoder_share:.1%}" in report.summary()


def test_deeper_stages_that_the_network_lacks_are_reported_as_skipped() -> None:
    deeper, network = build(features=(4, 8, 8)), build(features=(4, 8))
    report = transfer.load_encoder(network, content_of(deeper))
    assert report.encoder_share == 1
    assert sum(report.skipped.values()) == sum(p.numel() for p in deeper.encoder.stages[2].parameters())


def test_a_checkpoint_of_which_nothing_fits_is_refused_even_if_partial_loading_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"covers 0\.0%"):
        transfer.load_encoder(build(features=(4, 8)), content_of(build(features=(5, 9))), allow_partial=True)


def test_random_weights_of_a_checkpoint_do_not_count_as_pretrained() -> None:
    content = content_of(build())
    content["random_keys"] = [*content["random_keys"], *(k for k in content["network_weights"] if "stages.2" in k)]
    with pytest.raises(UserError, match="not in the checkpoint"):
        transfer.load_encoder(build(), content)


def test_other_strides_are_a_difference_although_every_weight_fits() -> None:
    content = content_of(build())
    kwargs = arch_kwargs(strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]])
    (difference,) = transfer.architecture_differences(content, PLAIN, kwargs)
    assert difference.startswith("strides: [[1, 1, 1], [2, 2, 2]")


def test_the_decoder_and_tuples_for_lists_are_no_difference() -> None:
    content = content_of(build())
    kwargs = arch_kwargs(n_conv_per_stage_decoder=[3, 3], features_per_stage=(4, 8, 8))
    assert transfer.architecture_differences(content, PLAIN, kwargs) == []
    assert transfer.architecture_differences(content, RESENC, kwargs) != []


SPELLINGS = [
    ("torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU"),
    (False, [False]),
    (3, [3, 3, 3]),
    ([3, [1, 3, 3]], [[3, 3, 3], (1, 3, 3)]),
    (3, [[3, 3, 3]] * 4),
    (1, 1.0),
    ((1, 2), [1, 2]),
    (1e-5, float(np.float32(1e-5))),
    (torch.tensor([1.0, 2.0]), [1, 2]),
    (None, {}),
    ({"eps": 1e-5, "inplace": True}, {"inplace": [True], "eps": 0.00001}),
    ("ZScoreNormalization", ["ZScoreNormalization"]),
]


@pytest.mark.parametrize(("a", "b"), SPELLINGS)
def test_two_spellings_of_one_setting_are_no_difference(a: Any, b: Any) -> None:
    assert transfer.same_setting(a, b)
    assert transfer.same_setting(b, a)


OTHERS = [
    ("torch.nn.LeakyReLU", "torch.nn.ReLU"),
    ("torch.nn.Conv2d", "torch.ao.nn.quantized.Conv2d"),
    ("their.LeakyReLU", "torch.nn.LeakyReLU"),
    (False, [False, True]),
    (3, [1, 3, 3]),
    ([1, 3, 3], [[1, 3, 3]] * 3),
    ([3, 3], [3, 3, 3]),
    (1, 1.001),
    (None, False),
    (None, []),
    (3, []),
    ({"eps": 1e-5}, {"eps": 1e-5, "affine": True}),
    ({"eps": 1e-5}, {"eps": 1e-4}),
    (["CTNormalization"], ["ZScoreNormalization"]),
]


@pytest.mark.parametrize(("a", "b"), OTHERS)
def test_other_settings_are_a_difference(a: Any, b: Any) -> None:
    assert not transfer.same_setting(a, b)
    assert not transfer.same_setting(b, a)


def test_a_networks_settings_in_another_spelling_are_no_difference() -> None:
    content = content_of(build())
    spelled = arch_kwargs(
        kernel_sizes=3, n_conv_per_stage=2, nonlin="torch.nn.modules.activation.LeakyReLU", dropout_op_kwargs={}
    )
    assert transfer.architecture_differences(content, PLAIN, spelled) == []
    content["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"] = spelled
    assert transfer.architecture_differences(content, PLAIN, arch_kwargs()) == []


@pytest.mark.parametrize("features", [(4, 8, 8), (4, 8)])
def test_the_summary_says_of_which_part_random_tensors_are(features: tuple[int, ...]) -> None:
    network = build()
    report = transfer.load_encoder(network, content_of(build(features=features)), allow_partial=True)
    found = re.findall(
        r"^  random +(\d+) tensors, +[\d,]+ parameters, (.*)$", report.summary(notes=False), re.MULTILINE
    )
    parts = {name: name.split(".")[0] for name, _ in network.named_parameters() if not name.startswith("decoder.enc")}
    decoder = [name for name, part in parts.items() if part == "decoder"]
    missing = [name for name in parts if name.startswith("encoder.stages.2.") and len(features) == 2]
    of_encoder = [(str(len(missing)), "of the encoder: the checkpoint has none that fit")] if missing else []
    assert found == [*of_encoder, (str(len(decoder)), "of nnU-Net's decoder: nothing pretrained is loaded for them")]
    hows = {name: how for name, kind, _, how in report.rows() if kind == "random"}
    assert {hows[name] for name in decoder} == {"nothing pretrained is loaded for them"}


def test_a_folds_own_pretraining_comes_before_that_on_all_cases_and_no_other_folds_is_taken() -> None:
    folders = [path.split("/")[-2] for path in transfer.candidates("results", "nnUNetPlans", "2d", 1)]
    assert folders == ["fold_1", "fold_all"]
    assert len(transfer.candidates("results", "nnUNetPlans", "2d", "all")) == 1


def test_cases_are_recognised_by_name_and_by_voxels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for name in ("a", "b", "c"):
        np.save(tmp_path / f"{name}.npy", rng.normal(size=(1, 4, 5, 6)).astype(np.float32))
        cases.append(Case(name, str(tmp_path / f"{name}.npy")))
    checkpoint = {
        "cases": [
            {"name": "a", "path": "Dataset001_X/folder/a.b2nd", "sha256": "of another plan's voxels"},
            {"name": "copy", "path": "Dataset002_Y/folder/copy.b2nd", "sha256": fingerprint(cases[1])},
            {"name": "c", "path": "Dataset002_Y/folder/c.b2nd", "sha256": "of another image"},
        ]
    }
    assert transfer.cases_seen(checkpoint, "Dataset001_X", cases) == ["a", "b (as copy)"]


@pytest.mark.parametrize("skip_connections", [False, True])
def test_of_the_pretrainings_decoder_what_fits_is_loaded_and_reported(skip_connections: bool) -> None:
    pretrained, network = build(), build()
    method = PCRLv2(pretrained.encoder, 1, skip_connections=skip_connections)
    with torch.no_grad():
        for parameter in method.decoder.parameters():
            parameter.copy_(torch.rand_like(parameter))
    content = content_of(pretrained)
    content["method_weights"] = method.state_dict()
    before = copy.deepcopy(network.decoder.state_dict())
    report = transfer.load_encoder(network, content)
    transfer.load_decoder(network, content, report)

    for ours, theirs in zip(network.decoder.transpconvs, method.decoder.upsample, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
    for i, (ours, theirs) in enumerate(zip(network.decoder.stages, method.decoder.blocks, strict=True)):
        weight, given = ours.convs[0].conv.weight, theirs.convs[0].conv.weight
        assert torch.equal(weight[:, : given.shape[1]], given)
        name = f"stages.{i}.convs.0.conv.weight"
        assert torch.equal(weight[:, given.shape[1] :], before[name][:, given.shape[1] :])
        assert f"decoder.{name}" in (report.loaded if skip_connections else report.adapted)
    assert set(report.random) == {f"decoder.seg_layers.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}
    assert not any(name.startswith("decoder.seg_layers") for name in report.notes)


@pytest.mark.parametrize(("theirs", "ours"), [((4, 8, 8, 8), (4, 8, 8)), ((4, 8, 8), (4, 8, 8, 8))])
def test_of_a_decoder_with_other_stages_the_levels_of_the_same_resolution_are_loaded(
    theirs: tuple[int, ...], ours: tuple[int, ...]
) -> None:
    pretrained, network = build(features=theirs), build(features=ours)
    method = PCRLv2(pretrained.encoder, 1)
    with torch.no_grad():
        for parameter in method.decoder.parameters():
            parameter.copy_(torch.rand_like(parameter))
    content = content_of(pretrained, features=theirs)
    content["method_weights"] = method.state_dict()
    report = transfer.load_encoder(network, content, allow_partial=True)
    transfer.load_decoder(network, content, report)
    for level in range(1, min(len(theirs), len(ours))):  # from full resolution
        assert torch.equal(network.decoder.transpconvs[-level].weight, method.decoder.upsample[-level].weight)


def test_copies_under_other_names_are_not_counted_as_skipped() -> None:
    deeper = build(features=(4, 8, 8))
    content, network = content_of(deeper), build(features=(4, 8))
    shared = transfer.load_encoder(network, content).as_dict()["totals"]
    content["network_weights"] = {name: tensor.clone() for name, tensor in content["network_weights"].items()}
    assert transfer.load_encoder(network, content).as_dict()["totals"] == shared


def test_what_nnssl_tells_of_its_data_is_compared_and_what_it_does_not_is_said() -> None:
    stated = {"spacing": [1, 1, 1], "patch_size": [160, 160, 160]}
    content = {
        "plans": None,
        "configuration": "onemmiso",
        "nnssl_adaptation_plan": {"pretrain_plan": {"configurations": {"onemmiso": stated}}},
    }
    plan = plan_with()
    plan["configurations"]["3d_fullres"] |= {"spacing": [1.0, 1.0, 1.0], "patch_size": [32, 32, 32]}
    patch, missing = transfer.data_differences(content, plan, "3d_fullres")
    assert patch == "patch_size: [160, 160, 160] in the checkpoint's plan, [32, 32, 32] in this one"
    assert missing == "the checkpoint does not state normalization_schemes, use_mask_for_norm"
