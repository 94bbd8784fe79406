"""Does pretraining help? The runs of a comparison with few labels, and what their results say.

A comparison has a folder of its own that is laid out as nnU-Net's: preprocessed data (links to the dataset's), plans
(one a run), a split of its own, results. Every training in it is nnU-Net's own, of a fold of that split.

A run is one fine-tuning: a method, a number of labelled cases, and a seed, which draws them. S seeds, K cases.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.data import find_cases
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.plans import PlannedConfiguration
from pcrl_nnunet.transfer import PRETRAINER
from pcrl_nnunet.unlabelled import unlabelled_folder

SHARES = (0.7, 0.1, 0.2)  # training, validation, test (method.md 3)
SPLIT_SEED = 12345  # nnU-Net's
CONTROL = "scratch"
COLUMNS = ("method", "labelled", "seed", "case", "label", "dice")
BOOTSTRAPS = 10_000
DESCRIPTION = "comparison.json"

Protocol = Literal["all", "semi", "transfer"]


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        trainer: class of nnU-Net's kind that fine-tunes.
        pretrain: settings over the plan's ``pcrl.pretrain``; None: it does not pretrain.
        finetune: settings over the plan's ``pcrl.finetune``.
        pretraining: the method whose pretraining it takes; None: its own.
    """

    trainer: str = "PCRLFinetuneTrainer"
    pretrain: Mapping[str, Any] | None = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)
    pretraining: str | None = None


_SCRATCH = "PCRLScratchTrainer"
METHODS: dict[str, Method] = {
    CONTROL: Method(_SCRATCH, None),
    # nnUNetTrainer's schedule, in as many iterations as the others have
    "stock": Method(_SCRATCH, None, {"initial_lr": 1e-2, "weight_decay": 3e-5, "warmup_share": 0.0}),
    "pcrlv2": Method(),
}


def methods_of(names: Sequence[str], own: Mapping[str, Any]) -> dict[str, Method]:
    """The named methods, of `METHODS` and of a user's own definitions; `UserError` for what is neither.

    Args:
        own: by name, the fields of `Method`.
    """
    known = dict(METHODS)
    for name, given in own.items():
        if not re.fullmatch(r"[A-Za-z0-9.-]+(_[A-Za-z0-9.-]+)*", name) or name in METHODS:
            raise UserError(f"a method cannot be called '{name}'; use letters, digits and single _, and another name")
        try:
            known[name] = Method(**given)
        except TypeError:
            raise UserError(
                f"method {name} is {given!r}; expected a block with some of {', '.join(Method.__dataclass_fields__)}"
            ) from None
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
        raise UserError(f"{len(order)} cases are too few for a split into training, validation and test cases")
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
    """

    folder: str
    plan: PlannedConfiguration
    methods: Mapping[str, Method]
    patients: Mapping[str, str]
    protocol: Protocol
    scored: Literal["val", "test"]
    settings: Mapping[str, Mapping[str, Any]]
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        if (self.protocol == "transfer") != (self.checkpoint is not None):
            raise UserError(
                f"-protocol is {self.protocol} and -checkpoint {self.checkpoint}; transfer, and no other one, compares "
                f"a pretraining of other data: give its checkpoint_final.pth with -checkpoint, or choose all or semi"
            )
        self.dataset = self.plan.plans["dataset_name"]
        self.preprocessed = os.path.join(self.folder, "nnUNet_preprocessed")
        self.results = os.path.join(self.folder, "nnUNet_results")
        self.identifier = self.plan.resolved["data_identifier"]
        cases = [case.name for case in find_cases(os.path.join(self.plan.folder, self.identifier))]
        self.split = split_by_patient(cases, self.patients)
        self.folds: list[str] = []  # their names; only ever appended to

    # ------------------------------------------------------------------------------------------------------- cases

    def labelled_cases(self, run: Run) -> list[str]:
        """Of a run: drawn by its seed, the same for all methods; those of a smaller number are among them."""
        return sorted(drawn_by_patient(self.split.train, self.patients, run.seed)[: run.labelled])

    def _fold(self, name: str) -> int:
        return self.folds.index(name)

    def _splits(self, runs: Sequence[Run]) -> dict[str, dict[str, list[str]]]:
        """nnU-Net's folds by name. A pretraining's "val" is what it leaves out."""
        split, splits = self.split, {}
        scored = list(getattr(split, self.scored))
        held_out = [*split.val, *split.test]
        for run in runs:
            labelled = self.labelled_cases(run)
            splits[self._data_name(run)] = {"train": labelled, "val": scored}
            if self.protocol == "semi":
                rest = sorted(set(split.train) - set(labelled))
                splits[self._pretraining_data_name(run)] = {"train": rest, "val": sorted({*held_out, *labelled})}
            else:
                splits[self._pretraining_data_name(run)] = {"train": list(split.train), "val": held_out}
        return splits

    @staticmethod
    def _data_name(run: Run) -> str:
        return f"{run.labelled}_{run.seed}"

    def _pretraining_data_name(self, run: Run) -> str:
        return f"pretrain_{run.labelled}_{run.seed}" if self.protocol == "semi" else "pretrain"

    # ------------------------------------------------------------------------------------------------------ folder

    def prepare(self, runs: Sequence[Run]) -> None:
        """Make the folder, or check that it is this comparison's, and add what the runs need.

        Raises:
            UserError: the folder holds another comparison, or runs of a method with other settings.
        """
        description = {
            "dataset": self.dataset,
            "plans": checkpoint_file.plans_hash(self.plan.plans),
            "configuration": self.plan.configuration,
            "protocol": self.protocol,
            "checkpoint": self.checkpoint,
            "scored": self.scored,
            "split": {name: list(getattr(self.split, name)) for name in ("train", "val", "test")},
        }
        path = os.path.join(self.folder, DESCRIPTION)
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                there = json.load(file)
            self.folds = there.pop("folds")
            for name, value in description.items():
                if there[name] != value:
                    raise UserError(
                        f"{self.folder} holds a comparison with another {name} ({_short(there[name])}, now "
                        f"{_short(value)}); give another folder with -o, or the same settings to continue it"
                    )
        target = os.path.join(self.preprocessed, self.dataset)
        for folder in (target, self.results, os.path.join(self.folder, "logs")):
            os.makedirs(folder, exist_ok=True)
        data = os.path.join(self.plan.folder, self.identifier)
        unlabelled = unlabelled_folder(self.plan.folder, self.identifier)
        for name in (data, unlabelled, "gt_segmentations", "dataset_fingerprint.json"):
            source = os.path.join(self.plan.folder, name)
            link = os.path.join(target, os.path.basename(source))
            if os.path.exists(source) and not os.path.islink(link):
                os.symlink(os.path.abspath(source), link)
        splits = self._splits(runs)
        self.folds += [name for name in splits if name not in self.folds]
        _write_json(path, {**description, "folds": self.folds})
        everything = {**splits, **self._splits([self._named(name) for name in self.folds if name[0].isdigit()])}
        _write_json(os.path.join(target, "splits_final.json"), [everything[name] for name in self.folds])
        _write_json(os.path.join(target, "dataset.json"), self.plan.dataset_json)
        for run in runs:
            for name, plan in self._plans(run).items():
                self._write_plan(os.path.join(target, f"{name}.json"), plan, run)

    @staticmethod
    def _named(fold: str) -> Run:
        labelled, seed = fold.split("_")
        return Run(CONTROL, int(labelled), int(seed))

    def _write_plan(self, path: str, plan: Mapping[str, Any], run: Run) -> None:
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                if json.load(file) != json.loads(json.dumps(plan)):
                    raise UserError(
                        f"{self.folder} holds runs of method {run.method} with other settings; give another folder "
                        f"with -o, or the method another name"
                    )
        _write_json(path, plan)

    def _plans(self, run: Run) -> dict[str, dict[str, Any]]:
        """The plans of a run's pretraining and fine-tuning, by name."""
        method = self.methods[run.method]
        plans = {self.plans_name(run): self._plan(self.plans_name(run), method, run)}
        if self.pretrains(run):
            name = self.pretraining_plans_name(run)
            plans[name] = self._plan(name, self.methods[method.pretraining or run.method], run)
        return plans

    def _plan(self, name: str, method: Method, run: Run) -> dict[str, Any]:
        plan = deepcopy(self.plan.plans)
        block = plan.setdefault("pcrl", {})
        for part in ("pretrain", "finetune"):
            own = getattr(method, part) or {}
            block[part] = _merged(block.get(part, {}), self.settings.get(part, {}), own)
        block["pretrain"]["seed"] = run.seed
        block.pop("checkpoint", None)
        if name == self.plans_name(run) and method.pretrain is not None:
            block["checkpoint"] = self.checkpoint or self.pretrained(run)
        plan["plans_name"] = name
        return plan

    def plans_name(self, run: Run) -> str:
        """Of the plan that a run is fine-tuned with."""
        return f"{self.plan.plans['plans_name']}_{run}"

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
        return self._fold(self._data_name(run))

    def pretrained(self, run: Run) -> str:
        """Path of the finished pretraining of a run."""
        name = f"{PRETRAINER}__{self.pretraining_plans_name(run)}__{self.plan.configuration}"
        return os.path.join(
            self.results, self.dataset, name, f"fold_{self.pretraining_fold(run)}", checkpoint_file.FINAL
        )

    def output(self, run: Run) -> str:
        """The folder of a run's fold."""
        name = f"{self.methods[run.method].trainer}__{self.plans_name(run)}__{self.plan.configuration}"
        return os.path.join(self.results, self.dataset, name, f"fold_{self.fold(run)}")

    def summary(self, run: Run) -> str:
        """Path of nnU-Net's own evaluation, which is the last thing that a training writes."""
        return os.path.join(self.output(run), "validation", "summary.json")

    def is_done(self, run: Run) -> bool:
        """Whether a run has been trained and scored."""
        return os.path.isfile(self.summary(run))

    def scores(self, runs: Iterable[Run]) -> pd.DataFrame:
        """The columns of results.csv for the runs that are done."""
        names = {str(_label(value)): name for name, value in self.plan.dataset_json["labels"].items()}
        rows = []
        for run in runs:
            if not self.is_done(run):
                continue
            with open(self.summary(run), encoding="utf-8") as file:
                summary = json.load(file)
            for of_case in summary["metric_per_case"]:
                case = os.path.basename(of_case["prediction_file"]).removesuffix(self.plan.dataset_json["file_ending"])
                for label, metrics in of_case["metrics"].items():
                    rows.append((run.method, run.labelled, run.seed, case, names.get(label, label), metrics["Dice"]))
        return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"dice": float})


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
    draft = f"{path}.draft"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
    os.replace(draft, path)


# --------------------------------------------------------------------------------------------------------- statistics


def per_case(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean over the labels of a case; a label that neither the truth nor the prediction has does not count."""
    return scores.groupby(["method", "labelled", "seed", "case"], as_index=False)["dice"].mean()


def interval(differences: np.ndarray, rng: np.random.Generator, share: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired differences, over labelled subsets and cases at once.

    Args:
        differences: (S, K), of the same cases for every subset; NaN where a case has no score.
    """
    num_seeds, num_cases = differences.shape
    means = np.empty(BOOTSTRAPS)
    for i in range(BOOTSTRAPS):
        rows, columns = rng.integers(num_seeds, size=num_seeds), rng.integers(num_cases, size=num_cases)
        means[i] = np.nanmean(differences[np.ix_(rows, columns)])
    low, high = np.nanquantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def table(scores: pd.DataFrame) -> pd.DataFrame:
    """One row a method and number of labelled cases, in points (100 Dice).

    Columns: method, labelled, seeds, mean, sd (over seeds, of the mean over cases), difference (to `CONTROL` on the
    same subsets and cases), low, high (of its 95 % interval).
    """
    cases = per_case(scores)
    rows = []
    for (labelled, method), group in cases.groupby(["labelled", "method"], sort=False):
        by_seed = group.groupby("seed")["dice"].mean() * 100
        row = {
            "method": method,
            "labelled": labelled,
            "seeds": len(by_seed),
            "mean": by_seed.mean(),
            "sd": by_seed.std(),
        }
        control = cases[(cases["labelled"] == labelled) & (cases["method"] == CONTROL)]
        paired = group.merge(control, on=["seed", "case"], suffixes=("", "_control"))
        if method != CONTROL and len(paired):
            paired["difference"] = (paired["dice"] - paired["dice_control"]) * 100
            matrix = paired.pivot_table(index="seed", columns="case", values="difference", dropna=False).to_numpy()
            low, high = interval(matrix, np.random.default_rng(0))
            row |= {"difference": float(np.nanmean(matrix)), "low": low, "high": high}
        rows.append(row)
    columns = ["method", "labelled", "seeds", "mean", "sd", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns).sort_values("labelled", kind="stable", ignore_index=True)


def verdict(rows: pd.DataFrame, method: str) -> str:
    """A sentence to act on: what a method gains over the control, at the number of labels where it gains most."""
    own = rows[(rows["method"] == method) & rows["difference"].notna()]
    if own.empty:
        return f"Nothing can be said of {method} yet: there is no finished pair of it and {CONTROL}."
    surely = own[own["low"] > 0]
    if surely.empty:
        told = "; ".join(f"{_gain(row)} with {row.labelled} labels" for row in own.itertuples())
        if (own["high"] < 0).any():
            return f"{method} costs Dice here: {told}."
        return f"{method} does not pay here, as far as can be told: {told}."
    return (
        "; ".join(f"With {row.labelled} labels expect {_gain(row)} Dice of {method}" for row in surely.itertuples())
        + "."
    )


def _gain(row: Any) -> str:
    half = (row.high - row.low) / 2
    return f"{row.difference:+.1f} \N{PLUS-MINUS SIGN} {half:.1f}"
