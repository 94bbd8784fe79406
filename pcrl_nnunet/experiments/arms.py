"""The arms of a comparison: the rows of its table, which users choose by name with ``-methods``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pcrl_nnunet.classification.label_table import LabelTable
from pcrl_nnunet.classification.shortcuts import SHORTCUTS, shortcuts_of
from pcrl_nnunet.config import PASTED_SHARE, RECIPES, FinetuneSettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.arm_names import (
    CONTROL,
    LONGER,
    PASTED,
    PSEUDO_LABELS,
    SEMI,
    SEMI_SCRATCH,
    STOCK,
    unknown_arm,
)
from pcrl_nnunet.experiments.settings import short
from pcrl_nnunet.method_names import DEFAULT, names
from pcrl_nnunet.methods.registry import method_class
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.semi_supervised.settings import SemiSettings

# A step of the second phase takes 1.6 to 1.9 times as long: the teacher adds a forward pass, a second loss and the
# loading of unlabelled patches. Measured on ACDC: 2D, a quarter of the width, one core; not in 3D or on a GPU. The
# largest value, and as if all steps were mixed, so that the control does not have less compute.
SECOND_PHASE = 1.9
# nnUNetTrainer's training, in as many iterations as the other arms have
NNUNET = {
    **{"recipe": "nnunet", "optimizer": "sgd", "deep_supervision": True},
    **{"initial_lr": 1e-2, "weight_decay": 3e-5, "warmup_share": 0.0},
}
PRETRAINED = DEFAULT  # the arm whose verdict comes last
DEFAULTS = (STOCK, PSEUDO_LABELS, *SHORTCUTS, PRETRAINED)  # a dataset may lack some
NAME = re.compile(r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*")  # nnU-Net splits names of folders at __


@dataclass(frozen=True)
class Arm:
    """One way to train, a row of the table.

    Args:
        pretrain: settings over the plan's ``pcrl.pretrain``; None: the arm does not pretrain.
        finetune: settings over the plan's ``pcrl.finetune``.
        pretraining: the arm whose pretraining this arm uses; None: its own.
        semi: settings over the plan's ``pcrl.semi``; None: the arm's training is not semi-supervised.
        controls: further arms that train without what this arm adds. They are trained too, and the verdict compares
            with the best control.
        epochs_factor: the epochs of fine-tuning, as a multiple of the other arms' epochs.
        pseudo_labels: train also on the cases without labels, with labels that the control's network predicts.
        shortcut: the name of one of `SHORTCUTS`, which classifies without a network.
    """

    pretrain: Mapping[str, Any] | None = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)
    pretraining: str | None = None
    semi: Mapping[str, Any] | None = None
    controls: Sequence[str] = ()
    epochs_factor: float = 1.0
    pseudo_labels: bool = False
    shortcut: str | None = None


def built_in_arms(
    plan: PlanFacts,
    method: str,
    batch_size: int,
    label_table: LabelTable | None = None,
    semi: SemiSettings | None = None,
) -> dict[str, Arm]:
    """Return the arms that need no definition by the user: controls, shortcuts, methods, and ablations of one method.

    Args:
        plan: the comparison's plan.
        method: name of the method whose ablations become arms.
        batch_size: samples a step of that method. All ablations use it, even if more would fit.
        label_table: labels of a classification, which has shortcuts instead of pseudo-labels; None: a segmentation.
        semi: settings of semi-supervised training, whose compute `LONGER` and `PASTED` have. None: the defaults.
    """
    cost = semi_cost(semi or SemiSettings())  # the controls get the compute of the semi-supervised arms
    for_task = {
        PSEUDO_LABELS: Arm(None, pseudo_labels=True),
        LONGER: Arm(None, epochs_factor=cost),
        PASTED: Arm(None, {"pasted_share": PASTED_SHARE}, epochs_factor=cost),
        SEMI_SCRATCH: Arm(None, semi={}, controls=[LONGER, PASTED]),
        SEMI: Arm(pretraining=PRETRAINED, semi={}, controls=[LONGER, PASTED]),
        **_with_recipes(),
    }
    if label_table is not None:
        for_task = {name: Arm(None, shortcut=name) for name in shortcuts_of(label_table)}
    ablations = method_class(method).ablations(plan, batch_size)
    return {
        CONTROL: Arm(None),
        STOCK: Arm(None, NNUNET),
        **for_task,
        **{name: Arm({"method": name}) for name in names()},
        **{name: Arm({"method": method, plan.configuration: given}) for name, given in ablations.items()},
    }


def methods_for(plan: PlanFacts) -> list[str]:
    """Return the names of the methods of pretraining that a plan of this many dimensions can have."""
    return [name for name in names() if len(plan.patch_size) in method_class(name).dimensions]


def semi_cost(semi: SemiSettings) -> float:
    """Return the time of a semi-supervised training, as a multiple of nnU-Net's training with as many steps.

    It is an upper bound: `mixing_ratio` may leave fewer steps of the second phase mixed.
    """
    return 1 + (SECOND_PHASE - 1) * (1 - semi.supervised_share)


def _with_recipes() -> dict[str, Arm]:
    """Return each method and the control with every recipe but nnU-Net's, whatever the plan says of the optimiser."""
    arms = {}
    usual = {name: getattr(FinetuneSettings, name) for name in ("optimizer", "weight_decay", "warmup_share")}
    for recipe, changes in RECIPES.items():
        if changes:
            given, control = {"recipe": recipe, **usual, **changes}, f"{CONTROL}_{recipe}"
            arms[control] = Arm(None, given)
            arms |= {f"{name}_{recipe}": Arm(finetune=given, pretraining=name, controls=[control]) for name in names()}
    return arms


def choose_arms(wanted: Sequence[str], own: Mapping[str, Any], built_in: Mapping[str, Arm]) -> dict[str, Arm]:
    """Return the control, the named arms, their own controls, and the arms whose pretraining they use.

    Args:
        wanted: names given with ``-methods``.
        own: the user's definitions: the fields of `Arm` by name.
        built_in: see `built_in_arms`.

    Raises:
        UserError: an arm is unknown, or its definition contradicts itself.
    """
    known = {**built_in, **{name: _defined(name, given, built_in) for name, given in own.items()}}
    for name in wanted:
        if name not in known:
            raise unknown_arm(name, known)
    chosen = {name: known[name] for name in dict.fromkeys((CONTROL, *wanted))}
    for name, arm in chosen.items():
        if unknown := [control for control in arm.controls if control not in known]:
            raise UserError(f"method {name} has the controls {unknown}; expected some of {', '.join(known)}")
        if arm.pretraining is not None and known.get(arm.pretraining, known[CONTROL]).pretrain is None:
            raise UserError(
                f"method {name} takes the pretraining of {arm.pretraining}, which has none; name one that pretrains"
            )
    chosen |= {name: known[name] for arm in [*chosen.values()] for name in arm.controls}
    return chosen | {arm.pretraining: known[arm.pretraining] for arm in chosen.values() if arm.pretraining}


def _defined(name: str, given: Any, built_in: Mapping[str, Arm]) -> Arm:
    """Return the arm that a user defined, or raise `UserError` if the definition is not valid."""
    if not NAME.fullmatch(name) or name in built_in:
        raise UserError(f"a method cannot be called '{name}'; use letters, digits and single _, and another name")
    try:
        arm = Arm(**given)
    except TypeError:
        raise UserError(
            f"method {name} is {given!r}; expected a block with some of {', '.join(Arm.__dataclass_fields__)}"
        ) from None
    if arm.pseudo_labels and arm.pretrain is not None:
        raise UserError(
            f'method {name} has pseudo_labels and pretrains; it can do only one of them: add "pretrain": null'
        )
    if arm.pseudo_labels and arm.semi is not None:
        raise UserError(f"method {name} has pseudo_labels and semi; it can do only one of them: take one out")
    if not isinstance(arm.epochs_factor, (int, float)) or not arm.epochs_factor > 0:
        raise UserError(
            f"method {name} has epochs_factor {arm.epochs_factor!r}; expected a number above 0, such as 1.4"
        )
    if arm.pretraining is not None and (arm.pretrain is None or arm.pretrain):
        raise UserError(
            f"method {name} takes the pretraining of {arm.pretraining} and also has pretrain {short(arm.pretrain)}, "
            f"which has no effect; leave one of them out"
        )
    for_masks = arm.pseudo_labels or arm.semi is not None
    if arm.shortcut is not None or (for_masks and PSEUDO_LABELS not in built_in):
        raise UserError(f"method {name} has {given!r}, which this task cannot have; take it out")
    return arm
