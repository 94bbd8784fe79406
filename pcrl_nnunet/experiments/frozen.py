"""The cheap look first: light heads on the frozen features of each method's pretraining and of a random network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from glob import escape, glob
from typing import Any

import pandas as pd
import torch

from pcrl_nnunet.checkpoint import encoder_hash
from pcrl_nnunet.classification.shortcuts import SHORTCUTS
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.arms import Arm
from pcrl_nnunet.experiments.comparison import Comparison, Run
from pcrl_nnunet.experiments.frozen_classification import TableTask
from pcrl_nnunet.experiments.frozen_segmentation import VoxelTask
from pcrl_nnunet.experiments.layout import Layout
from pcrl_nnunet.experiments.settings import with_settings
from pcrl_nnunet.features.encoder import network_of
from pcrl_nnunet.features.information import information
from pcrl_nnunet.features.voxels import Stages
from pcrl_nnunet.files import write_text
from pcrl_nnunet.method_names import names
from pcrl_nnunet.networks import encoder_of
from pcrl_nnunet.plans import PlanFacts, read_json
from pcrl_nnunet.progress import counted, doing

RANDOM = "random"
FOLDER = "frozen"
FORMAT = 1  # of the kept files; another number is computed again
OF_DICE = ("case", "label", "dice")
OF_AUROC = ("case", "sample", "label", "truth", "score")
OF_INFORMATION = ("task", "classes", "accuracy", "crops")


def frozen_methods(wanted: Sequence[str], arms: Mapping[str, Arm], checkpoint: str | None) -> tuple[list[str], str]:
    """Return the arms whose pretrainings are looked at, and a sentence on the others, which may be empty.

    Args:
        wanted: names given with ``-methods``.
        arms: the arms by name.
        checkpoint: the pretraining of all arms, or None if each has its own.

    Raises:
        UserError: none of the arms has a pretraining, or one has the name of the random network.
    """
    if RANDOM in arms:
        raise UserError(f"-frozen calls the network with random weights {RANDOM}; give your method another name")
    pretrained = [name for name in dict.fromkeys(wanted) if arms[name].pretrain is not None]
    if not pretrained:
        raise UserError(
            f"-frozen looks at pretrainings, and {', '.join(wanted)} have none; give some of {', '.join(names())} with "
            f"-methods"
        )
    of = {name: arms[name].pretraining or name for name in pretrained}
    if checkpoint is not None:
        of = dict.fromkeys(pretrained, pretrained[0])
    chosen = list(dict.fromkeys(of.values()))
    others = [f"{name} (the pretraining of {of[name]})" for name in pretrained if of[name] != name]
    others += [f"{name} (no pretraining)" for name in dict.fromkeys(wanted) if name not in (*pretrained, *SHORTCUTS)]
    return chosen, f"-frozen leaves out {', '.join(others)}" if others else ""


def task_of(comparison: Comparison) -> VoxelTask | TableTask:
    """Return the labels and their heads. Raise `UserError` for labels that no head can learn."""
    plan, cases, table = comparison.plan, comparison.cases.by_name, comparison.label_table
    if table is None:
        return VoxelTask(plan, os.path.join(plan.folder, plan.resolved["data_identifier"]), cases)
    return TableTask(replace(plan, plans=with_settings(plan.plans, comparison.settings)), table, cases)


@dataclass(frozen=True)
class Look:
    """A network or a shortcut that is looked at, and the runs that use it.

    Attributes:
        method: an arm, `RANDOM`, or a shortcut.
        checkpoint: path of the pretraining; None: random weights.
        informs: whether the information test belongs to this look. If pretrainings differ by the number of labelled
            cases, only the first does.
    """

    method: str
    seed: int
    checkpoint: str | None
    runs: tuple[Run, ...]
    informs: bool

    def __str__(self) -> str:
        return f"{self.method}, subset {self.seed}"


class FrozenLook:
    """The looks of a comparison. Each result is kept in a file of its own, so that the same command goes on.

    Args:
        layout: the comparison's folder.
        runs: the runs of the arms with a pretraining.
    """

    def __init__(self, layout: Layout, runs: Sequence[Run]) -> None:
        self.layout, self.comparison = layout, layout.comparison
        self.plan, self.folder = layout.comparison.plan, os.path.join(layout.folder, FOLDER)
        self.task = task_of(layout.comparison)
        self.looks = list(self._looks(runs))

    def _looks(self, runs: Sequence[Run]) -> Iterator[Look]:
        """Yield a look for each pretraining, then one for each subset's random network and shortcuts."""
        groups: dict[tuple[str, int, str | None], dict[Run, None]] = {}
        for run in runs:
            path = self.comparison.checkpoint or self.layout.pretrained(run)
            groups.setdefault((run.arm, run.seed, path), {})[run] = None
        for run in runs:
            groups.setdefault((RANDOM, run.seed, None), {})[Run(RANDOM, run.labelled, run.seed)] = None
        informed: set[tuple[str, int]] = set()
        for (method, seed, checkpoint), own in groups.items():
            yield Look(method, seed, checkpoint, tuple(own), (method, seed) not in informed)
            informed.add((method, seed))
        if isinstance(self.task, TableTask):
            for name in self.task.shortcuts:
                for seed in dict.fromkeys(run.seed for run in runs):
                    own = dict.fromkeys(Run(name, run.labelled, seed) for run in runs if run.seed == seed)
                    yield Look(name, seed, None, tuple(own), False)

    def look(self, device: torch.device) -> None:
        """Look at each network whose pretraining is there, and keep what is new."""
        os.makedirs(self.folder, exist_ok=True)
        there = [look for look in self.looks if look.checkpoint is None or os.path.isfile(look.checkpoint)]
        for number, look in enumerate(there, start=1):
            with doing(f"Looking at {look} ({number} of {len(there)})"):
                self._look_at(look, device)

    def _look_at(self, look: Look, device: torch.device) -> None:
        if look.method in SHORTCUTS:
            self._look_at_shortcut(look)
            return
        network, _, report = network_of(self.plan, look.checkpoint, look.seed)
        weights = encoder_hash(network)
        with_decoder = report is not None and any(name.startswith("decoder.stages.") for name in report.loaded)
        runs = [run for run in look.runs if not self._is_kept(self._file(run), weights)]
        network = network.to(device)
        if runs and isinstance(self.task, TableTask):
            labelled, scored = self._labelled(runs), self.comparison.scored_cases
            by_number = self.task.scores(encoder_of(network), labelled, scored, device)
            for run in runs:
                self._keep(self._file(run), weights, run, OF_AUROC, by_number[run.labelled])
        elif runs:
            self._segment(Stages(network, with_decoder), weights, runs, device)
        path = os.path.join(self.folder, f"information_{look.method}_{look.seed}_{self.comparison.scored}.json")
        if look.informs and not self._is_kept(path, weights):
            facts, cases = PlanFacts.of(self.plan.configuration, self.plan.resolved), self.comparison.cases
            parts = (cases.split.train, self.comparison.scored_cases)
            training, held_out = ([cases.by_name[name] for name in part] for part in parts)
            answers = information(encoder_of(network), facts, training, held_out, look.seed, device)
            self._keep(path, weights, look.runs[0], OF_INFORMATION, [tuple(asdict(a).values()) for a in answers])

    def _look_at_shortcut(self, look: Look) -> None:
        assert isinstance(self.task, TableTask)
        runs = [run for run in look.runs if not self._is_kept(self._file(run), None)]
        if runs:
            scored = self.comparison.scored_cases
            by_number = self.task.scores_of_shortcut(look.method, self._labelled(runs), scored)
            for run in runs:
                self._keep(self._file(run), None, run, OF_AUROC, by_number[run.labelled])

    def _labelled(self, runs: Sequence[Run]) -> dict[int, Sequence[str]]:
        """Return the labelled cases of a subset's runs, by their number."""
        return {run.labelled: self.comparison.labelled_cases(run) for run in runs}

    def _segment(self, stages: Stages, weights: str, runs: Sequence[Run], device: torch.device) -> None:
        """Train the runs' heads, and score all of them in one pass over the cases."""
        assert isinstance(self.task, VoxelTask)
        heads = {run: self.task.head(stages, self.comparison.labelled_cases(run), run.seed, device) for run in runs}
        rows: dict[Run, list[Any]] = {run: [] for run in runs}
        scored = self.comparison.scored_cases
        for name in counted(scored, len(scored), "cases are scored"):
            for run, found in self.task.scores(stages, heads, name, device).items():
                rows[run] += found
        for run in runs:
            self._keep(self._file(run), weights, run, OF_DICE, rows[run])

    def _file(self, run: Run) -> str:
        return os.path.join(self.folder, f"run_{run}_{self.comparison.scored}.json")

    def _is_kept(self, path: str, weights: str | None) -> bool:
        """Tell if a result of this network is there; `weights` is the hash of its encoder, None for a shortcut."""
        if not os.path.isfile(path):
            return False
        content = read_json(path, "remove it")
        return bool(content.get("weights") == weights and content.get("format") == FORMAT)

    def _keep(
        self, path: str, weights: str | None, run: Run, columns: Sequence[str], rows: Sequence[Sequence[Any]]
    ) -> None:
        of_run = {"method": run.arm, "labelled": run.labelled, "seed": run.seed}
        content = {"format": FORMAT, "weights": weights, **of_run, "columns": columns, "rows": rows}
        write_text(path, json.dumps(content))

    def kept(self, kind: str) -> pd.DataFrame:
        """Return all results of a kind, ``run`` or ``information``, of earlier calls too, in the order of the looks."""
        paths = sorted(glob(os.path.join(escape(self.folder), f"{kind}_*_{self.comparison.scored}.json")))
        tables = []
        for path in paths:
            content = read_json(path, "remove it")
            table = pd.DataFrame(content["rows"], columns=content["columns"])
            tables.append(table.assign(**{name: content[name] for name in ("method", "labelled", "seed")}))
        order = {name: number for number, name in enumerate(dict.fromkeys(look.method for look in self.looks))}
        found = pd.concat(tables, ignore_index=True)
        return found.sort_values(["method", "labelled", "seed"], kind="stable", ignore_index=True).sort_values(
            "method", key=lambda names: names.map(order).fillna(-1), kind="stable", ignore_index=True
        )
