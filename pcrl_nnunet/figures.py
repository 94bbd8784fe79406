"""Every picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO, StringIO
from itertools import cycle
from typing import IO, Any

import numpy as np
import pandas as pd
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_curve

from pcrl_nnunet.boxes import Box, ViewBoxes
from pcrl_nnunet.scores import CONTROL
from pcrl_nnunet.transforms.sub_crop import Volume

_PANELS = (  # title, lower limit, named curves: (key of the log, label)
    ("losses", None, (("restoration", "restoration"), ("comparison_global", "global"), ("comparison_local", "local"))),
    ("restoration error / variance of the images (1: nothing restored)", 0, (("restoration_ratio", "mean"),)),
    ("cosine of matched less shuffled samples (0: not told apart)", None, (("matched_minus_shuffled", "mean"),)),
    ("features: spread / even spread, effective rank / 10", 0, (("sd_ratio", "spread"), ("effective_rank", "rank"))),
    ("learning rate", 0, (("lrs", "rate"),)),
)
_PROBE_TITLE = "labels told apart by the encoder's features: AUROC of a linear probe (0.5: chance)"
_PROBED = {"probe": "all stages", "probe_start": "all stages, before the first step"}


def pretraining_progress(log: Mapping[str, Sequence[float]], path: str) -> None:
    """The pretraining's own curves, an epoch a point, as a PNG."""
    probed = [(key, _PROBED.get(key, key.removeprefix("probe_").replace("_", " "))) for key in log if "probe" in key]
    panels = [*_PANELS, *([(_PROBE_TITLE, None, probed)] if probed else [])]
    figure = Figure(figsize=(11, 3 * len(panels)), layout="constrained")
    for axis, (title, lower, curves) in zip(figure.subplots(len(panels), 1, sharex=True), panels, strict=True):
        for key, label in curves:
            values = {i: v / 10 if key == "effective_rank" else v for i, v in enumerate(log[key]) if not np.isnan(v)}
            axis.plot(values.keys(), values.values(), marker="." if len(values) < 50 else None, label=label)
        axis.set_title(title)
        axis.set_ylim(bottom=lower)
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
        axis.legend(loc="best")
    axis.set_xlabel("epoch")
    figure.savefig(path, dpi=100)


_PAIR_COLOURS = ("tab:cyan", "tab:orange")
_LOCAL_COLOUR = "tab:green"


_Grey = dict[str, Any]  # how `imshow` shows a channel


def views_of_a_case(
    case: str,
    volume: Volume,
    sample: Mapping[str, Any],
    before: Sequence[np.ndarray],
    spacing: Sequence[float],
    channels: Sequence[str],
    path: str | IO[bytes],
) -> None:
    """Where the views of one sample lie, and each view before and after pixel augmentation, as a PNG.

    Above: slices through the middle of the pair's bounding box, with all boxes projected onto them, in mm. Below: the
    middle slices of the views. Both have a row for each channel, in a grey scale of its own.

    Args:
        case: name, for the title.
        volume: (C, *spatial); only the slices shown are read.
        sample: ``boxes`` in voxels of the volume, with ``slice``, the volume's first spatial index for 2D views; and
            the views after augmentation, ``input`` (2, C, *G) and ``local`` (N, C, *L).
        before: the views before it, the pair first.
        spacing: mm, an axis of the views each.
        channels: names of the C channels, which are shown where there are several.
        path: where to, a file's or an open one.
    """
    boxes, after = sample["boxes"], [*sample["input"], *sample.get("local", ())]
    crops = [*boxes.pair, *boxes.local]
    planes = [(0, 1)] if len(spacing) == 2 else [(1, 2), (0, 2), (0, 1)]
    slices = [_slices(volume, sample["slice"], boxes.bounds, plane) for plane in planes]  # a plane: (C, rows, columns)
    greys = [_grey(np.concatenate([of_plane[c].ravel() for of_plane in slices])) for c in range(len(channels))]
    names = [f"{name}\n" for name in channels] if len(channels) > 1 else [""]
    heights = (4.7 if len(channels) == 1 else 3.6 * len(channels)), 1.3 + 1.5 * 2 * len(channels)
    figure = Figure(figsize=(2.1 * len(crops), sum(heights)), layout="constrained")
    where = "".join(f", slice {index} of {volume.shape[1]}" for index in sample["slice"])
    title = f"{case}{where}: image {_x(volume.shape[1:])} voxels, {_x(spacing)} mm a voxel"
    figure.suptitle(title, parse_math=False)  # a case may be called $x$
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    upper, lower = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    axes = upper.subplots(len(channels), len(planes), squeeze=False)
    for row, name, grey in zip(range(len(channels)), names, greys, strict=True):
        for axis, plane, of_plane in zip(axes[row], planes, slices, strict=True):
            _boxes_on_a_slice(axis, of_plane[row], boxes, plane, spacing, grey)
        axes[row, 0].set_ylabel(f"{name}{axes[row, 0].get_ylabel()}", parse_math=False)
    handles = {str(artist.get_label()): artist for artist in upper.axes[0].patches}
    upper.legend(list(handles.values()), list(handles), loc="outside right upper", facecolor="lightgrey")
    rows = lower.subplots(2 * len(channels), len(crops), squeeze=False)
    for number, (box, plain, augmented) in enumerate(zip(crops, before, after, strict=True)):
        kind = f"global {number + 1}" if number < 2 else f"local {number - 1}"
        mm = [n * s for n, s in zip(box.shape, spacing, strict=True)]
        title = f"{kind}\n{_x(box.shape)} voxels\n{_x(mm)} mm\nto {_x(plain.shape[1:])} voxels"
        rows[0, number].set_title(title, fontsize=10)
        aspect = (mm[-2] / plain.shape[-2]) / (mm[-1] / plain.shape[-1])  # as in the body: a view's voxels are no cubes
        for channel, grey in enumerate(greys):
            for axis, view in zip(rows[2 * channel : 2 * channel + 2, number], (plain, augmented), strict=True):
                axis.imshow(_middle(view, channel), aspect=aspect, **grey)
                axis.set(xticks=[], yticks=[])
    for channel, name in enumerate(names):
        rows[2 * channel, 0].set_ylabel(f"{name}before", parse_math=False)
        rows[2 * channel + 1, 0].set_ylabel(f"{name}after pixel\naugmentation", parse_math=False)
    figure.savefig(path, dpi=90)


def _grey(values: np.ndarray) -> _Grey:
    """Return the grey scale that shows nearly all of the values."""
    low, high = np.percentile(values, (0.5, 99.5))
    return {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6), "interpolation": "nearest"}


def _boxes_on_a_slice(
    axis: Axes, image: np.ndarray, boxes: ViewBoxes, plane: tuple[int, int], spacing: Sequence[float], grey: _Grey
) -> None:
    """Show a slice in mm, with all boxes projected onto it."""
    row, column = plane
    extent = (0, image.shape[1] * spacing[column], image.shape[0] * spacing[row], 0)
    axis.imshow(image, extent=extent, **grey)
    axis.set(xlabel=f"axis {column}, mm", ylabel=f"axis {row}, mm")
    _draw(axis, boxes.bounds, plane, spacing, "white", "box around them", 1)
    for box, colour, label in zip(boxes.pair, _PAIR_COLOURS, ("global 1", "global 2"), strict=True):
        _draw(axis, box, plane, spacing, colour, label, 2)
    for box in boxes.local:
        _draw(axis, box, plane, spacing, _LOCAL_COLOUR, "local", 1)


def _middle(image: np.ndarray, channel: int = 0) -> np.ndarray:
    """The middle slice of a channel of (C, *size)."""
    plane: np.ndarray = image[channel, image.shape[1] // 2] if image.ndim == 4 else image[channel]
    return plane


def _slices(volume: Volume, first: tuple[int, ...], bounds: Box, plane: tuple[int, int]) -> np.ndarray:
    """The slice through the middle of `bounds` that `plane` spans, of every channel: (C, rows, columns)."""
    middle = [(low + high) // 2 for low, high in zip(bounds.lower, bounds.upper, strict=True)]
    through = [slice(None) if axis in plane else slice(m, m + 1) for axis, m in enumerate(middle)]
    index = (slice(None), *(slice(i, i + 1) for i in first), *through)
    image = volume[index]
    kept = [n for n, s in zip(image.shape[-len(through) :], through, strict=True) if s == slice(None)]
    return image.reshape([len(image), *kept])


def _draw(
    axis: Axes, box: Box, plane: tuple[int, int], spacing: Sequence[float], colour: str, label: str, width: float
) -> None:
    row, column = (box.lower[i] * spacing[i] for i in plane)
    rows, columns = (box.shape[i] * spacing[i] for i in plane)
    axis.add_patch(Rectangle((column, row), columns, rows, fill=False, ec=colour, lw=width, label=label))


def _x(numbers: Sequence[float]) -> str:
    return "x".join(f"{number:.3g}" for number in numbers)


# -------------------------------------------------------------------------------------------------------------- report

_INK = "#010203"  # becomes the colour of the text around the chart, light or dark
_ON_BOTH = ("#4c8dd6", "#e0803a", "#3fa66b", "#c85f9b", "#8d76d6", "#b3962b", "#3ea9bb", "#d65f5f")  # visible on either


def slice_png(image: np.ndarray, channel: int, low: float, high: float) -> bytes:
    """The middle slice of an image's channel, a pixel a voxel, as a PNG.

    Args:
        image: (C, *size).
        channel: its number.
        low, high: what is black, and what white.
    """
    file = BytesIO()
    imsave(file, _middle(image, channel), cmap="gray", vmin=low, vmax=max(high, low + 1e-6), format="png")
    return file.getvalue()


def chart_svg(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], lower: float | None = None, line: float | None = None
) -> str:
    """Curves over epochs as an <svg> element for a page, in the page's colours.

    Args:
        curves: label -> epochs and values, both (N,); with a label that is empty there is no legend.
        lower: end of the axis.
        line: a value that is drawn dotted.
    """
    style: Any = {"svg.fonttype": "none", "font.size": 9, "grid.color": _INK, "text.color": _INK}
    style |= {key: _INK for key in ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    with rc_context(style):
        figure = Figure(figsize=(5.2, 2.6), layout="constrained")
        axis = figure.subplots()
        for number, (label, (epochs, values)) in enumerate(curves.items()):
            colour, marker = _ON_BOTH[number % len(_ON_BOTH)], "o" if len(values) < 50 else None
            axis.plot(epochs, values, color=colour, marker=marker, markersize=3, lw=1.6, label=label)
        if line is not None:
            axis.axhline(line, color=_INK, ls=":", lw=1)
        axis.set_ylim(bottom=lower)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.15)
        if "" not in curves:
            above: dict[str, Any] = {"bbox_to_anchor": (0, 1), "borderaxespad": 0.2, "frameon": False}
            axis.legend(loc="lower left", ncols=4, handlelength=1.2, columnspacing=1.2, **above)
        file = StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # whose names would be links
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # the next chart has the same ones
    return text.replace(_INK, "currentColor")


# ---------------------------------------------------------------------------------------------------------- comparison


def _colours(methods: Iterable[str]) -> dict[str, Any]:
    """One each, all different up to twenty: the built-in methods are more than matplotlib's cycle has colours.

    By the methods' names, the control first, so that all pictures of a comparison agree.
    """
    twenty = colormaps["tab20"]([*range(0, 20, 2), *range(1, 20, 2)])  # dark ones, matplotlib's usual ten, first
    return dict(zip(sorted(set(methods), key=lambda name: (name != CONTROL, name)), cycle(map(tuple, twenty))))


def _panels(number: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """So many panels of a size in inches, of one scale, three a row, so that they can be read on a screen."""
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
    """Draw the score against the number of labelled cases: a point a run, a line through a method's means.

    Args:
        runs: columns method, labelled, seed, points.
        measure: name of the score.
        chance: points that a prediction reaches without a look at the image; drawn dotted.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    numbers = sorted(runs["labelled"].unique())
    methods = list(dict.fromkeys(runs["method"]))
    colours = _colours(methods)
    for place, method in enumerate(methods):
        own = runs[runs["method"] == method]
        beside = 1 + 0.03 * (place - (len(methods) - 1) / 2)  # so that the points of methods do not hide each other
        axis.plot(own["labelled"] * beside, own["points"], "o", ms=4, alpha=0.6, color=colours[method])
        means = own.groupby("labelled")["points"].mean()
        axis.plot(means.index * beside, means, "-_", ms=16, color=colours[method], label=method)
    axis.axhline(chance, color="grey", linestyle=":", label="without a look at the image")
    axis.set_xscale("log")
    axis.set_xlim(numbers[0] / 1.3, numbers[-1] * 1.3)
    axis.set_xticks(numbers, [str(n) for n in numbers])
    axis.minorticks_off()
    axis.set(xlabel="labelled cases", ylabel=f"{measure}, %", title=title)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper")  # within, it would lie on points of whichever corner
    figure.savefig(path, dpi=120)


def score_while_training(
    curves: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]], measure: str, path: str
) -> None:
    """Score against fine-tuning iterations, a panel a number of labels, a line a run; a method's mean is bold.

    Args:
        curves: by number of labels and method, of each run: iterations and score, both (epochs,).
        measure: name of the score.
    """
    figure, panels = _panels(len(curves), (6, 4.5))
    colours = _colours(method for by_method in curves.values() for method in by_method)
    for axis, (title, by_method) in zip(panels, curves.items(), strict=True):
        for method, runs in by_method.items():
            colour = colours[method]  # the same in all panels, also where one lacks a method
            for iterations, score in runs:
                axis.plot(iterations, 100 * score, color=colour, alpha=0.3, lw=0.8)
            epochs = min(len(score) for _, score in runs)
            mean = np.nanmean([score[:epochs] for _, score in runs], axis=0)
            axis.plot(runs[0][0][:epochs], 100 * mean, color=colour, lw=2, label=method)
        axis.set(title=title, xlabel="iterations of fine-tuning", ylabel=f"{measure} while training, %")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def segmentations(rows: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], path: str) -> None:
    """Example slices, a row a case, side by side: labels as outlines on the image, through the largest slice.

    Args:
        rows: by title, and then by the panel's title: image and labels, both (X, Y, Z) or (1, X, Y).
    """
    columns = max(len(panels) for panels in rows.values())
    figure = Figure(figsize=(3 * columns, 3.2 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (title, panels) in zip(grid, rows.items(), strict=True):
        truth = next(iter(panels.values()))[1]
        area = (truth > 0).sum(axis=tuple(range(1, truth.ndim)))
        largest = np.flatnonzero(area == area.max())
        index = largest[len(largest) // 2]  # not the first slice, at the edge, of a structure that is alike in all
        for axis, (name, (image, labels)) in zip(axes, panels.items(), strict=False):
            low, high = np.percentile(image[index], (0.5, 99.5))
            axis.imshow(image[index], cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
            for label in np.unique(labels[labels > 0]):
                if (labels[index] == label).any():
                    axis.contour(labels[index] == label, [0.5], colors=f"C{int(label) % 10}", linewidths=1)
            axis.set(title=name, xticks=[], yticks=[])
        axes[0].set_ylabel(title, fontsize=8)
    figure.suptitle("of each case the slice with the most truth; Dice of the whole case", fontsize=9)
    figure.savefig(path, dpi=120)


def classification_progress(log: Mapping[str, Sequence[float]], path: str) -> None:
    """Losses, AUROC and rate of a classification, an epoch a point, as a PNG."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    panels = (
        ("loss", (("train_losses", "training"), ("val_losses", "validation"))),
        (
            "AUROC on batches of validation samples (0.5: chance)",
            (("mean_fg_dice", "epoch"), ("ema_fg_dice", "moving mean")),
        ),
        ("learning rate", (("lrs", "rate"),)),
    )
    for axis, (title, curves) in zip(figure.subplots(len(panels), 1), panels, strict=True):
        for key, label in curves:
            axis.plot(range(len(log[key])), log[key], marker="." if len(log[key]) < 50 else None, label=label)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(loc="best")
    axis.set_xlabel("epoch")
    figure.savefig(path, dpi=100)


def roc(
    truth: np.ndarray, score: np.ndarray, names: Sequence[str], found: Mapping[str, Mapping[str, float]], path: str
) -> None:
    """The ROC curve of every output, as a PNG.

    Args:
        truth: (N, L) 1, 0 or NaN.
        score: (N, L).
        found: of every name, auroc, low and high.
    """
    figure = Figure(figsize=(6, 6), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(names):
        known = ~np.isnan(truth[:, i])
        if len(np.unique(truth[known, i])) == 2:
            false, true, _ = roc_curve(truth[known, i], score[known, i])
            auroc, low, high = (found[name][key] for key in ("auroc", "low", "high"))
            interval = "" if np.isnan(low) else f" ({low:.3f} to {high:.3f})"
            axis.plot(false, true, label=f"{name}: {auroc:.3f}{interval}")
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
    axis.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axis.legend(loc="lower right", title="AUROC (95 %)")
    figure.savefig(path, dpi=100)


def activation(image: np.ndarray, maps: np.ndarray, titles: Sequence[str], title: str, path: str) -> None:
    """An input and what of it speaks for every output, in the middle slice, first channel, as a PNG.

    Args:
        image: (C, *size).
        maps: (L, *size).
        titles: of the maps.
    """
    picture, maps = _middle(image), maps[:, image.shape[1] // 2] if image.ndim == 4 else maps
    shown = min(len(maps), 6)
    figure = Figure(figsize=(3 * (shown + 1), 3.7), layout="constrained")
    axes = figure.subplots(1, shown + 1)
    figure.suptitle(title)
    limit = np.percentile(np.abs(maps), 99.5) or 1.0  # a single voxel, such as a maximum, would pale the rest
    for i, axis in enumerate(axes):
        axis.imshow(picture, cmap="gray")
        axis.set_axis_off()
        axis.set_title("input" if i == 0 else titles[i - 1])
        if i:
            axis.imshow(maps[i - 1], cmap="coolwarm", alpha=0.5, vmin=-limit, vmax=limit)
    figure.savefig(path, dpi=100)


def roc_of_methods(panels: Mapping[str, Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]]], path: str) -> None:
    """ROC curves, a panel a number of labels and label, a thin line a run; a method's mean is bold.

    Args:
        panels: by title and method, of each run: truth and score, both (N,), known ones of both classes.
    """
    figure, axes = _panels(len(panels), (5, 5.5))
    colours = _colours(method for by_method in panels.values() for method in by_method)
    grid = np.linspace(0, 1, 201)
    for axis, (title, by_method) in zip(axes, panels.items(), strict=True):
        for method, runs in by_method.items():
            colour, means = colours[method], []
            for truth, score in runs:
                false, true, _ = roc_curve(truth, score)
                axis.plot(false, true, color=colour, alpha=0.3, lw=0.8)
                means.append(np.interp(grid, false, true))
            axis.plot(grid, np.mean(means, 0), color=colour, lw=2, label=method)
        axis.plot([0, 1], [0, 1], color="grey", linestyle=":")
        axis.set(title=title, xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)
