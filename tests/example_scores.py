"""Made-up scores of two arms; the second may be better."""

import numpy as np
import pandas as pd

from pcrl_nnunet.experiments.scores import PREDICTION_COLUMNS, DiceScores


def dice_table(gain, seeds=5, cases=40, noise=0.01):
    rng = np.random.default_rng(0)
    base = rng.uniform(0.7, 0.9, (seeds, cases))
    better = base + gain + rng.normal(0, noise, base.shape)
    rows = [
        (method, 10, seed, f"case_{case}", label, values[seed, case])
        for method, values in (("scratch", base), ("pcrlv2", better))
        for seed in range(seeds)
        for case in range(cases)
        for label in ("a", "b")
    ]
    return pd.DataFrame(rows, columns=["method", "labelled", "seed", "case", "label", "dice"])


def together(*given):
    """Scores of several numbers of labels: (number, gain)."""
    return DiceScores(
        pd.concat([dice_table(gain, noise=noise).assign(labelled=number) for number, gain, noise in given])
    )


def nothing_found(labelled):
    return dice_table(0.0).assign(labelled=labelled, dice=0.0)


def predictions(seeds=3, cases=30, points=4, labels=("a",), better=1.5):
    """Points of cases, three cases a patient; the second method's scores tell the classes apart further."""
    rng = np.random.default_rng(0)
    truth = {label: rng.integers(0, 2, cases * points).astype(float) for label in labels}
    rows = []
    for method, distance in (("scratch", 0.5), ("pcrlv2", better)):
        for seed in range(seeds):
            for label in labels:
                score = np.round(distance * truth[label] + rng.normal(0, 1, cases * points), 1)  # with ties
                for sample, (t, s) in enumerate(zip(truth[label], score, strict=True)):
                    rows.append((method, 10, seed, f"case_{sample // points}", sample, label, t, s))
    return pd.DataFrame(rows, columns=list(PREDICTION_COLUMNS))


OF_THREE = {f"case_{i}": f"patient_{i // 3}" for i in range(30)}
