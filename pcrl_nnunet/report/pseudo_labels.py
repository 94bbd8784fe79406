"""pseudo_labels.png of a semi-supervised training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pcrl_nnunet.figure_style import DPI, WIDTH, grey_scale, heading, own_style, set_lower
from pcrl_nnunet.files import whole
from pcrl_nnunet.semi_supervised.label_facts import LabelFacts
from pcrl_nnunet.semi_supervised.watch import Pseudo

COLOURS = [f"C{number}" for number in range(10)]


@own_style()
def draw_pseudo_labels(
    history: Sequence[Pseudo],
    facts: LabelFacts,
    first_epoch: int,
    images: np.ndarray,
    labels: np.ndarray,
    run: str,
    path: str,
) -> None:
    """Draw the curves of the second phase, and unlabelled patches with the teacher's labels, as a PNG.

    Args:
        first_epoch: number of the second phase's first epoch.
        images: (B, C, *patch); the picture shows the first channel of the slice with the most labelled voxels.
        labels: (B, 1, *patch) label maps, or (B, R, *patch) regions.
        run: the training in words, for the heading.
        path: path of the PNG, which appears complete.
    """
    figure = Figure(figsize=(WIDTH, 10.5), layout="constrained")
    heading(figure, f"{run}\nPseudo-labels of the second phase")
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 2))
    curves, patches = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    shares, agreement = curves.subplots(2, 1, sharex=True)
    epochs = range(first_epoch, first_epoch + len(history))
    for number, name in enumerate(facts.names):
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "." if len(history) < 50 else None}
        shares.plot(epochs, [100 * epoch.shares[number] for epoch in history], label=name, **style)
        shares.axhline(100 * facts.shares[number], color=style["color"], linestyle=":", lw=1)
        agreement.plot(epochs, [epoch.agreement[number] for epoch in history], label=name, **style)
    shares.set_title(
        "Share of the voxels with a label, %\n(curve: unlabelled scans; dotted: labelled scans)", loc="left"
    )
    agreement.set_title("Dice of student and teacher on unlabelled scans", loc="left")
    agreement.set(xlabel="epoch", ylim=(0, 1))
    set_lower(shares, 0)
    for axis in (shares, agreement):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.tick_params(labelbottom=True)
        axis.grid()
    curves.legend(*shares.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(facts.names)))
    axes = patches.subplots(2, len(images), squeeze=False)
    for column, (image, of_patch) in enumerate(zip(images, labels, strict=True)):
        _draw_patch(list(axes[:, column]), image, of_patch, len(facts.names))
    axes[0, 0].set_ylabel("unlabelled\npatch")
    axes[1, 0].set_ylabel("teacher's\nlabels")
    with whole(path) as draft:
        figure.savefig(draft, dpi=DPI, format="png")


def _draw_patch(axes: Sequence[Axes], image: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
    """Draw a patch, and below the patch with its labels. If the teacher has labelled nothing, say so."""
    classes = np.arange(1, num_classes + 1).reshape(-1, *[1] * image[0].ndim)
    masks = labels if labels.dtype == bool else labels == classes
    slice_ = image[0]
    if slice_.ndim == 3:
        counts = masks.sum((0, 2, 3))
        index = int(counts.argmax()) if counts.any() else len(slice_) // 2
        slice_, masks = slice_[index], masks[:, index]
    for axis in axes:
        axis.imshow(slice_, **grey_scale(slice_))
        axis.set(xticks=[], yticks=[])
    for number, mask in enumerate(masks):
        if mask.any():
            axes[1].contourf(mask, levels=[0.5, 1.5], colors=[COLOURS[number % len(COLOURS)]], alpha=0.5)
    if not masks.any():
        axes[1].set_xlabel("no label")
