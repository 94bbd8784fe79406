import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.losses import restoration_loss
from pcrl_nnunet.methods import Levels, PCRLv2, pcrlv2

B, N, CHANNELS = 4, 6, 2


def at(level):
    return Levels(level, level, level)


def method(restoration="single", **settings):
    torch.manual_seed(0)
    network = PlainConvUNet(
        CHANNELS, 3, [4, 8, 8], nn.Conv3d, 3, [1, 2, 2], 1, 2, 1, True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
    )  # fmt: skip
    return PCRLv2(network.encoder, CHANNELS, restoration, **settings)


def batch():
    generator = torch.Generator().manual_seed(1)
    return {
        "input": torch.randn(B, 2, CHANNELS, 8, 8, 8, generator=generator),
        "target": torch.randn(B, 2, CHANNELS, 8, 8, 8, generator=generator),
        "local": torch.randn(B, N, CHANNELS, 5, 5, 5, generator=generator),
    }


@pytest.mark.parametrize("restoration", ["single", "full"])
def test_the_comparison_has_the_weight_that_is_asked_for_and_its_terms_stay_cosines(restoration):
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


def test_at_full_resolution_local_views_leave_nothing_for_backward_and_have_the_same_gradients(monkeypatch):
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


def test_the_loss_is_the_sum_of_its_terms():
    output = method()(batch(), at(1))
    assert output.loss.item() == pytest.approx(sum(float(term) for term in output.terms.values()), abs=1e-5)


def test_both_views_are_restored_against_their_own_targets():
    views = batch()
    output = method()(views, at(2))
    by_view = [restoration_loss(output.restored[:, k], views["target"][:, k]) for k in range(2)]
    assert output.terms["restoration"].item() == pytest.approx(float(sum(by_view)), abs=1e-5)
    swapped = {**views, "target": views["target"].flip(1)}
    assert method()(swapped, at(2)).terms["restoration"].item() != pytest.approx(float(sum(by_view)), abs=1e-4)


def test_single_trains_the_drawn_level_and_those_below_only():
    model = method()
    model(batch(), at(1)).loss.backward()
    assert model.decoder.blocks[0].convs[0].conv.weight.grad is not None
    assert all(p.grad is None for p in model.decoder.blocks[1].parameters())
    assert all(p.grad is None for p in model.comparison_heads["2"].parameters())


def test_full_restores_at_full_resolution_in_every_step_and_the_drawn_level_fades():
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


def test_the_level_is_a_function_of_seed_and_step_and_reaches_all():
    model = method()
    levels = [model.draw_levels(3, step) for step in range(200)]
    assert levels == [model.draw_levels(3, step) for step in range(200)]
    assert levels != [model.draw_levels(4, step) for step in range(200)]
    assert 70 < levels.count(at(1)) < 130
    assert set(levels) == {at(1), at(2)}


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
def test_a_level_setting_leaves_out_what_it_does_not_name(drawn, terms):
    model = method(levels=[drawn])
    levels = model.draw_levels(0, 0)
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
    assert set(model(batch(), model.draw_levels(0, 0)).terms) == {"restoration"}


def test_a_cross_scale_comparison_draws_two_levels_of_one_width():
    model = method(comparison="cross_scale")
    drawn = [model.draw_levels(0, step) for step in range(100)]
    assert {(d.comparison, d.comparison_of_second) for d in drawn} == {(1, 1), (1, 2), (2, 1), (2, 2)}
    output = model(batch(), next(d for d in drawn if d.comparison != d.comparison_of_second))
    assert output.v.shape == (B, 2, 8)
    output.loss.backward()
    assert all(head.project.weight.grad is not None for head in model.comparison_heads.values())


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
