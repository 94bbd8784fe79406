"""Blocks of settings in a plan, and their frozen dataclasses."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.settings import NOT_IN_BLOCK, differences, merged, number, part, pcrl_block, replaced, without_settings


@dataclass(frozen=True)
class Inner:
    size: tuple[int, ...] = (1, 2)
    rate: float = number(0.5, " (0.5 is usual)", above=0, at_most=1)
    way: Literal["", "up", "down"] = ""


@dataclass(frozen=True)
class Outer:
    elsewhere: int = field(default=0, metadata=NOT_IN_BLOCK)
    inner: Inner = field(default_factory=Inner)
    other: Inner = field(default_factory=Inner)
    steps: int = 3
    on: bool = False


def test_a_nested_block_replaces_only_given_settings():
    given = {"steps": 4, "inner": {"rate": 1}}
    assert replaced(Outer(), "here", given) == Outer(inner=Inner((1, 2), 1), steps=4)
    assert given == {"steps": 4, "inner": {"rate": 1}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 4}, r"^here.step is not a setting; expected one of inner, on, other, steps$"),
        ({"elsewhere": 4}, r"^here.elsewhere is not a setting"),
        ({"inner": {"rates": 4}}, r"^here.inner.rates is not a setting; expected one of rate, size, way$"),
        ({"inner": {"rate": "1"}}, r"^here.inner.rate is .1.; expected a value like 0.5$"),
        ({"inner": {"rate": float("inf")}}, r"^here.inner.rate is inf; expected a finite number$"),
        ({"inner": {"rate": 0}}, r"^here.inner.rate is 0; expected a number above 0, up to 1 \(0.5 is usual\)$"),
        ({"inner": {"rate": 1.5}}, r"^here.inner.rate is 1.5; expected a number above 0, up to 1 "),
        ({"inner": {"way": "left"}}, r"^here.inner.way is 'left'; expected 'up' or 'down'$"),
        ({"inner": {"size": 1}}, r"^here.inner.size is 1; expected a value like \[1, 2\]$"),
        ({"inner": 1}, r"^here.inner is 1; expected a block of settings"),
        ({"steps": 4.0}, r"^here.steps is 4.0; expected a value like 3$"),
        ({"steps": True}, r"^here.steps is true; expected a value like 3$"),
        ({"on": 1}, r"^here.on is 1; expected a value like false$"),
    ],
)
def test_a_setting_that_is_wrong_is_named_with_its_place(given, message):
    with pytest.raises(UserError, match=message):
        replaced(Outer(), "here", given)


def test_common_nested_blocks_are_merged():
    block = {"a": 1, "b": {"c": {"d": 2}, "e": 3}, "f": {"g": 4}, "h": 5}
    over = {"b": {"c": {"i": 6}, "e": {"j": 7}}, "f": 8, "h": {"k": 9}}
    before = repr((block, over))
    assert merged(block, over) == {"a": 1, "b": {"c": {"d": 2, "i": 6}, "e": {"j": 7}}, "f": 8, "h": {"k": 9}}
    assert repr((block, over)) == before


def test_differing_values_are_named_also_within_blocks():
    then = {"same": 1, "a": 1, "gone": 2, "block": {"same": 1, "x": 1, "deep": {"y": 1, "z": 2}}, "became": {"x": 1}}
    now = {"same": 1, "a": 2, "new": 3, "block": {"same": 1, "x": 2, "deep": {"y": 2, "z": 2}}, "became": 1}
    assert list(differences(then, now)) == ["a", "new", "block.x", "block.deep.y", "became", "gone"]
    assert differences(then, now)["block.x"] == (1, 2)
    assert differences(then, then) == {}


def test_none_differs_from_a_missing_value():
    assert differences({"a": None}, {}) == {"a": (None, None)}


def test_a_plan_without_a_block_has_an_empty_one():
    assert pcrl_block({}) == part({}, "pretrain") == {}
    assert without_settings({"pcrl": {"pretrain": {}}, "plans_name": "p"}) == {"plans_name": "p"}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ([], r"^pcrl is \[\]; expected a block of settings"),
        ({"pretraining": {}}, r"^pcrl.pretraining is no part of the plan's settings; expected pretrain, finetune"),
        ({"checkpoint": {}}, r"^pcrl.checkpoint is {}; expected the path of a checkpoint_final.pth$"),
    ],
)
def test_a_part_that_a_plan_cannot_have_is_named(block, message):
    with pytest.raises(UserError, match=message):
        pcrl_block({"pcrl": block})
