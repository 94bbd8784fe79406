"""pseudo_labels.png of a semi-supervised training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pcrl_nnunet.files import whole
from pcrl_nnunet.semi_supervised.label_facts import LabelFacts
from pcrl_nnunet.semi_supervised.watch import Pseudo

COLOURS = [f"C{number}" for number in range(10)]


def draw_pseudo_labels(
    history: Sequence[Pseudo], facts: LabelFacts, first_epoch: int, images: np.ndarray, labels: np.ndarray, path: str
) -> None:
    """Draw the curves of the second stage, and unlabelled patches with the teacher's labels, as a PNG.

    Args:
        first_epoch: number of the second stage's first epoch.
        images: (B, C, *patch); the picture shows the first channel of the slice with the most labelled voxels.
        labels: (B, 1, *patch) label maps, or (B, R, *patch) regions.
        path: path of the PNG, which appears complete.
    """
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(4, 5))
    curves, patches = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    shares, agreement = curves.subplots(1, 2)
    epochs = range(first_epoch, first_epoch + len(history))
    for number, name in enumerate(facts.names):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "." if len(history) < 50 else None}
        shares.plot(epochs, [epoch.shares[number] for epoch in history], label=name, **style)
        shares.axhline(facts.shares[number], color=style["color"], linestyle=":", lw=1)
        agreement.plot(epochs, [epoch.agreement[number] for epoch in history], label=name, **style)
    shares.set(title="share of unlabelled voxels (dotted: of labelled scans)", xlabel="epoch", ylim=(0, None))
    agreement.set(title="Dice of student and teacher", xlabel="epoch", ylim=(0, 1))
    for axis in (shares, agreement):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    shares.legend(loc="best")
    axes = patches.subplots(2, len(images), squeeze=False)
    for column, (image, of_patch) in enumerate(zip(images, labels, strict=True)):
        _draw_patch(list(axes[:, column]), image, of_patch, len(facts.names))
    axes[0, 0].set_ylabel("unlabelled patch")
    axes[1, 0].set_ylabel("teacher's labels")
    with whole(path) as draft:
        figure.savefig(draft, dpi=90, format="png")


def _draw_patch(axes: Sequence[Axes], image: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    classes = np.arange(1, num_classes + 1).reshape(-1, *[1] * image[0].ndim)
    masks = labels if labels.dtype == bool else labels == classes
    slice_ = image[0]
    if slice_.ndim == 3:
        counts = masks.sum((0, 2, 3))
        index = int(counts.argmax()) if counts.any() else len(slice_) // 2
        slice_, masks = slice_[index], masks[:, index]
    low, high = np.percentile(slice_, (0.5, 99.5))
    for axis in axes:
        axis.imshow(slice_, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
        axis.set(xticks=[], yticks=[])
    for number, mask in enumerate(masks):
        if mask.any():
            axes[1].contourf(mask, levels=[0.5, 1.5], colors=[COLOURS[number % len(COLOURS)]], alpha=0.5)
