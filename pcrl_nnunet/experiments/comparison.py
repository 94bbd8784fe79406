"""Does pretraining help? The runs of a comparison with few labels; `scores` says what comes of them.

A comparison has a folder of its own that is laid out as nnU-Net's: preprocessed data (links to the dataset's), plans
(one a run), a split of its own, results. Every training in it is nnU-Net's own, of a fold of that split.

A run is one fine-tuning: a method, a number of labelled cases, and a seed, which draws them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from glob import escape as glob_escape
from glob import glob
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.classification.label_table import CASE, FILES, LabelTable
from pcrl_nnunet.classification.prediction import EVALUATION, PREDICTIONS
from pcrl_nnunet.classification.shortcuts import SHORTCUTS
from pcrl_nnunet.config import ClassifySettings, FinetuneSettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.pseudo_labels import PseudoLabels
from pcrl_nnunet.experiments.scores import COLUMNS, CONTROL, PREDICTION_COLUMNS, STOCK, AurocScores, DiceScores, Scores
from pcrl_nnunet.files import write_text
from pcrl_nnunet.ingest.unlabelled import unlabelled_folder
from pcrl_nnunet.loading.cases import Case, find_cases
from pcrl_nnunet.loading.copies import find_copies
from pcrl_nnunet.plans import PlannedConfiguration
from pcrl_nnunet.pretraining.settings import pretrain_settings
from pcrl_nnunet.transfer.find import PRETRAINER
from pcrl_nnunet.transfer.foreign import read_encoder
from pcrl_nnunet.transfer.seen import cases_seen
from pcrl_nnunet.transfer.shapes import check_architecture

SHARES = (0.7, 0.1, 0.2)  # training, validation, test (method.md 3)
SPLIT_SEED = 12345  # nnU-Net's
DESCRIPTION = "comparison.json"
LONG_ENOUGH = 5000  # iterations with labels: nnU-Net's optimiser may predict background alone for the first 600
PARTS = ("pretrain", "finetune", "classify")  # of the plan's block, that -settings may change

Protocol = Literal["all", "semi", "transfer"]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        pretrain: settings over the plan's ``pcrl.pretrain``; None: it does not pretrain.
        finetune: settings over the plan's ``pcrl.finetune``.
        pretraining: the method whose pretraining it takes; None: its own.
        pseudo_labels: also train on the cases without labels, with those that the control's network predicts.
        shortcut: of a classification: no network, but one of `SHORTCUTS`.
    """

    pretrain: Mapping[str, Any] | None = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)
    pretraining: str | None = None
    pseudo_labels: bool = False
    shortcut: str | None = None


def built_in_methods(
    configuration: str, num_levels: int, batch_size: int, targets: LabelTable | None = None
) -> dict[str, Method]:
    """The rows of the table by name: controls, PCRLv2, and its ablations (PCRLv2, Tables 1-3).

    Table 3 adds to the comparison step by step: its rows before the last two have global views only, and the last one,
    with sub-crop, is pcrlv2 itself.

    Args:
        configuration: of the plan; the settings of views are a configuration's own.
        num_levels: n - 1 of the decoder; of three or fewer, three_levels would be all_levels and is left out.
        batch_size: pairs of pcrlv2, for all: of views without local ones more would fit.
        targets: of a classification, which has no pseudo-labels, but shortcuts; None: a segmentation.
    """
    n = num_levels
    of_views: dict[str, Any] = {"batch_size": batch_size}
    global_only = {**of_views, "views": {configuration: {"num_local": 0}}}
    ablations: dict[str, dict[str, Any]] = {
        "skip_connections": {"skip_connections": True},  # Table 1
        "cross_scale": {"comparison": "cross_scale"},  # Table 2
        "restoration_only": {"levels": [[n, None]], **global_only},  # Table 3, row 0
        "comparison_only": {"levels": [[None, 0]], **global_only},  # row 1
        "one_level": {"levels": [[n, 0]], **global_only},  # row 2
        "three_levels": {"levels": [[i, i] for i in (1, (n + 1) // 2, n)], **global_only},  # row 3
        "all_levels": global_only,  # row 4
        "multi_crop": {**of_views, "views": {configuration: {"crops": "multi_crop"}}},  # row 5
    }
    if n <= 3:
        del ablations["three_levels"]
    of_task = {"pseudo_labels": Method(None, pseudo_labels=True)}
    if targets is not None:
        names = [name for name in SHORTCUTS if name != "position" or targets.point is not None]
        of_task = {name: Method(None, shortcut=name) for name in names}
    return {
        CONTROL: Method(None),
        # nnUNetTrainer's schedule, in as many iterations as the others have
        STOCK: Method(None, {"initial_lr": 1e-2, "weight_decay": 3e-5, "warmup_share": 0.0}),
        **of_task,
        "pcrlv2": Method(),
        **{name: Method(pretrain=settings) for name, settings in ablations.items()},
    }


def methods_of(names: Sequence[str], own: Mapping[str, Any], built_in: Mapping[str, Method]) -> dict[str, Method]:
    """The named methods, of the built-in ones and of a user's own definitions; `UserError` for what is neither.

    Args:
        own: by name, the fields of `Method`.
    """
    known = dict(built_in)
    for name, given in own.items():
        if not re.fullmatch(r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*", name) or name in built_in:
            raise UserError(f"a method cannot be called '{name}'; use letters, digits and single _, and another name")
        try:
            known[name] = Method(**given)
        except TypeError:
            raise UserError(
                f"method {name} is {given!r}; expected a block with some of {', '.join(Method.__dataclass_fields__)}"
            ) from None
        if known[name].pseudo_labels and known[name].pretrain is not None:
            raise UserError(f'method {name} has pseudo_labels and pretrains; only one of them can be: "pretrain": null')
        if known[name].pretraining is not None and (known[name].pretrain is None or known[name].pretrain):
            raise UserError(
                f"method {name} takes the pretraining of {known[name].pretraining} and has pretrain "
                f"{_short(known[name].pretrain)} besides, which has no effect; leave one of them out"
            )
        if known[name].shortcut is not None or (known[name].pseudo_labels and "pseudo_labels" not in built_in):
            raise UserError(f"method {name} has {given!r}, which cannot be of this task; take it out")
    for name in names:
        if name not in known:
            raise UserError(f"there is no method '{name}'; expected some of {', '.join(known)}")
    chosen = {name: known[name] for name in dict.fromkeys((CONTROL, *names))}
    for name, method in chosen.items():
        if method.pretraining is not None and known.get(method.pretraining, known[CONTROL]).pretrain is None:
            raise UserError(f"method {name} takes the pretraining of {method.pretraining}, which has none")
    return chosen | {m.pretraining: known[m.pretraining] for m in chosen.values() if m.pretraining}


@dataclass(frozen=True)
class Split:
    """Case names; a patient's cases are all in the same part."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def split_by_patient(cases: Iterable[str], patients: Mapping[str, str], seed: int = SPLIT_SEED) -> Split:
    """70 / 10 / 20 % of the cases, a patient's together.

    Args:
        patients: of the cases; one that is not in it is its own patient.
    """
    order = drawn_by_patient(cases, patients, seed)
    bounds = [round(len(order) * share) for share in np.cumsum(SHARES[::-1])[:2]]
    parts: list[list[str]] = [[], [], []]  # test, validation, training
    part = 0
    for i, case in enumerate(order):
        begins = i == 0 or patients.get(case, case) != patients.get(order[i - 1], order[i - 1])
        if begins and part < 2 and i >= bounds[part]:
            part += 1
        parts[part].append(case)
    if any(len(p) < 1 for p in parts):
        num = len({patients.get(case, case) for case in order})
        raise UserError(
            f"{len(order)} cases of {num} patients are too few for a split into training, validation and test cases"
        )
    test, val, train = (tuple(sorted(p)) for p in parts)
    return Split(train, val, test)


def drawn_by_patient(cases: Iterable[str], patients: Mapping[str, str], seed: int) -> list[str]:
    """The cases in a random order in which those of a patient follow one another."""
    rng = np.random.default_rng(seed)
    by_patient: dict[str, list[str]] = {}
    for case in sorted(cases):
        by_patient.setdefault(patients.get(case, case), []).append(case)
    names = sorted(by_patient)
    return [case for i in rng.permutation(len(names)) for case in rng.permutation(by_patient[names[i]]).tolist()]


def number_of(labelled: str, available: int) -> int:
    """``10``, ``10%`` or ``all`` as a number of cases; `UserError` where there are not as many, or none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", labelled)
    if labelled != "all" and (match is None or (not match[2] and "." in match[1])):
        raise UserError(f"-labelled has '{labelled}'; expected numbers of cases, shares such as 10%, or all")
    number = available
    if match:
        number = max(1, round(float(match[1]) / 100 * available)) if match[2] else int(match[1])
    if not 1 <= number <= available:
        raise UserError(f"-labelled has '{labelled}', but the comparison's split has {available} training cases")
    return number


@dataclass(frozen=True)
class Run:
    """One fine-tuning."""

    method: str
    labelled: int
    seed: int

    def __str__(self) -> str:
        return f"{self.method}_{self.labelled}_{self.seed}"


@dataclass
class Comparison:
    """The folder of a comparison and what is in it.

    Args:
        folder: that it lies in.
        plan: of the dataset.
        patients: by case.
        protocol: what is pretrained on: ``all`` training cases; ``semi``: those without the labelled ones;
            ``transfer``: nothing of this dataset, but `checkpoint`.
        scored: the part of the split whose cases are scored.
        settings: over the plan's ``pcrl`` block, for every method: ``pretrain`` and ``finetune``.
        checkpoint: of a pretraining that was done elsewhere.
        targets: of a classification, which is scored by AUROC; None: a segmentation, by Dice.
    """

    folder: str
    plan: PlannedConfiguration
    methods: Mapping[str, Method]
    patients: Mapping[str, str]
    protocol: Protocol
    scored: Literal["val", "test"]
    settings: Mapping[str, Mapping[str, Any]]
    checkpoint: str | None = None
    targets: LabelTable | None = None

    def __post_init__(self) -> None:
        if (self.protocol == "transfer") != (self.checkpoint is not None):
            raise UserError(
                f"-protocol is {self.protocol} and -checkpoint {self.checkpoint}; transfer, and no other one, compares "
                f"a pretraining of other data: give its checkpoint_final.pth with -checkpoint, or choose all or semi"
            )
        self._check_settings()
        self.dataset = self.plan.plans["dataset_name"]
        self.named = self.folder  # in what is said to users, also of a preview
        self.move_to(self.folder)
        self.identifier = self.plan.resolved["data_identifier"]
        self.cases = {case.name: case for case in find_cases(os.path.join(self.plan.folder, self.identifier))}
        if self.targets is not None and not self.patients:
            self.patients = dict(self.targets.patient)
        else:
            self._check_patients()
        self.split = split_by_patient(self._known_cases(), self.patients)
        self.unlabelled, self.left_out = self._unlabelled()
        self.folds: dict[str, dict[str, list[str]]] = {}  # by name, in nnU-Net's order: only ever appended to
        self.encoder = None if self.checkpoint is None else self._checked_encoder(self.checkpoint)

    def move_to(self, folder: str) -> None:
        """Let the comparison lie elsewhere."""
        self.folder = folder
        self.preprocessed, self.results = (
            os.path.join(folder, name) for name in ("nnUNet_preprocessed", "nnUNet_results")
        )

    def preview_in(self, folder: str) -> None:
        """Let `prepare` write into a folder that is thrown away; results that there are are seen from there."""
        if not self.has_begun():
            self.move_to(folder)
            return
        there, own, results = self.preprocessed, os.path.join(folder, "nnUNet_preprocessed"), self.results
        shutil.copyfile(os.path.join(self.folder, DESCRIPTION), os.path.join(folder, DESCRIPTION))
        os.makedirs(os.path.join(own, self.dataset))
        for entry in os.scandir(os.path.join(there, self.dataset)):
            copy_or_link = shutil.copyfile if entry.is_file() and not entry.is_symlink() else _link
            copy_or_link(entry.path, os.path.join(own, self.dataset, entry.name))
        self.move_to(folder)
        self.results = results

    def file(self, name: str) -> str:
        """Path of a result; those of validation cases have a name of their own."""
        stem, ending = os.path.splitext(name)
        return os.path.join(self.folder, f"{stem}{'_val' * (self.scored == 'val')}{ending}")

    def _check_settings(self) -> None:
        """Raises `UserError` for settings that no training takes."""
        blocks = {"-settings": self.settings}
        blocks |= {
            f"method {name}": {"pretrain": m.pretrain or {}, "finetune": m.finetune} for name, m in self.methods.items()
        }
        for where, block in blocks.items():
            for part, given in block.items():
                if part not in PARTS or not isinstance(given, Mapping):
                    raise UserError(
                        f"{where} has {part}: {_short(given)}; expected the blocks of settings {', '.join(PARTS)}"
                    )
        for method in self.methods.values():
            plan = with_settings(self.plan.plans, self.settings, vars(method))
            pretrain_settings(plan, self.plan.configuration, self.plan.resolved)
            FinetuneSettings.from_plan(plan)
            ClassifySettings.from_plan(plan)
            if self.checkpoint is not None and method.pretrain:
                raise UserError(
                    f"a method with pretraining settings of its own ({_short(dict(method.pretrain))}) cannot take the "
                    f"pretraining of -checkpoint; leave it out of -methods"
                )

    def _check_patients(self) -> None:
        if not self.patients:
            return
        missing = sorted(set(self.cases) - self.patients.keys())
        unknown = sorted(self.patients.keys() - self.cases.keys() - {case.name for case in self._all_unlabelled()})
        for what, names in (("lacks the cases", missing), ("has cases that the dataset lacks,", unknown)):
            if names:
                raise UserError(
                    f"the file of -patients {what} {', '.join(names[:3])}{' ...' * (len(names) > 3)}; expected one "
                    f"line for each case, by the name of its image without ending and channel"
                )

    def _checked_encoder(self, path: str) -> str:
        """The hash of the encoder of a checkpoint that may be compared here, `UserError` for others."""
        content = read_encoder(path)
        try:
            check_architecture(content, self.plan.plans, self.plan.configuration, self.plan.folder)
        except UserError as error:
            raise UserError(f"-checkpoint {path}: {error}") from error
        if not content.get("all_cases_known", True):
            raise UserError(
                f"-checkpoint {path} does not list the cases that it was trained on, among which may be those that are "
                f"held out here; take a pretraining of pcrl_nnunet_pretrain"
            )
        held_out = [self.cases[name] for name in (*self.split.val, *self.split.test)]
        seen = cases_seen(content, self.dataset, held_out)
        if seen:
            raise UserError(
                f"checkpoint {path} was pretrained on {len(seen)} of the cases that are held out here "
                f"({', '.join(seen[:3])}{' ...' * (len(seen) > 3)}); take a pretraining of other data"
            )
        return checkpoint_file.encoder_hash(content["network_weights"])

    # ------------------------------------------------------------------------------------------------------- cases

    def _known_cases(self) -> list[str]:
        """Those that have labels: of a segmentation all."""
        if self.targets is None:
            return list(self.cases)
        known = set(self.targets.case[self.targets.of_cases(list(self.cases))])
        if not known:
            raise UserError(
                f"{FILES[self.targets.kind]} tells nothing of the {len(self.cases)} cases of {self.dataset}; check its "
                f"names of cases, such as {next(iter(self.targets.case))}, against theirs, such as "
                f"{next(iter(self.cases))}"
            )
        return [name for name in self.cases if name in known]

    def _all_unlabelled(self) -> list[Case]:
        folder = unlabelled_folder(self.plan.folder, self.identifier)
        there = os.path.isdir(folder) and any(file.endswith(".b2nd") for file in os.listdir(folder))
        return find_cases(folder) if there else []

    def _unlabelled(self) -> tuple[list[Case], dict[str, str]]:
        """Return the cases without labels, and why each of the others is left out."""
        cases = self._all_unlabelled()
        held_out = [*self.split.val, *self.split.test]
        copies = find_copies(cases, [self.cases[name] for name in held_out])
        of_patients = {self.patients[name]: name for name in held_out if name in self.patients}
        left_out = {}
        for case in cases:
            if case in copies:
                left_out[case.name] = f"it is {copies[case].name} under another name, which is held out"
            elif (other := of_patients.get(self.patients.get(case.name, ""))) is not None:
                left_out[case.name] = f"it is of the patient of {other}, which is held out"
        return [case for case in cases if case.name not in left_out], left_out

    def why_not(self, run: Run) -> str | None:
        """What a run would need and this dataset has not; None if it can be done."""
        rest = set(self.split.train) - set(self.labelled_cases(run))
        if rest or self.unlabelled:
            return None
        if self.methods[run.method].pseudo_labels:
            return "no case is left whose labels could be predicted"
        if self.pretrains(run) and self.protocol == "semi":
            return "no case is left for pretraining without the labelled ones"
        return None

    def note_on_stock(self) -> str | None:
        """A sentence where nnU-Net's schedule is the control's: of few epochs `warmup_share` leaves none to warm up in.

        A single one has the full rate already. None where the two differ, as in a classification by their rates.
        """
        if STOCK not in self.methods or self.targets is not None:  # its methods are also those of earlier calls
            return None
        control, stock = (
            FinetuneSettings.from_plan(with_settings(self.plan.plans, self.settings, vars(self.methods[name])))
            for name in (CONTROL, STOCK)
        )
        if control.warmup_epochs > 1 or replace(control, warmup_share=stock.warmup_share) != stock:
            return None
        return (
            f"{STOCK} is {CONTROL} once more here: {control.warmup_share:.0%} of {control.epochs} epochs leave none to "
            f"warm up in; what the two differ by is chance"
        )

    def remedy_for_learning(self) -> str:
        """Return a sentence that says which settings make the trainings with labels longer, and where they stand."""
        plan = with_settings(self.plan.plans, self.settings, vars(self.methods[CONTROL]))
        now = FinetuneSettings.from_plan(plan)
        wanted = max(4 * now.epochs, -(-LONG_ENOUGH // now.iters_per_epoch))
        example = json.dumps({**self.settings, "finetune": {**self.settings.get("finetune", {}), "epochs": wanted}})
        more = "" if self.targets is None else "; more scored cases may also tell a small effect from chance"
        return (
            f"The trainings with labels are {now.epochs} x {now.iters_per_epoch} iterations (finetune.epochs, "
            f"finetune.iters_per_epoch): lengthen them with a file for -settings such as {example}, and with another "
            f"folder for -o{more}"
        )

    def labelled_cases(self, run: Run) -> list[str]:
        """Of a run: drawn by its seed, the same for all methods; those of a smaller number are among them."""
        return sorted(drawn_by_patient(self.split.train, self.patients, run.seed)[: run.labelled])

    def _fold(self, name: str) -> int:
        return list(self.folds).index(name)

    def _splits(self, runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
        """nnU-Net's folds by name. A pretraining's "val" is what it leaves out."""
        split, splits = self.split, {}
        scored = list(getattr(split, self.scored))
        held_out = [*split.val, *split.test]
        patients = {self.patients.get(name, name) for name in held_out}
        others = sorted(self.cases.keys() - {*split.train, *held_out})  # a classification's without a label
        without = [name for name in others if self.patients.get(name, name) not in patients]
        held_out += [name for name in others if name not in without]
        for run in runs:
            labelled = self.labelled_cases(run)
            train = sorted({*labelled, *self.pseudo_labelled(run)})
            splits[self._fold_name(run)] = {"train": train, "val": scored}
            if self.protocol == "semi":
                rest = sorted(set(split.train) - set(labelled))
                splits[self._pretraining_data_name(run)] = {
                    "train": rest + without,
                    "val": sorted({*held_out, *labelled}),
                }
            else:
                splits[self._pretraining_data_name(run)] = {"train": [*split.train, *without], "val": held_out}
        return splits

    def _fold_name(self, run: Run) -> str:
        kind = "pseudo_" if self.pseudo_labelled(run) else ""
        return f"{kind}{_subset_name(run)}_{self.scored}"

    def _pretraining_data_name(self, run: Run) -> str:
        return f"pretrain_{_subset_name(run)}" if self.protocol == "semi" else "pretrain"

    def pseudo_labelled(self, run: Run) -> dict[str, Case]:
        """The training cases whose labels a run does not see, and the unlabelled ones, by a name for them."""
        if not self.methods[run.method].pseudo_labels:
            return {}
        rest = set(self.split.train) - set(self.labelled_cases(run))
        cases = {name: self.cases[name] for name in sorted(rest)}
        return cases | {f"unlabelled_{case.name}": case for case in self.unlabelled}

    def pseudo_labels(self, run: Run) -> PseudoLabels:
        """What a run with pseudo-labels trains on; the cases that are scored are there, too."""
        target = os.path.join(self.preprocessed, self.dataset, self._data_identifier(run))
        true = [self.cases[name] for name in (*self.labelled_cases(run), *getattr(self.split, self.scored))]
        return PseudoLabels(target, true, self.pseudo_labelled(run))

    def description_of_pseudo_labels(self, run: Run) -> str:
        """Path of the file that says what is to be predicted for a run."""
        return os.path.join(self.folder, f"pseudo_labels_{_subset_name(run)}_{self.scored}.json")

    def _data_identifier(self, run: Run) -> str:
        suffix = f"_pseudo_{_subset_name(run)}_{self.scored}" if self.pseudo_labelled(run) else ""
        return f"{self.identifier}{suffix}"

    # ------------------------------------------------------------------------------------------------------ folder

    def prepare(self, runs: Sequence[Run]) -> None:
        """Make the folder, or check that it is this comparison's, and add what the runs need.

        Raises:
            UserError: the folder holds another comparison, or one with other settings, of all methods or of one.
        """
        methods = {name: vars(method) for name, method in self.methods.items()}
        description = {
            "dataset": self.dataset,
            "plans": checkpoint_file.plans_hash(self.plan.plans),
            "configuration": self.plan.configuration,
            "protocol": self.protocol,
            "checkpoint": self.checkpoint,
            "split": {name: list(getattr(self.split, name)) for name in ("train", "val", "test")},
            "unlabelled": [case.name for case in self.unlabelled],
            "settings": with_settings(self.plan.plans, self.settings)["pcrl"],
        }
        if self.encoder is not None:
            description["encoder"] = self.encoder  # its file may be another pretraining's by the time this goes on
        table = self._table()
        if table is not None:
            with open(table, "rb") as file:
                description["table"] = hashlib.sha256(file.read()).hexdigest()
        path = os.path.join(self.folder, DESCRIPTION)
        if self.has_begun():
            with open(path, encoding="utf-8") as file:
                there = json.load(file)
            self.folds, earlier = there.pop("folds"), there.pop("methods", {})
            self._refuse_other(there, json.loads(json.dumps(description)), "the same settings to go on")
            again = {name: given for name, given in json.loads(json.dumps(methods)).items() if name in earlier}
            self._refuse_other({name: earlier[name] for name in again}, again, "the method another name", "method ")
            methods = {**earlier, **methods}
            self.methods = {name: Method(**given) for name, given in methods.items()}
        target = os.path.join(self.preprocessed, self.dataset)
        for folder in (target, self.results, os.path.join(self.folder, "logs")):
            os.makedirs(folder, exist_ok=True)
        for name in (self.identifier, "gt_segmentations", "dataset_fingerprint.json"):
            _link(os.path.join(self.plan.folder, name), os.path.join(target, name))
        if table is not None:
            shutil.copyfile(table, os.path.join(target, os.path.basename(table)))
        self._link_unlabelled(unlabelled_folder(target, self.identifier))
        self.folds = {**self.folds, **self._splits(runs)}
        _write_json(path, {**description, "methods": methods, "folds": self.folds})
        _write_json(os.path.join(target, "splits_final.json"), list(self.folds.values()))
        _write_json(os.path.join(target, "dataset.json"), self.plan.dataset_json)
        for run in runs:
            for name, plan in self._plans(run).items():
                _write_json(os.path.join(target, f"{name}.json"), plan)
            if self.pseudo_labelled(run):
                self.pseudo_labels(run).describe(self.description_of_pseudo_labels(run))

    def _link_unlabelled(self, folder: str) -> None:
        """Pretraining takes all that is in that folder: also what an earlier start had and this one leaves out."""
        paths = {os.path.basename(case.path): case.path for case in self.unlabelled}
        if paths:
            os.makedirs(folder, exist_ok=True)
        for name in set(os.listdir(folder) if os.path.isdir(folder) else ()) - paths.keys():
            os.remove(os.path.join(folder, name))
        for name, path in paths.items():
            _link(path, os.path.join(folder, name))

    def _table(self) -> str | None:
        """Of a classification, the file with the labels."""
        return None if self.targets is None else os.path.join(self.plan.folder, FILES[self.targets.kind])

    def has_begun(self) -> bool:
        """Whether anything was trained in the folder; until then it may become any comparison."""
        return os.path.isfile(os.path.join(self.folder, DESCRIPTION)) and bool(
            glob(os.path.join(glob_escape(self.results), "*", "*", "fold_*"))
        )

    def _refuse_other(self, there: Mapping[str, Any], now: Mapping[str, Any], remedy: str, kind: str = "") -> None:
        """Raises `UserError` where what the folder was begun with is not what it is now."""
        for name in {**there, **now}:
            if there.get(name) != now.get(name):
                where, before, after = _difference(there.get(name), now.get(name), name)
                raise UserError(
                    f"{self.named} holds a comparison with another {kind}{where} ({_short(before)}, now "
                    f"{_short(after)}); give another folder with -o, or {remedy}"
                )

    def _plans(self, run: Run) -> dict[str, dict[str, Any]]:
        """The plans of a run's pretraining and fine-tuning, by name."""
        method = self.methods[run.method]
        plans = {self.plans_name(run): self._plan(self.plans_name(run), method, run)}
        if self.pretrains(run):
            name = self.pretraining_plans_name(run)
            plans[name] = self._plan(name, self.methods[method.pretraining or run.method], run)
        return plans

    def _plan(self, name: str, method: Method, run: Run) -> dict[str, Any]:
        plan = with_settings(self.plan.plans, self.settings, vars(method))
        plan["plans_name"] = name
        if method.pretrain is None:
            del plan["pcrl"]["pretrain"]  # the same training, however the others are pretrained
        else:
            plan["pcrl"]["pretrain"]["seed"] = run.seed
        if self.targets is not None:
            plan["pcrl"].setdefault("classify", {})["table"] = self.targets.kind
        if name == self.plans_name(run) and method.pretrain is not None:
            plan["pcrl"]["checkpoint"] = self.checkpoint or self.pretrained(run)
        configuration = plan["configurations"][self.plan.configuration]
        configuration["data_identifier"] = self._data_identifier(run)
        configuration["next_stage"] = None  # of a cascade: nnU-Net would predict for it, too
        return plan

    def plans_name(self, run: Run) -> str:
        """Of the plan that a run is fine-tuned with; with pseudo-labels it names the data of the scored part."""
        scored = "_val" * (self.scored == "val" and bool(self.pseudo_labelled(run)))
        return f"{self.plan.plans['plans_name']}_{run}{scored}"

    def pretrains(self, run: Run) -> bool:
        """Whether a run needs a pretraining of this comparison."""
        return self.methods[run.method].pretrain is not None and self.checkpoint is None

    def pretraining_plans_name(self, run: Run) -> str:
        """Of the plan that the encoder of a run is pretrained with."""
        method = self.methods[run.method].pretraining or run.method
        labelled = f"{run.labelled}_" if self.protocol == "semi" else ""
        return f"{self.plan.plans['plans_name']}_{method}_pretrain_{labelled}{run.seed}"

    # ----------------------------------------------------------------------------------------------------- results

    def pretraining_fold(self, run: Run) -> int:
        """The fold whose "val" the pretraining leaves out."""
        return self._fold(self._pretraining_data_name(run))

    def fold(self, run: Run) -> int:
        """The fold that a run trains."""
        return self._fold(self._fold_name(run))

    def pretrained(self, run: Run) -> str:
        """Path of the finished pretraining of a run."""
        name = f"{PRETRAINER}__{self.pretraining_plans_name(run)}__{self.plan.configuration}"
        return os.path.join(
            self.results, self.dataset, name, f"fold_{self.pretraining_fold(run)}", checkpoint_file.FINAL
        )

    def trainer(self, run: Run) -> str:
        """Name of the class that trains, or of the shortcut, in its place in the name of the folder."""
        method = self.methods[run.method]
        if method.shortcut is not None:
            return f"Shortcut_{method.shortcut}"
        task, kind = "" if self.targets is None else "Classification", "Scratch" if method.pretrain is None else ""
        return f"PCRL{task}{kind or ('Finetune' if self.targets is None else '')}Trainer"

    def output(self, run: Run) -> str:
        """The folder of a run's fold."""
        name = f"{self.trainer(run)}__{self.plans_name(run)}__{self.plan.configuration}"
        return os.path.join(self.results, self.dataset, name, f"fold_{self.fold(run)}")

    def evaluation(self, run: Run) -> str:
        """Path of nnU-Net's own evaluation, or a classification's, which is the last thing that is written."""
        name = "summary.json" if self.targets is None else EVALUATION
        return os.path.join(self.output(run), "validation", name)

    def is_done(self, run: Run) -> bool:
        """Whether a run has been trained and scored."""
        return _is_whole_json(self.evaluation(run))

    def trained_before(self, run: Run) -> str | None:
        """Path of the network of a run that was done here with the other part scored; None: there is none.

        Its labelled cases and settings are the same (`prepare` refuses others), and what is scored has no part in a
        training. (Pseudo-labels are predicted again, into the data that hold the scored cases.)
        """
        other = copy(self)
        other.scored = "val" if self.scored == "test" else "test"
        if other._fold_name(run) not in self.folds or not other.is_done(run):
            return None
        path = other.network(run)
        return path if os.path.isfile(path) else None

    def network(self, run: Run) -> str:
        """Path of a run's trained network."""
        return os.path.join(self.output(run), "checkpoint_final.pth")

    def curve(self, run: Run) -> tuple[np.ndarray, np.ndarray] | None:
        """What nnU-Net validates by after each epoch, Dice or AUROC, mean over labels, and the iterations.

        It is of the cases that were scored when the network was trained, see `trained_before`.

        None of a shortcut, which does not iterate, and of a run that is not done.
        """
        if not os.path.isfile(self.network(run)):
            return None
        content = torch.load(self.network(run), map_location="cpu", weights_only=False, mmap=True)  # of our own making
        dice = np.asarray(content["logging"]["mean_fg_dice"], dtype=float)
        an_epoch = FinetuneSettings.from_plan(content["init_args"]["plans"]).iters_per_epoch
        return an_epoch * np.arange(1, len(dice) + 1), dice

    def examples(
        self, runs: Sequence[Run], scores: DiceScores, learned: Mapping[int, Sequence[str]]
    ) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """Return image and labels (X, Y, Z) of the truth, the control and a pretrained method, by case.

        The number of labels is the smallest with which a network learned. The subset is the first that both have done.
        The cases are those with the largest loss, the median and the largest gain in Dice.

        Args:
            learned: by number of labels, the methods whose networks learned.

        Raises:
            LookupError, OSError: there is no such subset; nnUNet_raw has no images.
        """
        raw = os.path.join(nnUNet_raw.get(), self.dataset) if nnUNet_raw.is_set() else ""
        pairs = [(Run(CONTROL, run.labelled, run.seed), run) for run in runs if run.method != CONTROL]
        pairs = [pair for pair in pairs if pair[0] in runs]
        pairs.sort(key=lambda pair: pair[1].method != "pcrlv2")
        pairs.sort(
            key=lambda pair: (
                not learned.get(pair[1].labelled),
                self.methods[pair[1].method].pretrain is None,
                pair[1].labelled,
            )
        )
        if not pairs:
            raise LookupError("it needs a finished run of scratch and one of another method with the same labels")
        if not os.path.isdir(raw):
            raise FileNotFoundError(f"it needs the images in nnUNet_raw, where there is no {self.dataset}")
        by_run = scores.cases.set_index(["method", "labelled", "seed", "case"])["points"].sort_index()
        control, other = (by_run.loc[(run.method, run.labelled, run.seed)] for run in pairs[0])
        gains = (other - control).dropna().sort_values()
        ending = self.plan.dataset_json["file_ending"]
        reader = PlansManager(self.plan.plans).image_reader_writer_class()
        images = get_filenames_of_train_images_and_targets(raw, self.plan.dataset_json)
        rows = {}
        for case in gains.index[sorted({0, len(gains) // 2, len(gains) - 1})]:
            image = reader.read_images(images[case]["images"][:1])[0][0]
            truth = os.path.join(self.preprocessed, self.dataset, "gt_segmentations", case + ending)
            panels = {"truth": (image, reader.read_seg(truth)[0][0])}
            for run, dice in zip(pairs[0], (control, other), strict=True):
                path = os.path.join(self.output(run), "validation", case + ending)
                panels[f"{run.method}: {dice[case]:.1f}"] = (image, reader.read_seg(path)[0][0])
            number = pairs[0][0].labelled
            gain = f"{gains[case]:+.1f} Dice" if learned.get(number) else "nothing surely learned"
            rows[f"{case}\n{number} labels, {gain}"] = panels
        return rows

    def drop_best_checkpoint(self, run: Run) -> None:
        """Remove nnU-Net's second checkpoint of a finished run, that of the best epoch: nothing here uses it."""
        best = os.path.join(self.output(run), "checkpoint_best.pth")
        if self.is_done(run) and os.path.isfile(best):
            os.remove(best)

    def write_scores(self, runs: Iterable[Run]) -> Scores:
        """Of the runs that are done, and of others that have been in this folder; results.csv says them, too.

        Of a classification, the other runs' are in predictions.csv, with each sample's truth and score.
        """
        if self.targets is None:
            table = self._collected("results.csv", COLUMNS, runs, self._of_segmentation)
            table.to_csv(self.file("results.csv"), index=False)
            return DiceScores(table.astype({"dice": float}), self.patients, self._shares_of_labels(table))
        predictions = self._collected("predictions.csv", PREDICTION_COLUMNS, runs, self._of_classification)
        predictions.to_csv(self.file("predictions.csv"), index=False)
        scores = AurocScores(predictions, self.patients)
        table = scores.of_labels.assign(case="all")
        table[["method", "labelled", "seed", "case", "label", "auroc"]].to_csv(self.file("results.csv"), index=False)
        return scores

    def _collected(
        self, name: str, columns: Sequence[str], runs: Iterable[Run], of_run: Callable[[Run], list[tuple[Any, ...]]]
    ) -> pd.DataFrame:
        """A file's lines of other runs, and those of the runs that are done; the control's come first."""
        path, tables = self.file(name), []
        if os.path.isfile(path):
            names, numbers = ("method", "case", "label"), ("dice", "truth", "score")
            types, empty = dict.fromkeys(names, str), {name: [""] for name in numbers}
            # a class may be called NA
            there = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=empty)[list(columns)]
            own = pd.MultiIndex.from_tuples([(run.method, run.labelled, run.seed) for run in runs])
            tables.append(there[~pd.MultiIndex.from_frame(there[["method", "labelled", "seed"]]).isin(own)])
        rows = [(run.method, run.labelled, run.seed, *row) for run in runs if self.is_done(run) for row in of_run(run)]
        tables.append(pd.DataFrame(rows, columns=list(columns)))
        all_of_them = pd.concat([table for table in tables if len(table)] or tables)
        # so that it has the first colour of every picture, whichever methods were called last
        return all_of_them.sort_values("method", key=lambda of: of != CONTROL, kind="stable", ignore_index=True)

    def _shares_of_labels(self, table: pd.DataFrame) -> dict[tuple[str, str], float]:
        """Return the share of the voxels for each scored case and label: the evaluation of any finished run has it."""
        of_table = table[["method", "labelled", "seed"]].drop_duplicates()
        for run in (Run(*row) for row in of_table.itertuples(index=False)):
            if run.method in self.methods and self.is_done(run):
                counted = ("TP", "FP", "FN", "TN")
                return {
                    (case, label): metrics["n_ref"] / max(1, sum(metrics[name] for name in counted))
                    for case, label, metrics in self._evaluated(run)
                }
        return {}

    def _of_segmentation(self, run: Run) -> list[tuple[Any, ...]]:
        """Return case, label and Dice."""
        return [(case, label, metrics["Dice"]) for case, label, metrics in self._evaluated(run)]

    def _evaluated(self, run: Run) -> list[tuple[str, str, dict[str, float]]]:
        """Return case, label and what nnU-Net measured."""
        names = {str(_label(value)): name for name, value in self.plan.dataset_json["labels"].items()}
        with open(self.evaluation(run), encoding="utf-8") as file:
            summary = json.load(file)
        rows = []
        for of_case in summary["metric_per_case"]:
            case = os.path.basename(of_case["prediction_file"]).removesuffix(self.plan.dataset_json["file_ending"])
            rows += [(case, names.get(label, label), metrics) for label, metrics in of_case["metrics"].items()]
        return rows

    def _of_classification(self, run: Run) -> list[tuple[Any, ...]]:
        """Case, number of the sample, label, truth, score."""
        assert self.targets is not None
        path = os.path.join(os.path.dirname(self.evaluation(run)), PREDICTIONS)
        table = pd.read_csv(path, dtype={CASE[self.targets.kind]: str})
        cases = table[CASE[self.targets.kind]]
        return [
            (case, sample, name, truth, score)
            for name in self.targets.names
            for sample, (case, truth, score) in enumerate(zip(cases, table[name], table[f"p_{name}"], strict=True))
        ]


def with_settings(plans: Mapping[str, Any], *settings: Mapping[str, Any]) -> dict[str, Any]:
    """A plan with settings over its own, the later ones over the earlier."""
    plan = dict(deepcopy(plans))
    block = plan.setdefault("pcrl", {})
    for part in PARTS:
        merged = _merged(block.get(part, {}), *(given.get(part) or {} for given in settings))
        if merged or part != "classify":
            block[part] = merged
    block.pop("checkpoint", None)
    return plan


def _is_whole_json(path: str) -> bool:
    """Whether a file is there and has been written to its end: nnU-Net writes its summary in place."""
    try:
        with open(path, encoding="utf-8") as file:
            json.load(file)
    except (OSError, ValueError):
        return False
    return True


def _link(source: str, link: str) -> None:
    if os.path.exists(source) and not os.path.islink(link):
        os.symlink(os.path.abspath(source), link)


def _difference(there: Any, now: Any, where: str) -> tuple[str, Any, Any]:
    """The first thing in which two blocks differ, by its path of names, and both values."""
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        for name in {**there, **now}:
            if there.get(name) != now.get(name):
                return _difference(there.get(name), now.get(name), f"{where}.{name}")
    return where, there, now


def _subset_name(run: Run) -> str:
    return f"{run.labelled}_{run.seed}"


def _label(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _merged(*blocks: Mapping[str, Any]) -> dict[str, Any]:
    """Later ones win, also within blocks of blocks."""
    merged: dict[str, Any] = {}
    for block in blocks:
        for key, value in block.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = _merged(merged[key], value) if both else deepcopy(value)
    return merged


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else f"{text[:57]}..."


def _write_json(path: str, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2))
