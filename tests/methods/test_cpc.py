from dataclasses import replace

import numpy as np
import pytest
import torch
from method_setups import CASE, SETUPS, Setup

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.cpc import CPC
from pcrl_nnunet.plans import PlanFacts

ON_ALL_PLANS = pytest.mark.parametrize("kind", SETUPS)
PLAN = PlanFacts("3d_fullres", (40, 56, 40), 2, ((1, 1, 1), *3 * [(2, 2, 2)]), (50, 60, 50), (1.0,) * 3)
LARGE = PlanFacts("3d_fullres", (128, 128, 128), 2, ((1, 1, 1), *5 * [(2, 2, 2)]), (200, 200, 200), (1.0,) * 3)
FLAT = PlanFacts("2d", (512, 512), 12, ((1, 1), *7 * [(2, 2)]), (512, 512), (1.0,) * 2)


def gru(sequence, cell):
    """Return the last state of a gated recurrent unit, from its equations (Cho et al., 2014, as in torch)."""
    weights = {key: value.detach().double().numpy() for key, value in cell.state_dict().items()}
    state = np.zeros(weights["weight_hh_l0"].shape[1])
    for x in sequence:
        of_input = np.split(weights["weight_ih_l0"] @ x + weights["bias_ih_l0"], 3)
        of_state = np.split(weights["weight_hh_l0"] @ state + weights["bias_hh_l0"], 3)
        reset, update = (1 / (1 + np.exp(-(i + h))) for i, h in zip(of_input[:2], of_state[:2], strict=True))
        state = (1 - update) * np.tanh(of_input[2] + reset * of_state[2]) + update * state
    return state


@pytest.mark.parametrize("kind", ["2D", "four channels, anisotropic"])
def test_the_loss_is_infonce_over_the_patches_below_of_all_samples(kind):
    setup = Setup("cpc", kind)
    method, batch = setup.trained(), setup.batch(2)
    output, grid = method(batch, None), setup.settings.geometry
    patches = batch["input"]
    with torch.no_grad():
        pooled = torch.stack(
            [torch.stack([method.pooled(row[None, None])[0, 0] for row in sample]) for sample in patches]
        ).double()
        standardised = (pooled - pooled.mean((0, 1, 2))) / (pooled.var((0, 1, 2), correction=0) + 1e-5).sqrt()
        codes = method.code(standardised.float())
    codes, above = codes.double().numpy(), grid.rows_above
    predicted, right = [], []
    for sample in codes:
        seen = sample[:above].reshape(-1, sample.shape[-1])
        contexts = [gru(seen[pyramid], method.context) for pyramid in grid.pyramids()]
        for row, layer in enumerate(method.predictors):
            weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
            predicted += [weight @ context + bias for context in contexts]
            right += [*sample[above + row]]
    similarity = np.exp(np.array(predicted) @ np.array(right).T)
    share = similarity.diagonal() / similarity.sum(1)
    assert output.loss.item() == pytest.approx(-np.log(share).mean(), rel=1e-3)
    found = (similarity.argmax(1) == np.arange(len(right))).mean() * len(right)
    assert output.values["right_over_chance"][""].item() == pytest.approx(found, abs=1.5)  # an equal argmax may differ


def test_rows_below_do_not_reach_the_predictions():
    setup = Setup("cpc", "3D")
    method, batch = setup.trained().eval(), setup.batch(2)
    patches, above = batch["input"].clone(), setup.settings.geometry.rows_above
    one = method.predicted(method.codes(method.pooled(patches))[:, :above])
    patches[:, above:] = torch.randn_like(patches[:, above:])
    assert torch.equal(one, method.predicted(method.codes(method.pooled(patches))[:, :above]))
    patches[:, 0] = torch.randn_like(patches[:, 0])
    assert not torch.equal(one, method.predicted(method.codes(method.pooled(patches))[:, :above]))


@pytest.mark.parametrize(
    ("plan", "grid", "cell", "patch", "overlap", "batch_size"),
    [
        (LARGE, (3, 3, 3), (42, 42, 42), (37, 37, 37), 0.0, 3),  # 4 cells of 32 would leave one voxel of a patch
        (replace(LARGE, strides=LARGE.strides[:5]), (4, 4, 4), (32, 32, 32), (28, 28, 28), 0.0, 2),  # Taleb et al.
        (PLAN, (4, 4, 4), (10, 14, 10), (9, 12, 9), 0.0, 2),
        (FLAT, (6, 6), (146, 146), (129, 129), 0.5, 6),
        (replace(FLAT, strides=FLAT.strides[:6]), (7, 7), (128, 128), (112, 112), 0.5, 5),
        (replace(LARGE, patch_size=(64, 64, 64)), (2, 2, 2), (34, 34, 34), (33, 33, 33), 0.0, 2),  # the crop grows
        (
            replace(LARGE, patch_size=(64, 64, 64), median_size=(60, 90, 90)),
            (1, 2, 2),
            (64, 34, 34),
            (56, 33, 33),
            0.0,
            2,
        ),
    ],
)
def test_the_grid_follows_from_patch_strides_and_median_image(plan, grid, cell, patch, overlap, batch_size):
    settings, number = CPC.configure(plan, {})
    assert (settings.grid, settings.cell_size, settings.patch_size, settings.overlap) == (grid, cell, patch, overlap)
    assert number == batch_size


def test_cells_follow_a_given_grid_and_overlap():
    assert CPC.configure(PLAN, {"grid": [2, 2, 2]})[0].cell_size == (20, 28, 20)
    settings, _ = CPC.configure(LARGE, {"overlap": 0.5})
    assert settings.grid == (4, 4, 4)
    assert settings.cell_size == (50, 50, 50)  # 3 x 25 + 50 voxels are 125, 3 x 26 + 51 are 129
    settings, _ = CPC.configure(PLAN, {"cell_size": [10, 10, 10], "patch_size": [10, 9, 10]})
    assert (settings.cell_size, settings.patch_size) == ((10, 10, 10), (10, 9, 10))


@pytest.mark.parametrize(
    ("plan", "given", "message"),
    [
        (PLAN, {"grid": [4, 4]}, r"grid is \(4, 4\); expected 3 positive numbers of patches"),
        (PLAN, {"grid": [1, 1, 1]}, r"grid is \(1, 1, 1\); expected 2 patches or more along one axis: raise grid"),
        (FLAT, {"grid": [2, 2]}, r"grid is \(2, 2\); expected 3 patches or more along one axis"),
        (
            replace(LARGE, patch_size=(64, 64, 64), median_size=(60, 60, 60)),
            {},
            r"choose another method if the median image \(60, 60, 60\) is smaller than \(68, 68, 68\) on every axis",
        ),
        (PLAN, {"cell_size": [10, 10]}, r"cell_size is \(10, 10\); expected 3 positive numbers of voxels"),
        (PLAN, {"patch_size": [9, 0, 9]}, r"patch_size is \(9, 0, 9\); expected 3 positive numbers of voxels"),
        (PLAN, {"patch_size": [11, 9, 9]}, r"patch_size is \(11, 9, 9\); expected patches within the cells \(10, 14"),
        (PLAN, {"patch_size": [8, 8, 8]}, r"patch_size \(8, 8, 8\) leaves 1 voxel at the bottleneck"),
        (PLAN, {"overlap": 0.6}, r"overlap is 0.6; expected a number from 0 to 0.5"),
        (PLAN, {"patches": 4}, r"pcrl.pretrain.cpc.patches is not a setting"),
    ],
)
def test_impossible_settings_are_named(plan, given, message):
    with pytest.raises(UserError, match=message):
        CPC.configure(plan, given)


def test_the_editable_settings_are_the_same_when_read_again():
    for plan in (PLAN, LARGE, FLAT):
        settings, batch_size = CPC.configure(plan, {})
        assert CPC.configure(plan, CPC.editable(settings)) == (settings, batch_size)


@ON_ALL_PLANS
def test_codes_of_different_patches_differ(kind):
    setup = Setup("cpc", kind)
    method, batch = setup.trained().eval(), setup.batch(2)
    with torch.no_grad():
        vectors = method.pooled(batch["input"]).flatten(0, 2)
    assert (vectors.std(0) / vectors.abs().mean(0).clamp_min(1e-6)).mean() > 0.1


def test_a_sample_has_the_patches_of_its_rows():
    setup = Setup("cpc", "2D")
    grid, sample = setup.settings.geometry, setup.sample()
    assert grid.rows == (0, 1, 2, 4, 5, 6)  # row 3 overlaps with both
    assert sample["input"].shape == (6, 7, 1, *setup.settings.patch_size)
    shown = setup.views().show(CASE, setup.volume(), np.random.default_rng(0))
    assert shown.views[0].images["crop"].shape[1:] == grid.crop_size


def test_a_few_steps_learn_to_find_the_patches_of_a_batch():
    setup = Setup("cpc", "2D")
    torch.manual_seed(0)
    method, batch = setup.trained(), setup.batch(4)
    optimizer = torch.optim.AdamW(method.parameters(), 1e-2)
    for _ in range(40):
        output = method(batch, None)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.values["right_over_chance"][""] > 5
