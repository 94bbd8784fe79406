import numpy as np
import pytest
from method_setups import SETUPS, Setup

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.models_genesis import ModelsGenesis
from pcrl_nnunet.views.crop import draw_crop


@pytest.mark.parametrize("kind", SETUPS)
def test_the_target_is_the_flipped_crop_without_corruption(kind):
    setup = Setup("models_genesis", kind)
    volume, seen = setup.volume(), 0
    for seed in range(6):
        sample = setup.sample(seed)
        crop = draw_crop(
            volume, setup.plan.patch_size, setup.plan.spacing, setup.settings.augmentation, np.random.default_rng(seed)
        )
        np.testing.assert_array_equal(sample["target"], crop.view)
        (shown,) = setup.views().show(None, volume, np.random.default_rng(seed)).views
        assert (shown.box, shown.flipped) == (crop.box, crop.flipped)
        inside = volume[(slice(None), *crop.slice, *crop.box.index()[1:])]
        if inside.shape == crop.view.shape:
            seen += 1
            back = np.flip(crop.view, [1 + axis for axis in crop.flipped])
            np.testing.assert_allclose(back, inside, atol=1e-5)
        assert (sample["input"] != sample["target"]).any()
    assert seen


def test_each_axis_is_flipped_in_half_of_the_crops():
    views, volume = Setup("models_genesis", "3D").views(), Setup("models_genesis", "3D").volume()
    flips = np.zeros(3)
    for seed in range(200):
        (shown,) = views.show(None, volume, np.random.default_rng(seed)).views
        flips[list(shown.flipped)] += 1
    assert np.abs(flips - 100).max() < 35  # 5 sd


def test_with_all_probabilities_0_nothing_is_corrupted():
    off = {"corruption": {"p_shuffle": 0.0, "p_curve": 0.0, "p_paint": 0.0}}
    setup = Setup("models_genesis", "3D")
    settings, _ = ModelsGenesis.configure(setup.plan, off)
    sample = ModelsGenesis.views(settings, setup.plan, 1, {})(None, setup.volume(), np.random.default_rng(0))
    np.testing.assert_array_equal(sample["input"], sample["target"])


def test_a_rotation_of_the_crop_is_a_setting():
    plan = Setup("models_genesis", "3D").plan
    settings, _ = ModelsGenesis.configure(plan, {"augmentation": {"rotation_degrees": 7.5, "scale": 0.1}})
    assert (settings.augmentation.rotation_degrees, settings.augmentation.scale) == (7.5, 0.1)


def test_a_wrong_strength_is_named_with_its_place():
    plan = Setup("models_genesis", "3D").plan
    with pytest.raises(UserError, match=r"pcrl.pretrain.models_genesis.corruption.p_shufle is not a setting"):
        ModelsGenesis.configure(plan, {"corruption": {"p_shufle": 0.0}})
    with pytest.raises(
        UserError, match=r"pcrl.pretrain.models_genesis.corruption.p_paint is 2.0; expected a number from 0 to 1"
    ):
        ModelsGenesis.configure(plan, {"corruption": {"p_paint": 2.0}})
