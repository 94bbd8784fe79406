import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from method_setups import SETUPS, Setup
from torch import nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.losses import restoration_loss
from pcrl_nnunet.methods import pcrlv2
from pcrl_nnunet.methods.pcrlv2 import Levels, PCRLv2, PCRLv2Settings
from pcrl_nnunet.methods.points import MOST_PAIRS, POINTS
from pcrl_nnunet.networks import at_points
from pcrl_nnunet.views.settings import ViewSettings

B, N, CHANNELS = 4, 6, 2
VIEWS = ViewSettings(((8, 8, 8),), ((5, 5, 5),), (8, 8, 8), (5, 5, 5), (1.0, 1.0, 1.0), N)


def at(level):
    return Levels(level, level, level)


def method(restoration="single", **settings):
    torch.manual_seed(0)
    network = PlainConvUNet(
        CHANNELS, 3, [4, 8, 8], nn.Conv3d, 3, [1, 2, 2], 1, 2, 1, True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
    )  # fmt: skip
    return PCRLv2(network, CHANNELS, PCRLv2Settings(VIEWS, restoration=restoration, **settings))


def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "input": torch.randn(B, 2, CHANNELS, 8, 8, 8, generator=generator),
        "target": torch.randn(B, 2, CHANNELS, 8, 8, 8, generator=generator),
        "local": torch.randn(B, N, CHANNELS, 5, 5, 5, generator=generator),
    }


def draws(model, number, seed=0):
    rng = np.random.default_rng(seed)
    return [model.draw(rng) for _ in range(number)]


@pytest.mark.parametrize("restoration", ["single", "full"])
def test_the_comparison_weight_scales_the_loss_and_not_the_terms(restoration):
    paper = method(restoration)(batch(), at(1))
    light = method(restoration, comparison_weight=0.1)(batch(), at(1))
    assert light.terms == paper.terms
    compared = paper.terms["comparison_global"] + paper.terms["comparison_local"]
    assert paper.loss.item() == pytest.approx(float(paper.terms["restoration"] + compared))
    assert light.loss.item() == pytest.approx(float(paper.terms["restoration"] + 0.1 * compared))


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("restoration", ["single", "full"])
def test_every_view_receives_gradient(level, restoration):
    views = batch()
    for name in ("input", "local"):
        views[name].requires_grad_()
    method(restoration)(views, at(level)).loss.backward()
    assert (views["input"].grad.flatten(2).abs().sum(2) > 0).all()
    assert (views["local"].grad.flatten(2).abs().sum(2) > 0).all()


def test_checkpointing_local_views_at_full_resolution_saves_memory_and_keeps_gradients(monkeypatch):
    def step():
        trained, kept = method(), 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = trained(batch(), at(2)).loss
        loss.backward()
        return kept, {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}

    kept, gradients = step()
    monkeypatch.setattr(pcrlv2, "checkpoint", lambda function, x, use_reentrant: function(x))
    kept_without, expected = step()
    assert kept < 0.75 * kept_without  # 6 local views of 5^3 beside 2 of 8^3
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_both_views_are_restored_against_their_own_targets():
    views, model = batch(), method().eval()
    swapped = {name: array.flip(1) for name, array in views.items()}
    with torch.no_grad():
        by_view = [
            restoration_loss(model.pictures(given)[-1].images, given["target"][:, 0]) for given in (views, swapped)
        ]
        found = model(views, at(2)).terms["restoration"].item()
        crossed = model({**views, "target": swapped["target"]}, at(2)).terms["restoration"].item()
    assert found == pytest.approx(float(sum(by_view)), abs=1e-5)
    assert crossed != pytest.approx(found, abs=1e-4)


def test_single_trains_only_the_drawn_level_and_lower_levels():
    model = method()
    model(batch(), at(1)).loss.backward()
    assert model.decoder.blocks[0].convs[0].conv.weight.grad is not None
    assert all(p.grad is None for p in model.decoder.blocks[1].parameters())
    assert all(p.grad is None for p in model.comparison_heads["2"].parameters())


def test_full_restores_at_full_resolution_in_every_step_and_fades_lower_levels():
    views = batch()
    model = method("full")
    model.eval()
    start, end = (model(views, at(1), progress).terms["restoration"].item() for progress in (0.0, 1.0))
    single = method()
    single.load_state_dict(model.state_dict())
    single.eval()
    drawn, whole = (single(views, at(level)).terms["restoration"].item() for level in (1, 2))
    assert end == pytest.approx(whole, abs=1e-5)
    assert start == pytest.approx(whole + drawn, abs=1e-5)


def test_levels_are_drawn_by_the_generator_alone_and_evenly():
    model = method()
    levels = draws(model, 200)
    assert levels == draws(model, 200)
    assert levels != draws(model, 200, seed=1)
    assert 70 < levels.count(at(1)) < 130
    assert set(levels) == {at(1), at(2)}


def test_a_step_of_each_variant_trains_all_parameters():
    model = method("full", comparison="cross_scale")
    variants = model.variants()
    assert [drawn.deepest for drawn in variants] == [1, 2]
    for drawn in variants:
        model(batch(), drawn).loss.backward()
    (group,) = model.groups()
    assert all(parameter.grad is not None for parameter in group.parameters)
    assert len(group.parameters) == len(list(model.parameters()))


def test_training_moves_the_encoder_of_the_plans_network():
    model = method()
    before = [p.detach().clone() for p in model.encoder.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(batch(), at(2)).loss.backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.encoder.parameters(), strict=True) if b.ndim > 1)


@pytest.mark.parametrize(
    ("drawn", "terms"),
    [
        ((2, None), {"restoration"}),
        ((None, 0), {"comparison_global", "comparison_local"}),
        ((2, 0), {"restoration", "comparison_global", "comparison_local"}),
    ],
)
def test_a_level_setting_trains_only_the_named_tasks(drawn, terms):
    model = method(levels=[drawn])
    (levels,) = draws(model, 1)
    output = model(batch(), levels)
    assert set(output.terms) == terms
    output.loss.backward()
    assert all(p.grad is not None for p in model.encoder.stages[0].parameters())
    decoded = model.decoder.blocks[1].convs[0].conv.weight.grad is not None
    assert decoded is (drawn[0] is not None)


def test_without_local_views_the_global_ones_are_compared():
    views = batch()
    del views["local"]
    assert set(method()(views, at(1)).terms) == {"restoration", "comparison_global"}


def test_a_cross_scale_comparison_without_a_compared_level_restores_alone():
    model = method(levels=[(2, None)], comparison="cross_scale")
    assert set(model(batch(), *draws(model, 1)).terms) == {"restoration"}


def test_a_cross_scale_comparison_draws_two_levels_of_one_width():
    model = method(comparison="cross_scale")
    drawn = draws(model, 100)
    assert {(d.comparison, d.comparison_of_second) for d in drawn} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    output = model(batch(), next(d for d in drawn if d.comparison != d.comparison_of_second))
    assert [vectors.shape for vectors in output.vectors.values()] == [(2 * B, 8)]
    output.loss.backward()
    assert all(head.project.weight.grad is not None for head in model.comparison_heads.values())


@pytest.mark.parametrize("kind", SETUPS)
def test_a_dense_comparison_finds_points_by_the_features_of_the_drawn_level(kind):
    """The loss is the restoration plus InfoNCE over all points of the batch, which is computed here in a loop."""
    setup = Setup("pcrlv2", kind)
    setup.settings, _ = PCRLv2.configure(setup.plan, {"comparison": "dense", "comparison_weight": 0.5})
    assert [*setup.views().arrays] == ["target", "input", "points"]
    model, views = setup.trained(), setup.batch(4)
    views = {**views, "points": views["points"][:, :, :5]}
    for drawn in model.variants():
        output = model(views, drawn)
        level = drawn.comparison
        features = model.decoder(model.encoder(views["input"].flatten(0, 1)), level)[level]
        sampled = at_points(features, views["points"].flatten(0, 1), views["input"].shape[3:]).flatten(0, 1)
        vectors = model.comparison_heads[str(level)](sampled).detach().double().reshape(4, 2, 5, -1)
        one, two = (v.reshape(20, -1).numpy() for v in vectors.unbind(1))
        one, two = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (one, two))
        cosines = one @ two.T
        shares = [row[i] / row.sum() for rows in (cosines, cosines.T) for i, row in enumerate(np.exp(rows / 0.1))]
        assert output.terms["comparison_global"].item() == pytest.approx(-np.log(shares).mean(), rel=1e-3)
        total = output.terms["restoration"] + 0.5 * output.terms["comparison_global"]
        assert output.loss.item() == pytest.approx(total.item(), rel=1e-5)
        of_level = output.vectors[f"level {level}"]
        torch.testing.assert_close(of_level, vectors.flatten(0, 2).float() - vectors.flatten(0, 2).float().mean(0))
        right = 20 * np.mean(cosines.argmax(1) == np.arange(20))
        assert float(output.values["right_over_chance"][f"level {level}"]) == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("kind", SETUPS)
def test_a_dense_comparison_has_no_local_view_and_swaps_no_blocks(kind):
    setup = Setup("pcrlv2", kind)
    setup.settings, number = PCRLv2.configure(setup.plan, {"comparison": "dense"})
    assert setup.settings.views.num_local == 0
    assert number <= MOST_PAIRS
    assert setup.settings.augmentation.p_swap == 0  # the points would not move with the blocks


def test_the_same_point_in_both_views_has_the_same_vector_if_the_views_are_the_same():
    """Every point of two equal views finds itself."""
    setup = Setup("pcrlv2", "2D")
    setup.settings, _ = PCRLv2.configure(setup.plan, {"comparison": "dense"})
    model, views = setup.trained(), setup.batch(4)
    twice = {name: array[:, :1].expand_as(array) for name, array in views.items()}
    found = model(twice, model.variants()[-1]).values["right_over_chance"]
    assert [round(float(right)) for right in found.values()] == [4 * POINTS]


def test_watched_quantities_belong_to_the_drawn_levels():
    output = method()(batch(), Levels(2, 1, 1))
    assert {name: list(of_group) for name, of_group in output.values.items()} == {
        "restoration_error": ["level 2"],
        "margin": ["level 1"],
    }
    assert list(output.vectors) == ["level 1"]
    watched = [value for of_group in output.values.values() for value in of_group.values()]
    assert not any(t.requires_grad for t in [*watched, *output.vectors.values(), *output.terms.values()])


def test_pictures_show_input_target_and_every_levels_restoration_with_its_error():
    views, model = batch(), method().eval()
    with torch.no_grad():
        pictures = model.pictures(views)
    assert [picture.title for picture in pictures] == ["input", "target", "level 1", "level 2"]
    torch.testing.assert_close(pictures[0].images, views["input"][:, 0])
    torch.testing.assert_close(pictures[1].images, views["target"][:, 0])
    finest, target = pictures[-1], views["target"][:, 0]
    error = (finest.images - target).square().mean((2, 3, 4)) / target.var((2, 3, 4), correction=0)
    torch.testing.assert_close(finest.errors, error)


def test_a_step_without_restoration_has_no_pictures():
    assert method(levels=[(None, 0)]).pictures(batch()) == []


def test_with_skip_connections_every_stage_reaches_the_restoration_directly():
    def direct(skip):
        model = method(skip_connections=skip)
        stages = [s.detach().requires_grad_() for s in model.encoder(torch.randn(2, CHANNELS, 8, 8, 8))]
        model.decoder(stages, 2)[-1].sum().backward()
        return [s.grad is not None for s in stages]

    assert direct(True) == [True, True, True]
    assert direct(False) == [False, False, True]


@pytest.mark.parametrize("levels", [[[3, 1]], [[1, 3]], [[0, 1]]])
def test_a_level_that_the_network_lacks_is_named(levels):
    with pytest.raises(UserError, match=r"levels has \[\d, \d\]; expected the level to restore from, 1 to 2 or null"):
        method(levels=levels)


@pytest.mark.parametrize("drawn", [[None, None], [1], [1.0, 1], 2, "12", [True, 1], [-1, 1]])
def test_a_setting_without_pairs_of_levels_is_named(drawn):
    with pytest.raises(UserError, match=r"pcrl.pretrain.pcrlv2.levels has .*; expected pairs of the level to restore"):
        PCRLv2Settings(VIEWS, levels=(drawn,))
