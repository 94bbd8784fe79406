"""The contract refuses methods that the engine cannot support."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from method_setups import Setup
from tiny_method import PLACE, Mean
from torch import nn

from pcrl_nnunet import method_names
from pcrl_nnunet.methods import Method, ParameterGroup, Preparation, StepOutput
from pcrl_nnunet.pretraining.optimisation import optimiser
from pcrl_nnunet.pretraining.preparation import make_anew
from pcrl_nnunet.pretraining.settings import PretrainSettings
from pcrl_nnunet.pretraining.step import Stepper


def test_a_group_keeps_the_parameters_of_a_generator() -> None:
    layer = nn.Linear(2, 2)
    group = ParameterGroup(layer.parameters())  # type: ignore[arg-type]  # authors write it like this
    assert [*group.parameters] == [*group.parameters] == [layer.weight, layer.bias]


def test_a_method_overriding_draw_must_override_variants() -> None:
    with pytest.raises(TypeError, match="overrides draw and not variants"):
        type("Drawing", (Method,), {"draw": lambda self, rng: rng.integers(2)})


def test_a_term_may_not_have_the_name_of_the_whole_loss() -> None:
    with pytest.raises(TypeError, match="has a term called loss"):
        type("Named", (Method,), {"terms": {"loss": "loss"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": {"secret": torch.zeros(())}}, r"gives terms that the method does not declare: \['secret'\]"),
        ({"values": {"precision": {"all": torch.zeros(())}}}, r"gives values .* does not declare: \['precision'\]"),
        ({"loss": torch.zeros(2, requires_grad=True)}, r"the loss of mean has the shape \(2,\); expected one number"),
    ],
)
def test_an_output_that_would_not_be_shown_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: Mapping[str, Any], message: str
) -> None:
    monkeypatch.setitem(method_names.BUILT_IN, "mean", PLACE)
    setup = Setup("mean", "3D")
    method, forward = setup.trained(), Mean.forward
    monkeypatch.setattr(Mean, "forward", lambda *given: replace(forward(*given), **change))
    settings = PretrainSettings("mean", setup.settings, 2, epochs=1, iters_per_epoch=2)
    stepper = Stepper(
        method, method.groups(), *optimiser(method.groups(), settings), None, settings, torch.device("cpu")
    )
    with pytest.raises(TypeError, match=message):
        stepper({**setup.batch(2), "cases": ["a", "b"]}, 0)


class Preparing(Mean):
    """A method that draws random numbers and returns a given value."""

    returned: Any = None

    @classmethod
    def prepare(cls, preparation: Preparation) -> dict[str, Any]:
        torch.rand(3)
        return {"found": cls.returned}


def preparation() -> Preparation:
    return Preparation([], nn.Linear(1, 1), 1, None, 0, torch.device("cpu"))


def test_random_draws_in_preparation_do_not_change_later_draws() -> None:
    given = preparation()
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    make_anew(Preparing, given)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("value", [np.array(["a"]), StepOutput, {1, 2}])
def test_values_unfit_for_a_checkpoint_are_refused_with_place(monkeypatch: pytest.MonkeyPatch, value: Any) -> None:
    monkeypatch.setattr(Preparing, "returned", value)
    with pytest.raises(TypeError, match=r"as mean\['found'\]; expected"):
        make_anew(Preparing, preparation())


def test_a_preparation_is_a_copy_of_the_network(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_pretraining import make_trainer

    monkeypatch.setitem(method_names.BUILT_IN, "mean", PLACE)
    trainer = make_trainer(method="mean")
    trainer.initialize()
    before = {name: value.clone() for name, value in trainer.plan_network.state_dict().items()}
    with torch.no_grad():
        for parameter in trainer.preparation().network.parameters():
            parameter.zero_().requires_grad_(False)
    assert all(torch.equal(value, before[name]) for name, value in trainer.plan_network.state_dict().items())
    assert all(parameter.requires_grad for parameter in trainer.network.parameters())
