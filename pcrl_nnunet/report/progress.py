"""progress.png of a pretraining or a classification, and the loggers that draw it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from pcrl_nnunet import figure_style
from pcrl_nnunet.figure_style import DPI, WIDTH, own_style
from pcrl_nnunet.files import whole
from pcrl_nnunet.methods.base import Method
from pcrl_nnunet.methods.quantities import Quantity
from pcrl_nnunet.report.metrics import METRICS, write_metrics

Panel = tuple[str, float | None, float | None, Mapping[str, str]]  # title, lower end, dotted line, labels of curves

PROGRESS = "progress.png"
_DOTTED = "Dotted: a network that learns nothing, or whose features have collapsed."


def terms_by_panel(terms: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Group the labels of a loss's terms into panels by the words before the comma: their scales differ.

    Args:
        terms: see `Method.terms`.
    """
    panels: dict[str, dict[str, str]] = {}
    for name, label in terms.items():
        panels.setdefault(label.split(",")[0], {})[name] = label
    return panels


class PretrainLogger(LocalLogger):
    """nnU-Net's logger with a method's terms and quantities, because LocalLogger has a fixed set of keys.

    Args:
        run: the training in words, for the heading of progress.png.
    """

    def __init__(self, method: type[Method], run: str) -> None:
        super().__init__()
        self.method, self.run = method, run
        keys = (
            *("train_losses", *method.terms, *(quantity.name for quantity in method.quantities)),
            *("lrs", "epoch_start_timestamps", "epoch_end_timestamps"),
        )
        self.my_fantastic_logging: dict[str, list[float]] = {key: [] for key in keys}

    def load_checkpoint(self, checkpoint: dict[str, list[float]]) -> None:
        """Continue a log. Quantities that an earlier version did not know are NaN in its epochs."""
        unknown = [math.nan] * len(checkpoint["train_losses"])
        self.my_fantastic_logging = {key: list(checkpoint.get(key, unknown)) for key in self.my_fantastic_logging}

    def write_curves(self, steps_per_epoch: int, output_folder: str, say: Callable[[str], object]) -> None:
        """Write metrics.csv and progress.png. A failure is a warning and never ends the training."""
        for name, write in (
            (METRICS, partial(write_metrics, self.my_fantastic_logging, steps_per_epoch, output_folder)),
            (PROGRESS, partial(self.plot_progress_png, output_folder)),
        ):
            try:
                write()
            except OSError as error:
                say(f"WARNING: {name} could not be written ({error}); the training goes on")

    def plot_progress_png(self, output_folder: str) -> None:
        """Write progress.png, whole or not at all."""
        method = self.method
        several = len(method.terms) > 1
        panels: list[Panel] = [
            ("loss" if several else " = ".join(["loss", *method.terms.values()]), None, None, {"train_losses": "loss"}),
            *((title, None, None, of_panel) for title, of_panel in terms_by_panel(method.terms).items() if several),
            *(
                (f"{q.heading} ({q.good})", q.lower, q.line, {q.name: "mean"})
                for q in method.quantities
                if self._has(q)
            ),
            ("learning rate", 0, None, {"lrs": "rate"}),
        ]
        heading = "\n".join([self.run, *([_DOTTED] if any(q.line is not None for q in method.quantities) else [])])
        draw_progress(self.my_fantastic_logging, panels, heading, 1, output_folder)

    def _has(self, quantity: Quantity) -> bool:
        """Tell if an epoch has had a quantity: some settings of a method lack it."""
        return not np.isnan(self.my_fantastic_logging[quantity.name]).all()


class ClassificationLogger(LocalLogger):
    """nnU-Net's logger with AUROC in place of Dice. As in nnU-Net's log, the first epoch is 0.

    Args:
        run: the training in words, for the heading of progress.png.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        self.run = run

    def plot_progress_png(self, output_folder: str) -> None:
        """Write progress.png, whole or not at all."""
        of_auroc = {"mean_fg_dice": "epoch", "ema_fg_dice": "moving mean"}
        panels: list[Panel] = [
            ("loss", None, None, {"train_losses": "training", "val_losses": "validation"}),
            ("AUROC of validation batches", None, 0.5, of_auroc),
            ("learning rate", 0, None, {"lrs": "rate"}),
        ]
        draw_progress(self.my_fantastic_logging, panels, f"{self.run}\nDotted: chance.", 0, output_folder)


@own_style()
def draw_progress(
    log: Mapping[str, Sequence[float]], panels: Sequence[Panel], heading: str, first_epoch: int, output_folder: str
) -> None:
    """Draw the curves of a training into progress.png, with a point for each epoch.

    Args:
        log: values by name, one for each epoch.
        heading: text above the panels.
        first_epoch: number of the first epoch in the training's log.
    """
    figure = Figure(figsize=(WIDTH, 0.7 + 1.75 * len(panels)), layout="constrained")
    figure_style.heading(figure, heading)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (title, lower, line, curves) in zip(axes, panels, strict=True):
        for key, label in curves.items():
            values = {first_epoch + i: v for i, v in enumerate(log[key]) if not np.isnan(v)}
            axis.plot(values.keys(), values.values(), marker="." if len(values) < 50 else None, label=label)
        if line is not None:
            axis.axhline(line, color="grey", linestyle=":", lw=1)
        axis.set_title(title, loc="left")
        figure_style.set_lower(axis, lower)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.tick_params(labelbottom=True)
        axis.grid()
        if len(curves) > 1:
            axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(curves), frameon=False, borderaxespad=0)
    axes[-1].set_xlabel("epoch")
    with whole(os.path.join(output_folder, PROGRESS)) as draft:
        figure.savefig(draft, dpi=DPI, format="png")
