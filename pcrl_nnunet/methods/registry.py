"""The methods by name: built-in methods and methods of other installed packages.

A package offers a method by an entry point of the group ``pcrl_nnunet.methods``. A method's module is imported only
when its name is chosen.
"""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.base import Method
from pcrl_nnunet.output_folder import METHOD

GROUP = "pcrl_nnunet.methods"
DEFAULT = "pcrlv2"
METHOD_OF_0_1_0 = "pcrlv2"  # the only method in checkpoints of that version
# Names with another meaning: shared settings, nnU-Net's configurations, arms of a comparison.
RESERVED = (
    *("method", "own", "batch_size", "epochs", "iters_per_epoch", "seed", "optimizer", "initial_lr", "momentum"),
    *("weight_decay", "2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres", "all", "scratch", "stock"),
    *("scratch_longer", "scratch_pretrained", "pseudo_labels", "semi", "semi_scratch", "thumbnail", "mean_intensity"),
    "position",
)
BUILT_IN = {
    "pcrlv2": "pcrl_nnunet.methods.pcrlv2:PCRLv2",
    "mae": "pcrl_nnunet.methods.mae:MAE",
    "models_genesis": "pcrl_nnunet.methods.models_genesis:ModelsGenesis",
    "simsiam": "pcrl_nnunet.methods.simsiam:SimSiam",
}


def names() -> list[str]:
    """Return the names of all methods, built-in methods first, without reserved names and without importing any."""
    return [*BUILT_IN, *sorted({point.name for point in entry_points(group=GROUP)} - {*BUILT_IN, *RESERVED})]


def method_class(name: str) -> type[Method]:
    """Import a method by its name. Another package cannot take a built-in name.

    Raises:
        UserError: no method has this name, several packages offer it, or it is not a method.
    """
    if name in BUILT_IN:
        module, attribute = BUILT_IN[name].split(":")
        return getattr(import_module(module), attribute)
    found = [point for point in entry_points(group=GROUP) if point.name == name]
    if not found:
        raise UserError(f"there is no method '{name}'; expected one of {', '.join(names())}: give it with -method NAME")
    if len({point.value for point in found}) > 1:
        packages = ", ".join(_package(point) for point in found)
        raise UserError(f"several packages offer a method '{name}' ({packages}); uninstall all but one of them")
    if name in RESERVED:
        raise UserError(
            f"a method of {_package(found[0])} is called '{name}', which is a setting's, a configuration's or an arm's "
            f"name here; give it another name"
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
