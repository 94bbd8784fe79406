"""PCRLv1's information test (ICCV 2021, Table 1): what can a linear layer tell from frozen features?

Two questions: how a crop was turned, and where a neighbouring crop lies. N: crops, D: features, C: image channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from pcrl_nnunet.features.embedding import precision
from pcrl_nnunet.features.voxels import batch_of
from pcrl_nnunet.features.windows import read
from pcrl_nnunet.loading.cases import Case, CaseVolume
from pcrl_nnunet.networks import mean_and_maximum
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.views.configure import turnable_crop
from pcrl_nnunet.views.sub_crop import Volume
from pcrl_nnunet.views.turns import Turn, turns

TRAINING, HELD_OUT = 1000, 500  # crops of a question


@dataclass(frozen=True)
class Answer:
    """The share of right answers on held-out cases.

    Attributes:
        classes: number of possible answers, all equally frequent.
        crops: number of held-out crops.
    """

    task: str
    classes: int
    accuracy: float
    crops: int


@dataclass(frozen=True)
class TurnOfACrop:
    """The turn of a crop, of the turns that the plan allows."""

    size: Sequence[int]
    answers: Sequence[Turn]
    name = "turn"

    def crops(self, volume: Volume, answer: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Draw a crop, turned."""
        return [self.answers[answer].apply(drawn(volume, self.size, rng))]


@dataclass(frozen=True)
class PlaceOfANeighbour:
    """The direction from a crop to the next one: 8 directions in 2D, the 6 faces in 3D.

    In 3D, a neighbour behind an edge or a corner would need images of twice the crop along two or three axes.
    """

    size: Sequence[int]
    answers: Sequence[tuple[int, ...]]
    name = "place"

    def crops(self, volume: Volume, answer: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Draw a crop and its neighbour."""
        direction = self.answers[answer]
        both = drawn(volume, [(1 + abs(step)) * n for step, n in zip(direction, self.size, strict=True)], rng)
        crops = []
        for side in (-1, 1):
            starts = [(step == side) * n for step, n in zip(direction, self.size, strict=True)]
            index = (slice(None), *(slice(low, low + n) for low, n in zip(starts, self.size, strict=True)))
            crops.append(both[index])
        return crops


def questions(plan: PlanFacts) -> list[TurnOfACrop | PlaceOfANeighbour]:
    """Return the questions for a plan. The crops of the second one have half the edges of the patch.

    The crops of the first one lie within the median image: repeated borders would tell the turn.
    """
    dim = len(plan.patch_size)
    steps = [step for step in itertools.product((-1, 0, 1), repeat=dim) if any(step)]
    neighbours = [step for step in steps if dim == 2 or sum(map(abs, step)) == 1]
    total = [math.prod(stride[axis] for stride in plan.strides) for axis in range(dim)]
    # two voxels of the last stage along each axis that has them: instance norm leaves nothing of a single voxel
    half = [max(min(2, n // t), n // 2 // t, 1) * t for n, t in zip(plan.patch_size, total, strict=True)]
    return [TurnOfACrop(turnable_crop(plan), turns(plan.spacing)), PlaceOfANeighbour(half, neighbours)]


def information(
    encoder: nn.Module,
    plan: PlanFacts,
    training: Sequence[Case],
    held_out: Sequence[Case],
    seed: int,
    device: torch.device,
) -> Iterator[Answer]:
    """Yield the answers to the questions. The crops follow the seed alone, so that all networks see the same crops.

    Args:
        encoder: returns the features of all stages; the last one is pooled.
        training: cases whose crops train the linear layer.
        held_out: cases whose crops are scored.
        device: where the encoder is.
    """
    for question in questions(plan):
        features, truth = _features(encoder, question, training, TRAINING, np.random.default_rng((seed, 0)), device)
        scored, expected = _features(encoder, question, held_out, HELD_OUT, np.random.default_rng((seed, 1)), device)
        layer = LogisticRegression(C=1 / features.shape[1], max_iter=1000)  # a logit varies by about 1
        found = make_pipeline(StandardScaler(), layer).fit(features, truth).predict(scored)
        yield Answer(question.name, len(question.answers), float((found == expected).mean()), len(expected))


def _features(
    encoder: nn.Module,
    question: TurnOfACrop | PlaceOfANeighbour,
    cases: Sequence[Case],
    number: int,
    rng: np.random.Generator,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """Return pooled features (N, D) and answers (N,). The features of a question's crops are concatenated."""
    answers = rng.permutation(np.arange(number) % len(question.answers))
    rows: list[np.ndarray] = []
    parts = np.array_split(np.arange(number), min(len(cases), number))
    for part, places in enumerate(parts):
        volume = CaseVolume(cases[part * len(cases) // len(parts)])
        for some in np.array_split(places, math.ceil(len(places) / batch_of(question.size))):
            groups = [question.crops(volume, int(answers[place]), rng) for place in some]
            images = torch.from_numpy(np.stack([crop for group in groups for crop in group])).to(device)
            with torch.no_grad(), precision(device):
                pooled = mean_and_maximum(encoder(images)[-1].float())
            rows.append(pooled.reshape(len(groups), -1).cpu().numpy())
    return np.concatenate(rows), answers


def drawn(volume: Volume, size: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Draw a box (C, *size) inside a volume (C, *). Where the volume is smaller, its border is repeated."""
    shape = volume.shape[1:]
    edges = (*(1 for _ in range(len(shape) - len(size))), *size)
    lower = [
        int(rng.integers(n - edge + 1)) if n >= edge else -((edge - n) // 2)
        for n, edge in zip(shape, edges, strict=True)
    ]
    return read(volume, lower, size)
