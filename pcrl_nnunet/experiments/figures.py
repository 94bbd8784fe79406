"""Pictures of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from pcrl_nnunet.experiments.arms import CONTROL


def _colours(arms: Iterable[str]) -> dict[str, Any]:
    """Return a colour for each arm, all different for up to forty arms; matplotlib's cycle has too few.

    Colours follow the arms' names, the control first, so that all pictures of a comparison agree.
    """
    twenty = colormaps["tab20"]([*range(0, 20, 2), *range(1, 20, 2)])  # dark ones, matplotlib's usual ten, first
    forty = [*map(tuple, twenty), *map(tuple, colormaps["tab20b"](range(20)))]
    return dict(zip(sorted(set(arms), key=lambda name: (name != CONTROL, name)), cycle(forty)))


def _panels(number: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels of a size in inches and one scale; three panels a row fit on a screen."""
    if not number:
        raise LookupError("no finished run has a curve")
    columns = min(3, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for empty in panels[number:]:
        empty.remove()
    return figure, list(panels[:number])


def label_efficiency(runs: pd.DataFrame, measure: str, chance: float, title: str, path: str) -> None:
    """Draw the score against the number of labelled cases: each run is a point, a line joins an arm's means.

    Args:
        runs: columns method, labelled, seed, points.
        measure: name of the score.
        chance: points that a prediction reaches without looking at the image; drawn as a dotted line.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    numbers = sorted(runs["labelled"].unique())
    arms = list(dict.fromkeys(runs["method"]))
    colours = _colours(arms)
    for place, arm in enumerate(arms):
        own = runs[runs["method"] == arm]
        beside = 1 + 0.03 * (place - (len(arms) - 1) / 2)  # so that the points of arms do not hide each other
        axis.plot(own["labelled"] * beside, own["points"], "o", ms=4, alpha=0.6, color=colours[arm])
        means = own.groupby("labelled")["points"].mean()
        axis.plot(means.index * beside, means, "-_", ms=16, color=colours[arm], label=arm)
    axis.axhline(chance, color="grey", linestyle=":", label="without a look at the image")
    axis.set_xscale("log")
    axis.set_xlim(numbers[0] / 1.3, numbers[-1] * 1.3)
    axis.set_xticks(numbers, [str(n) for n in numbers])
    axis.minorticks_off()
    axis.set(xlabel="labelled cases", ylabel=f"{measure}, %", title=title)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")  # inside it would hide points in any corner
    figure.savefig(path, dpi=120)


def score_while_training(
    curves: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]], measure: str, path: str
) -> None:
    """Draw the score against iterations: a panel for each number of labels, a line for each run, arms' means in bold.

    Args:
        curves: iterations and score of each run, both (epochs,), by title and arm.
        measure: name of the score.
    """
    figure, panels = _panels(len(curves), (6, 4.5))
    colours = _colours(arm for by_arm in curves.values() for arm in by_arm)
    for axis, (title, by_arm) in zip(panels, curves.items(), strict=True):
        for arm, runs in by_arm.items():
            colour = colours[arm]  # the same in all panels, even if a panel lacks an arm
            for iterations, score in runs:
                axis.plot(iterations, 100 * score, color=colour, alpha=0.3, lw=0.8)
            epochs = min(len(score) for _, score in runs)
            mean = np.nanmean([score[:epochs] for _, score in runs], axis=0)
            axis.plot(runs[0][0][:epochs], 100 * mean, color=colour, lw=2, label=arm)
        axis.set(title=title, xlabel="iterations of fine-tuning", ylabel=f"{measure} while training, %")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def segmentations(rows: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], path: str) -> None:
    """Draw labels as outlines on images, a row for each case, in the slice with the most labelled voxels.

    Args:
        rows: image and labels, both (X, Y, Z) or (1, X, Y), by the row's title and the panel's title.
    """
    columns = max(len(panels) for panels in rows.values())
    figure = Figure(figsize=(3 * columns, 3.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (title, panels) in zip(grid, rows.items(), strict=True):
        truth = next(iter(panels.values()))[1]
        area = (truth > 0).sum(axis=tuple(range(1, truth.ndim)))
        largest = np.flatnonzero(area == area.max())
        index = largest[len(largest) // 2]  # the middle one of equal slices: the first lies at the structure's edge
        for axis, (name, (image, labels)) in zip(axes, panels.items(), strict=False):
            low, high = np.percentile(image[index], (0.5, 99.5))
            axis.imshow(image[index], cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            for label in np.unique(labels[labels > 0]):
                if (labels[index] == label).any():
                    axis.contour(labels[index] == label, [0.5], colors=f"C{int(label) % 10}", linewidths=1)
            axis.set(title=name, xticks=[], yticks=[])
        axes[0].set_ylabel(title, fontsize=8)
    figure.suptitle("slices with the most labelled voxels; Dice of the whole case", fontsize=9)
    figure.savefig(path, dpi=120)


def roc_of_arms(panels: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]], path: str) -> None:
    """Draw ROC curves: a panel for each number of labels and label, a thin line for each run, arms' means in bold.

    Args:
        panels: truth and score of each run, both (N,), by title and arm; the truth is known and has both classes.
    """
    figure, axes = _panels(len(panels), (5, 5.5))
    colours = _colours(arm for by_arm in panels.values() for arm in by_arm)
    grid = np.linspace(0, 1, 201)
    for axis, (title, by_arm) in zip(axes, panels.items(), strict=True):
        for arm, runs in by_arm.items():
            colour, means = colours[arm], []
            for truth, score in runs:
                false, true, _ = roc_curve(truth, score)
                axis.plot(false, true, color=colour, alpha=0.3, lw=0.8)
                means.append(np.interp(grid, false, true))
            axis.plot(grid, np.mean(means, 0), color=colour, lw=2, label=arm)
        axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
        axis.set(title=title, xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)
