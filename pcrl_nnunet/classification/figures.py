"""Pictures of a classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from pcrl_nnunet.figure_style import DPI, WIDTH, grey_scale, heading, own_style

MAPS_SHOWN = 6  # largest number of class-activation maps in a picture


@own_style()
def roc(
    truth: np.ndarray, score: np.ndarray, names: Sequence[str], found: Mapping[str, Mapping[str, float]], path: str
) -> None:
    """Draw the ROC curve of every output with its number of samples, AUROC and interval, as a PNG.

    Args:
        truth: (N, L) 1, 0 or NaN.
        score: (N, L).
        found: the result of `auroc_interval` by name.
    """
    figure = Figure(figsize=(WIDTH, WIDTH + 0.2 + 0.4 * len(names)), layout="constrained")
    axis = figure.subplots()
    for i, name in enumerate(names):
        known = ~np.isnan(truth[:, i])
        if len(np.unique(truth[known, i])) == 2:
            false, true, _ = roc_curve(truth[known, i], score[known, i])
            axis.plot(false, true, label=said_of_auroc(name, found[name]))
    axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="chance")
    axis.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal", xlim=(-0.01, 1), ylim=(0, 1.01))
    axis.grid()
    figure.legend(loc="outside lower center")
    figure.savefig(path, dpi=DPI)


def said_of_auroc(name: str, found: Mapping[str, float]) -> str:
    """Return an output's AUROC with its interval and its number of samples, in two lines."""
    interval = "no interval" if np.isnan(found["low"]) else f"95 % interval {found['low']:.3f} to {found['high']:.3f}"
    return (
        f"{name}: AUROC {found['auroc']:.3f}, {interval}\n"
        f"n = {found['known']:.0f}, {found['positive']:.0f} of them positive"
    )


@own_style()
def activation(image: np.ndarray, maps: np.ndarray, titles: Sequence[str], title: str, path: str) -> None:
    """Draw the activation map of every output on the middle slice of an input's first channel, as a PNG.

    Args:
        image: (C, *size).
        maps: (L, *size); the mean of a map plus the bias is the output's logit.
        titles: a title for each map.
    """
    picture, where = image[0], ""
    if picture.ndim == 3:
        middle = len(picture) // 2
        picture, maps, where = picture[middle], maps[:, middle], ", middle slice"
    shown = min(len(maps), MAPS_SHOWN)
    columns = 2 if shown == 1 else 3
    rows = -(-(shown + 1) // columns)
    figure = Figure(figsize=(WIDTH, 1.0 + rows * (0.5 + WIDTH / columns)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    heading(figure, f"{title}{where}" + f"\nthe first {shown} of {len(maps)} labels" * (len(maps) > shown))
    limit = np.percentile(np.abs(maps), 99.5) or 1.0  # a single extreme voxel would make the rest pale
    for i, axis in enumerate(axes[: shown + 1]):
        axis.imshow(picture, **grey_scale(picture))
        axis.set_axis_off()
        lines = ["input"] if i == 0 else [fill(line, 24) for line in titles[i - 1].splitlines()]
        axis.set_title("\n".join(lines), parse_math=False)
        if i:
            over = axis.imshow(maps[i - 1], cmap="coolwarm", alpha=0.5, vmin=-limit, vmax=limit)
    for empty in axes[shown + 1 :]:
        empty.remove()
    bar = figure.colorbar(over, ax=list(axes[: shown + 1]), location="bottom", shrink=0.8, aspect=30, extend="both")
    bar.set_label("effect on the logit: red for the label, blue against it\n(mean of the map + bias = logit)")
    figure.savefig(path, dpi=DPI)
