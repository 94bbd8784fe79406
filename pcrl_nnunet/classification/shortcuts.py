"""What a classification reaches by a shortcut: the baselines beside which its AUROC is to be read. N samples.

Datasets give classes away by what is not meant: images of two sources that differ in brightness or framing, nodules
that lie where others do not. A logistic regression on such a feature shows how much of an AUROC that explains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.functional import adaptive_avg_pool2d, adaptive_avg_pool3d

from pcrl_nnunet.classification.crops import cut, input_size, places
from pcrl_nnunet.classification.prediction import table_of, write_evaluation
from pcrl_nnunet.classification.targets import Drawing, Targets, read_targets
from pcrl_nnunet.config import ClassifySettings
from pcrl_nnunet.loading.cases import Case, CaseVolume, find_cases
from pcrl_nnunet.loading.splits import fold_of
from pcrl_nnunet.plans import PlannedConfiguration

THUMBNAIL_2D, THUMBNAIL_3D = (16, 16), (8, 8, 8)  # voxels: 256 and 512 features a channel
MAX_TRAINING = 10_000  # samples; of more, so many are drawn


def thumbnail(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """The input (C, *size), averaged down to a few voxels."""
    given = torch.from_numpy(image)
    small = adaptive_avg_pool2d(given, THUMBNAIL_2D) if image.ndim == 3 else adaptive_avg_pool3d(given, THUMBNAIL_3D)
    return np.asarray(small).ravel()


def mean_intensity(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Of every channel."""
    mean: np.ndarray = image.reshape(len(image), -1).mean(1)
    return mean


def position(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Of a point, in shares of its image, an axis an entry."""
    return where


SHORTCUTS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    f.__name__: f for f in (thumbnail, mean_intensity, position)
}


def features(
    name: str,
    targets: Targets,
    samples: np.ndarray,
    cases: Mapping[str, Case],
    size: Sequence[int],
    axes: Sequence[int],
) -> np.ndarray:
    """(N, features) of what a network would see: the crop around a point; of a case its whole image.

    Args:
        size: of a crop, voxels.
        axes: the plan's transpose_forward.
    """
    of_name = SHORTCUTS[name]
    rows: list[np.ndarray] = [np.empty(0)] * len(samples)
    for case_name in dict.fromkeys(targets.case[samples]):  # a scan is opened once
        case = cases[str(case_name)]
        volume = CaseVolume(case)
        shape = volume.shape[1:]
        for i in np.flatnonzero(targets.case[samples] == case_name):
            if targets.point is None:
                image = np.asarray(volume[tuple([slice(None)] * (1 + len(shape)))], np.float32)
                image = image[:, 0] if len(size) == 2 and shape[0] == 1 else image
                rows[i] = of_name(image, np.zeros(len(shape)))
            else:
                (place,) = places(targets.point[samples[[i]]], case, shape, axes)
                crop = np.empty(0) if of_name is position else cut(volume, place, size)
                rows[i] = of_name(crop, place / shape)
    return np.stack(rows)


def predict(training: np.ndarray, truth: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """(M, L) probabilities by a logistic regression an output.

    Standardised features; a prior of variance 1 / their number for the weights lets a logit vary by about 1, whether
    there is one feature or hundreds.

    Args:
        training: (N, features).
        truth: (N, L) 1, 0, or NaN for unknown.
        scored: (M, features).
    """
    found = np.empty((len(scored), truth.shape[1]))
    for i, column in enumerate(truth.T):
        known = ~np.isnan(column)
        values = np.unique(column[known])
        if len(values) < 2:  # nothing to tell apart
            found[:, i] = values[0] if len(values) else 0.5
            continue
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=1 / training.shape[1], class_weight="balanced", max_iter=1000)
        )
        found[:, i] = model.fit(training[known], column[known]).predict_proba(scored)[:, 1]
    return found


def write(name: str, plan: PlannedConfiguration, fold: int, folder: str) -> None:
    """Fit a shortcut to a fold's training samples, and write what a training writes of its validation samples.

    Args:
        name: one of `SHORTCUTS`.
        folder: gets predictions.csv, roc.png and auroc.json.
    """
    configuration = PlansManager(plan.plans).get_configuration(plan.configuration)
    settings = ClassifySettings.from_plan(plan.plans)
    targets = read_targets(plan.folder, settings.target or None)
    cases = {case.name: case for case in find_cases(os.path.join(plan.folder, plan.resolved["data_identifier"]))}
    split = fold_of(plan.folder, fold, cases)
    train, scored = (targets.of_cases(names) for names in (split.train, split.val))
    if len(train) > MAX_TRAINING:
        train = Drawing(targets, train, settings.balanced)(np.random.default_rng(0), MAX_TRAINING)
    size = input_size(targets, settings.crop_mm, configuration)
    of_train, of_scored = (
        features(name, targets, samples, cases, size, plan.plans["transpose_forward"]) for samples in (train, scored)
    )
    found = predict(of_train, targets.value[train], of_scored)
    os.makedirs(folder, exist_ok=True)
    write_evaluation(table_of(targets, scored, found), targets, scored, folder)
