from dataclasses import replace

import numpy as np
import pytest
import torch
from method_setups import SETUPS, Setup
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights as nnunets_own_loader

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.losses import masked_restoration_loss
from pcrl_nnunet.methods.mae import MAE
from pcrl_nnunet.methods.quantities import variance_within
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.pretraining import result
from pcrl_nnunet.transfer.weights import load_encoder, load_trained_decoder

ON_ALL_PLANS = pytest.mark.parametrize("kind", SETUPS)
PLAN = PlanFacts("3d_fullres", (40, 56, 40), 2, ((1, 1, 1), (2, 2, 2), (2, 2, 2)), (50, 60, 50), (1.0,) * 3)


def random_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(3, 2, 6, 8, 4, generator=generator) * 3 + 1
    masked = torch.rand(3, 1, 6, 8, 4, generator=generator) < 0.7
    return {"target": target, "input": torch.where(masked, 0.0, target), "masked": masked}


@ON_ALL_PLANS
def test_three_quarters_of_the_blocks_are_masked_and_zero_in_the_input(kind):
    setup = Setup("mae", kind)
    for seed in range(5):
        sample = setup.sample(seed)
        masked = np.broadcast_to(sample["masked"], sample["target"].shape)
        assert not sample["input"][masked].any()
        np.testing.assert_array_equal(sample["input"][~masked], sample["target"][~masked])
        blocks = np.prod(np.divide(setup.plan.patch_size, setup.settings.block_size))
        assert blocks % 1 == 0
        assert sample["masked"].mean() == pytest.approx(round(0.75 * blocks) / blocks)


def test_blocks_have_the_total_stride_or_at_most_16_voxels():
    settings, batch_size = MAE.configure(PLAN, {})
    assert settings.block_size == (4, 4, 4)
    assert batch_size == PLAN.batch_size
    deep = replace(PLAN, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)))
    assert MAE.configure(deep, {})[0].block_size == (4, 16, 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"block_size": [8, 8]}, r"block_size is \(8, 8\); expected 3 positive numbers of voxels, such as \(4, 4, 4\)"),
        ({"block_size": [8, 0, 8]}, r"block_size is .*; expected 3 positive numbers of voxels"),
        ({"mask_share": 1.0}, r"mask_share is 1.0; expected a number above 0, below 1"),
        ({"block_size": [40, 56, 40]}, r"mask_share 0.75 of the 1 blocks of a patch masks 1 blocks; lower mask_share"),
        ({"mask_share": 0.0001}, r"mask_share 0.0001 of the 1400 blocks of a patch masks 0 blocks; raise mask_share"),
        ({"block_size": [400, 8, 8]}, r"block_size is \(400, 8, 8\); expected blocks within the patch \(40, 56, 40\)"),
        ({"mask_ratio": 0.5}, r"pcrl.pretrain.mae.mask_ratio is not a setting"),
    ],
)
def test_impossible_settings_are_named(given, message):
    with pytest.raises(UserError, match=message):
        MAE.configure(PLAN, given)


def test_the_loss_is_the_mean_over_samples_of_the_error_of_masked_voxels():
    batch = random_batch()
    setup = Setup("mae", "four channels, anisotropic")
    method = MAE(setup.network(), 4, setup.settings)
    method.unet = torch.nn.Conv3d(2, 2, 1)
    restored = method.unet(batch["input"]).detach().numpy()
    target, masked = batch["target"].numpy(), batch["masked"].numpy()
    errors = []
    for r, t, m in zip(restored, target, masked, strict=True):
        errors.append(np.mean([(rc[m[0]] - tc[m[0]]) ** 2 for rc, tc in zip(r, t, strict=True)]))
    assert method(batch, None).loss.item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_visible_voxels_of_the_target_do_not_count():
    batch = random_batch()
    method = MAE(Setup("mae", "3D").network(), 1, Setup("mae", "3D").settings)
    method.unet = torch.nn.Conv3d(2, 2, 1)
    other = {**batch, "target": torch.where(batch["masked"], batch["target"], 100.0)}
    one, two = (method(given, None) for given in (batch, other))
    assert one.loss == two.loss
    assert one.values == two.values


def test_the_ratio_is_one_for_each_samples_mean():
    batch = random_batch()
    target, masked = batch["target"], batch["masked"]
    means = torch.stack([torch.stack([c[m[0]].mean() for c in t]) for t, m in zip(target, masked, strict=True)])[
        ..., None, None, None
    ].expand_as(target)
    error = masked_restoration_loss(means, target, masked)
    assert (error / variance_within(target, masked)).item() == pytest.approx(1, rel=1e-5)
    everywhere = torch.ones_like(masked)
    assert variance_within(target).item() == pytest.approx(variance_within(target, everywhere).item(), rel=1e-5)


@ON_ALL_PLANS
def test_the_encoder_gets_zeros_at_masked_voxels(kind):
    setup = Setup("mae", kind)
    method, batch, seen = setup.trained(), setup.batch(2), []
    method.unet.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    method(batch, None)
    (image,) = seen
    assert image.shape == batch["target"].shape
    masked = batch["masked"].expand_as(image)
    assert not image[masked].any()
    assert torch.equal(image[~masked], batch["target"][~masked])


def test_blocks_that_do_not_divide_the_patch_are_cut():
    setup = Setup("mae", "3D")
    settings, _ = MAE.configure(setup.plan, {"block_size": [5, 7, 6]})
    sample = MAE.views(settings, setup.plan, 1, {})(None, setup.volume(), np.random.default_rng(0))
    masked, of_blocks = sample["masked"][0], []
    for place in np.ndindex(5, 4, 4):
        block = masked[tuple(slice(p * b, (p + 1) * b) for p, b in zip(place, (5, 7, 6), strict=True))]
        assert block.all() or not block.any()
        of_blocks.append(bool(block.flat[0]))
    assert sum(of_blocks) == 60


@pytest.mark.parametrize("name", ["mae", "models_genesis"])
def test_stock_and_our_fine_tuning_load_all_but_the_segmentation_layers(name, tmp_path):
    setup = Setup(name, "residual encoder")
    network = setup.network()
    method = setup.method(network, 1, setup.settings)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(torch.randn_like(parameter))
    found = result.weights(network, method)
    assert {key for key in found["network_weights"] if "seg_layers" in key} == set(found["random_keys"])
    torch.save({"network_weights": found["network_weights"]}, tmp_path / "checkpoint.pth")
    stock, ours = setup.network(), setup.network()
    nnunets_own_loader(stock, str(tmp_path / "checkpoint.pth"))
    report = load_encoder(ours, {**found, "num_input_channels": 1})
    load_trained_decoder(ours, found, report)
    for key, value in network.state_dict().items():
        if "seg_layers" not in key:
            assert torch.equal(stock.state_dict()[key], value)
            assert torch.equal(ours.state_dict()[key], value)
