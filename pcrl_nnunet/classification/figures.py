"""Pictures of a classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve


def roc(
    truth: np.ndarray, score: np.ndarray, names: Sequence[str], found: Mapping[str, Mapping[str, float]], path: str
) -> None:
    """Draw the ROC curve of every output, as a PNG.

    Args:
        truth: (N, L) 1, 0 or NaN.
        score: (N, L).
        found: auroc, low and high by name.
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
    """Draw the activation map of every output on the middle slice of an input's first channel, as a PNG.

    Args:
        image: (C, *size).
        maps: (L, *size).
        titles: a title for each map.
    """
    picture = image[0]
    if picture.ndim == 3:
        middle = len(picture) // 2
        picture, maps = picture[middle], maps[:, middle]
    shown = min(len(maps), 6)
    figure = Figure(figsize=(3 * (shown + 1), 3.7), layout="constrained")
    axes = figure.subplots(1, shown + 1)
    figure.suptitle(title)
    limit = np.percentile(np.abs(maps), 99.5) or 1.0  # a single extreme voxel would make the rest pale
    for i, axis in enumerate(axes):
        axis.imshow(picture, cmap="gray")
        axis.set_axis_off()
        axis.set_title("input" if i == 0 else titles[i - 1])
        if i:
            axis.imshow(maps[i - 1], cmap="coolwarm", alpha=0.5, vmin=-limit, vmax=limit)
    figure.savefig(path, dpi=100)
