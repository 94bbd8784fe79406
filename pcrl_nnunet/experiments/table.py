"""The table of a comparison: one row for each arm and number of labelled cases."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from pcrl_nnunet.experiments.arms import CONTROL
from pcrl_nnunet.experiments.scores import Scores


def table(scores: Scores) -> pd.DataFrame:
    """Return one row for each arm and number of labelled cases, in points.

    Columns: method, labelled, subsets, mean, sd (over subsets), learned (see `Scores.has_learned`), and the result of
    `Scores.gain` over `CONTROL`: pairs (subsets that both have), difference, low, high (of its 95 % interval).
    """
    rows = []
    for (labelled, arm), group in scores.runs.groupby(["labelled", "method"], sort=False):
        points = group["points"]
        row = {
            "method": arm, "labelled": labelled, "subsets": len(points), "mean": points.mean(), "sd": points.std(),
            "learned": scores.has_learned(arm, labelled),
        }  # fmt: skip
        rows.append({**row, "pairs": 0, **scores.gain(arm, CONTROL, labelled)})
    columns = ["method", "labelled", "subsets", "mean", "sd", "learned", "pairs", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns).sort_values("labelled", kind="stable", ignore_index=True)


def networks_that_learned(rows: pd.DataFrame, shortcuts: Iterable[str] = ()) -> dict[int, list[str]]:
    """Return the arms whose networks learned, by number of labelled cases; a list is empty if none learned.

    Args:
        rows: see `table`.
        shortcuts: arms without a network.
    """
    networks = rows[~rows["method"].isin(list(shortcuts))]
    return {int(n): list(own.loc[own["learned"], "method"]) for n, own in networks.groupby("labelled")}
