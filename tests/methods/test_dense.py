import math

import numpy as np
import pytest
import torch
from method_setups import CASE, SETUPS, Setup

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.dense import Dense
from pcrl_nnunet.methods.points import MOST_PAIRS, POINTS, partners_over_chance
from pcrl_nnunet.pretraining import result

ON_ALL_PLANS = pytest.mark.parametrize("kind", SETUPS)
UNCHANGED = {"p_grey": 0.0, "p_holes": 0.0, "p_noise": 0.0, "p_blur": 0.0, "p_gamma": 0.0, "p_curve": 0.0}
RESTORING = {"restoration_weight": 2.0}


def coordinates(shape):
    """Return a volume (axes, *shape) whose channels are the indices of its voxels."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)


def interpolated(image, index):
    """Return the values (channels,) at an index by a loop over the corners around it."""
    low = np.clip(np.floor(index).astype(int), 0, np.array(image.shape[1:]) - 2)
    value = np.zeros(len(image))
    for corner in np.ndindex(*[2] * len(index)):
        weight = np.prod([f if c else 1 - f for c, f in zip(corner, index - low, strict=True)])
        value += weight * image[(slice(None), *(low + corner))]
    return value


@ON_ALL_PLANS
@pytest.mark.parametrize(("name", "given"), [("dense", UNCHANGED), ("pcrlv2", {})])
def test_both_views_show_the_same_place_of_the_volume_at_a_point(kind, name, given):
    """The image's channels are the coordinates of its voxels, so the values at a point tell its place."""
    setup = Setup(name, kind)
    size = setup.plan.patch_size
    shape = [2 * length for length in size]
    shape = [5, *shape] if len(shape) == 2 else shape
    own = {} if name == "dense" else {"comparison": "dense"}
    settings, _ = setup.method.configure(setup.plan, {**own, "augmentation": {**given, "rotation_degrees": 25.0}})
    views = setup.method.views(settings, setup.plan, len(shape), {})
    checked = 0
    for seed in range(6):
        sample = views(CASE, coordinates(shape), np.random.default_rng(seed))
        pair, places = sample.get("target", sample["input"]), sample["points"].astype(np.float64)
        one, two = (
            np.stack([interpolated(view, index) for index in points])[:, -len(size) :]
            for view, points in zip(pair, places, strict=True)
        )
        assert len(np.unique(one.round(3), axis=0)) == POINTS
        # near the image's border views repeat it, and coordinates stop there
        far = ((one >= 4) & (one <= np.array(shape)[-len(size) :] - 5)).all(1)
        np.testing.assert_allclose(one[far], two[far], atol=1e-3)
        np.testing.assert_allclose(one, two, atol=3)
        checked += far.sum()
    assert checked > POINTS


@ON_ALL_PLANS
def test_points_lie_inside_both_views_and_differ_in_their_places(kind):
    setup = Setup("dense", kind)
    for seed in range(5):
        points = setup.sample(seed)["points"]
        assert points.shape == (2, setup.settings.points, len(setup.plan.patch_size))
        assert (points >= 0).all()
        assert (points <= np.subtract(setup.settings.views.global_input_size, 1)).all()
        assert (points.std(1) > 0.5).all()


@pytest.mark.parametrize("kind", SETUPS)
def test_the_loss_is_infonce_over_all_points_of_the_batch_in_both_directions(kind):
    setup = Setup("dense", kind)
    method, batch = setup.trained(), setup.batch(2)
    batch = {**batch, "points": batch["points"][:, :, :9]}
    output = method(batch, None)
    levels = method.unet.features(batch["input"].flatten(0, 1))
    vectors = method.head.vectors(levels, batch["points"], batch["input"].shape[3:])
    one, two = vectors.detach().double().numpy().swapaxes(0, 1).reshape(2, 18, -1)
    losses, found = [], []
    for mine, theirs in ((one, two), (two, one)):
        for number, vector in enumerate(mine):
            cosines = [vector @ v / np.linalg.norm(vector) / np.linalg.norm(v) for v in theirs]
            losses.append(-math.log(math.exp(cosines[number] / 0.1) / sum(math.exp(c / 0.1) for c in cosines)))
            found.append(int(np.argmax(cosines)) == number)
    assert output.loss.item() == pytest.approx(np.mean(losses), rel=1e-3)
    assert float(output.values["right_over_chance"][""]) == pytest.approx(18 * np.mean(found[:18]), rel=1e-4)


def test_vectors_at_a_point_are_the_head_of_the_features_of_all_levels_there():
    """At a voxel that all levels have, no interpolation is needed."""
    setup = Setup("dense", "four channels, anisotropic")
    method, batch = setup.trained().eval(), setup.batch(2)
    levels = method.unet.features(batch["input"].flatten(0, 1))
    assert [level.shape[1] for level in levels] == [8, 8, 4]
    points = torch.tensor([[0, 4, 8], [2, 8, 4]]).expand(2, 2, 2, 3)
    found = method.head.vectors(levels, points.float(), batch["input"].shape[3:])
    for sample, view, point in np.ndindex(2, 2, 2):
        z, y, x = points[sample, view, point].tolist()
        at = [level[2 * sample + view] for level in levels]
        features = torch.cat([at[0][:, z // 2, y // 4, x // 4], at[1][:, z, y // 2, x // 2], at[2][:, z, y, x]])
        torch.testing.assert_close(found[sample, view, point], method.head(features[None])[0], rtol=1e-4, atol=1e-5)


def test_partners_are_counted_over_chance():
    one = torch.eye(6)
    two = one[[0, 1, 2, 4, 5, 3]]
    assert partners_over_chance(one, two).item() == pytest.approx(3)
    assert partners_over_chance(one, one).item() == pytest.approx(6)


@ON_ALL_PLANS
def test_a_restoration_adds_the_error_of_the_unchanged_views(kind):
    setup = Setup("dense", kind)
    setup.settings, _ = Dense.configure(setup.plan, RESTORING)
    method, batch = setup.trained(), setup.batch(2)
    output = method(batch, None)
    restored = method.restore(method.unet.features(batch["input"].flatten(0, 1))[-1]).detach()
    error = ((restored.unflatten(0, (2, 2)) - batch["target"]) ** 2).mean().item()
    assert output.terms["restoration"].item() == pytest.approx(error, rel=1e-4)
    assert output.loss.item() == pytest.approx(output.terms["comparison"].item() + 2 * error, rel=1e-4)
    with torch.no_grad():
        assert [picture.title for picture in method.eval().pictures(batch)] == ["input", "target", "restored"]
    assert (batch["input"] != batch["target"]).any()


def test_without_a_restoration_there_is_no_target_and_no_output():
    setup = Setup("dense", "3D")
    assert [*setup.views().arrays] == ["input", "points"]
    assert not any(name.startswith("restore") for name, _ in setup.trained().named_parameters())


def test_encoder_and_decoder_are_pretrained():
    setup = Setup("dense", "residual encoder")
    network = setup.network()
    found = result.weights(network, setup.method(network, 1, setup.settings))
    assert {key for key in found["network_weights"] if "seg_layers" in key} == set(found["random_keys"])


def test_a_batch_has_at_most_32_pairs():
    assert Dense.configure(Setup("dense", "2D").plan, {})[1] <= MOST_PAIRS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"points": 0}, r"points is 0; expected a number from 1 to 4096"),
        ({"temperature": 0.0}, r"temperature is 0.0; expected a number above 0"),
        ({"views": {"num_local": 6}}, r"num_local is 6; Dense comparison has no local views: set 0"),
        (
            {"views": {"global_input_size": [22, 24, 24]}},
            r"global_input_size is \(22, 24, 24\); expected multiples of the network's total stride \(4, 4, 4\)",
        ),
        ({"augmentation": {"p_swap": 0.5}}, r"augmentation.p_swap is not a setting"),
        ({"restoration_weight": -1.0}, r"restoration_weight is -1.0; expected 0 or more"),
    ],
)
def test_impossible_settings_are_named(given, message):
    with pytest.raises(UserError, match=message):
        Dense.configure(Setup("dense", "3D").plan, given)
