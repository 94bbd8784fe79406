from dataclasses import replace

import numpy as np
import pytest
import torch
from method_setups import CASE, SETUPS, Setup

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.c2l import C2L, mixed
from pcrl_nnunet.views.holes import GreyAndHoles, GreyAndHolesTransform

ON_ALL_PLANS = pytest.mark.parametrize("kind", SETUPS)
SHARE = 0.7


def setup_of(kind="3D", **settings):
    setup = Setup("c2l", kind)
    setup.settings = replace(setup.settings, **settings)
    return setup


def contrast(queries, keys, negatives, allowed, temperature):
    """Return InfoNCE, one sample after the other."""

    def normalised(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    losses = []
    for query, key, others in zip(normalised(queries), normalised(keys), allowed, strict=True):
        right = np.exp(query @ key / temperature)
        wrong = sum(
            np.exp(query @ other / temperature) for other, use in zip(normalised(negatives), others, strict=True) if use
        )
        losses.append(-np.log(right / (right + wrong)))
    return np.mean(losses)


@ON_ALL_PLANS
def test_the_loss_is_the_mean_of_three_contrasts(kind):
    setup = setup_of(kind, queue_size=12, temperature=1.0)
    method = setup.trained()
    batch = {**setup.batch(3), "case": torch.tensor([[1], [2], [3]])}
    with torch.no_grad():
        for parameter in method.momentum.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        method.queue.push(torch.randn(8, 128), torch.tensor([1, 2, 3, 4] * 2))
        output = method(batch, SHARE)
        one, two = batch["input"].unbind(1)
        following = [1, 2, 0]
        mixed_one, mixed_two = (SHARE * x + (1 - SHARE) * x[following] for x in (one, two))
        query, mixed_query = method.query(torch.cat((one, mixed_one))).double().numpy().reshape(2, 3, -1)
        key, mixed_key = method.momentum(torch.cat((two, mixed_two))).double().numpy().reshape(2, 3, -1)
    negatives, of = method.queue.keys.double().numpy(), method.queue.cases.numpy()
    case = np.array([1, 2, 3])
    other = of != case[:, None]
    of_neither = other & (of != case[following][:, None])
    assert of_neither.sum(1).tolist() == [8] * 3  # of 12: 4 random keys, and 4 of the two other cases
    lengths = np.linalg.norm(key, axis=1, keepdims=True)
    assert lengths.max() / lengths.min() > 1.01  # otherwise it does not matter that unit vectors are mixed
    unit = key / lengths
    expected = [
        contrast(query, key, negatives, other, 1.0),
        contrast(mixed_query, mixed_key, negatives, of_neither, 1.0),
        contrast(mixed_query, SHARE * unit + (1 - SHARE) * unit[following], negatives, of_neither, 1.0),
    ]
    assert [float(term) for term in output.terms.values()] == pytest.approx(expected, rel=1e-3)
    assert output.loss.item() == pytest.approx(np.mean(expected), rel=1e-3)


def test_a_mixture_has_the_shares_of_a_sample_and_of_the_next():
    assert mixed(torch.tensor([[1.0], [2.0], [4.0]]), 0.75).flatten().tolist() == [1.25, 2.5, 3.25]


def test_shares_of_mixtures_are_uniform_from_a_half_to_one():
    method = setup_of().trained()
    shares = [method.draw(np.random.default_rng(seed)) for seed in range(1000)]
    assert 0.5 <= min(shares) < max(shares) <= 1
    assert np.quantile(shares, [0.25, 0.5, 0.75]) == pytest.approx([0.625, 0.75, 0.875], abs=0.03)


def test_keys_have_no_gradient_and_the_copy_follows():
    setup = setup_of(key_momentum=0.9)
    method, batch = setup.trained(), setup.batch(3)
    output = method(batch, SHARE)
    output.loss.backward()
    assert not any(parameter.grad is not None for parameter in method.momentum.parameters())
    own, copied = method.query.head[1].weight, method.momentum.network.head[1].weight
    before = copied.clone()
    with torch.no_grad():
        own += 1
    method.after_step(output, stepped=False)
    assert torch.equal(copied, before)
    method.after_step(output, stepped=True)
    torch.testing.assert_close(copied, before + 0.1)
    torch.testing.assert_close(method.queue.keys[:3], torch.nn.functional.normalize(output.kept["keys"], dim=1))
    assert method.queue.cases[:3].tolist() == batch["case"][:, 0].tolist()
    method.after_loading()
    assert torch.equal(copied, own)


def test_keys_of_a_case_are_no_negatives_of_its_views():
    setup = setup_of(queue_size=4)
    method, batch = setup.trained(), setup.batch(3)
    method.queue.push(torch.randn(4, 128), batch["case"][0].repeat(4))
    assert method(batch, SHARE).loss.item() == 0


def test_samples_carry_a_number_of_their_case():
    setup = setup_of()
    views, volume = setup.views(), setup.volume()

    def number_of(name):
        return int(views(replace(CASE, name=name), volume, np.random.default_rng(0))["case"][0])

    assert number_of("one") == number_of("one") == 2053932785  # the same in every process
    assert number_of("two") != number_of("one")


@ON_ALL_PLANS
def test_vectors_of_different_images_differ(kind):
    setup = setup_of(kind)
    method = setup.trained().eval()
    rng = np.random.default_rng(0)
    images = []
    for exponent in range(8):  # very different images
        image = rng.normal(size=(setup.channels, *setup.plan.patch_size)).cumsum(1) ** (1 + exponent % 3)
        images.append((image - image.mean()) / image.std())
    with torch.no_grad():
        vectors = method.query.pooled(torch.from_numpy(np.stack(images)).float())
    assert (vectors.std(0) / vectors.abs().mean(0)).mean() > 0.1


@pytest.mark.parametrize("size", [(56, 56), (56, 56, 56)])
def test_holes_have_the_channels_mean_and_the_same_share_in_2d_and_3d(size):
    augmentation = GreyAndHoles(p_grey=0.0, holes=1)
    views = np.random.default_rng(0).normal(size=(2, 3, *size)).astype(np.float32)
    made = GreyAndHolesTransform(augmentation)(target=views, rng=np.random.default_rng(1))["input"]
    for view, before in zip(made, views, strict=True):
        changed = view != before
        assert changed.mean() == pytest.approx((1 / 7) ** 2, rel=0.1)
        assert (changed == changed[:1]).all()
        means = before.mean(tuple(range(1, before.ndim)))
        for channel, where, mean in zip(view, changed, means, strict=True):
            np.testing.assert_allclose(channel[where], mean, rtol=1e-5)


def test_without_strengths_the_views_are_unchanged():
    views = np.random.default_rng(0).normal(size=(2, 1, 9, 9, 9)).astype(np.float32)
    for off in ({"p_grey": 0.0, "p_holes": 0.0}, {"grey": 0.0, "holes": 0}, {"grey": 0.0, "hole_size": 0.0}):
        made = GreyAndHolesTransform(GreyAndHoles(**off))(target=views, rng=np.random.default_rng(1))["input"]
        np.testing.assert_array_equal(made, views)
        assert not np.shares_memory(made, views)


def test_the_queue_follows_the_number_of_cases():
    settings = setup_of().settings
    assert C2L.for_cases(settings, 10).queue_size == 160
    assert C2L.for_cases(settings, 5000).queue_size == 16384
    assert C2L.for_cases(replace(settings, queue_size=100), 10).queue_size == 100
    given = setup_of(queue_size=7).trained()
    assert given.queue.keys.shape == (7, 128)


@pytest.mark.parametrize(
    ("given", "number", "message"),
    [
        ({"queue_size": 161}, 10, "queue_size is 161, and 10 cases allow 160 keys, .*: set 160 or less, or 0 for 160"),
        ({"queue_size": 16385}, 9999, "queue_size is 16385, and 9999 cases allow 16384 keys"),
        ({"queue_size": -1}, 10, "queue_size is -1; expected 0 or more"),
        ({"temperature": 0.0}, 10, "temperature is 0.0; expected a number above 0"),
        ({"key_momentum": 1.0}, 10, "key_momentum is 1.0; expected .*below 1"),
        ({"views": {"num_local": 2}}, 10, "num_local is 2; Comparing to Learn has no local views: set 0"),
        ({"augmentation": {"p_holes": 2.0}}, 10, "p_holes is 2.0; expected a number from 0 to 1"),
    ],
)
def test_bad_settings_are_refused(given, number, message):
    plan = Setup("c2l", "3D").plan
    with pytest.raises(UserError, match=message):
        C2L.for_cases(C2L.configure(plan, given)[0], number)
