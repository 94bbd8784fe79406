"""Random samples of a label table."""

from __future__ import annotations

import numpy as np

from pcrl_nnunet.classification.label_table import LabelTable


class Drawing:
    """A drawer of samples, balanced or uniform.

    Balanced drawing first picks a class, or a label and one of its values, all with the same probability. Then it picks
    one of its samples. A binary classification sees as many positives as negatives, even with 1,500 among 755,000.
    """

    def __init__(self, table: LabelTable, samples: np.ndarray, balanced: bool) -> None:
        value = table.value[samples]
        groups = [samples]
        if balanced:
            wanted = [(i, 1.0) for i in range(value.shape[1])]
            if not table.exclusive:
                wanted += [(i, 0.0) for i in range(value.shape[1])]
            groups = [samples[value[:, i] == v] for i, v in wanted]
        self.groups = [group for group in groups if len(group)]

    def __call__(self, rng: np.random.Generator, number: int) -> np.ndarray:
        """Draw (number,) indices into the table."""
        drawn = [self.groups[group] for group in rng.integers(len(self.groups), size=number)]
        return np.array([group[rng.integers(len(group))] for group in drawn], dtype=int)
