import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from unets import PLAIN, RESENC, build, content_of

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.networks import Decoder
from pcrl_nnunet.transfer.weights import load_encoder, load_own_decoder, load_trained_decoder


def encoder_of(network: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in network.encoder.state_dict().items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", [PLAIN, RESENC])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_encoder_gets_the_checkpoints_weights_and_the_decoder_stays(name: str, dim: int) -> None:
    pretrained, network = build(name, dim=dim), build(name, dim=dim)
    decoder = copy.deepcopy(network.decoder.seg_layers.state_dict())
    report = load_encoder(network, content_of(pretrained, name=name, dim=dim))
    assert equal(encoder_of(network), encoder_of(pretrained))
    assert equal(network.decoder.seg_layers.state_dict(), decoder)
    assert report.encoder_share == 1
    assert not report.adapted
    assert not report.skipped
    assert not report.notes


@pytest.mark.parametrize("name", [PLAIN, RESENC])
def test_the_report_counts_every_parameter_once(name: str) -> None:
    network = build(name)
    report = load_encoder(network, content_of(build(name), name=name))
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
    load_encoder(compiled, content_of(pretrained))
    assert equal(encoder_of(network), encoder_of(pretrained))


def test_a_network_wrapped_by_ddp_is_loaded_in_place(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        pretrained, network = build(), build()
        wrapped = DistributedDataParallel(torch.compile(network, backend="eager"))
        load_encoder(wrapped, content_of(pretrained))
        assert equal(encoder_of(network), encoder_of(pretrained))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", [PLAIN, RESENC])
def test_other_kernels_are_adapted_and_reported_tensor_by_tensor(name: str) -> None:
    flat = {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}
    pretrained, network = build(name, **flat), build(name)
    report = load_encoder(network, content_of(pretrained, name=name, **flat))
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
    report = load_encoder(network, content_of(shallower), allow_partial=True)
    assert equal(network.encoder.stages[2].state_dict(), deepest)
    assert equal(network.encoder.stages[1].state_dict(), shallower.encoder.stages[1].state_dict())
    missing = sum(p.numel() for p in network.encoder.stages[2].parameters())
    assert report.encoder_share == 1 - missing / sum(p.numel() for p in network.encoder.parameters())


def test_the_table_has_every_tensor_of_both_sides_once() -> None:
    deeper, network = build(features=(4, 8, 8)), build(features=(4, 8), channels=2)
    rows = load_encoder(network, content_of(deeper)).rows()
    ours = {name for name, _ in network.named_parameters(remove_duplicate=True)}
    assert {name for name, what, *_ in rows if what != "skipped"} == ours
    assert len(rows) == len({name for name, *_ in rows})
    assert {what for _, what, *_ in rows} == {"loaded", "adapted", "skipped", "random"}
    assert [how for _, what, _, how in rows if what == "adapted"] == ["1 input channels made 2"]


@pytest.mark.parametrize("name", [PLAIN, RESENC])
def test_a_network_of_more_channels_takes_the_encoder(name: str) -> None:
    pretrained, network = build(name, channels=1), build(name, channels=4)
    report = load_encoder(network, content_of(pretrained, name=name))
    image = torch.randn(1, 1, 16, 16, 16)
    for a, b in zip(pretrained.encoder(image), network.encoder(image.expand(-1, 4, -1, -1, -1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert len(report.adapted) == 1
    assert report.encoder_share == 1


@pytest.mark.parametrize("given", [1, 3])
def test_label_channels_of_a_cascade_have_no_effect_at_first(given: int) -> None:
    """This holds even if image and label channels together equal the checkpoint's number of image channels."""
    pretrained, network = build(channels=given), build(channels=1 + 2)
    load_encoder(network, content_of(pretrained, channels=given), label_channels=2)
    image, labels = torch.randn(1, 1, 16, 16, 16), torch.ones(1, 2, 16, 16, 16)
    expected = pretrained.encoder(image.expand(-1, given, -1, -1, -1))
    for a, b in zip(expected, network.encoder(torch.cat([image, labels], 1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_an_encoder_that_is_not_covered_is_refused_and_nothing_is_copied() -> None:
    network = build(features=(4, 8, 8))
    before = encoder_of(network)
    with pytest.raises(UserError, match=r"covers \d+\.\d% of the encoder.*stages\.2.*\(16, .*\(8, .*allow_partial"):
        load_encoder(network, content_of(build(features=(4, 8, 16))))
    assert equal(encoder_of(network), before)


def test_fitting_tensors_are_loaded_if_partial_loading_is_allowed() -> None:
    pretrained, network = build(features=(4, 8, 16)), build(features=(4, 8, 8))
    report = load_encoder(network, content_of(pretrained), allow_partial=True)
    assert equal(network.encoder.stages[0].state_dict(), pretrained.encoder.stages[0].state_dict())
    assert 0 < report.encoder_share < 1
    assert set(report.skipped) == {name for name in report.random if name.startswith("encoder.")}
    assert f"{report.encoder_share:.1%}" in report.summary()


def test_deeper_stages_that_the_network_lacks_are_reported_as_skipped() -> None:
    deeper, network = build(features=(4, 8, 8)), build(features=(4, 8))
    report = load_encoder(network, content_of(deeper))
    assert report.encoder_share == 1
    assert sum(report.skipped.values()) == sum(p.numel() for p in deeper.encoder.stages[2].parameters())


def test_a_checkpoint_without_fitting_tensors_is_refused_despite_partial_loading() -> None:
    with pytest.raises(UserError, match=r"covers 0\.0%"):
        load_encoder(build(features=(4, 8)), content_of(build(features=(5, 9))), allow_partial=True)


def test_random_weights_of_a_checkpoint_do_not_count_as_pretrained() -> None:
    content = content_of(build())
    content["random_keys"] = [*content["random_keys"], *(k for k in content["network_weights"] if "stages.2" in k)]
    with pytest.raises(UserError, match="not in the checkpoint"):
        load_encoder(build(), content)


@pytest.mark.parametrize("features", [(4, 8, 8), (4, 8)])
def test_the_summary_groups_random_tensors_by_part(features: tuple[int, ...]) -> None:
    network = build()
    report = load_encoder(network, content_of(build(features=features)), allow_partial=True)
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


@pytest.mark.parametrize("skip_connections", [False, True])
def test_fitting_tensors_of_the_pretrained_decoder_are_loaded_and_reported(skip_connections: bool) -> None:
    pretrained, network = build(), build()
    method = nn.ModuleDict({"decoder": Decoder(pretrained.encoder, skip_connections)})
    with torch.no_grad():
        for parameter in method["decoder"].parameters():
            parameter.copy_(torch.rand_like(parameter))
    content = content_of(pretrained)
    content["method_weights"] = method.state_dict()
    before = copy.deepcopy(network.decoder.state_dict())
    report = load_encoder(network, content)
    load_own_decoder(network, content, report)

    for ours, theirs in zip(network.decoder.transpconvs, method["decoder"].upsample, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
    for i, (ours, theirs) in enumerate(zip(network.decoder.stages, method["decoder"].blocks, strict=True)):
        weight, given = ours.convs[0].conv.weight, theirs.convs[0].conv.weight
        assert torch.equal(weight[:, : given.shape[1]], given)
        name = f"stages.{i}.convs.0.conv.weight"
        assert torch.equal(weight[:, given.shape[1] :], before[name][:, given.shape[1] :])
        assert f"decoder.{name}" in (report.loaded if skip_connections else report.adapted)
    assert set(report.random) == {f"decoder.seg_layers.{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}
    assert not any(name.startswith("decoder.seg_layers") for name in report.notes)


@pytest.mark.parametrize(("theirs", "ours"), [((4, 8, 8, 8), (4, 8, 8)), ((4, 8, 8), (4, 8, 8, 8))])
def test_a_decoder_with_other_stages_is_loaded_at_the_same_resolutions(
    theirs: tuple[int, ...], ours: tuple[int, ...]
) -> None:
    pretrained, network = build(features=theirs), build(features=ours)
    method = nn.ModuleDict({"decoder": Decoder(pretrained.encoder)})
    with torch.no_grad():
        for parameter in method["decoder"].parameters():
            parameter.copy_(torch.rand_like(parameter))
    content = content_of(pretrained, features=theirs)
    content["method_weights"] = method.state_dict()
    report = load_encoder(network, content, allow_partial=True)
    load_own_decoder(network, content, report)
    for level in range(1, min(len(theirs), len(ours))):  # from full resolution
        assert torch.equal(network.decoder.transpconvs[-level].weight, method["decoder"].upsample[-level].weight)


def test_copies_under_other_names_are_not_counted_as_skipped() -> None:
    deeper = build(features=(4, 8, 8))
    content, network = content_of(deeper), build(features=(4, 8))
    shared = load_encoder(network, content).as_dict()["totals"]
    content["network_weights"] = {name: tensor.clone() for name, tensor in content["network_weights"].items()}
    assert load_encoder(network, content).as_dict()["totals"] == shared


@pytest.mark.parametrize("name", [PLAIN, RESENC])
def test_a_trained_decoder_is_loaded_without_its_segmentation_layers(name: str) -> None:
    pretrained, network = build(name), build(name)
    heads = copy.deepcopy(network.decoder.seg_layers.state_dict())
    content = {**content_of(pretrained, name=name), "random_keys": []}
    report = load_encoder(network, content)
    load_trained_decoder(network, content, report)
    assert equal(network.decoder.stages.state_dict(), pretrained.decoder.stages.state_dict())
    assert equal(network.decoder.transpconvs.state_dict(), pretrained.decoder.transpconvs.state_dict())
    assert equal(network.decoder.seg_layers.state_dict(), heads)
    assert (
        {key.split(".")[1] for key in report.random} == {key.split(".")[1] for key in report.skipped} == {"seg_layers"}
    )
    assert not report.adapted


def test_a_decoder_that_the_method_did_not_train_stays_random() -> None:
    network = build()
    before = copy.deepcopy(network.decoder.stages.state_dict())
    content = content_of(build())
    report = load_encoder(network, content)
    load_trained_decoder(network, content, report)
    assert equal(network.decoder.stages.state_dict(), before)
    assert report.decoder_share == 0


@pytest.mark.parametrize(("theirs", "ours"), [((4, 8, 8, 8), (4, 8, 8)), ((4, 8, 8), (4, 8, 8, 8))])
def test_a_trained_decoder_with_other_stages_loads_at_the_same_resolutions(
    theirs: tuple[int, ...], ours: tuple[int, ...]
) -> None:
    pretrained, network = build(features=theirs), build(features=ours)
    content = {**content_of(pretrained, features=theirs), "random_keys": []}
    report = load_encoder(network, content, allow_partial=True)
    load_trained_decoder(network, content, report)
    for level in range(1, min(len(theirs), len(ours))):  # from full resolution
        assert torch.equal(network.decoder.transpconvs[-level].weight, pretrained.decoder.transpconvs[-level].weight)
        assert equal(network.decoder.stages[-level].state_dict(), pretrained.decoder.stages[-level].state_dict())


def test_loading_a_decoder_from_a_method_without_one_is_refused() -> None:
    content = {**content_of(build()), "method": "mae", "method_weights": {"mask_token": torch.zeros(1)}}
    network = build()
    report = load_encoder(network, content)
    with pytest.raises(
        UserError, match=r"of mae, has no decoder of a pretraining; set pcrl\.finetune\.load_decoder to"
    ):
        load_own_decoder(network, content, report)
    load_own_decoder(network, {**content, "random_keys": []}, report)  # the plan's own decoder was trained
