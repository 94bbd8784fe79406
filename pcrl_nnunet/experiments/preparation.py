"""The files of a comparison's folder: description, links to the data, folds and plans. A preview lies elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.classification.label_table import FILES
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.arms import Arm
from pcrl_nnunet.experiments.comparison import Comparison, Run
from pcrl_nnunet.experiments.layout import DESCRIPTION, PREPROCESSED, Layout
from pcrl_nnunet.experiments.settings import short, with_settings
from pcrl_nnunet.files import write_text
from pcrl_nnunet.ingest.unlabelled import MANIFEST, unlabelled_folder
from pcrl_nnunet.plans import read_json
from pcrl_nnunet.settings import differences


def prepare(layout: Layout, runs: Sequence[Run]) -> None:
    """Make the folder, or check that it holds this comparison, and add what the runs need.

    Raises:
        UserError: the folder holds another comparison, or the same one with other settings.
    """
    description = _described(layout.comparison)
    arms = {name: vars(arm) for name, arm in layout.comparison.arms.items()}
    if layout.has_begun():
        arms = {**_earlier_arms(layout, description, arms), **arms}
        layout.comparison = replace(layout.comparison, arms={name: Arm(**given) for name, given in arms.items()})
    target = layout.data_folder
    for folder in (target, layout.results, os.path.join(layout.folder, "logs")):
        os.makedirs(folder, exist_ok=True)
    _link_data(layout)
    layout.folds = {**layout.folds, **_folds(layout, runs)}
    # "methods" is what users call the arms
    _write_json(os.path.join(layout.folder, DESCRIPTION), {**description, "methods": arms, "folds": layout.folds})
    _write_json(os.path.join(target, "splits_final.json"), list(layout.folds.values()))
    _write_json(os.path.join(target, "dataset.json"), layout.comparison.plan.dataset_json)
    for run in runs:
        for name, plan in plans_of(layout, run).items():
            _write_json(os.path.join(target, f"{name}.json"), plan)
        if layout.comparison.pseudo_labelled(run):
            layout.pseudo_labels(run).describe(layout.description_of_pseudo_labels(run))


def preview_in(layout: Layout, folder: str) -> None:
    """Let `prepare` write into a temporary folder, from which existing results are visible."""
    if not layout.has_begun():
        layout.move_to(folder)
        return
    there, results = layout.data_folder, layout.results
    own = os.path.join(folder, PREPROCESSED, layout.comparison.dataset)
    shutil.copyfile(os.path.join(layout.folder, DESCRIPTION), os.path.join(folder, DESCRIPTION))
    os.makedirs(own)
    for entry in os.scandir(there):
        copy_or_link = shutil.copyfile if entry.is_file() and not entry.is_symlink() else _link
        copy_or_link(entry.path, os.path.join(own, entry.name))
    layout.move_to(folder)
    layout.results = results


def plans_of(layout: Layout, run: Run) -> dict[str, dict[str, Any]]:
    """Return the plans of a run's fine-tuning and pretraining by name."""
    name, comparison = layout.plans_name(run), layout.comparison
    plan = _plan(layout, name, run.arm, run)
    if comparison.arms[run.arm].pretrain is not None:
        plan["pcrl"]["checkpoint"] = comparison.checkpoint or layout.pretrained(run)
    if not comparison.pretrains(run):
        return {name: plan}
    of_pretraining = layout.pretraining_plans_name(run)
    return {name: plan, of_pretraining: _plan(layout, of_pretraining, comparison.pretraining_arm(run), run)}


def _plan(layout: Layout, name: str, arm: str, run: Run) -> dict[str, Any]:
    """Return the plan of a training with an arm's settings and a run's seed and data."""
    comparison = layout.comparison
    plan = comparison.plan_of(arm)
    plan["plans_name"] = name
    if comparison.arms[arm].pretrain is None:
        del plan["pcrl"]["pretrain"]  # the same training, however the other arms are pretrained
    else:
        plan["pcrl"]["pretrain"]["seed"] = run.seed
    of_semi = plan["pcrl"].pop("semi", {})
    if comparison.arms[arm].semi is not None:
        # scans that are left out are not linked, and the trainer refuses names that it does not find
        plan["pcrl"]["semi"] = {**of_semi, "leave_out": comparison.cases.held_out, "seed": run.seed}
    if comparison.label_table is not None:
        plan["pcrl"].setdefault("classify", {})["table"] = comparison.label_table.kind
    configuration = plan["configurations"][comparison.plan.configuration]
    configuration["data_identifier"] = layout.data_identifier(run)
    configuration["next_stage"] = None  # nnU-Net would also predict for the next stage of a cascade
    return plan


def _folds(layout: Layout, runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
    """Return nnU-Net's folds of the runs by name."""
    comparison, folds = layout.comparison, {}
    for run in runs:
        labelled = comparison.labelled_cases(run)
        train = sorted({*labelled, *comparison.pseudo_labelled(run)})
        folds[layout.fold_name(run)] = {"train": train, "val": list(comparison.scored_cases)}
        left_out = labelled if comparison.protocol == "semi" else ()
        folds[layout.pretraining_fold_name(run)] = comparison.cases.pretraining_fold(left_out)
    return folds


# -------------------------------------------------------------------------------------------------------- description


def _described(comparison: Comparison) -> dict[str, Any]:
    """Return what all calls of a comparison must have in common, after a round trip through JSON."""
    split = comparison.cases.split
    description: dict[str, Any] = {
        "dataset": comparison.dataset,
        "plans": checkpoint_file.plans_hash(comparison.plan.plans),
        "configuration": comparison.plan.configuration,
        "protocol": comparison.protocol,
        "checkpoint": comparison.checkpoint,
        "split": {name: list(getattr(split, name)) for name in ("train", "val", "test")},
        "unlabelled": [case.name for case in comparison.cases.unlabelled],
        "settings": with_settings(comparison.plan.plans, comparison.settings)["pcrl"],
    }
    if comparison.encoder is not None:
        description["encoder"] = comparison.encoder  # another pretraining may have replaced the file
    table = _table(comparison)
    if table is not None:
        with open(table, "rb") as file:
            description["table"] = hashlib.sha256(file.read()).hexdigest()
    return json.loads(json.dumps(description))


def _earlier_arms(layout: Layout, description: Mapping[str, Any], arms: Mapping[str, Any]) -> dict[str, Any]:
    """Take over the folds of earlier calls and return their arms.

    Raises:
        UserError: the folder was begun with another description or another definition of an arm.
    """
    there = read_json(os.path.join(layout.folder, DESCRIPTION), "give another folder with -o")
    layout.folds = there.pop("folds")
    # an older folder lacks new fields of an arm: they get their defaults
    earlier = json.loads(json.dumps({name: vars(Arm(**arm)) for name, arm in there.pop("methods", {}).items()}))
    _refuse_other(layout, there, description, "the same settings to go on")
    again = {name: given for name, given in json.loads(json.dumps(arms)).items() if name in earlier}
    _refuse_other(layout, {name: earlier[name] for name in again}, again, "the method another name", "method ")
    return dict(earlier)


def _refuse_other(
    layout: Layout, there: Mapping[str, Any], now: Mapping[str, Any], remedy: str, kind: str = ""
) -> None:
    """Raise `UserError` if the folder was begun with something else."""
    for where, (before, after) in differences(there, now).items():
        if before != after:  # None: an earlier version did not write it
            raise UserError(
                f"{layout.named} holds a comparison with another {kind}{where} ({short(before)}, now "
                f"{short(after)}); give another folder with -o, or {remedy}"
            )


# -------------------------------------------------------------------------------------------------------- links


def _link_data(layout: Layout) -> None:
    """Link the dataset's preprocessed cases, and copy the table of a classification."""
    plan, target = layout.comparison.plan, layout.data_folder
    identifier = plan.resolved["data_identifier"]
    for name in (identifier, "gt_segmentations", "dataset_fingerprint.json"):
        _link(os.path.join(plan.folder, name), os.path.join(target, name))
    table = _table(layout.comparison)
    if table is not None:
        shutil.copyfile(table, os.path.join(target, os.path.basename(table)))
    _link_unlabelled(layout, unlabelled_folder(target, identifier))


def _link_unlabelled(layout: Layout, folder: str) -> None:
    """Link the scans without labels, and remove an earlier call's links to scans that are now left out.

    Pretraining takes all files of the folder.
    """
    paths = {os.path.basename(case.path): case.path for case in layout.comparison.cases.unlabelled}
    if paths:
        os.makedirs(folder, exist_ok=True)
        paths[MANIFEST] = os.path.join(os.path.dirname(next(iter(paths.values()))), MANIFEST)
    for name in set(os.listdir(folder) if os.path.isdir(folder) else ()) - paths.keys():
        os.remove(os.path.join(folder, name))
    for name, path in paths.items():
        _link(path, os.path.join(folder, name))


def _table(comparison: Comparison) -> str | None:
    """Return the path of the table of a classification."""
    label_table = comparison.label_table
    return None if label_table is None else os.path.join(comparison.plan.folder, FILES[label_table.kind])


def _link(source: str, link: str) -> None:
    if os.path.exists(source) and not os.path.islink(link):
        os.symlink(os.path.abspath(source), link)


def _write_json(path: str, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2))
