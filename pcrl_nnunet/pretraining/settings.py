"""Settings of a pretraining: shared settings and the method's own.

Every setting has a default from the plan. A block in the plan changes the defaults::

    "pcrl": {"pretrain": {"method": "pcrlv2", "epochs": 240, "pcrlv2": {"restoration": "full"},
                          "3d_fullres": {"batch_size": 16, "pcrlv2": {"views": {"num_local": 4}}}}}

A block with the name of a configuration applies to that configuration only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.method_names import BUILT_IN, DEFAULT, METHOD_OF_0_1_0, names
from pcrl_nnunet.methods.base import Method
from pcrl_nnunet.methods.registry import method_class
from pcrl_nnunet.plans import PlanFacts, PlannedConfiguration
from pcrl_nnunet.settings import (
    NOT_IN_BLOCK,
    changes,
    merged,
    number,
    part,
    pcrl_block,
    replaced,
    without_settings,
)

ADAMW_LR = 1e-3
WHERE = "pcrl.pretrain"


@dataclass(frozen=True)
class PretrainSettings:
    """The settings that all methods share. The learning rate decays to 0 by a cosine.

    Attributes:
        method: what is learned: the name of a method. Source: ours.
        batch_size: samples of a step, of all GPUs together. By default as many as fit the plan's voxel budget. Source:
            the plan. At most PCRLv2's batch: 32 in 3D, 256 in 2D.
        epochs: number of epochs. Source: PCRLv2.
        iters_per_epoch: steps of an epoch. Source: nnU-Net.
        seed: seed of all random choices. Source: ours.
        optimizer: SGD or AdamW. Source: the papers of PCRLv2 and SimSiam; ours for the others.
        initial_lr: learning rate at the start. With AdamW the default is 0.001. Source: ours.
        momentum: momentum of SGD. Source: PCRLv2.
        weight_decay: weight decay of either optimizer. Source: PCRLv2's code.
    """

    method: str
    own: Any = field(metadata=NOT_IN_BLOCK)  # the method's settings, an instance of its `Settings`
    batch_size: int = number(1, at_least=1)
    epochs: int = number(240, at_least=1)
    iters_per_epoch: int = number(250, at_least=1)
    seed: int = number(0, at_least=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    initial_lr: float = number(1e-2, above=0)
    momentum: float = number(0.9, at_least=0, below=1)
    weight_decay: float = number(1e-4, at_least=0)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for the log and the checkpoint, in the form of the plan's block."""
        shared = {name: value for name, value in asdict(self).items() if name != "own"}
        return {**shared, self.method: asdict(self.own)}

    @property
    def steps(self) -> int:
        """Number of steps of the whole training."""
        return self.epochs * self.iters_per_epoch


def method_of(plan: Mapping[str, Any], name: str | None = None) -> type[Method]:
    """Return the method with the given name, else the plan's method, else the default method."""
    given = part(pcrl_block(plan), "pretrain", "pcrl.").get("method", DEFAULT)
    if not isinstance(given, str):
        raise UserError(f"{WHERE}.method is {given!r}; expected one of {', '.join(names())}")
    return method_class(name or given)


def pretrain_settings(
    plan: Mapping[str, Any], name: str, configuration: Mapping[str, Any], **overrides: Any
) -> PretrainSettings:
    """Return the settings in effect: defaults from the plan, then its ``pcrl.pretrain`` part, then overrides.

    Args:
        plan: nnU-Net's plan.
        name: name of the configuration, such as 3d_fullres.
        configuration: content of nnU-Net's `ConfigurationManager` (inheritance resolved).
        overrides: fields of `PretrainSettings`; None means not given.

    Raises:
        UserError: a setting is unknown or out of range.
    """
    overrides = {key: value for key, value in overrides.items() if value is not None}
    method = method_of(plan, overrides.pop("method", None))
    facts = PlanFacts.of(name, configuration)
    _check_dimensions(method, facts)
    given = _of_configuration(part(pcrl_block(plan), "pretrain", "pcrl."), plan, name)
    given.pop("method", None)
    known = {*names(), method.name}
    blocks = {other: given.pop(other) for other in [*given] if other in known or isinstance(given[other], Mapping)}
    for other in blocks.keys() - known:
        raise UserError(
            f"{WHERE}.{other} names neither a method nor a configuration of the plan; expected one of "
            f"{', '.join([*names(), *plan['configurations']])}"
        )
    own, batch_size = method.configure(facts, part(blocks, method.name, f"{WHERE}."))
    wanted, defaults = {**given, **overrides}, dict(method.defaults)
    optimizer = wanted.get("optimizer", defaults.get("optimizer", "sgd"))
    if optimizer != defaults.get("optimizer", "sgd"):
        defaults.pop("initial_lr", None)  # the rate belongs to another optimizer
    if optimizer == "adamw":
        defaults.setdefault("initial_lr", ADAMW_LR)
    settings = replaced(PretrainSettings(method.name, own, batch_size), WHERE, {**defaults, **wanted})
    needed, why = method.min_batch_size
    if settings.batch_size < needed:
        raise UserError(
            f"batch_size is {settings.batch_size}; {why} needs at least {needed} samples: raise -batch_size, or make "
            f"the views smaller under {WHERE}.{method.name} in the plan"
        )
    return settings


def _check_dimensions(method: type[Method], facts: PlanFacts) -> None:
    """Raise `UserError` if the method cannot train on a plan with this number of axes."""
    dim = len(facts.patch_size)
    if dim not in method.dimensions:
        fitting = [name for name in BUILT_IN if dim in method_class(name).dimensions]
        possible = " or ".join(f"{n}D" for n in method.dimensions)
        raise UserError(
            f"{method.title} needs a {possible} configuration, and {facts.configuration} is {dim}D: give another -c, "
            f"or another method: {', '.join(fitting)}"
        )


def _of_configuration(given: Mapping[str, Any], plan: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Merge the configuration's block into a block of settings, and drop the blocks of other configurations."""
    shared = {key: value for key, value in given.items() if key not in plan["configurations"]}
    own = part(given, name, f"{WHERE}.")
    if "method" in own:
        raise UserError(
            f"{WHERE}.{name}.method is {own['method']!r}; a plan has one method for all configurations: give it as "
            f"{WHERE}.method, or with -method"
        )
    return merged(shared, own)


def described(settings: PretrainSettings, plan: PlannedConfiguration) -> str:
    """Return the length of a training, and the settings that differ from the method's defaults for the plan."""
    method, plans = settings.method, without_settings(plan.plans)
    try:
        defaults = pretrain_settings(plans, plan.configuration, plan.resolved, method=method)
        differing = changes(settings.as_dict(), defaults.as_dict())
    except UserError:  # the plan's own settings make the method possible for this plan
        differing = json.dumps(settings.as_dict())
    return (
        f"{method_class(method).title}: {settings.epochs} epochs of {settings.iters_per_epoch} steps, "
        f"{settings.batch_size} samples a step\nSettings: {differing}"
    )


def in_present_form(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's settings in the form of `PretrainSettings.as_dict`.

    Version 0.1.0 had one method, whose settings lay among the shared settings.
    """
    if "method" in settings:
        return dict(settings)
    names_of_shared = {*PretrainSettings.__dataclass_fields__} - {"own"}
    shared = {name: value for name, value in settings.items() if name in names_of_shared}
    own = {name: value for name, value in settings.items() if name not in names_of_shared and name != "probe_every"}
    own["views"] = {name: value for name, value in own.get("views", {}).items() if name != "pairs_per_read"}
    return {"method": METHOD_OF_0_1_0, **shared, METHOD_OF_0_1_0: own}
