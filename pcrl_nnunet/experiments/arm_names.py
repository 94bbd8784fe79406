"""The names of a comparison's arms, without importing torch or any method: `arms` has the arms themselves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from pcrl_nnunet.config import RECIPES
from pcrl_nnunet.errors import UserError, with_nearest
from pcrl_nnunet.method_names import BUILT_IN, DEFAULT, check_name, names
from pcrl_nnunet.settings import part, pcrl_block

CONTROL, STOCK = "scratch", "stock"
PSEUDO_LABELS = "pseudo_labels"
SEMI, SEMI_SCRATCH = "semi", "semi_scratch"
LONGER, PASTED = "scratch_longer", "scratch_pasted"
OF_SEGMENTATIONS = (PSEUDO_LABELS, LONGER, PASTED, SEMI_SCRATCH, SEMI)
OF_CLASSIFICATIONS = ("thumbnail", "mean_intensity", "position")
# The ablations of each built-in method that has some.
ABLATIONS: Mapping[str, Sequence[str]] = {
    "pcrlv2": (
        *("skip_connections", "cross_scale", "restoration_only", "comparison_only", "one_level", "three_levels"),
        *("all_levels", "multi_crop"),
    ),
    "pcrlv1": ("contrast_only", "restoration", "rotation_task", "attention_flips", "attention", "mixup_half"),
}


def arm_names(method: str, task: str | None = None) -> list[str]:
    """Return the names of the built-in arms.

    Args:
        method: the built-in method whose ablations are arms.
        task: ``segmentation`` or ``classification``; None: the names of both.
    """
    recipes = [recipe for recipe, changes in RECIPES.items() if changes]
    with_recipes = [f"{name}_{recipe}" for recipe in recipes for name in (CONTROL, *names())]
    of_segmentations = (*OF_SEGMENTATIONS, *with_recipes) if task != "classification" else ()
    of_classifications = OF_CLASSIFICATIONS if task != "segmentation" else ()
    return [CONTROL, STOCK, *of_segmentations, *of_classifications, *names(), *ABLATIONS.get(method, ())]


def unknown_arm(name: str, known: Collection[str]) -> UserError:
    """Return the error for a name that is no arm."""
    for method, ablations in ABLATIONS.items():
        if name in ablations:
            return UserError(
                f"'{name}' is an ablation of {method}, which is not the method of this comparison; set method to "
                f'"{method}" in pcrl.pretrain of the plan or of -settings'
            )
    begin = with_nearest(f"there is no method '{name}'", name, known)
    return UserError(f"{begin}; expected some of {', '.join(known)}")


ALL = "all"  # stands for every method of pretraining


def expanded(wanted: Sequence[str], methods: Sequence[str]) -> list[str]:
    """Return the names given with ``-methods``, with all these methods of pretraining in place of ``all``."""
    return list(dict.fromkeys(name for given in wanted for name in (methods if given == ALL else [given])))


def check_arm_names(
    wanted: Iterable[str], own: Iterable[str], settings: Mapping[str, Any], plan: Mapping[str, Any], task: str | None
) -> None:
    """Raise `UserError` for a name that is no arm, before torch is imported.

    The ablations of another package's method are unknown without importing it. `choose_arms` then checks the names, and
    whether the dataset can have the arms.

    Args:
        wanted: names that were given with ``-methods``.
        own: names that the user defined.
        settings: content of ``-settings``.
        plan: nnU-Net's plan.
        task: see `arm_names`.
    """
    of_plan = part(pcrl_block(plan), "pretrain", "pcrl.")
    method = part(settings, "pretrain", "-settings ").get("method", of_plan.get("method", DEFAULT))
    if isinstance(method, str):
        check_name(method)
    if method not in BUILT_IN:
        return
    known = [*arm_names(method, task), *own]
    for name in wanted:
        if name not in known:
            raise unknown_arm(name, known)
