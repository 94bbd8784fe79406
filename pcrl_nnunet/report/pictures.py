"""Pictures of a pretraining: its curves, its views, and what it restores."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from typing import IO, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from pcrl_nnunet.views.boxes import Box, ViewBoxes
from pcrl_nnunet.views.sub_crop import Volume

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
