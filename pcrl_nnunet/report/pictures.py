"""Pictures of a pretraining: curves, views and restorations."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import BytesIO, StringIO
from typing import IO, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import imsave
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from pcrl_nnunet.loading.samples import ShownSample, ShownView
from pcrl_nnunet.views.boxes import Box
from pcrl_nnunet.views.sub_crop import Volume

_COLOURS = ("tab:cyan", "tab:orange", "tab:green", "tab:pink", "tab:olive")  # for the kinds of views, in order

_Grey = dict[str, Any]  # arguments of `imshow` for a channel


def views_of_a_case(
    case: str,
    volume: Volume,
    shown: ShownSample,
    spacing: Sequence[float],
    channels: Sequence[str],
    path: str | IO[bytes],
) -> None:
    """Draw the positions and contents of one sample's views, as a PNG.

    Above: slices through the middle of the box around the views, with all boxes projected onto them, in mm. Below: the
    middle slices of the views. Both have a row for each channel, with its own grey scale.

    Args:
        case: name of the case, for the title.
        volume: (C, *spatial); only the shown slices are read.
        shown: the sample; boxes are in voxels of the volume.
        spacing: mm for each axis of the views.
        channels: names of the C channels, shown if there are several.
        path: path of the PNG, or an open file.
    """
    views, dim = shown.views, len(spacing)
    rows = list(dict.fromkeys(name for view in views for name in view.images))
    plane_shape = volume.shape[1 + len(shown.slice) :]
    bounds = shown.bounds or Box.of_size([0] * dim, plane_shape[-dim:])
    first = shown.slice if len(plane_shape) == dim else (volume.shape[1] // 2,)
    planes = [(0, 1)] if dim == 2 else [(1, 2), (0, 2), (0, 1)]
    slices = [_slices(volume, first, bounds, plane) for plane in planes]  # a plane: (C, rows, columns)
    greys = [_grey(np.concatenate([of_plane[c].ravel() for of_plane in slices])) for c in range(len(channels))]
    names = [f"{name}\n" for name in channels] if len(channels) > 1 else [""]
    heights = (4.7 if len(channels) == 1 else 3.6 * len(channels)), 1.3 + 1.5 * len(rows) * len(channels)
    figure = Figure(figsize=(max(8.0, 2.1 * len(views)), sum(heights)), layout="constrained")
    # for views without a position, the image's middle slice is shown
    where = "".join(f", {'' if shown.slice else 'middle '}slice {index} of {volume.shape[1]}" for index in first)
    title = f"{case}{where}: image {_x(volume.shape[1:])} voxels, {_x(spacing)} mm a voxel"
    figure.suptitle(title, parse_math=False)  # a case may be called $x$
    grid = figure.add_gridspec(2, 1, height_ratios=heights)
    upper, lower = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    _draw_boxes(upper, slices, planes, shown, spacing, names, greys)
    if not views:
        figure.savefig(path, dpi=90)
        return
    axes = lower.subplots(len(rows) * len(channels), len(views), squeeze=False)
    for column, view in enumerate(views):
        _draw_view(list(axes[:, column]), view, rows, spacing, greys)
    for channel, name in enumerate(names):
        for row, label in enumerate(rows):
            axes[len(rows) * channel + row, 0].set_ylabel(f"{name}{label}", parse_math=False)
    figure.savefig(path, dpi=90)


def _draw_boxes(
    figure: SubFigure,
    slices: Sequence[np.ndarray],
    planes: Sequence[tuple[int, int]],
    shown: ShownSample,
    spacing: Sequence[float],
    names: Sequence[str],
    greys: Sequence[_Grey],
) -> None:
    """Draw the slices of every channel, with all boxes projected onto them."""
    axes = figure.subplots(len(greys), len(planes), squeeze=False)
    for row, name, grey in zip(range(len(greys)), names, greys, strict=True):
        for axis, plane, of_plane in zip(axes[row], planes, slices, strict=True):
            _boxes_on_a_slice(axis, of_plane[row], shown, plane, spacing, grey)
        axes[row, 0].set_ylabel(f"{name}{axes[row, 0].get_ylabel()}", parse_math=False)
    handles = {str(artist.get_label()): artist for artist in figure.axes[0].patches}
    if handles:
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", facecolor="lightgrey")


def _draw_view(
    axes: Sequence[Axes], view: ShownView, rows: Sequence[str], spacing: Sequence[float], greys: Sequence[_Grey]
) -> None:
    """Draw a view's images below each other, with rows for each channel."""
    size = next(iter(view.images.values())).shape[1:]
    lines, aspect = [view.title], spacing[-2] / spacing[-1]
    if view.box is not None:
        mm = [n * s for n, s in zip(view.box.shape, spacing, strict=True)]
        lines += [f"{_x(view.box.shape)} voxels", f"{_x(mm)} mm"]
        aspect = (mm[-2] / size[-2]) / (mm[-1] / size[-1])  # as in the body: a view's voxels are not cubes
    axes[0].set_title("\n".join([*lines, f"to {_x(size)} voxels"]), fontsize=10)
    for channel, grey in enumerate(greys):
        for row, name in enumerate(rows):
            axis = axes[len(rows) * channel + row]
            if name in view.images:
                axis.imshow(_middle(view.images[name], channel), aspect=aspect, **grey)
            axis.set(xticks=[], yticks=[])


def _grey(values: np.ndarray) -> _Grey:
    """Return the grey scale that covers nearly all values."""
    low, high = np.percentile(values, (0.5, 99.5))
    return {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6), "interpolation": "nearest"}


def _boxes_on_a_slice(
    axis: Axes, image: np.ndarray, shown: ShownSample, plane: tuple[int, int], spacing: Sequence[float], grey: _Grey
) -> None:
    """Draw a slice in mm, with all boxes projected onto it."""
    row, column = plane
    extent = (0, image.shape[1] * spacing[column], image.shape[0] * spacing[row], 0)
    axis.imshow(image, extent=extent, **grey)
    axis.set(xlabel=f"axis {column}, mm", ylabel=f"axis {row}, mm")
    kinds = list(dict.fromkeys(view.kind for view in shown.views))
    if shown.bounds is not None:
        _draw(axis, shown.bounds, plane, spacing, "white", "box around them", 1)
    for view in shown.views:
        if view.box is not None:
            several = sum(other.kind == view.kind for other in shown.views) > 1
            colour = _COLOURS[kinds.index(view.kind) % len(_COLOURS)]
            _draw(axis, view.box, plane, spacing, colour, view.kind, 1 if several else 2)


def _middle(image: np.ndarray, channel: int = 0) -> np.ndarray:
    """Return the middle slice of a channel of (C, *size)."""
    return image[channel, image.shape[1] // 2] if image.ndim == 4 else image[channel]


def _slices(volume: Volume, first: tuple[int, ...], bounds: Box, plane: tuple[int, int]) -> np.ndarray:
    """Return the slice (C, rows, columns) through the middle of `bounds` in `plane`, for every channel."""
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
    """Return the middle slice of an image's channel as a PNG, with a pixel for each voxel.

    Args:
        image: (C, *size).
        channel: number of the channel.
        low, high: values shown black and white.
    """
    file = BytesIO()
    imsave(file, _middle(image, channel), cmap="gray", vmin=low, vmax=max(high, low + 1e-6), format="png")
    return file.getvalue()


def chart_svg(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], lower: float | None = None, line: float | None = None
) -> str:
    """Return curves over epochs as an <svg> element for a page, in the page's colours.

    Args:
        curves: label -> epochs and values, both (N,); an empty label gives no legend.
        lower: lower end of the axis.
        line: value of a dotted line.
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
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # their names would become links
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])  # ids would repeat in the next chart
    return text.replace(_INK, "currentColor")
