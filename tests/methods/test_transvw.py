import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from method_setups import CASE, SETUPS, Setup
from tiny_dataset import make_plan
from tiny_pretraining import make_trainer

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case, CaseVolume
from pcrl_nnunet.methods import PlanFacts, Preparation, transvw
from pcrl_nnunet.methods.transvw import TransVW, box_at
from pcrl_nnunet.pretraining.preparation import make_anew

ON_ALL_PLANS = pytest.mark.parametrize("kind", SETUPS)
PLAN = PlanFacts("3d_fullres", (40, 56, 40), 2, ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)), (36, 50, 35), (1.0,) * 3)


def views_of(setup, places, without=(), **changes):
    settings = replace(setup.settings, **changes)
    prepared = {"reference": "case", "places": np.array(places), "without_places": [*without]}
    return TransVW.views(settings, setup.plan, setup.channels, prepared)


@ON_ALL_PLANS
def test_a_crop_lies_at_the_same_share_of_each_axis_of_every_case(kind):
    setup = Setup("transvw", kind)
    rng, axes = np.random.default_rng(0), len(setup.volume().shape) - 1
    places = rng.uniform(0.3, 0.7, (5, axes))
    views = views_of(setup, places, jitter=0.0)
    for seed, factor in enumerate((2, 3, 2, 3, 2, 3)):
        volume = rng.normal(size=(setup.channels, *(factor * n for n in setup.volume().shape[1:]))).astype(np.float32)
        sample = views(CASE, volume, np.random.default_rng(seed))
        place = places[sample["place"]] * volume.shape[1:]
        size = setup.settings.crop_size
        extra = axes - len(size)
        expected = volume[(slice(None), *(int(p) for p in place[:extra]))]
        lower = np.round(place[extra:] - np.array(size) / 2).astype(int)
        expected = expected[(slice(None), *(slice(low, low + s) for low, s in zip(lower, size, strict=True)))]
        np.testing.assert_allclose(sample["target"], expected, atol=1e-5)


def test_all_places_are_drawn_alike():
    setup = Setup("transvw", "3D")
    views, volume = setup.views(), setup.volume()
    drawn = [int(views(CASE, volume, np.random.default_rng(seed))["place"]) for seed in range(440)]
    assert np.bincount(drawn, minlength=44).max() < 10 + 5 * 10**0.5
    assert len({*drawn}) == 44


def test_the_jitter_moves_a_crop_by_up_to_a_tenth_of_its_edge():
    setup = Setup("transvw", "3D")
    places, volume = np.full((2, 3), 0.5), np.zeros((1, 100, 100, 100), np.float32)
    setup.settings = replace(setup.settings, crop_size=(20, 40, 12))
    views = views_of(setup, places)
    lower = []
    for seed in range(100):
        (shown,) = views.show(CASE, volume, np.random.default_rng(seed)).views
        lower.append(shown.box.lower)
    assert np.min(lower, axis=0).tolist() == [38, 26, 43]
    assert np.max(lower, axis=0).tolist() == [42, 34, 45]


@pytest.mark.parametrize(
    ("place", "shift", "lower"),
    [((0.0, 0.5, 1.0), (0, 0, 0), (0, 15, 20)), ((0.5, 0.5, 0.5), (-99, 99, 0), (0, 30, 10))],
)
def test_crops_stay_within_the_image(place, shift, lower):
    box, plane = box_at(np.array(place), (30, 40, 30), (10, 10, 10), shift)
    assert (box.lower, box.shape, plane) == (lower, (10, 10, 10), ())


def test_crops_larger_than_the_image_are_centred_and_slices_exist():
    box, plane = box_at(np.array((1.0, 0.0, 0.3)), (7, 5, 9), (10, 8), (0, 0))
    assert (box.lower, box.shape, plane) == ((-2, 0), (10, 8), (6,))


def test_places_on_the_reference_case_are_its_own_crops_and_not_background(tmp_path):
    volume = np.full((1, 60, 40, 40), -1, np.float32)
    volume[:, 40:] = np.random.default_rng(0).normal(3, 1, (1, 20, 40, 40))
    setup = Setup("transvw", "3D")
    (case,) = written(tmp_path, [volume])
    prepared = TransVW.prepare(preparation(setup, [case]))
    places = prepared["places"]
    assert places.shape == (44, 3)
    assert prepared["reference"] == "case_0"
    assert len(np.unique(places, axis=0)) == 44
    shares = []
    for place in places:
        box, _ = box_at(place, (60, 40, 40), setup.settings.crop_size, (0, 0, 0))
        shares.append((volume[box.index()] == -1).mean())
    assert np.mean(np.array(shares) <= 0.85) > 0.8  # four draws each: a few stay empty
    assert np.mean(shares) < 0.5


def written(folder, volumes):
    cases = []
    for number, volume in enumerate(volumes):
        cases.append(Case(f"case_{number}", os.path.join(folder, f"case_{number}.npy")))
        np.save(cases[-1].path, volume)
    return cases


def preparation(setup, cases, **changes):
    settings = replace(setup.settings, **changes)
    return Preparation(cases, setup.network(), setup.channels, settings, 0, torch.device("cpu"))


@pytest.fixture(params=["3D", "2D"])
def two_kinds(request, tmp_path, monkeypatch):
    """Eight cases: those with even numbers show one scene, the others another one, with noise and in other sizes."""
    monkeypatch.setattr(transvw, "GRID", {2: 16, 3: 12})
    setup, rng, volumes = Setup("transvw", request.param), np.random.default_rng(0), []
    for number in range(8):
        edge = 40 + number
        first, second = np.meshgrid(*2 * [np.linspace(-1, 1, edge)], indexing="ij")
        scene = np.sign(first) if number % 2 == 0 else 1 - 2 * (first**2 + second**2)
        volumes.append((scene + rng.normal(0, 0.3, (1, 30, edge, edge))).astype(np.float32))
    return setup, written(tmp_path, volumes)


def test_places_count_in_the_cases_that_look_like_the_reference(two_kinds):
    setup, cases = two_kinds
    given = {"nearest_cases": 4, "autoencoder_steps": 20}
    prepared = make_anew(TransVW, preparation(setup, cases, **given))
    kind = int(prepared["reference"][-1]) % 2
    assert prepared["without_places"] == [case.name for case in cases if int(case.name[-1]) % 2 != kind]
    again = make_anew(TransVW, preparation(setup, cases, **given))
    assert again["without_places"] == prepared["without_places"]
    np.testing.assert_array_equal(again["places"], prepared["places"])


def test_distances_depend_only_on_seed_and_cases(two_kinds):
    setup, cases = two_kinds
    given = preparation(setup, cases, autoencoder_steps=3)
    found = []
    for noise in range(2):
        torch.manual_seed(noise)
        fresh = replace(given, network=setup.network())
        found.append(transvw.distances(cases, fresh, np.random.default_rng(0)))
    np.testing.assert_array_equal(*found)
    assert found[0][0] == 0
    assert (found[0][1:] > 0).all()


def test_the_autoencoder_learns(two_kinds, monkeypatch):
    setup, cases = two_kinds
    losses, own = [], transvw.F.mse_loss
    monkeypatch.setattr(transvw.F, "mse_loss", lambda *given: losses.append(own(*given)) or losses[-1])
    transvw.distances(cases, preparation(setup, cases, autoencoder_steps=40), np.random.default_rng(0))
    assert losses[-1].item() < 0.5 * losses[0].item()


def test_with_few_cases_all_have_places_and_no_autoencoder_is_trained(two_kinds, monkeypatch):
    setup, cases = two_kinds
    monkeypatch.setattr(transvw, "distances", None)
    assert TransVW.prepare(preparation(setup, cases, nearest_cases=8))["without_places"] == []


def test_only_some_of_many_cases_are_compared(two_kinds, monkeypatch):
    setup, cases = two_kinds
    monkeypatch.setattr(transvw, "CANDIDATES", 2)
    compared = []

    def distances(candidates, *_):
        compared.extend(case.name for case in candidates)
        return np.arange(len(candidates), dtype=float)

    monkeypatch.setattr(transvw, "distances", distances)
    prepared = TransVW.prepare(preparation(setup, cases, nearest_cases=3))
    assert compared[0] == prepared["reference"]
    assert len({*compared}) == len(compared) == 6
    assert {*prepared["without_places"]} == {case.name for case in cases} - {*compared[:3]}


def test_an_image_with_room_becomes_the_reference(tmp_path):
    setup, rng = Setup("transvw", "3D"), np.random.default_rng(0)
    small = setup.settings.crop_size
    volumes = [rng.normal(size=(1, *size)).astype(np.float32) for size in (small, small, (30, 30, 30), small)]
    cases = written(tmp_path, volumes)
    assert TransVW.prepare(preparation(setup, cases))["reference"] == "case_2"
    with pytest.raises(UserError, match=r"crop_size is \(12, 12, 12\), and no image is larger, .* make crop_size sm"):
        TransVW.prepare(preparation(setup, [cases[0], cases[1], cases[3]]))


def test_a_case_that_looks_unlike_the_reference_has_crops_from_anywhere_without_a_place():
    setup = Setup("transvw", "3D")
    views = views_of(setup, np.full((2, 3), 0.5), without=["case"])
    volume, lower = setup.volume(), set()
    for seed in range(20):
        shown = views.show(CASE, volume, np.random.default_rng(seed))
        assert shown.sample["place"] == -1
        lower.add(shown.views[0].box.lower)
    assert len(lower) > 10
    unseen = Case("another", "nowhere.b2nd")
    assert views(unseen, volume, np.random.default_rng(0))["place"] >= 0


def test_the_loss_is_the_restoration_and_a_hundredth_of_the_cross_entropy_of_known_places():
    setup = Setup("transvw", "four channels, anisotropic")
    method, batch = setup.trained(), dict(setup.batch(4))
    batch["place"] = torch.tensor([3, -1, 40, 3])
    output = method(batch, None)
    with torch.no_grad():
        restored = method.unet(batch["input"]).double().numpy()
        bottleneck = method.unet.encoder(batch["input"])[-1].double().flatten(2).numpy()
    pooled = np.concatenate([bottleneck.mean(2), bottleneck.max(2)], 1)
    logits = pooled @ method.head.weight.detach().double().numpy().T + method.head.bias.detach().double().numpy()
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    entropy = -np.mean([logs[0, 3], logs[2, 40], logs[3, 3]])
    error = np.mean((restored - batch["target"].numpy()) ** 2)
    assert output.terms["restoration"].item() == pytest.approx(error, rel=1e-4)
    assert output.terms["classification"].item() == pytest.approx(entropy, rel=1e-4)
    assert output.loss.item() == pytest.approx(error + 0.01 * entropy, rel=1e-4)
    right = np.mean(logits[[0, 2, 3]].argmax(1) == [3, 40, 3]) * 44
    assert output.values["right_over_chance"][""].item() == pytest.approx(right)


def test_a_batch_without_places_trains_the_restoration_alone():
    setup = Setup("transvw", "3D")
    method, batch = setup.trained(), dict(setup.batch(2))
    batch["place"] = torch.full((2,), -1)
    output = method(batch, None)
    output.loss.backward()
    assert output.loss == output.terms["restoration"]
    assert output.terms["classification"] == 0
    assert [*output.values] == ["restoration_error"]
    assert not method.head.weight.grad.any()
    assert method.unet.output.weight.grad.any()


@ON_ALL_PLANS
def test_logits_of_different_images_differ(kind):
    """Behind instance norm, means alone would hardly differ."""
    setup = Setup("transvw", kind)
    method, seen = setup.trained().eval(), []
    method.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    rng, images = np.random.default_rng(0), []
    for exponent in range(8):
        image = rng.normal(size=(setup.channels, *setup.settings.crop_size)).cumsum(1) ** (1 + exponent % 3)
        images.append((image - image.mean()) / image.std())
    image = torch.from_numpy(np.stack(images)).float()
    with torch.no_grad():
        method({"input": image, "target": image, "place": torch.zeros(8, dtype=torch.int64)}, None)
    assert (seen[0].std(0) / seen[0].abs().mean(0)).mean() > 0.1


def test_crops_are_at_most_half_of_the_median_image_and_fill_the_budget():
    settings, batch_size = TransVW.configure(PLAN, {})
    assert settings.crop_size == (16, 24, 16)
    assert batch_size == 2 * 40 * 56 * 40 // (16 * 24 * 16)
    assert settings.nearest_cases == 200
    thin = replace(PLAN, strides=((1, 1, 1), (1, 2, 2), (1, 2, 2)), patch_size=(4, 64, 64), median_size=(5, 300, 90))
    settings, batch_size = TransVW.configure(thin, {})
    assert settings.crop_size == (2, 64, 44)
    flat = replace(PLAN, patch_size=(64, 64), strides=((1, 1), (2, 2)), median_size=(40, 400), spacing=(1.0, 1.0))
    settings, batch_size = TransVW.configure(replace(flat, batch_size=1000), {})
    assert (settings.crop_size, settings.nearest_cases, batch_size) == ((20, 64), 1000, 256)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"crop_size": [16, 16]}, r"crop_size is \(16, 16\); expected 3 multiples of .* stride \(8, 8, 8\), such as"),
        ({"crop_size": [12, 16, 16]}, r"crop_size is \(12, 16, 16\); expected 3 multiples of"),
        ({"crop_size": [8, 8, 16]}, r"crop_size \(8, 8, 16\) leaves 2 of the 3 voxels at the bottleneck"),
        ({"places": 1}, r"pcrl.pretrain.transvw.places is 1; expected 2 or more"),
        ({"nearest_cases": 1}, r"nearest_cases is 1; expected 2 or more"),
        ({"jitter": 1.5}, r"jitter is 1.5; expected a number from 0 to 1"),
        ({"corruption": {"p_paint": 0.5}}, r"transvw.corruption.p_paint is not a setting"),
        ({"words": 3}, r"pcrl.pretrain.transvw.words is not a setting"),
    ],
)
def test_impossible_settings_are_named(given, message):
    with pytest.raises(UserError, match=message):
        TransVW.configure(PLAN, given)


def test_another_datasets_small_images_drop_the_crop_size():
    block = {"crop_size": [16, 24, 16], "places": 20}
    assert TransVW.fitted(block, (36, 50, 35)) == (block, [])
    assert TransVW.fitted(block, (36, 20, 35)) == ({"places": 20}, ["crop_size"])
    assert TransVW.fitted({"crop_size": "large"}, (36, 20, 35)) == ({"crop_size": "large"}, [])


def test_a_training_with_more_cases_than_nearest_cases_finds_them_before(tiny):
    plan = make_plan(pretrain={"transvw": {"nearest_cases": 2, "autoencoder_steps": 2}})
    trainer = make_trainer(method="transvw", plan=plan)
    trainer.run_training()
    assert len(trainer.prepared["without_places"]) == 2
    assert np.isfinite(trainer.logger.local_logger.my_fantastic_logging["train_losses"]).all()
    batches = [trainer.loader().sample(step, index) for step in range(3) for index in range(4)]
    for case, sample in batches:
        assert (sample["place"] < 0) == (case.name in trainer.prepared["without_places"])
    assert CaseVolume(batches[0][0]).shape == (1, 14, 14, 14)
