"""progress.png of a pretraining or a classification, and the loggers that draw it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from pcrl_nnunet.files import whole
from pcrl_nnunet.methods.base import Method

Panel = tuple[str, float | None, float | None, Mapping[str, str]]  # title, lower end, dotted line, labels of curves


class PretrainLogger(LocalLogger):
    """nnU-Net's logger with a method's terms and quantities, because LocalLogger has a fixed set of keys."""

    def __init__(self, method: type[Method]) -> None:
        super().__init__()
        self.method = method
        keys = (
            *("train_losses", *method.terms, *(quantity.name for quantity in method.quantities)),
            *("lrs", "epoch_start_timestamps", "epoch_end_timestamps"),
        )
        self.my_fantastic_logging: dict[str, list[float]] = {key: [] for key in keys}

    def plot_progress_png(self, output_folder: str) -> None:
        """Write progress.png, whole or not at all."""
        method = self.method
        panels: list[Panel] = [
            ("losses", None, None, {"train_losses": "loss", **(method.terms if len(method.terms) > 1 else {})}),
            *((f"{q.heading} ({q.good})", q.lower, q.line, {q.name: "mean"}) for q in method.quantities),
            ("learning rate", 0, None, {"lrs": "rate"}),
        ]
        draw_progress(self.my_fantastic_logging, panels, output_folder)


class ClassificationLogger(LocalLogger):
    """nnU-Net's logger with AUROC in place of Dice."""

    def plot_progress_png(self, output_folder: str) -> None:
        """Write progress.png, whole or not at all."""
        of_auroc = {"mean_fg_dice": "epoch", "ema_fg_dice": "moving mean"}
        panels: list[Panel] = [
            ("loss", None, None, {"train_losses": "training", "val_losses": "validation"}),
            ("AUROC on batches of validation samples (0.5: chance)", None, 0.5, of_auroc),
            ("learning rate", 0, None, {"lrs": "rate"}),
        ]
        draw_progress(self.my_fantastic_logging, panels, output_folder)


def draw_progress(log: Mapping[str, Sequence[float]], panels: Sequence[Panel], output_folder: str) -> None:
    """Draw the curves of a training into progress.png, with a point for each epoch."""
    figure = Figure(figsize=(11, 3 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True)
    for axis, (title, lower, line, curves) in zip(axes, panels, strict=True):
        for key, label in curves.items():
            values = {i: v for i, v in enumerate(log[key]) if not np.isnan(v)}
            axis.plot(values.keys(), values.values(), marker="." if len(values) < 50 else None, label=label)
        if line is not None:
            axis.axhline(line, color="grey", linestyle=":", lw=1)
        axis.set_title(title)
        axis.set_ylim(bottom=lower)
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
        axis.legend(loc="best")
    axes[-1].set_xlabel("epoch")
    with whole(os.path.join(output_folder, "progress.png")) as draft:
        figure.savefig(draft, dpi=100)
