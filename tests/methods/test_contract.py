"""Every registered method keeps the contract of `pcrl_nnunet.methods.base`, on plans of many kinds."""

from __future__ import annotations

import copy
import html
import os
import pickle
import re
import subprocess
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from method_setups import CASE, FORMS, SETUPS, Setup, gradients
from nnunetv2.run.run_training import find_free_network_port
from tiny_pretraining import make_trainer
from two_ranks import PAIR, QUEUE, state_after_steps

from pcrl_nnunet import checkpoint, method_names
from pcrl_nnunet.methods import ShownSample, names
from pcrl_nnunet.output_folder import METHOD
from pcrl_nnunet.pretraining import distributed, result
from pcrl_nnunet.pretraining.memory import estimated_peak

BATCH = 4
METHODS = pytest.mark.parametrize("name", names())
METHODS_AND_FORMS = pytest.mark.parametrize("name", [*names(), *FORMS])
ON_ALL_PLANS = pytest.mark.parametrize("kind", SETUPS)


def batch_of(setup):
    return setup.batch(max(BATCH, setup.method.min_batch_size[0]))


@METHODS
def test_every_method_has_a_valid_name_title_and_quantities(name):
    method = Setup(name, "3D").method
    assert method.name == name
    assert re.fullmatch(METHOD, name)
    assert method.title
    assert len({quantity.name for quantity in method.quantities} | set(method.terms)) == len(method.quantities) + len(
        method.terms
    )


@METHODS_AND_FORMS
def test_settings_of_fractions_take_fractions(name):
    """A default of 0 instead of 0.0 would refuse them."""
    assert not [path for path, field, value in fields_of(Setup(name, "3D").settings) if field == "float" != value]


def fields_of(settings, path=""):
    """Yield the path, the annotated type and the type of the value of each field, those of nested blocks included."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from fields_of(value, f"{path}{field.name}.")
        else:
            yield f"{path}{field.name}", field.type, type(value).__name__


@METHODS_AND_FORMS
@ON_ALL_PLANS
def test_samples_match_their_declaration_and_depend_only_on_the_generator(name, kind):
    setup = Setup(name, kind)
    views = pickle.loads(pickle.dumps(setup.views()))
    one = setup.sample()
    np.random.seed(1)
    volume = setup.volume()
    other = views(CASE, volume, np.random.default_rng(0))
    assert one.keys() >= views.arrays.keys() >= {"input"}
    for key, spec in views.arrays.items():
        assert one[key].shape == tuple(spec.shape)
        assert one[key].dtype == spec.dtype
        np.testing.assert_array_equal(one[key], other[key])
        assert not np.shares_memory(other[key], volume)
        assert not any(np.shares_memory(other[key], other[o]) for o in views.arrays if o != key)
    np.testing.assert_array_equal(volume, setup.volume())
    assert any((setup.sample(1)[key] != one[key]).any() for key in views.arrays)


@METHODS_AND_FORMS
@ON_ALL_PLANS
def test_the_shown_sample_is_the_trained_sample(name, kind):
    setup = Setup(name, kind)
    shown = setup.views().show(CASE, setup.volume(), np.random.default_rng(0))
    assert isinstance(shown, ShownSample)
    for key, array in setup.sample().items():
        np.testing.assert_array_equal(shown.sample[key], array)
    assert shown.views
    for view in shown.views:
        assert {image.ndim for image in view.images.values()} == {1 + len(setup.plan.patch_size)}


@METHODS_AND_FORMS
@ON_ALL_PLANS
def test_every_parameter_that_is_trained_gets_a_gradient(name, kind):
    setup = Setup(name, kind)
    method, batch = setup.trained(), batch_of(setup)
    trained = {id(parameter) for group in method.groups() for parameter in group.parameters}
    with torch.no_grad():
        for parameter in method.parameters():  # nnU-Net's residual blocks begin with zeros, which stop gradients
            parameter.add_(0.1 * torch.randn_like(parameter))
    reached, moved = set(), set()
    for drawn in method.variants():
        found = gradients(method, batch, drawn)
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        reached |= found.keys()
        moved |= {key for key, gradient in found.items() if gradient.any()}
    by_name = dict(method.named_parameters())
    assert {id(by_name[key]) for key in reached} == trained
    # a bias before a norm has no gradient apart from rounding errors
    assert moved >= {key for key, p in by_name.items() if id(p) in trained and p.ndim > 1}


@METHODS_AND_FORMS
@ON_ALL_PLANS
def test_a_step_returns_the_announced_terms_and_values(name, kind):
    setup = Setup(name, kind)
    method = setup.trained()
    output = method(batch_of(setup), method.draw(np.random.default_rng(0)), 0.5)
    assert output.loss.ndim == 0
    assert output.terms.keys() <= method.terms.keys()
    assert output.values.keys() <= {quantity.name for quantity in method.quantities}
    assert not any(term.requires_grad for term in output.terms.values())
    method.after_step(output, True)
    method.after_step(output, False)


@METHODS_AND_FORMS
@ON_ALL_PLANS
def test_constant_images_give_finite_losses_and_gradients(name, kind):
    setup = Setup(name, kind)
    method, batch = setup.trained(), setup.batch(max(BATCH, setup.method.min_batch_size[0]), constant=True)
    for drawn in method.variants():
        assert all(torch.isfinite(gradient).all() for gradient in gradients(method, batch, drawn).values())


@METHODS_AND_FORMS
def test_draws_depend_only_on_the_generator(name):
    method = Setup(name, "3D").trained()
    drawn = [[method.draw(np.random.default_rng((3, step))) for step in range(20)] for _ in range(2)]
    assert drawn[0] == drawn[1]


@METHODS_AND_FORMS
@ON_ALL_PLANS
def test_the_estimated_memory_of_a_step_is_plausible_or_none(name, kind):
    setup = Setup(name, kind)
    method, arrays = setup.trained(), setup.views().arrays
    small, large = (estimated_peak(method, arrays, number, "sgd") for number in (BATCH, 2 * BATCH))
    if small is not None:
        weights = sum(p.numel() for p in method.parameters()) * 4
        # a comparison of all samples with each other grows faster than the batch
        assert weights < small < large < 2.5 * small


@METHODS_AND_FORMS
@ON_ALL_PLANS
def test_the_report_has_pictures_of_finite_images(name, kind):
    setup = Setup(name, kind)
    method = setup.trained().eval()
    before = copy.deepcopy(method.state_dict())
    with torch.no_grad():
        pictures = method.pictures(batch_of(setup))
    for picture in pictures:
        assert picture.images.shape[1] == setup.channels
        assert torch.isfinite(picture.images).all()
        assert picture.errors is None or picture.errors.shape == picture.images.shape[:2]
    assert bool(pictures) <= bool(method.pictures_caption)
    assert all(torch.equal(tensor, before[key]) for key, tensor in method.state_dict().items())


@METHODS_AND_FORMS
def test_settings_and_weights_are_plain_and_stock_nnunet_loads_the_encoder(name, tmp_path):
    setup = Setup(name, "3D")
    network = setup.network()
    method = setup.method(network, 1, setup.settings)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(1)
    content = {**result.weights(network, method), "settings": asdict(setup.settings)}
    torch.save(content, tmp_path / "content.pth")
    read = torch.load(tmp_path / "content.pth", weights_only=True)
    stock = setup.network()
    stock.load_state_dict(read["network_weights"])
    trained = {key for key in read["network_weights"] if key not in read["random_keys"]}
    assert {key for key in trained if key.startswith("encoder.")} == {
        f"encoder.{key}" for key in network.encoder.state_dict()
    }
    assert not {key for key in trained if "seg_layers" in key}


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory, forked_commands):
    """Each process's gradients and states of all methods' steps; the two processes share the batch."""
    output = tmp_path_factory.mktemp("ranks") / "gradients.pth"
    tests = Path(__file__).parents[1]
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
        "OMP_NUM_THREADS": "1",
    }
    code = f"import sys; sys.path.insert(0, {str(tests)!r}); import two_ranks; two_ranks.main()"
    processes = [
        subprocess.Popen(
            [forked_commands / "python", "-P", "-c", code, str(output), *names(), *FORMS, "queue"],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    return [torch.load(f"{output}.{rank}", weights_only=True) for rank in range(2)]


@METHODS_AND_FORMS
def test_two_processes_that_share_a_batch_have_the_gradients_of_one(name, of_two_ranks):
    setup = Setup(name, "3D")
    method = setup.trained()
    alone = gradients(method, setup.batch(PAIR), method.draw(np.random.default_rng(0)))
    assert "error" not in of_two_ranks[0][name], of_two_ranks[0][name]["error"]
    shared = of_two_ranks[0][name]["gradients"]
    assert shared.keys() == alone.keys()
    largest = max(float(gradient.abs().max()) for gradient in alone.values())
    for key, gradient in alone.items():
        torch.testing.assert_close(shared[key], gradient, rtol=1e-3, atol=1e-4 * largest)


@METHODS_AND_FORMS
def test_two_processes_end_in_the_state_of_one(name, of_two_ranks):
    first, second = (of_rank[name]["state"] for of_rank in of_two_ranks)
    alone = state_after_steps(Setup(name, "3D"))
    assert first.keys() == second.keys() == alone.keys()
    for key, value in alone.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-2, atol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_a_queue_has_the_keys_of_all_processes_in_sample_order(of_two_ranks, monkeypatch):
    monkeypatch.setitem(method_names.BUILT_IN, "queue", QUEUE)
    first, second = (of_rank["queue"]["state"]["keys"] for of_rank in of_two_ranks)
    assert torch.equal(first, second)
    alone = state_after_steps(Setup("queue", "3D"))["keys"]
    assert alone.all(1).all()  # the queue is full
    torch.testing.assert_close(first, alone, rtol=1e-3, atol=1e-4)


@METHODS
def test_it_trains_resumes_bit_for_bit_and_reports(name, tiny, monkeypatch):
    trainer = make_trainer(method=name, epochs=3)
    folder = Path(trainer.output_folder)
    assert f"PCRLPretrainTrainer_{name}__" in str(folder)
    trainer.run_training()
    whole = checkpoint.read(str(folder / checkpoint.FINAL))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert html.escape(trainer.method.title) in page
    assert "could not be made" not in page
    assert (folder / "progress.png").stat().st_size > 10_000

    (folder / checkpoint.FINAL).unlink()
    stopped = make_trainer(method=name, epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "on_any_rank", lambda *_: stopped.step == 3)  # acts like a SIGTERM within an epoch
        with pytest.raises(SystemExit):
            stopped.run_training()
    continued = make_trainer(method=name, epochs=3)
    continued.load_checkpoint(str(folder / checkpoint.LATEST))
    assert continued.step == 3
    continued.run_training()
    resumed = checkpoint.read(str(folder / checkpoint.FINAL))
    assert resumed["encoder_hash"] == whole["encoder_hash"]
    for part in ("network_weights", "method_weights"):
        assert resumed[part].keys() == whole[part].keys()
        assert all(torch.equal(tensor, whole[part][key]) for key, tensor in resumed[part].items())
    assert resumed["monitor"] == whole["monitor"]
