"""The scores of a comparison's runs, Dice or AUROC, and paired differences of arms. S: subsets (seeds), K: cases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import pandas as pd

from pcrl_nnunet.classification.auroc import MIN_GROUPS, auroc
from pcrl_nnunet.experiments import intervals
from pcrl_nnunet.experiments.intervals import Replicates

# "method" is what users call an arm.
COLUMNS = ("method", "labelled", "seed", "case", "label", "dice")
PREDICTION_COLUMNS = ("method", "labelled", "seed", "case", "sample", "label", "truth", "score")
MAX_BLOCKS = 500  # the bootstrap draws blocks of several patients if there are more patients than this
LEARNED = 1.0  # points above `Scores.chance`: a network with fewer learned nothing

Curves = dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]]


def labelled_cases(number: int) -> str:
    """Return a number of labelled cases in words."""
    return f"{number} labelled case" if number == 1 else f"{number} labelled cases"


class Scores(ABC):
    """The scores of a comparison's finished runs, in points (100 is perfect).

    Attributes:
        measure: name of the score.
        chance: the most points that a prediction reaches without looking at the image.
        runs: columns method, labelled, seed, points; one row a run.
    """

    measure: str
    chance: float
    runs: pd.DataFrame

    @abstractmethod
    def replicates(self, arm: str, over: str | None, labelled: int, rng: np.random.Generator) -> Replicates | None:
        """Return the differences on the subsets that both arms have; None if they share no subset.

        Args:
            over: another arm; None: a prediction with the points of `chance`.
        """

    def has_learned(self, arm: str, labelled: int) -> bool:
        """Tell if an arm's networks are surely better than `chance`, by at least `LEARNED` points.

        The interval is for these networks on other cases. Networks of other subsets might learn more, or nothing.
        """
        found = self.replicates(arm, None, labelled, np.random.default_rng(0))
        if found is None:
            return False
        low, _ = intervals.interval_over_cases(found)
        return bool(low > 0 and found.observed.mean() >= LEARNED)

    def gain(self, arm: str, over: str, labelled: int) -> dict[str, float]:
        """Return the paired difference of two arms in points, on the subsets and cases that both have.

        Returns:
            pairs (subsets), difference, low, high; empty without a pair. The interval of a single pair is NaN: one
            subset says nothing about others.
        """
        found = None if arm == over else self.replicates(arm, over, labelled, np.random.default_rng(0))
        if found is None:
            return {}
        low, high = intervals.interval(found) if len(found.observed) > 1 else (float("nan"), float("nan"))
        return {"pairs": len(found.observed), "difference": float(found.observed.mean()), "low": low, "high": high}


class DiceScores(Scores):
    """Mean over cases of the mean over a case's labels.

    If neither the case nor the prediction contains a label, nnU-Net gives no score. That prediction is right, and its
    Dice counts as 1. Otherwise it would be no better than a false positive.

    Args:
        scores: columns `COLUMNS`.
        patients: patient by case. A case without an entry is its own patient.
        shares: the share of voxels that have the label, by case and label.
    """

    measure = "Dice"

    def __init__(
        self,
        scores: pd.DataFrame,
        patients: Mapping[str, str] | None = None,
        shares: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        known = scores.fillna({"dice": 1.0})
        self.cases = known.groupby(["method", "labelled", "seed", "case"], as_index=False, sort=False)["dice"].mean()
        self.cases["points"] = 100 * self.cases.pop("dice")
        self.runs = self.cases.groupby(["method", "labelled", "seed"], as_index=False, sort=False)["points"].mean()
        self.patients = patients or {}
        self.blind = blind_dice(shares or {})
        self.chance = float(self.blind.mean()) if len(self.blind) else 0.0

    def replicates(self, arm: str, over: str | None, labelled: int, rng: np.random.Generator) -> Replicates | None:
        """See `Scores.replicates`."""
        of_number = self.cases[self.cases["labelled"] == labelled]
        first, second = (of_number[of_number["method"] == name] for name in (arm, over or arm))
        if over is None:
            second = second.assign(points=second["case"].map(self.blind).fillna(0.0))
        paired = first.merge(second, on=["seed", "case"], suffixes=("", "_over"))
        if paired.empty:
            return None
        paired["difference"] = paired["points"] - paired["points_over"]
        matrix = paired.pivot(index="seed", columns="case", values="difference")
        of_patient = np.array([self.patients.get(case, case) for case in matrix.columns])
        return intervals.replicates_of_means(matrix.to_numpy(), rng, of_patient)


def blind_dice(shares: Mapping[tuple[str, str], float]) -> pd.Series[float]:
    """Return the points that a prediction can reach in each case without looking at the image.

    A random share q of the voxels has a Dice of about 2 p q / (p + q) with a label of share p. The maximum is
    2 p / (1 + p), with all voxels. If a case lacks the label, only a prediction without the label is right. Each label
    is predicted nowhere or everywhere, whichever is better over the cases. The points are an upper bound: labels that
    exclude each other cannot all be everywhere.

    Args:
        shares: the share p of voxels that have the label, by case and label.
    """
    if not shares:
        return pd.Series(dtype=float)
    share = pd.Series(dict(shares)).unstack()
    nowhere, everywhere = (share == 0).astype(float), 2 * share / (1 + share)
    best = {label: max(nowhere[label], everywhere[label], key=lambda dice: dice.mean()) for label in share}
    return 100 * pd.DataFrame(best).mean(axis=1)


class AurocScores(Scores):
    """Area under the ROC curve, mean over the labels.

    Args:
        predictions: columns `PREDICTION_COLUMNS`; all runs have the same samples.
        patients: patient by case. A case without an entry is its own patient. Samples of a patient are drawn together.
    """

    measure = "AUROC"
    chance = 50.0

    def __init__(self, predictions: pd.DataFrame, patients: Mapping[str, str] | None = None) -> None:
        self.of_labels = pd.DataFrame(
            [
                (*run, auroc(own["truth"].to_numpy(float), own["score"].to_numpy(float)))
                for run, own in predictions.groupby(["method", "labelled", "seed", "label"], sort=False)
            ],
            columns=["method", "labelled", "seed", "label", "auroc"],
        )
        self.runs = self.of_labels.groupby(["method", "labelled", "seed"], as_index=False, sort=False)["auroc"].mean()
        self.runs["points"] = 100 * self.runs.pop("auroc")
        self.predictions, self.patients = predictions, patients or {}

    def replicates(self, arm: str, over: str | None, labelled: int, rng: np.random.Generator) -> Replicates | None:
        """See `Scores.replicates`; also None if the positives or the negatives are too few to rule out chance.

        An AUROC is a mean over pairs of a positive and a negative. The pairs are summed once for each two patients; the
        AUROC of a draw of patients is then a weighted sum.
        """
        of_number = self.predictions[self.predictions["labelled"] == labelled]
        names = {case: self.patients.get(case, case) for case in of_number["case"].unique()}
        first, second = (dict(list(of_number[of_number["method"] == m].groupby("seed"))) for m in (arm, over or arm))
        if over is None:
            second = {seed: frame.assign(score=0.0) for seed, frame in second.items()}  # all pairs are ties
        seeds = sorted(first.keys() & second.keys())
        if not seeds or (over is None and _fewest_patients(of_number, names) < MIN_GROUPS):
            return None
        block = {name: i % MAX_BLOCKS for i, name in enumerate(rng.permutation(sorted(set(names.values()))))}
        places = {case: block[name] for case, name in names.items()}
        of_subsets, drawn = intervals.draw(len(seeds), rng), intervals.draw(max(block.values()) + 1, rng)
        observed, resampled = [], []
        for seed in seeds:
            labels = _more_right_pairs(first[seed], second[seed], places, drawn.shape[1])
            if not labels:
                return None
            observed.append(np.mean([more_right.sum() / pairs.sum() for more_right, pairs in labels]))
            resampled.append(_differences(labels, drawn))
        return Replicates(100 * np.array(observed), 100 * np.stack(resampled, 1), of_subsets)

    def curves(self, titles: Mapping[int, str]) -> Curves:
        """Return truth and score, both (N,), of each run by panel and arm, where both classes are known.

        Args:
            titles: title by number of labelled cases.
        """
        panels: Curves = {}
        for (labelled, label, arm, _), own in self.predictions.groupby(
            ["labelled", "label", "method", "seed"], sort=False
        ):
            known = own.dropna(subset="truth")
            if known["truth"].nunique() == 2:
                of_arm = panels.setdefault(f"{label}, {titles[int(str(labelled))]}", {}).setdefault(str(arm), [])
                of_arm.append((known["truth"].to_numpy(float), known["score"].to_numpy(float)))
        return panels

    def intervals_of_curves(self, titles: Mapping[int, str]) -> dict[str, dict[str, dict[str, float]]]:
        """Return points, low and high of each arm's mean AUROC, in the panels of `curves`.

        The 95 % interval is over cases, and over subsets if there are several. It is NaN if the positives or negatives
        come from too few patients.
        """
        found: dict[str, dict[str, dict[str, float]]] = {}
        for (labelled, label), own in self.predictions.groupby(["labelled", "label"], sort=False):
            of_label, number = AurocScores(own, self.patients), int(str(labelled))
            for arm, runs in of_label.runs.dropna().groupby("method", sort=False):
                low, high = np.nan, np.nan
                over_chance = of_label.replicates(str(arm), None, number, np.random.default_rng(0))
                if over_chance is not None:
                    of = intervals.interval if len(over_chance.observed) > 1 else intervals.interval_over_cases
                    low, high = (self.chance + end for end in of(over_chance))
                values = {"points": float(runs["points"].mean()), "low": low, "high": high}
                found.setdefault(f"{label}, {titles[number]}", {})[str(arm)] = values
        return found


def _fewest_patients(predictions: pd.DataFrame, names: Mapping[str, str]) -> int:
    """Return the smallest number of patients among the positives or negatives of any label."""
    known = predictions.dropna(subset="truth").assign(patient=lambda frame: frame["case"].map(names))
    of_classes = known.groupby(["label", "truth"])["patient"].nunique()
    return int(of_classes.min()) if len(of_classes) else 0


def _more_right_pairs(
    first: pd.DataFrame, second: pd.DataFrame, places: Mapping[str, int], num: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return two counts for each label with pairs: the first's lead in pairs in the right order, and all pairs.

    Args:
        first, second: predictions of the same samples.
        places: block of patients by case.
        num: number of blocks.

    Returns:
        matrices (num, num), see `_pairs`.
    """
    labels, others = [], dict(list(second.groupby("label", sort=False)))
    for label, own in first.groupby("label", sort=False):
        place, truth = own["case"].map(places).to_numpy(int), own["truth"].to_numpy(float)
        score, score_over = (frame["score"].to_numpy(float) for frame in (own, others[label]))
        more_right = _pairs(truth, score, place, num) - _pairs(truth, score_over, place, num)
        labels.append((more_right, _pairs(truth, None, place, num)))
    return [(more_right, pairs) for more_right, pairs in labels if pairs.any()]


def _differences(labels: list[tuple[np.ndarray, np.ndarray]], drawn: np.ndarray) -> np.ndarray:
    """Return (BOOTSTRAPS,): the difference of two AUROCs in each draw of blocks, mean over the labels."""
    sums = np.array([[((drawn @ matrix) * drawn).sum(1) for matrix in of_label] for of_label in labels])
    counts = sums[:, 1] > 0  # (labels, BOOTSTRAPS): a draw may lack pairs of a rare label
    differences = np.divide(sums[:, 0], sums[:, 1], out=np.zeros(counts.shape), where=counts)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN if a draw has no pair at all
        mean: np.ndarray = differences.sum(0) / counts.sum(0)
    return mean


def _pairs(truth: np.ndarray, score: np.ndarray | None, place: np.ndarray, num: int) -> np.ndarray:
    """Return (num, num): number of pairs in the right order, ties half, by place of positive and negative.

    Args:
        truth: (N,) 1, 0, or NaN for unknown.
        score: (N,); None: count all pairs.
        place: (N,) 0 to num - 1.
    """
    counted = np.zeros((num, num))
    positive, negative = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    for i in positive:
        right = None
        if score is not None:
            right = (score[i] > score[negative]) + 0.5 * (score[i] == score[negative])
        counted[place[i]] += np.bincount(place[negative], right, num)
    return counted
