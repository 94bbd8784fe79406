import numpy as np
import pytest
import torch
from method_setups import SETUPS, Setup
from torch import nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.simsiam import SimSiam

ON_ALL_PLANS = pytest.mark.parametrize("kind", SETUPS)


def trained(kind="3D"):
    return Setup("simsiam", kind).trained()


def test_projector_and_predictor_are_the_papers():
    method = trained()
    d = 2 * method.encoder.output_channels[-1]
    linear = [module for module in method.projector if isinstance(module, nn.Linear)]
    norms = [module for module in method.projector if isinstance(module, nn.BatchNorm1d)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(d, d)] * 3
    assert [norm.affine for norm in norms] == [True, True, False]
    assert isinstance(method.projector[-1], nn.BatchNorm1d)  # no activation follows
    linear = [module for module in method.predictor if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(d, d // 4), (d // 4, d)]
    assert linear[-1].bias is not None
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(module) for module in method.predictor] == [*kinds, nn.Linear]
    assert [type(module) for module in method.projector] == [*kinds, *kinds, nn.Linear, nn.BatchNorm1d]


def test_the_loss_is_the_symmetric_cosine_of_predictions_and_features():
    setup = Setup("simsiam", "3D")
    method, batch = setup.trained(), setup.batch(4)
    loss = method(batch, None).loss
    both = batch["input"].flatten(0, 1)
    z = method.projector(method.pooled(both)).detach().double().numpy().reshape(4, 2, -1)
    p = method.predictor(method.projector(method.pooled(both))).detach().double().numpy().reshape(4, 2, -1)

    def cosine(a, b):
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    expected = -0.5 * (cosine(p[:, 0], z[:, 1]) + cosine(p[:, 1], z[:, 0])).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert -1 <= loss.item() <= 1


def test_no_gradient_flows_through_the_features_that_are_predicted():
    """The predictor has gradient zero here, so any gradient would come through the features."""
    setup = Setup("simsiam", "3D")
    method, batch = setup.trained(), setup.batch(4)
    for parameter in method.predictor[-1].parameters():
        nn.init.zeros_(parameter)
    nn.init.ones_(method.predictor[-1].bias)  # the prediction is the same for all images
    method(batch, None).loss.backward()
    assert not any(p.grad is not None and p.grad.any() for p in method.encoder.parameters())
    assert method.predictor[-1].bias.grad.any()


def test_the_predictors_rate_does_not_decay():
    method = trained()
    groups = {group.decays: {id(p) for p in group.parameters} for group in method.groups()}
    assert groups[False] == {id(p) for p in method.predictor.parameters()}
    assert groups[True] == {id(p) for p in method.parameters()} - groups[False]


@ON_ALL_PLANS
def test_pooled_vectors_of_different_images_differ(kind):
    setup = Setup("simsiam", kind)
    method = setup.trained().eval()
    rng = np.random.default_rng(0)
    images = []
    for exponent in range(8):  # very different images
        image = rng.normal(size=(setup.channels, *setup.plan.patch_size)).cumsum(1) ** (1 + exponent % 3)
        images.append((image - image.mean()) / image.std())
    with torch.no_grad():
        vectors = method.pooled(torch.from_numpy(np.stack(images)).float())
    assert (vectors.std(0) / vectors.abs().mean(0)).mean() > 0.1


def test_simsiam_has_pairs_of_views_without_local_ones():
    setup = Setup("simsiam", "3D")
    assert setup.settings.views.num_local == 0
    assert [*setup.views().arrays] == ["input"]
    sample = setup.sample()
    assert sample["input"].shape[0] == 2
    assert (sample["input"][0] != sample["input"][1]).any()
    with pytest.raises(UserError, match="num_local is 6; SimSiam has no local views: set 0"):
        SimSiam.configure(setup.plan, {"views": {"num_local": 6}})
