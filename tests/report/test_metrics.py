"""metrics.csv of a pretraining."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pcrl_nnunet.report.metrics import write_metrics

LOG = {
    "train_losses": [1.5, 1.0],
    "restoration": [0.5, float("nan")],
    "lrs": [0.01, 0.005],
    "epoch_start_timestamps": [100.0, 120.0],
    "epoch_end_timestamps": [110.0, 124.5],
}


def test_each_epoch_has_a_line_with_the_names_of_the_log(tmp_path: Path) -> None:
    write_metrics(LOG, 250, str(tmp_path))
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert list(table) == ["epoch", "step", "loss", "restoration", "learning_rate", "seconds"]
    assert table["epoch"].tolist() == [1, 2]
    assert table["step"].tolist() == [250, 500]
    assert table["loss"].tolist() == [1.5, 1.0]
    assert table["learning_rate"].tolist() == [0.01, 0.005]
    assert table["seconds"].tolist() == [10.0, 4.5]


def test_a_value_that_an_epoch_lacks_is_empty(tmp_path: Path) -> None:
    write_metrics(LOG, 250, str(tmp_path))
    assert (tmp_path / "metrics.csv").read_text().splitlines()[2] == "2,500,1,,0.005,4.50"
