"""Pictures of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.metrics import roc_curve

from pcrl_nnunet.experiments.arms import CONTROL
from pcrl_nnunet.figure_style import COLUMNS, DPI, WIDTH, grey_scale, heading, own_style


def _colours(arms: Iterable[str]) -> dict[str, Any]:
    """Return a colour for each arm, all different for up to forty arms; matplotlib's cycle has too few.

    Colours follow the arms' names, the control first, so that all pictures of a comparison agree.
    """
    twenty = colormaps["tab20"]([*range(0, 20, 2), *range(1, 20, 2)])  # dark ones, matplotlib's usual ten, first
    forty = [*map(tuple, twenty), *map(tuple, colormaps["tab20b"](range(20)))]
    return dict(zip(sorted(set(arms), key=lambda name: (name != CONTROL, name)), cycle(forty)))


def _panels(number: int, height: float, title: str) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels of a height in inches and one vertical scale, two panels a row."""
    if not number:
        raise LookupError("no finished run has a curve")
    columns = min(COLUMNS, number)
    rows = -(-number // columns)
    figure = Figure(figsize=(WIDTH, 0.8 + height * rows), layout="constrained")
    heading(figure, title)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for empty in panels[number:]:
        empty.remove()
    return figure, list(panels[:number])


def _legend_below(figure: Figure, axes: Sequence[Axes]) -> None:
    """Draw one legend of all panels, below them: inside it would hide points in any corner."""
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    longest = max(map(len, handles))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=max(1, min(3, 66 // (longest + 6)))
    )


@own_style()
def label_efficiency(runs: pd.DataFrame, measure: str, chance: float, title: str, path: str) -> None:
    """Draw the score against the number of labelled cases: each run is a point, a line joins an arm's means.

    Args:
        runs: columns method, labelled, seed, points.
        measure: name of the score.
        chance: points that a prediction reaches without looking at the image; drawn as a dotted line. If the line lay
            far below the runs, they would lie close together: then only the legend states these points.
    """
    arms = list(dict.fromkeys(runs["method"]))
    figure = Figure(figsize=(WIDTH, 5.2 + 0.1 * len(arms)), layout="constrained")
    heading(figure, title)
    axis = figure.subplots()
    numbers = sorted(runs["labelled"].unique())
    colours = _colours(arms)
    for place, arm in enumerate(arms):
        own = runs[runs["method"] == arm]
        beside = 1 + 0.03 * (place - (len(arms) - 1) / 2)  # the points of two arms do not hide each other
        axis.plot(own["labelled"] * beside, own["points"], "o", ms=4, alpha=0.6, color=colours[arm])
        means = own.groupby("labelled")["points"].mean()
        axis.plot(means.index * beside, means, "-_", ms=16, color=colours[arm], label=arm)
    lowest, highest = runs["points"].min(), runs["points"].max()
    dotted: dict[str, Any] = {"color": "grey", "linestyle": ":"}
    if chance >= lowest - max(highest - lowest, 10):
        axis.axhline(chance, **dotted, label="without a look at the image")
    else:
        axis.plot([], [], **dotted, label=f"without a look at the image: {chance:.0f}, below the axis")
    axis.set_xscale("log")
    axis.set_xlim(numbers[0] / 1.3, numbers[-1] * 1.3)
    axis.set_xticks(numbers, [str(n) for n in numbers])
    axis.minorticks_off()
    axis.set(xlabel="labelled cases", ylabel=f"{measure}, points")
    axis.grid()
    _legend_below(figure, [axis])
    figure.savefig(path, dpi=DPI)


@own_style()
def score_while_training(
    curves: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]], measure: str, title: str, path: str
) -> None:
    """Draw the score against iterations: a panel for each number of labelled cases, a line for each run.

    Bold lines are the arms' means.

    Args:
        curves: iterations and score of each run, both (epochs,), by panel and arm.
        measure: name of the score.
    """
    figure, panels = _panels(len(curves), 3.4, title)
    colours = _colours(arm for by_arm in curves.values() for arm in by_arm)
    for axis, (name, by_arm) in zip(panels, curves.items(), strict=True):
        for arm, runs in by_arm.items():
            colour = colours[arm]  # the same in all panels, even if a panel lacks an arm
            for iterations, score in runs:
                axis.plot(iterations, 100 * score, color=colour, alpha=0.3, lw=0.8)
            epochs = min(len(score) for _, score in runs)
            mean = np.nanmean([score[:epochs] for _, score in runs], axis=0)
            axis.plot(runs[0][0][:epochs], 100 * mean, color=colour, lw=2, label=arm)
        axis.set(xlabel="iterations of fine-tuning")
        axis.set_title(fill(name, 36), loc="left")
        axis.grid()
        place = axis.get_subplotspec()
        if place is not None and place.is_first_col():
            axis.set_ylabel(f"{measure}, points")
    _legend_below(figure, panels)
    figure.savefig(path, dpi=DPI)


@own_style()
def segmentations(
    rows: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], names: Mapping[int, str], title: str, path: str
) -> None:
    """Draw labels as outlines on images, a row for each case, in the slice with the most labelled voxels.

    A panel says if a prediction has no label, in this slice or in the whole image.

    Args:
        rows: image and labels, both (X, Y, Z) or (1, X, Y), by the row's title and the panel's title.
        names: names of the labels by their value.
    """
    columns = max(len(panels) for panels in rows.values())
    figure = Figure(figsize=(WIDTH, 1.2 + 2.5 * len(rows)), layout="constrained")
    heading(figure, title)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    shown: set[int] = set()
    for axes, (row, panels) in zip(grid, rows.items(), strict=True):
        truth = next(iter(panels.values()))[1]
        area = (truth > 0).sum(axis=tuple(range(1, truth.ndim)))
        largest = np.flatnonzero(area == area.max())
        index = largest[len(largest) // 2]  # the middle one of equal slices: the first lies at the structure's edge
        for axis, (name, (image, labels)) in zip(axes, panels.items(), strict=False):
            axis.imshow(image[index], **grey_scale(image[index]))
            present = [int(label) for label in np.unique(labels[index]) if label > 0]
            for label in present:
                axis.contour(labels[index] == label, [0.5], colors=_colour_of_label(label), linewidths=1.2)
            shown |= set(present)
            missing = "" if present else "\nempty in this slice" if (labels > 0).any() else "\nempty"
            axis.set_title(f"{name}{missing}")
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(row, fontsize=9, parse_math=False)
    lines = [Line2D([], [], color=_colour_of_label(label)) for label in sorted(shown)]
    legend = [names.get(label, f"label {label}") for label in sorted(shown)]
    figure.legend(lines, legend, loc="outside lower center", ncols=max(1, min(4, len(lines))))
    figure.savefig(path, dpi=DPI)


def _colour_of_label(label: int) -> str:
    return f"C{label % 10}"


@own_style()
def roc_of_arms(
    panels: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]],
    found: Mapping[str, Mapping[str, Mapping[str, float]]],
    title: str,
    path: str,
) -> None:
    """Draw ROC curves: a panel for each label and number of labelled cases, a thin line for each run.

    Bold lines are the arms' means.

    Args:
        panels: truth and score of each run, both (N,), by panel and arm; the truth is known and has both classes.
        found: points, low and high in points, by panel and arm, for the legend.
    """
    most = max((len(by_arm) for by_arm in panels.values()), default=0)
    figure, axes = _panels(len(panels), 3.9 + 0.17 * most, title)
    colours = _colours(arm for by_arm in panels.values() for arm in by_arm)
    grid = np.linspace(0, 1, 201)
    for axis, (name, by_arm) in zip(axes, panels.items(), strict=True):
        for arm, runs in by_arm.items():
            colour, means = colours[arm], []
            for truth, score in runs:
                false, true, _ = roc_curve(truth, score)
                axis.plot(false, true, color=colour, alpha=0.3, lw=0.8)
                means.append(np.interp(grid, false, true))
            axis.plot(grid, np.mean(means, 0), color=colour, lw=2, label=_said_of_arm(arm, found[name][arm]))
        axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
        truth = next(iter(by_arm.values()))[0][0]  # all runs have the same samples
        axis.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        axis.set_title(f"{fill(name, 36)}\nn = {len(truth)}, {int(truth.sum())} of them positive", loc="left")
        legend = "AUROC, points (95 % interval)"
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, title=legend)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")  # the constrained layout may cut the lowest legend


def _said_of_arm(arm: str, found: Mapping[str, float]) -> str:
    interval = "no interval" if np.isnan(found["low"]) else f"{found['low']:.1f} to {found['high']:.1f}"
    return f"{arm}: {found['points']:.1f} ({interval})"
