"""progress.png of a pretraining, and the logger that draws it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from pcrl_nnunet.files import whole
from pcrl_nnunet.methods.base import Method


class PretrainLogger(LocalLogger):
    """nnU-Net's logger with the terms and quantities of a method: LocalLogger knows and plots a fixed set of keys."""

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
        path = os.path.join(output_folder, "progress.png")
        with whole(path) as draft:
            pretraining_progress(self.my_fantastic_logging, self.method, draft)


def pretraining_progress(log: Mapping[str, Sequence[float]], method: type[Method], path: str) -> None:
    """Draw the curves of a pretraining as a PNG, an epoch a point: losses, quantities, learning rate."""
    panels: list[tuple[str, float | None, float | None, dict[str, str]]] = [
        ("losses", None, None, {"train_losses": "loss", **(method.terms if len(method.terms) > 1 else {})}),
        *(
            (f"{quantity.heading} ({quantity.good})", quantity.lower, quantity.line, {quantity.name: "mean"})
            for quantity in method.quantities
        ),
        ("learning rate", 0, None, {"lrs": "rate"}),
    ]
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
    figure.savefig(path, dpi=100)
