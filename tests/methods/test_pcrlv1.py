"""The arithmetic of PCRLv1 against numpy, its settings, and the parts that the rows of its table train."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from method_setups import CASE, SETUPS, Setup, gradients

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.arm_names import ABLATIONS
from pcrl_nnunet.methods.base import StepOutput
from pcrl_nnunet.methods.keys import LARGEST_QUEUE
from pcrl_nnunet.methods.pcrlv1 import (
    ENCODERS,
    KEY_CHANNELS,
    PCRLv1,
    PCRLv1Settings,
    mixed,
    with_equal_edges,
)
from pcrl_nnunet.networks.momentum import NO_CASE
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.pretraining import result
from pcrl_nnunet.views.corruption import robust_ranges

ON_ALL_PLANS = pytest.mark.parametrize("kind", SETUPS)
NUMBER = 4
ROWS = PCRLv1.ablations(Setup("pcrlv1", "3D").plan, 8)


def setup_with(kind: str = "3D", **given: Any) -> Setup:
    setup = Setup("pcrlv1", kind)
    setup.settings, _ = PCRLv1.configure(setup.plan, given)
    return setup


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def info_nce(query: np.ndarray, key: np.ndarray, negatives: np.ndarray, temperature: float) -> float:
    """Eq. 7: the negatives alone stand in the denominator."""
    query, key, negatives = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, key, negatives))
    positive = np.exp((query * key).sum(1) / temperature)
    return float(-np.log(positive / np.exp(query @ negatives.T / temperature).sum(1)).mean())


def test_the_loss_is_half_the_contrast_and_half_the_restorations() -> None:
    setup = setup_with()
    method, batch, share = setup.trained(), setup.batch(NUMBER), 0.3
    output = method(batch, share)
    ordinary, momentum = method.encoder(batch["input"][:, 0]), method.momentum_encoder(batch["input"][:, 1])
    hybrid = [share * a + (1 - share) * b for a, b in zip(ordinary, momentum, strict=True)]
    g_o, g_m, g_h = (
        array(project(method.pooled(stages[-1])))
        for project, stages in (
            (method.projector, ordinary),
            (method.momentum_projector, momentum),
            (method.projector, hybrid),
        )
    )
    negatives = array(method.queue.keys)
    assert len(negatives) == LARGEST_QUEUE
    contrast = (info_nce(g_o, g_m, negatives, 0.2) + info_nce(g_h, g_m, negatives, 0.2)) / 2
    assert output.terms["contrast"].item() == pytest.approx(contrast, rel=1e-4)

    one, two = array(batch["target"][:, 0]), array(batch["target"][:, 1])
    restoration = 0.0
    for number, (stages, clean) in enumerate(
        [(ordinary, one), (momentum, two), (hybrid, share * one + (1 - share) * two)]
    ):
        indicator = batch["indicators"][:, number]
        attended = method.attention(stages[-1], indicator)
        restored = array(method.unet.decode([*stages[:-1], attended]))
        target = np.stack([transformed(image, bits) for image, bits in zip(clean, array(indicator), strict=True)])
        restoration += np.square(restored - target).mean()
        value = output.values["restoration_error"][ENCODERS[number]].item()
        within = target.reshape(*target.shape[:2], -1).var(2).mean()
        assert value == pytest.approx(np.square(restored - target).mean() / within, rel=1e-3)
    assert output.terms["restoration"].item() == pytest.approx(restoration, rel=1e-4)
    assert output.loss.item() == pytest.approx(0.5 * contrast + 0.5 * restoration, rel=1e-4)


def transformed(image: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Flip and turn one image (C, X, Y, Z): 3 bits for the flips, 4 for the number of quarters."""
    flipped = np.flip(image, [axis + 1 for axis in range(3) if bits[axis]])
    return np.rot90(flipped, int(bits[3:].argmax()), (2, 3))


def test_a_mixture_is_exact_at_its_ends_and_linear_between() -> None:
    one, other = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(mixed(one, other, 1.0), one)
    assert torch.equal(mixed(one, other, 0.0), other)
    np.testing.assert_allclose(mixed(one, other, 0.25), 0.25 * one.numpy() + 0.75 * other.numpy(), rtol=1e-5, atol=1e-6)


def test_a_hybrid_encoder_with_the_whole_share_restores_like_the_ordinary_encoder() -> None:
    setup = setup_with()
    method, batch = setup.trained(), dict(setup.batch(NUMBER))
    batch["indicators"][:, 2] = batch["indicators"][:, 0]
    errors = method(batch, 1.0).values["restoration_error"]
    torch.testing.assert_close(errors["hybrid encoder"], errors["ordinary encoder"])
    batch["indicators"][:, 2] = batch["indicators"][:, 1]
    errors = method(batch, 0.0).values["restoration_error"]
    torch.testing.assert_close(errors["hybrid encoder"], errors["momentum encoder"])


def test_one_share_of_a_step_is_uniform_in_its_range() -> None:
    method = setup_with().trained()
    drawn = np.array([method.draw(np.random.default_rng((0, step))) for step in range(2000)])
    assert np.quantile(drawn, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.04)
    drawn = np.array([setup_with(mixup=[0.5, 1]).trained().draw(np.random.default_rng(step)) for step in range(20)])
    assert 0.5 <= drawn.min() < drawn.max() <= 1
    assert setup_with(mixup=[]).trained().draw(np.random.default_rng(0)) is None


def test_keys_of_the_own_case_are_no_negatives() -> None:
    setup = setup_with(queue_size=40)
    method, batch = setup.trained(), setup.batch(NUMBER)
    assert (batch["case"] == zlib.crc32(CASE.name.encode())).all()
    before = method(batch, 0.5).terms["contrast"]
    method.queue.keys[:20] = method.queue.keys[20:]
    fewer = method(batch, 0.5).terms["contrast"]  # each key twice: log 2 more for the same keys
    method.queue.cases[:20] = zlib.crc32(CASE.name.encode())
    assert method(batch, 0.5).terms["contrast"].item() == pytest.approx(fewer.item() - np.log(2), rel=1e-4)
    assert not torch.equal(before, fewer)


def test_momentum_copies_follow_and_the_keys_of_all_encoders_enter_the_queue() -> None:
    setup = setup_with()
    method, batch = setup.trained(), setup.batch(NUMBER)
    output = method(batch, 0.5)
    old = [p.clone() for p in (*method.momentum_encoder.parameters(), *method.momentum_projector.parameters())]
    with torch.no_grad():
        for parameter in (*method.encoder.parameters(), *method.projector.parameters()):
            parameter.add_(1)
    method.after_step(output, False)
    assert (method.queue.cases == NO_CASE).all()
    method.after_step(output, True)
    new = [*method.momentum_encoder.parameters(), *method.momentum_projector.parameters()]
    for before, now in zip(old, new, strict=True):
        torch.testing.assert_close(now, before + 0.01)
    keys = output.kept["keys"]
    assert keys.shape == (NUMBER, 3, KEY_CHANNELS)
    torch.testing.assert_close(method.queue.keys[: 3 * NUMBER], keys.flatten(0, 1))
    assert (method.queue.cases[: 3 * NUMBER] == batch["case"][0]).all()
    assert (method.queue.cases[3 * NUMBER :] == NO_CASE).all()
    method.after_loading()
    assert all(torch.equal(a, b) for a, b in zip(method.encoder.parameters(), new, strict=False))


def test_the_momentum_encoder_gets_no_gradient() -> None:
    setup = setup_with()
    found = gradients(setup.trained(), setup.batch(NUMBER), 0.5)
    assert not [name for name in found if name.startswith("momentum")]
    only_momentum = gradients(setup.trained(), setup.batch(NUMBER), 0.0)
    assert only_momentum["unet.output.weight"].any()  # the decoder learns from its features


@ON_ALL_PLANS
def test_vectors_of_different_images_differ(kind: str) -> None:
    setup = setup_with(kind)
    method = setup.trained().eval()
    rng = np.random.default_rng(0)
    images = []
    for exponent in range(8):  # very different images
        image = rng.normal(size=(setup.channels, *setup.settings.views.global_input_size))
        image = image.cumsum(1) ** (1 + exponent % 3)
        images.append((image - image.mean()) / image.std())
    with torch.no_grad():
        vectors = method.pooled(method.encoder(torch.from_numpy(np.stack(images)).float())[-1])
    assert (vectors.std(0) / vectors.abs().mean(0)).mean() > 0.1


@ON_ALL_PLANS
def test_inputs_are_painted_and_targets_are_not(kind: str) -> None:
    sample = setup_with(kind, corruption={"p_paint": 1.0}, augmentation={"p_blur": 0.0}).sample()
    for target, image in zip(sample["target"], sample["input"], strict=True):
        changed = (target != image).any(0)
        assert 0.02 < changed.mean() < 0.98
        for channel, (low, high) in enumerate(robust_ranges(target)):
            painted = image[channel][changed]
            assert low <= painted.min() < painted.max() <= high


def test_transformations_are_drawn_apart_for_the_three_encoders() -> None:
    setup = setup_with()
    indicators = np.stack([setup.sample(seed)["indicators"] for seed in range(40)])
    assert indicators.shape == (40, 3, 7)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 0.5 < (indicators[:, one] != indicators[:, other]).any(1).mean() < 1


@pytest.mark.parametrize(
    ("size", "spacing", "strides", "expected"),
    [
        ((40, 56), (1.0, 1.0), [(1, 1), (8, 8)], (40, 40)),
        ((40, 56), (1.0, 2.0), [(1, 1), (8, 8)], (40, 56)),
        ((16, 64, 96), (3.0, 1.0, 1.0), [(1, 1, 1), (4, 16, 16)], (16, 64, 64)),
        ((40, 56, 40), (1.0, 1.0, 1.0), [(1, 1, 1), (8, 8, 8)], (40, 40, 40)),
        ((48, 16), (1.0, 1.0), [(1, 1), (16, 16)], (32, 32)),  # one voxel would remain of 16 x 16
    ],
)
def test_the_input_has_equal_edges_in_the_plane_of_turns(
    size: tuple[int, ...], spacing: tuple[float, ...], strides: list[tuple[int, ...]], expected: tuple[int, ...]
) -> None:
    views = replace(Setup("pcrlv1", "3D").settings.views, spacing=(1.0, 1.0, 1.0))
    crops = (size, tuple(2 * s for s in size))
    views = replace(
        views,
        global_crop_sizes=crops,
        local_crop_sizes=(size,),
        global_input_size=size,
        local_input_size=size,
        spacing=spacing,
    )
    found = with_equal_edges(views, strides)
    assert found.global_input_size == expected
    assert found.global_crop_sizes == (expected, tuple(2 * s for s in expected))


def test_pairs_overlap_as_in_the_paper() -> None:
    assert setup_with().settings.views.min_iou == 0.2


TRAINED = {
    "contrast_only": {"encoder", "projector"},
    "restoration": {"encoder", "projector", "unet"},
    "rotation_task": {"encoder", "projector", "unet", "rotation_head"},
    "attention_flips": {"encoder", "projector", "unet", "attention"},
    "attention": {"encoder", "projector", "unet", "attention"},
    "mixup_half": {"encoder", "projector", "unet", "attention"},
}


def test_the_rows_of_table_2_are_all_there() -> None:
    assert ROWS.keys() == TRAINED.keys() == {*ABLATIONS["pcrlv1"]}


@pytest.mark.parametrize("name", TRAINED)
def test_a_row_of_table_2_trains_its_parts_and_the_checkpoint_lists_the_others(name: str) -> None:
    setup = setup_with(**ROWS[name]["pcrlv1"])
    network = setup.network()
    method = PCRLv1(network, 1, setup.settings)
    found = gradients(method, setup.batch(NUMBER), method.variants()[-1])
    assert {key.split(".")[0] for key in found} == TRAINED[name]
    random = result.weights(network, method)["random_keys"]
    assert not [key for key in random if key.startswith("encoder.")]
    of_decoder = [key for key in network.state_dict() if key.startswith("decoder.") and "encoder" not in key]
    untrained = {key for key in of_decoder if key in random}
    if "unet" in TRAINED[name]:
        assert untrained == {key for key in of_decoder if "seg_layers" in key}
    else:
        assert untrained == {*of_decoder}


def test_rows_differ_in_indicators_and_mixture() -> None:
    def bits(name: str) -> int | None:
        spec = setup_with(**ROWS[name]["pcrlv1"]).views().arrays.get("indicators")
        return None if spec is None else spec.shape[1]

    assert [bits(name) for name in TRAINED] == [None, None, None, 3, 7, 7]
    mixtures = [setup_with(**ROWS[name]["pcrlv1"]).settings.mixup for name in TRAINED]
    assert mixtures == [()] * 5 + [(0.5, 1.0)]


def test_a_plan_without_quarter_turns_has_fewer_rows_and_bits() -> None:
    plan = PlanFacts("2d", (32, 32), 2, ((1, 1), (2, 2), (2, 2)), (40.0, 40.0), (1.0, 3.0))
    assert [*PCRLv1.ablations(plan, 8)] == ["contrast_only", "restoration", "attention", "mixup_half"]
    settings, _ = PCRLv1.configure(plan, {})
    assert settings.told is not None
    assert settings.told.bits == 2
    assert PCRLv1.facts(settings)["transformations"] == "flips"
    with pytest.raises(UserError, match=r"rotation_task needs a plane for quarter turns.*set rotation_task to false"):
        PCRLv1.configure(plan, {"rotation_task": True})


def test_the_papers_attention_states_its_weights() -> None:
    settings = setup_with(attention="outer_product").settings
    assert "32.8 million weights for 320 channels" in PCRLv1.facts(settings)["attention"]
    setup = setup_with(attention="outer_product")
    found = gradients(setup.trained(), setup.batch(NUMBER), 0.5)
    assert found["attention.of_products.weight"].any()


def test_the_queue_follows_the_number_of_cases() -> None:
    settings = setup_with().settings
    assert PCRLv1.for_cases(settings, 40).queue_size == 640
    assert PCRLv1.for_cases(settings, 5000).queue_size == LARGEST_QUEUE
    assert PCRLv1.for_cases(replace(settings, queue_size=100), 40).queue_size == 100
    with pytest.raises(UserError, match=r"queue_size is 641, and 40 cases allow 640 keys.*set 640 or less, or 0"):
        PCRLv1.for_cases(replace(settings, queue_size=641), 40)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"views": {"num_local": 6}}, "num_local is 6; PCRLv1 has no local views: set 0"),
        (
            {"views": {"global_input_size": [22, 24, 24]}},
            r"multiples of the encoder's total stride \(4, 4, 4\)",
        ),
        ({"mixup": [0.5]}, r"mixup is \[0.5\]; expected the two ends of a range within 0 and 1"),
        ({"mixup": [0.8, 0.5]}, r"mixup is \[0.8, 0.5\]"),
        ({"mixup": ["a", "b"]}, "mixup is"),
        ({"attention": "large"}, "attention is 'large'; expected 'channels' or 'outer_product'"),
        ({"transformations": "turns"}, "transformations is 'turns'"),
        ({"key_momentum": 1.0}, "key_momentum is 1.0"),
        ({"contrast_weight": 0.0}, "contrast_weight is 0.0"),
    ],
)
def test_a_bad_setting_is_an_error_that_says_what_is_expected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        setup_with(**given)


def test_after_step_accepts_the_keys_of_two_encoders() -> None:
    setup = setup_with(mixup=[])
    method = setup.trained()
    output: StepOutput = method(setup.batch(NUMBER), None)
    assert output.kept["keys"].shape[1] == 2
    method.after_step(output, True)
    assert (method.queue.cases != NO_CASE).sum() == 2 * NUMBER


def test_settings_are_a_dataclass_with_the_papers_numbers() -> None:
    settings: PCRLv1Settings = setup_with().settings
    assert (settings.temperature, settings.key_momentum) == (0.2, 0.99)
    assert (settings.contrast_weight, settings.restoration_weight) == (0.5, 0.5)
    assert settings.mixup == (0.0, 1.0)
