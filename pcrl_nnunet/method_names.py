"""The names of the methods, built-in ones and those of other installed packages, without importing any method.

A package offers a method by an entry point of the group ``pcrl_nnunet.methods``. `methods.registry` imports it.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from pcrl_nnunet.errors import UserError, with_nearest

GROUP = "pcrl_nnunet.methods"
DEFAULT = "pcrlv2"
METHOD_OF_0_1_0 = "pcrlv2"  # the only method in checkpoints of that version
# Names with another meaning: shared settings, nnU-Net's configurations, arms of a comparison.
RESERVED = (
    *("method", "own", "batch_size", "epochs", "iters_per_epoch", "seed", "optimizer", "initial_lr", "momentum"),
    *("weight_decay", "2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres", "all", "scratch", "stock"),
    *("scratch_longer", "scratch_pasted", "scratch_pretrained", "pseudo_labels", "semi", "semi_scratch"),
    *("thumbnail", "mean_intensity", "position"),
)
BUILT_IN = {
    "pcrlv2": "pcrl_nnunet.methods.pcrlv2:PCRLv2",
    "pcrlv1": "pcrl_nnunet.methods.pcrlv1:PCRLv1",
    "mae": "pcrl_nnunet.methods.mae:MAE",
    "models_genesis": "pcrl_nnunet.methods.models_genesis:ModelsGenesis",
    "simsiam": "pcrl_nnunet.methods.simsiam:SimSiam",
    "rotation": "pcrl_nnunet.methods.rotation:Rotation",
    "cpc": "pcrl_nnunet.methods.cpc:CPC",
    "c2l": "pcrl_nnunet.methods.c2l:C2L",
    "rubiks_cube": "pcrl_nnunet.methods.rubiks_cube:RubiksCube",
    "transvw": "pcrl_nnunet.methods.transvw:TransVW",
    "dense": "pcrl_nnunet.methods.dense:Dense",
}


def names() -> list[str]:
    """Return the names of all methods, built-in methods first, without reserved names."""
    return [*BUILT_IN, *sorted({point.name for point in entry_points(group=GROUP)} - {*BUILT_IN, *RESERVED})]


def offered(name: str) -> list[EntryPoint]:
    """Return the entry points by which other packages offer a method, also under a reserved name."""
    return [point for point in entry_points(group=GROUP) if point.name == name]


def check_name(name: str) -> None:
    """Raise `UserError` if no method has this name."""
    if name not in BUILT_IN and not offered(name):
        begin = with_nearest(f"there is no method '{name}'", name, names())
        raise UserError(f"{begin}; expected one of {', '.join(names())}: give it with -method NAME")
