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
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from pcrl_nnunet.figure_style import COLUMNS, DPI, WIDTH, grey_scale, heading, own_style, set_lower
from pcrl_nnunet.loading.samples import ShownSample, ShownView
from pcrl_nnunet.views.boxes import Box
from pcrl_nnunet.views.sub_crop import Volume

_COLOURS = ("tab:cyan", "tab:orange", "tab:green", "tab:pink", "tab:olive")  # for the kinds of views, in order
_VIEWS_A_ROW = 4

_Grey = dict[str, Any]  # arguments of `imshow` for a channel


@own_style()
def views_of_a_case(
    case: str,
    volume: Volume,
    shown: ShownSample,
    spacing: Sequence[float],
    unit: str,
    channels: Sequence[str],
    path: str | IO[bytes],
) -> None:
    """Draw the positions and contents of one sample's views, as a PNG.

    Above: slices through the middle of the box around the views, with all boxes projected onto them. Below: the middle
    slices of the views, four views beside each other. Each channel has its own rows and its own grey scale.

    Args:
        case: name of the case with its dataset's, for the title.
        volume: (C, *spatial); only the shown slices are read.
        shown: the sample; boxes are in voxels of the volume.
        spacing: size of a voxel along each axis of the views, in `unit`.
        unit: see `plans.unit_of`; with "pixels" the picture has no mm.
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
    greys = [grey_scale(np.concatenate([of_plane[c].ravel() for of_plane in slices])) for c in range(len(channels))]
    names = [f"{name}\n" for name in channels] if len(channels) > 1 else [""]
    groups = [views[i : i + _VIEWS_A_ROW] for i in range(0, len(views), _VIEWS_A_ROW)]
    upper_rows = len(channels) * -(-len(planes) // COLUMNS)
    heights = [4.4 if upper_rows == 1 else 2.8 * upper_rows, *[0.9 + 1.35 * len(rows) * len(channels)] * len(groups)]
    figure = Figure(figsize=(WIDTH, 0.5 + sum(heights)), layout="constrained")
    heading(figure, _title(case, volume.shape[1:], first, bool(shown.slice), spacing, unit))
    grid = figure.add_gridspec(1 + len(groups), 1, height_ratios=heights)
    _draw_boxes(figure.add_subfigure(grid[0]), slices, planes, shown, spacing, unit, names, greys)
    kinds = list(dict.fromkeys(view.kind for view in views))
    for number, group in enumerate(groups, 1):
        columns = min(_VIEWS_A_ROW, len(views))
        axes = figure.add_subfigure(grid[number]).subplots(len(rows) * len(channels), columns, squeeze=False)
        for column, view in enumerate(group):
            _draw_view(list(axes[:, column]), view, rows, spacing, unit, greys, _colour(view, kinds))
        for empty in axes[:, len(group) :].ravel():
            empty.remove()
        for channel, name in enumerate(names):
            for row, label in enumerate(rows):
                axes[len(rows) * channel + row, 0].set_ylabel(f"{name}{label}", parse_math=False)
    figure.savefig(path, dpi=DPI)


def _title(
    case: str, shape: Sequence[int], first: tuple[int, ...], drawn: bool, spacing: Sequence[float], unit: str
) -> str:
    """Return the case with its slice and size. `drawn`: the slice was drawn; otherwise it is the middle slice."""
    if unit == "pixels":
        return f"{case}\nimage of {_x(shape[-len(spacing) :])} pixels"
    several = shape[0] > 1
    where = "".join(f"{'' if drawn else 'middle '}slice {index} of {shape[0]}, " for index in first if several)
    return f"{case}\n{where}image of {_x(shape)} voxels, {_x(spacing)} mm a voxel"


def _colour(view: ShownView, kinds: Sequence[str]) -> str:
    return _COLOURS[kinds.index(view.kind) % len(_COLOURS)]


def _draw_boxes(
    figure: SubFigure,
    slices: Sequence[np.ndarray],
    planes: Sequence[tuple[int, int]],
    shown: ShownSample,
    spacing: Sequence[float],
    unit: str,
    names: Sequence[str],
    greys: Sequence[_Grey],
) -> None:
    """Draw the slices of every channel, with all boxes projected onto them."""
    columns = 1 if len(planes) == len(greys) == 1 else COLUMNS
    panels = [(channel, number) for channel in range(len(greys)) for number in range(len(planes))]
    places = [(channel * -(-len(planes) // columns) + n // columns, n % columns) for channel, n in panels]
    if len(planes) == 1:  # channels beside each other
        places = [(channel // columns, channel % columns) for channel, _ in panels]
    grid = figure.add_gridspec(1 + max(row for row, _ in places), columns)
    for (channel, number), place in zip(panels, places, strict=True):
        axis = figure.add_subplot(grid[place])
        _boxes_on_a_slice(axis, slices[number][channel], shown, planes[number], spacing, unit, greys[channel])
        if number == 0:
            axis.set_ylabel(f"{names[channel]}{axis.get_ylabel()}", parse_math=False)
    handles = {str(artist.get_label()): artist for artist in figure.axes[0].patches}
    if handles:
        shown_boxes = list(handles.values()), list(handles)
        if len(planes) == 3:  # three planes leave a fourth place
            figure.legend(*shown_boxes, loc="lower right", facecolor="lightgrey")
        else:
            figure.legend(*shown_boxes, loc="outside lower center", ncols=len(handles), facecolor="lightgrey")


def _draw_view(
    axes: Sequence[Axes],
    view: ShownView,
    rows: Sequence[str],
    spacing: Sequence[float],
    unit: str,
    greys: Sequence[_Grey],
    colour: str,
) -> None:
    """Draw a view's images below each other, with rows for each channel, in a frame of the box's colour."""
    size = next(iter(view.images.values())).shape[1:]
    voxels = "pixels" if unit == "pixels" else "voxels"
    lines, aspect = [view.title], spacing[-2] / spacing[-1]
    if view.box is None:
        lines.append(f"{_x(size)} {voxels}")
    else:
        extent = [n * s for n, s in zip(view.box.shape, spacing, strict=True)]
        lines += [f"{_x(view.box.shape)} {voxels}", *([f"{_x(extent)} mm"] if unit == "mm" else []), f"to {_x(size)}"]
        aspect = (extent[-2] / size[-2]) / (extent[-1] / size[-1])  # as in the body: a view's voxels are not cubes
    if view.flipped is not None:
        lines.append(flips(view.flipped))
    axes[0].set_title("\n".join(lines), fontsize=9)
    for channel, grey in enumerate(greys):
        for row, name in enumerate(rows):
            axis = axes[len(rows) * channel + row]
            if name in view.images:
                axis.imshow(_middle(view.images[name], channel), aspect=aspect, **grey)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(visible=True)
            if view.box is not None:
                axis.spines[:].set(color=colour, linewidth=1.5)


def flips(axes: Sequence[int]) -> str:
    """Say along which axes a view is flipped."""
    numbers = ", ".join(map(str, axes))
    return f"flip: axis {numbers}" if len(axes) == 1 else f"flip: axes {numbers}" if axes else "no flip"


def _boxes_on_a_slice(
    axis: Axes,
    image: np.ndarray,
    shown: ShownSample,
    plane: tuple[int, int],
    spacing: Sequence[float],
    unit: str,
    grey: _Grey,
) -> None:
    """Draw a slice with all boxes projected onto it."""
    row, column = plane
    extent = (0, image.shape[1] * spacing[column], image.shape[0] * spacing[row], 0)
    axis.imshow(image, extent=extent, **grey)
    axis.set(xlabel=f"axis {column}, {unit}", ylabel=f"axis {row}, {unit}")
    kinds = list(dict.fromkeys(view.kind for view in shown.views))
    if shown.bounds is not None and len(shown.views) > 1:
        _draw(axis, shown.bounds, plane, spacing, "white", "box around the global crops", 1, "--")
    for view in shown.views:
        if view.box is not None:
            several = sum(other.kind == view.kind for other in shown.views) > 1
            colour = _colour(view, kinds)
            _draw(axis, view.box, plane, spacing, colour, view.kind, 1 if several else 2)
            x, y = (view.box.lower[i] * spacing[i] for i in (column, row))
            number = view.title.removeprefix(view.kind).strip()
            style: Any = {"color": "white", "fontsize": 9, "fontweight": "bold", "va": "top"}
            style["path_effects"] = [withStroke(linewidth=2.5, foreground=colour)]
            axis.annotate(number, (x, y), (2, -2), textcoords="offset points", **style)


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
    axis: Axes,
    box: Box,
    plane: tuple[int, int],
    spacing: Sequence[float],
    colour: str,
    label: str,
    width: float,
    style: str = "-",
) -> None:
    row, column = (box.lower[i] * spacing[i] for i in plane)
    rows, columns = (box.shape[i] * spacing[i] for i in plane)
    axis.add_patch(Rectangle((column, row), columns, rows, fill=False, ec=colour, lw=width, ls=style, label=label))


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


@own_style()
def chart_svg(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], lower: float | None = None, line: float | None = None
) -> str:
    """Return curves over epochs as an <svg> element for a page, in the page's colours.

    Args:
        curves: label -> epochs and values, both (N,); an empty label gives no legend.
        lower: lower end of the axis.
        line: value of a dotted line.
    """
    style: Any = {"svg.fonttype": "none", "font.size": 10, "grid.color": _INK, "text.color": _INK}
    style |= {key: _INK for key in ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")}
    with rc_context(style):
        figure = Figure(figsize=(4.8, 2.5), layout="constrained")
        axis = figure.subplots()
        for number, (label, (epochs, values)) in enumerate(curves.items()):
            colour, marker = _ON_BOTH[number % len(_ON_BOTH)], "o" if len(values) < 50 else None
            axis.plot(epochs, values, color=colour, marker=marker, markersize=3, lw=1.6, label=label)
        if line is not None:
            axis.axhline(line, color=_INK, ls=":", lw=1)
        set_lower(axis, lower)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
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
