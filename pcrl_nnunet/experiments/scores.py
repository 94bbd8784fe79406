"""The table, the intervals and the verdict of a comparison's scores. S seeds (labelled subsets), K cases."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from pcrl_nnunet.classification.auroc import LEVEL, MIN_GROUPS, auroc

CONTROL = "scratch"
STOCK = "stock"
COLUMNS = ("method", "labelled", "seed", "case", "label", "dice")
PREDICTION_COLUMNS = ("method", "labelled", "seed", "case", "sample", "label", "truth", "score")
BOOTSTRAPS = 10_000
MAX_BLOCKS = 500  # of patients that are drawn together; of more patients several are in one
WORTH = 0.5  # points: a gain that surely is smaller does not pay
LEARNED = 1.0  # points above `Scores.chance`: a network with fewer has learned nothing


class Scores(ABC):
    """The scores of a comparison's finished runs, in points (100 is perfect).

    Attributes:
        measure: name of the score.
        chance: the most points that a prediction reaches without a look at the image.
        runs: columns method, labelled, seed, points; one row a run.
    """

    measure: str
    chance: float
    runs: pd.DataFrame

    @abstractmethod
    def replicates(self, method: str, over: str | None, labelled: int, rng: np.random.Generator) -> Replicates | None:
        """Return the differences on the subsets that both methods have; None where there is none.

        Args:
            over: another method; None: the prediction with the points of `chance`.
        """

    def has_learned(self, method: str, labelled: int) -> bool:
        """Tell if a method's networks are surely better than `chance`, and by `LEARNED` points at least.

        The interval is of these networks on other cases: other subsets might teach more, or nothing.
        """
        found = self.replicates(method, None, labelled, np.random.default_rng(0))
        if found is None:
            return False
        low = np.nanquantile(found.resampled.mean(1), (1 - LEVEL) / 2)
        return bool(low > 0 and found.observed.mean() >= LEARNED)

    def gain(self, method: str, over: str, labelled: int) -> dict[str, float]:
        """Paired difference of two methods on the subsets and cases that both have, in points.

        Returns:
            pairs (subsets), difference, low, high; empty without a pair, and NaN for the interval of a single one,
            which says nothing of other subsets.
        """
        found = None if method == over else self.replicates(method, over, labelled, np.random.default_rng(0))
        if found is None:
            return {}
        low, high = interval(found) if len(found.observed) > 1 else (float("nan"), float("nan"))
        return {"pairs": len(found.observed), "difference": float(found.observed.mean()), "low": low, "high": high}


@dataclass(frozen=True)
class Replicates:
    """Differences of two methods, each on the same cases.

    Args:
        observed: (S,) of every subset.
        resampled: (BOOTSTRAPS, S) of cases that were drawn with replacement, a draw for all subsets; NaN where a draw
            has no score.
        of_subsets: (BOOTSTRAPS, S), how often each subset is drawn.
    """

    observed: np.ndarray
    resampled: np.ndarray
    of_subsets: np.ndarray


def interval(found: Replicates) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired differences, over labelled subsets and cases at once.

    A bootstrap of a few subsets is too narrow, as it takes their spread for that of all subsets. Their distances from
    the mean are widened first, as far as Student's interval of S values is wider than a bootstrap's:
    t(S-1) / z * sqrt(S / (S-1)). S is at least 2.
    """
    num = len(found.observed)
    z, t = stats.norm.ppf((1 + LEVEL) / 2), stats.t.ppf((1 + LEVEL) / 2, num - 1)
    further = (t / z * np.sqrt(num / (num - 1)) - 1) * (found.observed - found.observed.mean())
    means = (found.of_subsets * (found.resampled + further)).sum(1) / num
    low, high = np.nanquantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _drawn(num: int, rng: np.random.Generator) -> np.ndarray:
    """(BOOTSTRAPS, num), how often each of `num` is drawn with replacement."""
    counts: np.ndarray = rng.multinomial(num, np.full(num, 1 / num), BOOTSTRAPS)
    return counts


def of_differences(differences: np.ndarray, rng: np.random.Generator, patients: np.ndarray | None = None) -> Replicates:
    """Of a mean over cases.

    Args:
        differences: (S, K), of the same cases for every subset.
        patients: (K,), whose cases are drawn together; None: each is a patient.
    """
    num_seeds, num_cases = differences.shape
    _, patient = np.unique(np.arange(num_cases) if patients is None else patients, return_inverse=True)
    of_subsets = _drawn(num_seeds, rng)
    of_cases = _drawn(patient.max() + 1, rng)[:, patient]
    return Replicates(differences.mean(1), of_cases @ differences.T / of_cases.sum(1, keepdims=True), of_subsets)


class DiceScores(Scores):
    """Mean over cases of the mean over a case's labels.

    nnU-Net gives no score to a label that neither the truth nor the prediction has. That prediction is right, and
    counts 1: left out, a method that finds nothing where nothing is would not be better than one that does.

    Args:
        scores: columns `COLUMNS`.
        patients: of the cases; one that is not in it is its own patient.
        shares: of each case and label, the share of the voxels that have the label; a case without has it in few.
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

    def replicates(self, method: str, over: str | None, labelled: int, rng: np.random.Generator) -> Replicates | None:
        """As `Scores` says."""
        of_number = self.cases[self.cases["labelled"] == labelled]
        first, second = (of_number[of_number["method"] == name] for name in (method, over or method))
        if over is None:
            second = second.assign(points=second["case"].map(self.blind).fillna(0.0))
        paired = first.merge(second, on=["seed", "case"], suffixes=("", "_over"))
        if paired.empty:
            return None
        paired["difference"] = paired["points"] - paired["points_over"]
        matrix = paired.pivot(index="seed", columns="case", values="difference")
        of_patient = np.array([self.patients.get(case, case) for case in matrix.columns])
        return of_differences(matrix.to_numpy(), rng, of_patient)


def blind_dice(shares: Mapping[tuple[str, str], float]) -> pd.Series[float]:
    """Return the points of each case that a prediction can reach without a look at the image.

    Voxels that are drawn at random, a share q of them, have a Dice of about 2 p q / (p + q) with a label of a share p:
    at most 2 p / (1 + p), where all voxels are drawn. If a case lacks the label, only a prediction without it is right.
    Each label is predicted nowhere or everywhere, whichever is better over the cases. Labels that exclude each other
    cannot all be everywhere, so that the points are an upper bound.

    Args:
        shares: of each case and label, the share p of the voxels that have the label.
    """
    if not shares:
        return pd.Series(dtype=float)
    share = pd.Series(dict(shares)).unstack()
    nowhere, everywhere = (share == 0).astype(float), 2 * share / (1 + share)
    best = {label: max(nowhere[label], everywhere[label], key=lambda dice: dice.mean()) for label in share}
    points: pd.Series[float] = 100 * pd.DataFrame(best).mean(axis=1)
    return points


class AurocScores(Scores):
    """Area under the ROC curve, mean over the labels.

    Args:
        predictions: columns `PREDICTION_COLUMNS`; of all runs of the same samples, of each all.
        patients: of the cases; one that is not in it is its own patient. Their samples are drawn together.
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

    def replicates(self, method: str, over: str | None, labelled: int, rng: np.random.Generator) -> Replicates | None:
        """As `Scores` says; None also where the positives or the negatives are too few to tell chance.

        An AUROC is a mean over pairs of a positive and a negative. Summed up by the patients of both, once, a draw of
        patients is a weighted sum of these.
        """
        of_number = self.predictions[self.predictions["labelled"] == labelled]
        cases = of_number["case"].unique()
        names = {case: self.patients.get(case, case) for case in cases}
        first, second = (
            dict(list(of_number[of_number["method"] == m].groupby("seed"))) for m in (method, over or method)
        )
        if over is None:
            second = {seed: frame.assign(score=0.0) for seed, frame in second.items()}  # all pairs are ties
        seeds = sorted(first.keys() & second.keys())
        if not seeds or (over is None and _fewest_patients(of_number, names) < MIN_GROUPS):
            return None
        block = {name: i % MAX_BLOCKS for i, name in enumerate(rng.permutation(sorted(set(names.values()))))}
        num = max(block.values()) + 1
        of_subsets, drawn = _drawn(len(seeds), rng), _drawn(num, rng)
        observed, resampled = [], []
        for seed in seeds:
            labels = []
            others = dict(list(second[seed].groupby("label", sort=False)))
            for label, own in first[seed].groupby("label", sort=False):
                place = own["case"].map(lambda case: block[names[case]]).to_numpy(int)
                truth, score, score_over = (
                    frame[column].to_numpy(float)
                    for frame, column in ((own, "truth"), (own, "score"), (others[label], "score"))
                )
                more_right = _pairs(truth, score, place, num) - _pairs(truth, score_over, place, num)
                labels.append((more_right, _pairs(truth, None, place, num)))
            labels = [(more_right, pairs) for more_right, pairs in labels if pairs.any()]
            if not labels:
                return None
            observed.append(np.mean([more_right.sum() / pairs.sum() for more_right, pairs in labels]))
            sums = np.array([[((drawn @ matrix) * drawn).sum(1) for matrix in of_label] for of_label in labels])
            counts = sums[:, 1] > 0  # (labels, BOOTSTRAPS): of a rare label a draw may have no pair
            differences = np.divide(sums[:, 0], sums[:, 1], out=np.zeros(counts.shape), where=counts)
            with np.errstate(invalid="ignore"):  # 0 / 0 is NaN where it has none of any
                resampled.append(differences.sum(0) / counts.sum(0))
        return Replicates(100 * np.array(observed), 100 * np.stack(resampled, 1), of_subsets)

    def curves(self, titles: Mapping[int, str]) -> dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]]:
        """Return truth and score, both (N,), of each run by panel and method, where both classes are known.

        Args:
            titles: of the numbers of labelled cases.
        """
        panels: dict[str, dict[str, list[tuple[np.ndarray, np.ndarray]]]] = {}
        for (labelled, label, method, _), own in self.predictions.groupby(
            ["labelled", "label", "method", "seed"], sort=False
        ):
            known = own.dropna(subset="truth")
            if known["truth"].nunique() == 2:
                of_method = panels.setdefault(f"{label}, {titles[int(str(labelled))]}", {}).setdefault(str(method), [])
                of_method.append((known["truth"].to_numpy(float), known["score"].to_numpy(float)))
        return panels


def _fewest_patients(predictions: pd.DataFrame, names: Mapping[str, str]) -> int:
    """Return how many patients the positives or the negatives of a label are of: of all labels and both the fewest."""
    known = predictions.dropna(subset="truth").assign(patient=lambda frame: frame["case"].map(names))
    of_classes = known.groupby(["label", "truth"])["patient"].nunique()
    return int(of_classes.min()) if len(of_classes) else 0


def _pairs(truth: np.ndarray, score: np.ndarray | None, place: np.ndarray, num: int) -> np.ndarray:
    """(num, num): by place of the positive and of the negative, how many pairs are in the right order, ties half.

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


def table(scores: Scores) -> pd.DataFrame:
    """One row a method and number of labelled cases, in points.

    Columns: method, labelled, seeds, mean, sd (over seeds), learned (see `Scores.has_learned`), and of `Scores.gain`
    over `CONTROL`: pairs (seeds that both have), difference, low, high (of its 95 % interval).
    """
    rows = []
    for (labelled, method), group in scores.runs.groupby(["labelled", "method"], sort=False):
        points = group["points"]
        row = {
            "method": method, "labelled": labelled, "seeds": len(points), "mean": points.mean(), "sd": points.std(),
            "learned": scores.has_learned(method, labelled),
        }  # fmt: skip
        rows.append({**row, "pairs": 0, **scores.gain(method, CONTROL, labelled)})
    columns = ["method", "labelled", "seeds", "mean", "sd", "learned", "pairs", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns).sort_values("labelled", kind="stable", ignore_index=True)


def networks_that_learned(rows: pd.DataFrame, shortcuts: Iterable[str] = ()) -> dict[int, list[str]]:
    """Return the methods whose networks learned, by number of labels; empty where none did.

    Args:
        rows: the `table`.
        shortcuts: methods that are no networks.
    """
    networks = rows[~rows["method"].isin(list(shortcuts))]
    return {int(n): list(own.loc[own["learned"], "method"]) for n, own in networks.groupby("labelled")}


def note_on_learning(
    scores: Scores, learned: Mapping[int, Sequence[str]], remedy: str, shortcuts: Iterable[str] = ()
) -> str | None:
    """Name the networks that learned nothing, with what to do; None if all learned something.

    Args:
        learned: by `networks_that_learned`.
        remedy: a sentence.
    """
    networks, told = scores.runs[~scores.runs["method"].isin(list(shortcuts))], []
    by_luck = False  # a mean above chance of too few cases
    for labelled in sorted(learned):
        means = networks[networks["labelled"] == labelled].groupby("method", sort=False)["points"].mean()
        failed = means[~means.index.isin(learned[labelled])]
        if not learned[labelled]:
            luck = bool(means.max() >= scores.chance + LEARNED)
            by_luck |= luck
            kind = "is surely better than chance" if luck else "learned anything"
            told.append(f"with {labelled} labels no network {kind} (the best, {means.idxmax()}: {means.max():.1f})")
        elif len(failed):
            listed = ", ".join(f"{method}: {points:.1f}" for method, points in failed.items())
            told.append(f"with {labelled} labels some networks learned nothing ({listed})")
    if not told:
        return None
    start = "There is no verdict: " if by_luck else "Nothing was learned, and there is no verdict: "
    start = "" if any(learned.values()) else start
    chance = f"without a look at the images a prediction reaches up to {scores.chance:.1f} {scores.measure}"
    told[0] = told[0] if start else told[0][0].upper() + told[0][1:]
    return f"{start}{'; '.join(told)}; {chance}. {remedy}"


def verdict(
    scores: Scores,
    method: str,
    learned: Mapping[int, Sequence[str]],
    controls: Sequence[str] = (CONTROL, STOCK),
) -> str:
    """A sentence to act on: what a method gains at every number of labels over the better of the controls.

    Args:
        learned: by `networks_that_learned`. If neither the method nor the control learned, their difference says
            nothing.
    """
    told, numbers, pays, costs, highs, nothing = [], [], [], [], [], []
    for labelled in sorted(scores.runs["labelled"].unique()):
        control = _better_control(scores, method, labelled, controls)
        found = {} if control is None else scores.gain(method, control, labelled)
        if not found:
            continue
        if not {method, control} & {*learned.get(labelled, ())}:
            nothing.append(f"with {labelled} labels neither {method} nor {control} surely learned anything")
            continue
        low, high = found["low"], found["high"]
        numbers.append(str(labelled))
        highs.append(high)
        if low > 0 and high >= WORTH:
            pays.append(str(labelled))
        elif high < 0:
            costs.append(str(labelled))
        kind = "expect" if low > 0 else "it costs" if high < 0 else "undecided,"
        between = f"{low:+.1f} to {high:+.1f}, " if np.isfinite(low) else ""
        subsets = f"{found['pairs']} subset{'s' * (found['pairs'] > 1)}"
        gain = f"{found['difference']:+.1f} {scores.measure} over {control}"
        told.append(f"with {labelled} labels {kind} {gain} ({between}{subsets})")
    if not told and nothing:
        return f"Nothing can be said of {method}: {'; '.join(nothing)}."
    if not told:
        return f"Nothing can be said of {method} yet: there is no finished pair of it and {CONTROL}."
    if pays:
        start = f"{method} pays"
        if len(pays) < len(told) + len(nothing):
            start += f" with {', '.join(pays)} labels" + f", and costs with {', '.join(costs)}" * bool(costs)
    elif all(high < WORTH for high in highs):
        start = f"{method} does not pay " + (f"with {', '.join(numbers)} labels" if nothing else "here")
    else:
        most = f" (at most {max(highs):+.1f} {scores.measure})" if np.isfinite(highs).all() else ""
        start = f"Whether {method} pays is undecided{most}, more subsets (-seeds) or scored cases may tell"
    return f"{start}: {'; '.join(told + nothing)}."


def _better_control(scores: Scores, method: str, labelled: int, controls: Sequence[str]) -> str | None:
    """The better of the controls on the subsets that a method has, too; None: there is none.

    Of one that was run on fewer of these than the other nothing is said: it would leave pairs out, and its mean over
    other subsets would say how easy they are.
    """
    of_number = scores.runs[scores.runs["labelled"] == labelled]
    points = of_number.pivot(index="seed", columns="method", values="points")
    names = [name for name in controls if name in points and name != method]
    if method not in points or not names:
        return None
    found = points.loc[points[method].notna(), names]
    pairs = found.notna().sum()
    found = found.loc[:, pairs == pairs.max()]
    common = found.dropna()
    return str(found.columns[0] if common.empty else common.mean().idxmax())


def shortcut_warning(scores: Scores, shortcuts: Iterable[str]) -> str | None:
    """Where a shortcut is as good as the best network: then neither number says that anything else was learned."""
    names, told = set(shortcuts), []
    for labelled in sorted(scores.runs["labelled"].unique()):
        means = scores.runs[scores.runs["labelled"] == labelled].groupby("method")["points"].mean()
        short, networks = means[means.index.isin(names)], means[~means.index.isin(names)]
        if len(short) and len(networks) and short.max() >= networks.max():
            told.append(
                f"with {labelled} labels {short.idxmax()} reaches {short.max():.1f}, {networks.idxmax()} "
                f"{networks.max():.1f}"
            )
    if not told:
        return None
    return f"A shortcut is as good as the best network: {'; '.join(told)}."
