"""The experiment: does pretraining help, with few labelled cases and with many?

A comparison has arms (rows of the table), labelled subsets of the training cases, and a test on cases that no training
sees. A run is one fine-tuning: an arm, a number of labelled cases, and a seed, which draws them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nnunetv2.paths import nnUNet_raw

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.classification.label_table import LabelTable, planned_labels
from pcrl_nnunet.config import ClassifySettings, FinetuneSettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.arms import Arm
from pcrl_nnunet.experiments.cases import Cases
from pcrl_nnunet.experiments.settings import check_protocol, refuse_other_parts, short, with_settings
from pcrl_nnunet.ingest.maskless import is_without_masks
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.plans import PlannedConfiguration
from pcrl_nnunet.pretraining.settings import method_of, pretrain_settings
from pcrl_nnunet.semi_supervised.settings import SemiSettings
from pcrl_nnunet.transfer.foreign import read_encoder
from pcrl_nnunet.transfer.seen import cases_seen
from pcrl_nnunet.transfer.shapes import check_architecture

Protocol = Literal["all", "semi", "transfer"]
Part = Literal["val", "test"]


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    arm: str
    labelled: int
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}_{self.subset}"

    @property
    def subset(self) -> str:
        """Name of the labelled cases."""
        return f"{self.labelled}_{self.seed}"


@dataclass(frozen=True)
class Comparison:
    """The arms and the cases of an experiment. Nothing here writes a file; `Layout` knows where the results lie.

    Attributes:
        plan: plan of the dataset.
        cases: cases of the dataset and their split.
        protocol: the cases for pretraining. ``all``: all training cases; ``semi``: the training cases without the
            labelled ones; ``transfer``: none of this dataset, because `checkpoint` is used.
        scored: the part of the split whose cases are scored.
        settings: blocks of settings for all arms, over the plan's ``pcrl`` block.
        label_table: labels of a classification, scored by AUROC; None: a segmentation, scored by Dice.
        checkpoint: path of a pretraining on other data.
        encoder: hash of the checkpoint's encoder.
    """

    plan: PlannedConfiguration
    arms: Mapping[str, Arm]
    cases: Cases
    protocol: Protocol
    scored: Part
    settings: Mapping[str, Mapping[str, Any]]
    label_table: LabelTable | None = None
    checkpoint: str | None = None
    encoder: str | None = None

    @classmethod
    def of_plan(
        cls,
        plan: PlannedConfiguration,
        arms: Mapping[str, Arm],
        patients: Mapping[str, str],
        protocol: Protocol,
        scored: Part,
        settings: Mapping[str, Mapping[str, Any]],
        checkpoint: str | None = None,
        label_table: LabelTable | None = None,
    ) -> Comparison:
        """Check the arguments, and find and split the cases.

        Raises:
            UserError: the flags contradict each other, a setting is unknown, or the checkpoint cannot be compared here.
        """
        check_protocol(protocol, checkpoint)
        _check_settings(plan, arms, settings, checkpoint)
        cases = Cases.find(plan, patients, label_table, _leave_out(plan, arms, settings))
        encoder = None if checkpoint is None else _checked_encoder(checkpoint, plan, cases)
        return cls(plan, arms, cases, protocol, scored, settings, label_table, checkpoint, encoder)

    @property
    def dataset(self) -> str:
        """Name of the dataset."""
        return str(self.plan.plans["dataset_name"])

    @property
    def scored_cases(self) -> tuple[str, ...]:
        """Names of the cases that are scored."""
        return self.cases.split.val if self.scored == "val" else self.cases.split.test

    def runs(self, arms: Sequence[str], numbers: Sequence[int], seeds: int) -> tuple[list[Run], dict[Run, str]]:
        """Return the runs that this dataset has enough cases for, and the other runs with what they lack."""
        wanted = [Run(arm, number, seed) for seed in range(seeds) for number in numbers for arm in arms]
        lacking = {run: reason for run in wanted if (reason := self.why_not(run)) is not None}
        return [run for run in wanted if run not in lacking], lacking

    def why_not(self, run: Run) -> str | None:
        """Return what this dataset lacks for a run; None if the run can be done."""
        rest = set(self.cases.split.train) - set(self.labelled_cases(run))
        if rest or self.cases.unlabelled:
            return None
        if self.arms[run.arm].pseudo_labels or self.arms[run.arm].semi is not None:
            return "no case is left whose labels could be predicted"
        if self.pretrains(run) and self.protocol == "semi":
            return "no case is left for pretraining without the labelled ones"
        return None

    def pretrains(self, run: Run) -> bool:
        """Tell if a run needs a pretraining of this comparison."""
        return self.arms[run.arm].pretrain is not None and self.checkpoint is None

    def pretraining_arm(self, run: Run) -> str:
        """Name the arm whose pretraining a run uses."""
        return self.arms[run.arm].pretraining or run.arm

    def labelled_cases(self, run: Run) -> list[str]:
        """Return the names of the cases whose labels a run sees; they are the same for all arms."""
        return self.cases.labelled(run.labelled, run.seed)

    def pseudo_labelled(self, run: Run) -> dict[str, Case]:
        """Return the cases that a run trains on with predicted labels, by their name in the run's data."""
        if not self.arms[run.arm].pseudo_labels:
            return {}
        rest = set(self.cases.split.train) - set(self.labelled_cases(run))
        cases = {name: self.cases.by_name[name] for name in sorted(rest)}
        return cases | {f"unlabelled_{case.name}": case for case in self.cases.unlabelled}

    def method(self, arm: str) -> str:
        """Name the method of an arm's pretraining."""
        return method_of(self.plan_of(arm)).name

    def plan_of(self, arm: str) -> dict[str, Any]:
        """Return the plan with the settings of an arm."""
        plan = with_settings(self.plan.plans, self.settings, vars(self.arms[arm]))
        if (factor := self.arms[arm].epochs_factor) != 1:
            plan["pcrl"]["finetune"]["epochs"] = math.ceil(round(factor * FinetuneSettings.from_plan(plan).epochs, 6))
        return plan

    def finetune_settings(self, arm: str) -> FinetuneSettings:
        """Return the settings that an arm is fine-tuned with."""
        return FinetuneSettings.from_plan(self.plan_of(arm))


def find_label_table(task: str | None, plan: PlannedConfiguration) -> LabelTable | None:
    """Return the labels of a classification; None for a segmentation.

    Args:
        task: ``segmentation`` or ``classification``; None: a classification if the dataset has no masks.

    Raises:
        UserError: the dataset has no masks, or no table.
    """
    name = plan.plans["dataset_name"]
    without_masks = is_without_masks(name, plan.dataset_json)
    if task == "segmentation" and without_masks:
        raise UserError(f"-task is segmentation and {name} has no masks; give -task classification")
    if task == "segmentation" or (task is None and not without_masks):
        return None
    raw = os.path.join(nnUNet_raw.get(), name) if nnUNet_raw.is_set() else None
    return planned_labels(plan.plans, plan.folder, raw)


def _check_settings(
    plan: PlannedConfiguration,
    arms: Mapping[str, Arm],
    settings: Mapping[str, Mapping[str, Any]],
    checkpoint: str | None,
) -> None:
    """Raise `UserError` for settings that no training accepts."""
    refuse_other_parts("-settings", settings)
    for name, arm in arms.items():
        parts = {"pretrain": arm.pretrain or {}, "finetune": arm.finetune, "semi": arm.semi or {}}
        refuse_other_parts(f"method {name}", parts)
    for arm in arms.values():
        plans = with_settings(plan.plans, settings, vars(arm))
        pretrain_settings(plans, plan.configuration, plan.resolved)
        epochs = FinetuneSettings.from_plan(plans).epochs
        ClassifySettings.from_plan(plans)
        semi = SemiSettings.from_plan(plans)
        if arm.semi is not None:
            semi.supervised_epochs(epochs)  # raises if the epochs are too few
        own = {name: value for name, value in (arm.pretrain or {}).items() if name != "method"}
        if checkpoint is not None and own:
            raise UserError(
                f"a method with pretraining settings of its own ({short(own)}) cannot take the "
                f"pretraining of -checkpoint; leave it out of -methods"
            )


def _leave_out(
    plan: PlannedConfiguration, arms: Mapping[str, Arm], settings: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return the cases that any arm leaves out. No arm trains on them, so that all arms see the same cases."""
    plans = [with_settings(plan.plans, settings, vars(arm)) for arm in arms.values()]
    return list(dict.fromkeys(name for given in plans for name in SemiSettings.from_plan(given).leave_out))


def _checked_encoder(path: str, plan: PlannedConfiguration, cases: Cases) -> str:
    """Return the hash of a checkpoint's encoder. Raise `UserError` if it does not fit or has seen held-out cases."""
    content = read_encoder(path)
    try:
        check_architecture(content, plan.plans, plan.configuration, plan.folder)
    except UserError as error:
        raise UserError(f"-checkpoint {path}: {error}") from error
    if not content.get("all_cases_known", True):
        raise UserError(
            f"-checkpoint {path} does not list the cases that it was trained on, which may include cases that are "
            f"held out here; take a pretraining of pcrl_nnunet_pretrain"
        )
    seen = cases_seen(content, plan.plans["dataset_name"], [cases.by_name[name] for name in cases.held_out])
    if seen:
        raise UserError(
            f"checkpoint {path} was pretrained on {len(seen)} of the cases that are held out here "
            f"({', '.join(seen[:3])}{' ...' * (len(seen) > 3)}); take a pretraining of other data"
        )
    return checkpoint_file.encoder_hash(content["network_weights"])
