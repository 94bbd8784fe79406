"""The pictures of a comparison and their contents; `figures` draws them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from pcrl_nnunet.experiments import figures
from pcrl_nnunet.experiments.arms import CONTROL, PRETRAINED
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.layout import Layout
from pcrl_nnunet.experiments.results import curve, runs_in
from pcrl_nnunet.experiments.scores import AurocScores, Curves, DiceScores, Scores, labelled_cases

Panels = dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]


def draw_pictures(layout: Layout, scores: Scores, learned: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """Draw all finished runs, earlier calls included, and yield the paths. A failure does not stop other pictures.

    Args:
        learned: see `networks_that_learned`. Titles name the numbers of labelled cases with which no network learned.
    """
    runs = runs_in(scores.runs.sort_values("labelled", kind="stable"))
    done = [run for run in runs if layout.is_done(run)]
    if not done:
        return
    titles = {
        run.labelled: labelled_cases(run.labelled) + ", nothing surely learned" * (not learned.get(run.labelled))
        for run in runs
    }
    nothing_learned = [str(number) for number in titles if not learned.get(number)]
    for name in ("label_efficiency", "iterations", "segmentations" if isinstance(scores, DiceScores) else "roc"):
        path = layout.file(f"{name}.png")
        try:
            if name == "label_efficiency":
                title = _title_of_label_efficiency(layout, scores.measure, nothing_learned)
                figures.label_efficiency(scores.runs, scores.measure, scores.chance, title, path)
            elif name == "iterations":
                of_patches = f"{scores.measure}{' of patches' * isinstance(scores, DiceScores)}"  # nnU-Net's validation
                title = f"{_name(layout)}\n{of_patches} while training\nthin: a run; bold: mean over labelled subsets"
                figures.score_while_training(_curves(layout, done, titles), of_patches, title, path)
            elif isinstance(scores, DiceScores):
                rows, names = examples(layout, done, scores, learned), _label_names(layout.comparison.plan.dataset_json)
                title = (
                    f"{_name(layout)}\ncases with the largest loss, the median and the largest gain\n"
                    f"slices with the most labelled voxels; Dice of the whole case, points"
                )
                figures.segmentations(rows, names, title, path)
            elif isinstance(scores, AurocScores):
                title = f"{_name(layout)}\nROC on {_scored(layout)}\nthin: a run; bold: mean over labelled subsets"
                figures.roc_of_arms(scores.curves(titles), scores.intervals_of_curves(titles), title, path)
            yield f"Picture: {path}"
        except (OSError, LookupError, RuntimeError, ValueError) as error:
            yield f"No picture {path}: {type(error).__name__}: {error}"


def _name(layout: Layout) -> str:
    """Name the dataset and the configuration."""
    return f"{layout.comparison.dataset}, {layout.comparison.plan.configuration}"


def _scored(layout: Layout) -> str:
    """Return the number of scored cases in words."""
    part = {"val": "validation", "test": "test"}[layout.comparison.scored]
    return f"{len(layout.comparison.scored_cases)} {part} cases"


def _title_of_label_efficiency(layout: Layout, measure: str, nothing_learned: Sequence[str]) -> str:
    """Say what is drawn, and name the numbers of labelled cases with which no network learned."""
    title = (
        f"{_name(layout)}\n{measure} on {_scored(layout)} by number of labelled cases\n"
        f"point: a run on one labelled subset; line: mean over the subsets"
    )
    numbers = ", ".join(nothing_learned)
    return title + f"\nno network surely learned anything with {numbers} labelled cases" * bool(nothing_learned)


def _label_names(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Return the names of label values. If regions share a value, the name has all of them."""
    names: dict[int, str] = {}
    for name, values in dataset_json["labels"].items():
        for value in values if isinstance(values, (list, tuple)) else [values]:
            names[int(value)] = f"{names[int(value)]} + {name}" if int(value) in names else name
    return names


def _curves(layout: Layout, runs: Sequence[Run], titles: Mapping[int, str]) -> Curves:
    """Return iterations and score of each run, by panel and arm."""
    curves: Curves = {}
    for run in runs:
        of_run = curve(layout, run)
        if of_run is not None:
            curves.setdefault(titles[run.labelled], {}).setdefault(run.arm, []).append(of_run)
    return curves


def examples(layout: Layout, runs: Sequence[Run], scores: DiceScores, learned: Mapping[int, Sequence[str]]) -> Panels:
    """Return image and labels (X, Y, Z) of the truth, the control and a pretrained arm, by case.

    There are three cases: the largest loss, the median, and the largest gain in Dice.

    Args:
        runs: finished runs.
        learned: the arms whose networks learned, by number of labelled cases.

    Raises:
        LookupError, OSError: there is no such subset; nnUNet_raw has no images.
    """
    pair, plan = _pair(layout, runs, learned), layout.comparison.plan
    raw = os.path.join(nnUNet_raw.get(), layout.comparison.dataset) if nnUNet_raw.is_set() else ""
    if not os.path.isdir(raw):
        raise FileNotFoundError(f"it needs the images in nnUNet_raw, where there is no {layout.comparison.dataset}")
    by_run = scores.cases.set_index(["method", "labelled", "seed", "case"])["points"].sort_index()
    control, other = (by_run.loc[(run.arm, run.labelled, run.seed)] for run in pair)
    gains = (other - control).dropna().sort_values()
    ending = plan.dataset_json["file_ending"]
    reader = PlansManager(plan.plans).image_reader_writer_class()
    images = get_filenames_of_train_images_and_targets(raw, plan.dataset_json)
    rows = {}
    for case in gains.index[sorted({0, len(gains) // 2, len(gains) - 1})]:
        image = reader.read_images(images[case]["images"][:1])[0][0]
        truth = os.path.join(layout.data_folder, "gt_segmentations", case + ending)
        panels = {"truth": (image, reader.read_seg(truth)[0][0])}
        for run, dice in zip(pair, (control, other), strict=True):
            path = os.path.join(layout.output(run), "validation", case + ending)
            panels[f"{run.arm}\nDice {dice[case]:.1f}"] = (image, reader.read_seg(path)[0][0])
        number = pair[0].labelled
        gain = f"{gains[case]:+.1f} Dice" if learned.get(number) else "nothing surely learned"
        rows[f"{case}\n{labelled_cases(number)}, {gain}"] = panels
    return rows


def _pair(layout: Layout, runs: Sequence[Run], learned: Mapping[int, Sequence[str]]) -> tuple[Run, Run]:
    """Return the control's run and another arm's run with the same labelled cases.

    Choose the smallest number of labelled cases with which a network learned, and the first subset that both have done.
    """

    def rank(run: Run) -> tuple[bool, bool, int, bool]:
        unpretrained = layout.comparison.arms[run.arm].pretrain is None
        return not learned.get(run.labelled), unpretrained, run.labelled, run.arm != PRETRAINED

    pairs = [(Run(CONTROL, run.labelled, run.seed), run) for run in runs if run.arm != CONTROL]
    pairs = [pair for pair in pairs if pair[0] in runs]
    if not pairs:
        raise LookupError("it needs a finished run of scratch and one of another method with the same labelled cases")
    return min(pairs, key=lambda pair: rank(pair[1]))
