"""The methods by name: built-in methods, and methods of other installed packages."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import make_plan

from pcrl_nnunet import method_names
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.method_names import BUILT_IN, DEFAULT, RESERVED, names
from pcrl_nnunet.methods import Method
from pcrl_nnunet.methods.pcrlv2 import PCRLv2
from pcrl_nnunet.methods.registry import method_class
from pcrl_nnunet.output_folder import METHOD
from pcrl_nnunet.pretraining.settings import PretrainSettings, pretrain_settings


class Mine(Method):
    name = "mine"


class Split(Method):
    name = "a__b"


class Package:
    """The package of an entry point."""

    def __init__(self, name: str) -> None:
        self.name = name


def offered(monkeypatch: pytest.MonkeyPatch, *methods: tuple[str, str, str]) -> None:
    """Let packages offer methods.

    Args:
        methods: name, module:class, and the package.
    """
    points = []
    for name, value, package in methods:
        point = EntryPoint(name, value, method_names.GROUP)
        vars(point)["dist"] = Package(package)
        points.append(point)
    monkeypatch.setattr(method_names, "entry_points", lambda group: points if group == method_names.GROUP else [])


HERE = __name__


def test_the_default_is_built_in() -> None:
    assert method_class(DEFAULT) is PCRLv2


def test_every_built_in_method_calls_itself_by_its_name() -> None:
    for name in BUILT_IN:
        assert method_class(name).name == name
        assert re.fullmatch(METHOD, name)


@pytest.mark.parametrize("name", ["scratch", "seed", "3d_fullres", "method"])
def test_a_name_that_means_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    offered(monkeypatch, (name, f"{HERE}:Mine", "my_package"))
    with pytest.raises(UserError, match=f"a method of my_package is called '{name}', which already"):
        method_class(name)


def test_a_package_with_a_reserved_name_does_not_take_other_methods_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, ("momentum", f"{HERE}:Mine", "my_package"))
    plan = make_plan(pretrain={"momentum": 0.5})
    configuration = PlansManager(plan).get_configuration("3d_fullres").configuration
    assert pretrain_settings(plan, "3d_fullres", configuration).momentum == 0.5


def test_names_of_settings_are_reserved() -> None:
    assert {*PretrainSettings.__dataclass_fields__} <= {*RESERVED}


def test_names_are_listed_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, ("z", "no_such_module:Z", "last"), ("a", "no_such_module:A", "first"))
    assert names() == [*BUILT_IN, "a", "z"]


def test_a_method_of_another_package_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, ("mine", f"{HERE}:Mine", "my_package"))
    assert method_class("mine") is Mine


@pytest.mark.parametrize("name", ["c2l", "cpc", "pcrlv1", "transvw"])
def test_methods_that_compare_cases_need_two(name: str) -> None:
    assert method_class(name).min_cases[0] == 2


def test_an_unknown_method_is_answered_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, ("mine", f"{HERE}:Mine", "my_package"))
    with pytest.raises(
        UserError, match=rf"'pcrl', the nearest is pcrlv2; expected one of {', '.join([*BUILT_IN, 'mine'])}:"
    ):
        method_class("pcrl")


def test_a_built_in_name_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, (DEFAULT, f"{HERE}:Mine", "my_package"))
    assert method_class(DEFAULT) is PCRLv2
    assert names().count(DEFAULT) == 1


def test_packages_with_the_same_method_name_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, ("mine", f"{HERE}:Mine", "one"), ("mine", f"{HERE}:Split", "two"))
    with pytest.raises(UserError, match=r"several packages offer a method 'mine' \(one, two\); uninstall all but one"):
        method_class("mine")


def test_an_entry_point_found_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens if a package lies in two folders of the path."""
    offered(monkeypatch, *[("mine", f"{HERE}:Mine", "my_package")] * 2)
    assert method_class("mine") is Mine


@pytest.mark.parametrize("value", ["Package", "offered"])
def test_an_offered_object_of_wrong_type_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    offered(monkeypatch, ("mine", f"{HERE}:{value}", "my_package"))
    with pytest.raises(
        UserError, match=rf"method 'mine' of my_package is <.*{value}.*>; expected a subclass of .*Method"
    ):
        method_class("mine")


@pytest.mark.parametrize(("name", "value", "own"), [("yours", "Mine", "mine"), ("a__b", "Split", "a__b")])
def test_a_method_that_calls_itself_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, own: str
) -> None:
    offered(monkeypatch, (name, f"{HERE}:{value}", "my_package"))
    with pytest.raises(UserError, match=rf"method '{name}' of my_package calls itself '{own}'; expected the same name"):
        method_class(name)


def test_an_error_in_another_package_is_raised_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    offered(monkeypatch, ("mine", "no_such_module:Mine", "my_package"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        method_class("mine")


def test_listing_the_names_imports_no_method() -> None:
    code = (
        "import sys; from pcrl_nnunet.methods import names; names(); "
        "sys.exit(any(m.startswith('pcrl_nnunet.methods.pcrlv2') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
