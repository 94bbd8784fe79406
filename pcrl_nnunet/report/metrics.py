"""metrics.csv of a pretraining: a line for each epoch, with the values of log, report and curves."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from math import isnan

from pcrl_nnunet.files import whole

METRICS = "metrics.csv"
_NAMES = {"train_losses": "loss", "lrs": "learning_rate"}  # nnU-Net's names, and the names to show
_TIMES = ("epoch_start_timestamps", "epoch_end_timestamps")


def write_metrics(log: Mapping[str, Sequence[float]], steps_per_epoch: int, folder: str) -> None:
    """Write metrics.csv, whole or not at all. A value that an epoch lacks stays empty.

    Args:
        log: values by name, one for each epoch.
        folder: the output folder.
    """
    keys = [key for key in log if key not in _TIMES]
    starts, ends = (log[key] for key in _TIMES)
    with whole(os.path.join(folder, METRICS)) as draft, open(draft, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", *(_NAMES.get(key, key) for key in keys), "seconds"])
        for epoch, (start, end) in enumerate(zip(starts, ends, strict=True)):
            values = [log[key][epoch] for key in keys]
            row = ["" if isnan(value) else f"{value:.6g}" for value in values]
            writer.writerow([epoch + 1, (epoch + 1) * steps_per_epoch, *row, f"{end - start:.2f}"])
