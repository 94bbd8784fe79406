"""The import of a method by its name: a built-in method, or a method of another installed package (`method_names`).

A method's module is imported only when its name is chosen.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import EntryPoint

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.method_names import BUILT_IN, RESERVED, check_name, offered
from pcrl_nnunet.methods.base import Method
from pcrl_nnunet.output_folder import METHOD


def method_class(name: str) -> type[Method]:
    """Import a method by its name. Another package cannot take a built-in name.

    Raises:
        UserError: no method has this name, several packages offer it, or it is not a method.
    """
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        return getattr(import_module(module), attribute)
    check_name(name)
    found = offered(name)
    if len({point.value for point in found}) > 1:
        packages = ", ".join(_package(point) for point in found)
        raise UserError(f"several packages offer a method '{name}' ({packages}); uninstall all but one of them")
    if name in RESERVED:
        raise UserError(
            f"a method of {_package(found[0])} is called '{name}', which already names a setting, a configuration or a "
            f"method of pcrl_nnunet_compare; give it another name"
        )
    return _loaded(found[0])


def _loaded(point: EntryPoint) -> type[Method]:
    found = point.load()  # the package's own errors keep their traceback
    package = _package(point)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UserError(
            f"method '{point.name}' of {package} is {found!r}; expected a subclass of pcrl_nnunet.methods.Method: "
            f"correct its entry point"
        )
    if found.name != point.name or not re.fullmatch(METHOD, point.name):
        raise UserError(
            f"method '{point.name}' of {package} calls itself '{found.name}'; expected the same name of letters, "
            f"digits and single underscores in its class and its entry point"
        )
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
