from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_setups import CASE, SETUPS, Setup

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.rotation import Rotation
from pcrl_nnunet.plans import PlanFacts

ON_ALL_PLANS = pytest.mark.parametrize("kind", SETUPS)
PLAN = PlanFacts("3d_fullres", (40, 56, 40), 2, ((1, 1, 1), (2, 2, 2), (2, 2, 2)), (50, 60, 50), (1.0,) * 3)
PLAIN = {"augmentation": {"rotation_degrees": 0.0, "scale": 0.0}}


def sample_of_a_whole_image(size, spacing=None):
    """Return samples of an image of the crop's size: without augmentation, only the turn changes it."""
    plan = PlanFacts("any", size, 2, ((1,) * len(size), (2,) * len(size)), size, spacing or (1.0,) * len(size))
    settings, _ = Rotation.configure(plan, PLAIN)
    image = np.random.default_rng(0).normal(size=(2, *settings.crop_size)).astype(np.float32)
    views = Rotation.views(settings, plan, 2, {})
    return image, [views(CASE, image, np.random.default_rng(seed)) for seed in range(60)]


def by_hand(image, turn):
    """Return the turned image by Taleb et al.'s list: flips and transpositions, planes in the order of the axes."""
    planes = [(1, 2)] if image.ndim == 3 else [(1, 2), (1, 3), (2, 3)]
    if turn == 0:
        return image
    first, second = planes[(turn - 1) // 3]
    transposed = np.swapaxes(image, first, second)
    return {
        1: np.flip(transposed, first),
        2: np.flip(image, (first, second)),
        3: np.flip(transposed, second),
    }[(turn - 1) % 3 + 1]


@pytest.mark.parametrize("size", [(8, 8), (8, 8, 8)])
def test_the_input_is_the_crop_after_the_named_turn(size):
    image, samples = sample_of_a_whole_image(size)
    found = Counter(int(sample["turn"]) for sample in samples)
    assert [*sorted(found)] == list(range(4 if len(size) == 2 else 10))
    for sample in samples:
        np.testing.assert_allclose(sample["input"], by_hand(image, int(sample["turn"])), atol=1e-5)


def test_without_equal_spacings_only_half_turns_are_left():
    image, samples = sample_of_a_whole_image((4, 8, 16), (4.0, 2.0, 1.0))
    assert {int(sample["turn"]) for sample in samples} == {0, 1, 2, 3}
    flipped = [image, *(np.flip(image, axes) for axes in ((1, 2), (1, 3), (2, 3)))]
    for sample in samples:
        np.testing.assert_allclose(sample["input"], flipped[int(sample["turn"])], atol=1e-5)
    image, samples = sample_of_a_whole_image((4, 8), (2.0, 1.0))
    assert {int(sample["turn"]) for sample in samples} == {0, 1}


@ON_ALL_PLANS
def test_the_loss_is_the_cross_entropy_of_a_linear_layer_on_means_and_maxima(kind):
    setup = Setup("rotation", kind)
    method, batch = setup.trained(), setup.batch(4)
    output = method(batch, None)
    with torch.no_grad():
        feature = method.encoder(batch["input"])[-1].double().numpy()
    flat = feature.reshape(*feature.shape[:2], -1)
    pooled = np.concatenate([flat.mean(2), flat.max(2)], 1)
    logits = pooled @ method.head.weight.detach().double().numpy().T + method.head.bias.detach().numpy()
    turn = batch["turn"].numpy()
    of_right = np.exp(logits[range(4), turn]) / np.exp(logits).sum(1)
    assert output.loss.item() == pytest.approx(-np.log(of_right).mean(), rel=1e-4)
    right = (logits.argmax(1) == turn).mean() * logits.shape[1]
    assert output.values["right_over_chance"][""].item() == pytest.approx(right)
    np.testing.assert_allclose(output.vectors[""], pooled, rtol=1e-4, atol=1e-5)


@ON_ALL_PLANS
def test_there_is_an_output_for_each_turn(kind):
    setup = Setup("rotation", kind)
    assert setup.trained().head.out_features == len(setup.views().turns) == (4 if kind == "2D" else 10)


def test_the_crop_is_the_largest_turnable_crop_and_the_batch_fills_the_budget():
    settings, batch_size = Rotation.configure(PLAN, {})
    assert settings.crop_size == (40, 40, 40)
    assert batch_size == 2  # 2 x 40 x 56 x 40 voxels hold 2.8 crops
    settings, batch_size = Rotation.configure(replace(PLAN, spacing=(3.0, 1.0, 1.0)), {})
    assert settings.crop_size == (40, 40, 40)
    small = replace(PLAN, median_size=(36, 50, 35))  # repeated borders would tell quarter turns
    assert Rotation.configure(small, {})[0].crop_size == (32, 32, 32)
    flat = replace(PLAN, patch_size=(16, 96, 112), spacing=(7.0, 1.0, 1.0), median_size=(20, 200, 200))
    assert Rotation.configure(flat, {})[0].crop_size == (16, 96, 96)
    assert Rotation.configure(replace(flat, spacing=(4.0, 2.0, 1.0)), {})[0].crop_size == (16, 96, 112)
    assert Rotation.configure(PLAN, {"crop_size": [20, 20, 20]})[1] == 22
    assert Rotation.configure(PLAN, {"crop_size": [8, 8, 8]})[1] == 32  # no more
    assert Rotation.configure(PLAN, {"crop_size": [200, 200, 200]})[1] == 1  # no less


def test_a_crop_that_leaves_too_few_voxels_at_the_bottleneck_grows():
    thin = PlanFacts("2d", (24, 40), 2, ((1, 1), (8, 16)), (50, 60), (1.0, 1.0))  # 16x16 would leave 2x1 voxels
    assert Rotation.configure(thin, {})[0].crop_size == (32, 32)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"crop_size": [40, 40]}, r"crop_size is \(40, 40\); expected 3 positive numbers of voxels, such as \(40, 40"),
        ({"crop_size": [40, 0, 40]}, r"crop_size is .*; expected 3 positive numbers of voxels"),
        ({"crop_size": [40, 56, 40]}, r"quarter turns exchange the axes 0 and 1: give both the same number of voxels"),
        ({"crop_size": [4, 4, 4]}, r"crop_size \(4, 4, 4\) leaves 1 voxel at the bottleneck"),
        ({"augmentation": {"p_flip": 0.5}}, r"p_flip is 0.5; two flips are a half turn, which .* has to find: set 0"),
        ({"augmentation": {"rotation_degrees": 45.0}}, r"rotation_degrees is 45.0; such a rotation looks like a quart"),
        ({"spacing": [1, 1, 1]}, r"pcrl.pretrain.rotation.spacing is not a setting"),
        ({"turns": 4}, r"pcrl.pretrain.rotation.turns is not a setting"),
    ],
)
def test_impossible_settings_are_named(given, message):
    with pytest.raises(UserError, match=message):
        Rotation.configure(PLAN, given)


def test_the_editable_settings_are_the_plans_own_when_read_again():
    settings, batch_size = Rotation.configure(PLAN, {})
    assert Rotation.configure(PLAN, Rotation.editable(settings)) == (settings, batch_size)


def test_the_shown_view_has_the_crop_before_its_turn():
    setup = Setup("rotation", "2D")
    for seed in range(8):
        shown = setup.views().show(CASE, setup.volume(), np.random.default_rng(seed))
        (view,) = shown.views
        quarters = int(shown.sample["turn"])
        assert view.title.startswith(f"{90 * quarters} degrees")
        np.testing.assert_array_equal(np.rot90(view.images["before"], quarters, (1, 2)), view.images["turned"])


def test_a_few_steps_learn_the_turns_of_an_image():
    setup = Setup("rotation", "2D")
    torch.manual_seed(0)
    method, batch = setup.trained(), setup.batch(16)
    optimizer = torch.optim.AdamW(method.parameters(), 1e-2)
    for _ in range(60):
        output = method(batch, None)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.values["right_over_chance"][""] > 2
