from dataclasses import replace

import numpy as np
import pytest
import torch
from method_setups import CASE, Setup
from tiny_dataset import make_plan

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.method_names import BUILT_IN
from pcrl_nnunet.methods import PlanFacts
from pcrl_nnunet.methods.rubiks_cube import RubiksCube
from pcrl_nnunet.plans import resolve
from pcrl_nnunet.pretraining.settings import pretrain_settings

PLAN = PlanFacts("3d_fullres", (40, 56, 40), 2, ((1, 1, 1), *[(2, 2, 2)] * 3), (50.0, 60.0, 50.0), (1.0, 1.0, 1.0))


def setup_of(**settings):
    setup = Setup("rubiks_cube", "3D")
    setup.settings = replace(setup.settings, **settings)
    return setup


def gradient_of(loss, parameters):
    return torch.autograd.grad(loss, parameters, retain_graph=True)


def test_the_loss_trains_both_networks_and_each_by_its_own_terms():
    setup = setup_of(adversarial_weight=0.25)
    method, batch = setup.trained(), setup.batch(2)
    output = method(batch, None)
    restored, target = method.unet(batch["input"]), batch["target"]
    real, fake = (torch.sigmoid(method.discriminator(image)).double() for image in (target, restored))
    error = (restored - target).square().double().mean()
    adversarial, told = -fake.log().mean(), (-real.log().mean() - (1 - fake).log().mean()) / 2
    expected = {"restoration": error, "adversarial": adversarial, "discriminator": told}
    assert {name: float(term) for name, term in output.terms.items()} == pytest.approx(
        {name: float(term.detach()) for name, term in expected.items()}, rel=1e-4
    )
    assert output.loss.item() == pytest.approx((error + 0.25 * adversarial + told).item(), rel=1e-4)
    for network, loss in ((method.unet, error + 0.25 * adversarial), (method.discriminator, told)):
        parameters = [*network.parameters()]
        for found, wanted in zip(gradient_of(output.loss, parameters), gradient_of(loss, parameters), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_the_discriminators_gradient_is_clipped_by_itself():
    method = setup_of().trained()
    groups = method.groups()
    assert [group.clip for group in groups] == [None, 12.0]
    assert {id(p) for p in groups[1].parameters} == {id(p) for p in method.discriminator.parameters()}


def test_without_a_weight_there_is_no_discriminator():
    setup = setup_of(adversarial_weight=0.0)
    method = setup.trained()
    output = method(setup.batch(2), None)
    assert [*output.terms] == ["restoration"]
    assert output.loss.item() == output.terms["restoration"].item()
    assert len(method.groups()) == 1


@pytest.mark.parametrize("turned", ["cubes", "layers"])
def test_the_input_has_the_targets_voxels_in_other_places(turned):
    sample = setup_of(turned=turned).sample()
    assert (sample["input"] != sample["target"]).mean() > 0.3
    np.testing.assert_array_equal(np.sort(sample["input"].ravel()), np.sort(sample["target"].ravel()))


def test_crops_are_upright():
    setup = setup_of()
    shown = [setup.views().show(CASE, setup.volume(), np.random.default_rng(seed)) for seed in range(10)]
    assert all(not view.flipped for sample in shown for view in sample.views)


def test_crop_cubes_and_batch_follow_the_plan():
    settings, batch_size = RubiksCube.configure(PLAN, {})
    assert (settings.crop_size, settings.cube_size, batch_size) == ((40, 40, 40), (10, 10, 10), 2)
    flat = replace(PLAN, patch_size=(16, 96, 32), spacing=(4.0, 1.0, 1.0))
    settings, batch_size = RubiksCube.configure(flat, {})
    assert (settings.crop_size, settings.cube_size, batch_size) == ((16, 32, 32), (8, 16, 16), 6)
    assert RubiksCube.configure(PLAN, {"crop_size": [24, 24, 24]})[0].cube_size == (12, 12, 12)
    assert RubiksCube.facts(settings) == {
        "crop": "16x32x32 voxels",
        "cubes": "8 of 8x16x16 voxels, each turned by itself",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"crop_size": [20, 20, 20]},
            r"crop_size is \(20, 20, 20\); expected multiples of the total stride",
        ),
        ({"crop_size": [40, 56, 40]}, r"crop_size is \(40, 56, 40\); .* equal on axes .* such as \(40, 40, 40\)"),
        ({"crop_size": [40, 40]}, r"crop_size is \(40, 40\); expected"),
        ({"cube_size": [9, 9, 9]}, r"cube_size is \(9, 9, 9\); expected a size that divides the crop \(40, 40, 40\)"),
        ({"cube_size": [10, 20, 20]}, r"cube_size is \(10, 20, 20\); .* such as \(10, 10, 10\)"),
        ({"cube_size": [40, 40, 40]}, "expected a size that divides the crop .* into several cubes"),
        ({"cube_size": [10]}, r"cube_size is \(10,\); expected"),
        ({"turned": "faces"}, "turned is 'faces'; expected 'cubes' or 'layers'"),
        ({"adversarial_weight": -1.0}, "adversarial_weight is -1.0; expected 0 or more"),
    ],
)
def test_bad_settings_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        RubiksCube.configure(PLAN, given)


def test_a_2d_configuration_is_refused_with_the_methods_that_fit():
    plan = make_plan()
    configuration = {**resolve(plan, "3d_fullres"), "patch_size": [32, 32]}
    others = ", ".join(name for name in BUILT_IN if name != "rubiks_cube")
    with pytest.raises(UserError) as error:
        pretrain_settings(plan, "2d", configuration, method="rubiks_cube")
    assert str(error.value) == (
        f"Rubik's Cube++ needs a 3D configuration, and 2d is 2D: give another -c, or another method: {others}"
    )
