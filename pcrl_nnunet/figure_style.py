"""The style of all pictures: they can be read on a phone and on a desk.

A phone shows a picture at about 390 pixels. Text of 9 points then has 8 pixels if the picture is 6 inches wide, so
panels lie below each other rather than beside each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import fill
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 6.0  # inches
DPI = 150
COLUMNS = 2  # panels side by side
_LETTERS = 72  # letters that fit into one line of a heading

_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "figure.titlesize": 10.5,
    "legend.fontsize": 9,
    "legend.handlelength": 1.4,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def own_style() -> Iterator[None]:
    """Draw in this style, also after nnU-Net's own progress.png, which changes matplotlib's settings for good."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def heading(figure: Figure, text: str) -> None:
    """Write a text of one or several lines above a figure's panels."""
    wrapped = "\n".join(fill(line, _LETTERS) for line in text.splitlines())
    figure.suptitle(wrapped, parse_math=False)  # a dataset or a case may be called $x$


def set_lower(axis: Axes, lower: float | None) -> None:
    """Set the lower end of the vertical axis after its curves are drawn; None: leave it to matplotlib."""
    if lower is not None:
        axis.update_datalim([(axis.dataLim.x0, lower)], updatex=False)  # leaves room above the highest point
        axis.autoscale_view()
        axis.set_ylim(bottom=lower)


def grey_scale(values: np.ndarray) -> dict[str, Any]:
    """Return arguments of `imshow` for a grey scale that covers nearly all values."""
    low, high = np.percentile(values, (0.5, 99.5))
    return {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6), "interpolation": "nearest"}
