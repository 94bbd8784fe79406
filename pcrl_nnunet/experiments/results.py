"""The results of finished runs: scores, written to files for the user, and curves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from pcrl_nnunet.classification.label_table import CASE
from pcrl_nnunet.classification.prediction import PREDICTIONS
from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.experiments.arms import CONTROL
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.layout import Layout
from pcrl_nnunet.experiments.scores import COLUMNS, PREDICTION_COLUMNS, AurocScores, DiceScores, Scores
from pcrl_nnunet.plans import read_json

RESULTS, SCORES_OF_SAMPLES = "results.csv", "predictions.csv"
Rows = list[tuple[Any, ...]]


def collect(layout: Layout, runs: Sequence[Run]) -> Scores:
    """Return the scores of the runs that are done, and write them into results.csv.

    The file keeps the scores of other runs in this folder. For a classification, predictions.csv keeps the truth and
    score of each sample.
    """
    for run in runs:
        _drop_best_checkpoint(layout, run)
    patients = layout.comparison.cases.patients
    if layout.comparison.label_table is None:
        table = _collected(layout, RESULTS, COLUMNS, runs, _of_segmentation)
        table.to_csv(layout.file(RESULTS), index=False)
        return DiceScores(table.astype({"dice": float}), patients, _shares_of_labels(layout, table))
    predictions = _collected(layout, SCORES_OF_SAMPLES, PREDICTION_COLUMNS, runs, _of_classification)
    predictions.to_csv(layout.file(SCORES_OF_SAMPLES), index=False)
    scores = AurocScores(predictions, patients)
    table = scores.of_labels.assign(case="all")
    table[["method", "labelled", "seed", "case", "label", "auroc"]].to_csv(layout.file(RESULTS), index=False)
    return scores


def runs_in(table: pd.DataFrame) -> list[Run]:
    """Return the runs of a table with the columns method, labelled and seed."""
    rows = table[["method", "labelled", "seed"]].drop_duplicates()
    return [Run(*row) for row in rows.itertuples(index=False)]


def curve(layout: Layout, run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the iterations and nnU-Net's validation score after each epoch: Dice or AUROC, mean over labels.

    The score comes from the cases that were scored when the network was trained, see `Layout.trained_before`. Return
    None for a shortcut, which does not iterate, and for an unfinished run.
    """
    if not os.path.isfile(layout.network(run)):
        return None
    content = torch.load(layout.network(run), map_location="cpu", weights_only=False, mmap=True)  # a file of ours
    score = np.asarray(content["logging"]["mean_fg_dice"], dtype=float)
    an_epoch = FinetuneSettings.from_plan(content["init_args"]["plans"]).iters_per_epoch
    return an_epoch * np.arange(1, len(score) + 1), score


def _drop_best_checkpoint(layout: Layout, run: Run) -> None:
    """Remove a finished run's checkpoint of the best epoch: nothing here uses it."""
    best = os.path.join(layout.output(run), "checkpoint_best.pth")
    if layout.is_done(run) and os.path.isfile(best):
        os.remove(best)


def _collected(
    layout: Layout, name: str, columns: Sequence[str], runs: Iterable[Run], of_run: Callable[[Layout, Run], Rows]
) -> pd.DataFrame:
    """Return the lines of the finished runs and the file's lines of other runs. The control's lines come first."""
    path, tables = layout.file(name), []
    if os.path.isfile(path):
        names, numbers = ("method", "case", "label"), ("dice", "truth", "score")
        types, empty = dict.fromkeys(names, str), {name: [""] for name in numbers}
        # a class may be called NA
        there = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=empty)[list(columns)]
        own = pd.MultiIndex.from_tuples([(run.arm, run.labelled, run.seed) for run in runs])
        tables.append(there[~pd.MultiIndex.from_frame(there[["method", "labelled", "seed"]]).isin(own)])
    done = [run for run in runs if layout.is_done(run)]
    rows = [(run.arm, run.labelled, run.seed, *row) for run in done for row in of_run(layout, run)]
    tables.append(pd.DataFrame(rows, columns=list(columns)))
    everything = pd.concat([table for table in tables if len(table)] or tables)
    # the control comes first in every picture, whichever arms were called last
    return everything.sort_values("method", key=lambda arm: arm != CONTROL, kind="stable", ignore_index=True)


def _shares_of_labels(layout: Layout, table: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Return the share of voxels of each label in each scored case; any finished run's evaluation contains it."""
    for run in runs_in(table):
        if run.arm in layout.comparison.arms and layout.is_done(run):
            counted = ("TP", "FP", "FN", "TN")
            return {
                (case, label): metrics["n_ref"] / max(1, sum(metrics[name] for name in counted))
                for case, label, metrics in _evaluated(layout, run)
            }
    return {}


def _of_segmentation(layout: Layout, run: Run) -> Rows:
    """Return case, label and Dice."""
    return [(case, label, metrics["Dice"]) for case, label, metrics in _evaluated(layout, run)]


def _evaluated(layout: Layout, run: Run) -> list[tuple[str, str, dict[str, float]]]:
    """Return case, label and nnU-Net's measures."""
    dataset_json = layout.comparison.plan.dataset_json
    # nnU-Net spells a region as a tuple
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in dataset_json["labels"].items()}
    names = {str(value): name for name, value in values.items()}
    summary = read_json(layout.evaluation(run), "run the same command again")
    rows = []
    for of_case in summary["metric_per_case"]:
        case = os.path.basename(of_case["prediction_file"]).removesuffix(dataset_json["file_ending"])
        rows += [(case, names.get(label, label), metrics) for label, metrics in of_case["metrics"].items()]
    return rows


def _of_classification(layout: Layout, run: Run) -> Rows:
    """Return case, number of the sample, label, truth and score."""
    label_table = layout.comparison.label_table
    assert label_table is not None
    path = os.path.join(os.path.dirname(layout.evaluation(run)), PREDICTIONS)
    table = pd.read_csv(path, dtype={CASE[label_table.kind]: str})
    cases = table[CASE[label_table.kind]]
    return [
        (case, sample, name, truth, score)
        for name in label_table.names
        for sample, (case, truth, score) in enumerate(zip(cases, table[name], table[f"p_{name}"], strict=True))
    ]
