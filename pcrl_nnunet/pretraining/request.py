"""A requested pretraining, and the checks before anything is written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from pcrl_nnunet import checkpoint, output_folder
from pcrl_nnunet.checkpoint import plans_hash
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.method_names import METHOD_OF_0_1_0
from pcrl_nnunet.methods import method_class
from pcrl_nnunet.plans import PlannedConfiguration, channel_names, load_plan
from pcrl_nnunet.pretraining.cases import Others, Place, PretrainingCases
from pcrl_nnunet.pretraining.settings import PretrainSettings, pretrain_settings
from pcrl_nnunet.target_plans import existing_plan, preprocess_command
from pcrl_nnunet.transfer.foreign import read_encoder
from pcrl_nnunet.transfer.seen import cases_seen
from pcrl_nnunet.transfer.shapes import check_architecture


@dataclass(frozen=True)
class Request:
    """A requested pretraining."""

    plan: PlannedConfiguration
    fold: int | str
    settings: PretrainSettings
    cases: PretrainingCases
    init: str | None = None  # checkpoint to start from
    continues: bool = False  # --c
    overwrite: bool = False

    @classmethod
    def of_plan(
        cls, plan: PlannedConfiguration, fold: int | str, others: Others = MappingProxyType({}), **overrides: Any
    ) -> Request:
        """Return a pretraining from the first step, with its cases and the settings in effect.

        Args:
            others: see `other_datasets`.
            overrides: settings that override the plan's; None means not given.
        """
        settings = pretrain_settings(plan.plans, plan.configuration, plan.resolved, **overrides)
        cases = PretrainingCases.find(plan.plans, plan.configuration, fold, others)
        method, number = method_class(settings.method), len(cases.used)
        needed, why = method.min_cases
        if number < needed:
            raise UserError(
                f"the pretraining has {number} case{'s' * (number != 1)}; {why} needs at least {needed}: add cases, or "
                f"choose another method"
            )
        own = method.for_cases(settings.own, number)
        return cls(plan, fold, replace(settings, own=own), cases)

    @property
    def folder(self) -> str:
        """The output folder."""
        return self._folder_of(output_folder.name_of_pretrainer(self.settings.method))

    @property
    def title(self) -> str:
        """The pretraining in words, in two lines: its datasets, and its settings as the command has them."""
        plans, fold = self.plan.plans["plans_name"], self.fold
        return (
            f"{' + '.join(self.cases.datasets)}\n"
            f"method {self.settings.method}, configuration {self.plan.configuration}, plan {plans}, fold {fold}"
        )

    @property
    def finals(self) -> list[str]:
        """Possible paths of the result. Version 0.1.0 had one method, and its folder had no method's name."""
        named = os.path.join(self.folder, checkpoint.FINAL)
        return [named, self.unnamed_final] if self.settings.method == METHOD_OF_0_1_0 else [named]

    @property
    def unnamed_final(self) -> str:
        """Path of the result in the folder without a method's name, to which pcrl_nnunet_transfer writes."""
        return os.path.join(self._folder_of(output_folder.PRETRAINER), checkpoint.FINAL)

    def _folder_of(self, trainer: str) -> str:
        plans = self.plan.plans
        return output_folder.path_of(
            trainer, plans["dataset_name"], plans["plans_name"], self.plan.configuration, self.fold
        )

    def anew(self) -> Request:
        """Return the same pretraining from the first step."""
        return replace(self, init=None, continues=False, overwrite=False)


def other_datasets(
    datasets: Sequence[str], target: str | None, plans_name: str, plan: PlannedConfiguration
) -> dict[str, tuple[Place, str]]:
    """Find the preprocessed data of the datasets after the first.

    Args:
        datasets: value of ``-d``.
        target: value of ``-target``.
        plans_name: value of ``-p``.
        plan: plan of the first dataset.

    Raises:
        UserError: a dataset is not prepared for the first's (or -target's) plan, or has other channels.
    """
    found: dict[str, tuple[Place, str]] = {}
    for dataset in datasets[1:]:
        other = load_plan(dataset, existing_plan(dataset, target or datasets[0], plans_name), plan.configuration)
        name = other.plans["dataset_name"]
        channels, own = (len(channel_names(p.dataset_json)) for p in (other, plan))
        if channels != own:
            raise UserError(
                f"{name} has {channels} channels and {plan.plans['dataset_name']} {own}; take datasets with the same "
                f"number, or pretrain on each alone"
            )
        spacings = other.resolved["spacing"], plan.resolved["spacing"]
        if spacings[0] != spacings[1] or other.plans["transpose_forward"] != plan.plans["transpose_forward"]:
            raise UserError(
                f"{name} was preprocessed with a spacing of {spacings[0]}, axes {other.plans['transpose_forward']}, "
                f"and {plan.plans['plans_name']} of {plan.plans['dataset_name']} now has {spacings[1]}, axes "
                f"{plan.plans['transpose_forward']}; preprocess it again: "
                f"{preprocess_command(dataset, target or datasets[0], plans_name)}"
            )
        if name in (plan.plans["dataset_name"], *found):
            raise UserError(f"-d has {name} more than once; give every dataset once")
        found[name] = (other.folder, other.resolved["data_identifier"]), plans_hash(other.plans)
    return found


def check_initial(plan: PlannedConfiguration, path: str) -> None:
    """Raise `UserError` for a checkpoint that a pretraining cannot start from."""
    try:
        check_architecture(read_encoder(path), plan.plans, plan.configuration, plan.folder)
    except UserError as error:
        raise UserError(f"-init {path}: {error}") from error


def refuse_initial_that_has_seen(path: str, cases: PretrainingCases) -> None:
    """Raise `UserError` for an encoder that has seen cases which this pretraining leaves out."""
    seen = cases_seen(read_encoder(path), cases.target or cases.dataset, cases.held_out_cases)
    if seen:
        raise UserError(
            f"-init {path} has seen validation cases of fold {cases.fold}, which -f leaves out: "
            f"{', '.join(seen[:5])}; take a checkpoint that was pretrained with -f {cases.fold}, or leave -f out"
        )
