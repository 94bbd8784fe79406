"""Shortcut baselines for the AUROC of a classification. N: samples.

A dataset may give its classes away: images of two sources differ in brightness or framing, or nodules lie in other
places than other points. A logistic regression on such a feature shows how much of an AUROC the feature explains.
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

from pcrl_nnunet.classification.drawing import Drawing
from pcrl_nnunet.classification.label_table import LabelTable, read_labels
from pcrl_nnunet.classification.patches import cut, input_size
from pcrl_nnunet.classification.prediction import table_of, write_evaluation
from pcrl_nnunet.classification.world import opened
from pcrl_nnunet.config import ClassifySettings
from pcrl_nnunet.loading.cases import Case, find_cases
from pcrl_nnunet.loading.splits import fold_of
from pcrl_nnunet.plans import PlannedConfiguration

THUMBNAIL_2D, THUMBNAIL_3D = (16, 16), (8, 8, 8)  # voxels: 256 and 512 features a channel
MAX_TRAINING = 10_000  # samples; if there are more, this number is drawn


def thumbnail(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Downsample the input (C, *size) to a few voxels by averaging."""
    given = torch.from_numpy(image)
    small = adaptive_avg_pool2d(given, THUMBNAIL_2D) if image.ndim == 3 else adaptive_avg_pool3d(given, THUMBNAIL_3D)
    return np.asarray(small).ravel()


def mean_intensity(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return the mean of each channel of the input (C, *size)."""
    return image.reshape(len(image), -1).mean(1)


def position(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Return a point's position as a share of the image along each axis."""
    return where


SHORTCUTS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    f.__name__: f for f in (thumbnail, mean_intensity, position)
}


def shortcuts_of(labels: LabelTable) -> list[str]:
    """Return the names of the shortcuts of a table: cases have no position."""
    return [name for name, of in SHORTCUTS.items() if of is not position or labels.point is not None]


def features(
    name: str,
    labels: LabelTable,
    samples: np.ndarray,
    cases: Mapping[str, Case],
    size: Sequence[int],
    axes: Sequence[int],
) -> np.ndarray:
    """Return the features (N, features) of the patch around each point, or of each case's whole image.

    Args:
        size: size of a patch, voxels.
        axes: the plan's transpose_forward.
    """
    of_name = SHORTCUTS[name]
    rows: list[np.ndarray] = [np.empty(0)] * len(samples)
    for of_case, volume, centres in opened(labels, samples, cases, axes):
        shape = volume.shape[1:]
        if centres is None:
            image = np.asarray(volume[tuple([slice(None)] * (1 + len(shape)))], np.float32)
            image = image[:, 0] if len(size) == 2 and shape[0] == 1 else image
            rows[of_case[0]] = of_name(image, np.zeros(len(shape)))
            continue
        for i, place in zip(of_case, centres, strict=True):
            patch = np.empty(0) if of_name is position else cut(volume, place, size)
            rows[i] = of_name(patch, place / shape)
    return np.stack(rows)


def predict(training: np.ndarray, truth: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """Return probabilities (M, L) from a logistic regression for each output.

    Features are standardised. The weights' prior variance is 1 / number of features: a logit varies by about 1, with
    one feature or with hundreds.

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
    """Fit a shortcut to a fold's training samples, and write the same files as a training's validation.

    Args:
        name: one of `SHORTCUTS`.
        folder: destination of predictions.csv, roc.png and auroc.json.
    """
    configuration = PlansManager(plan.plans).get_configuration(plan.configuration)
    settings = ClassifySettings.from_plan(plan.plans)
    labels = read_labels(plan.folder, settings.table or None)
    cases = {case.name: case for case in find_cases(os.path.join(plan.folder, plan.resolved["data_identifier"]))}
    split = fold_of(plan.folder, fold, cases)
    train, scored = (labels.of_cases(names) for names in (split.train, split.val))
    if len(train) > MAX_TRAINING:
        train = Drawing(labels, train, settings.balanced)(np.random.default_rng(0), MAX_TRAINING)
    size = input_size(labels, settings.patch_mm, configuration)
    of_train, of_scored = (
        features(name, labels, samples, cases, size, plan.plans["transpose_forward"]) for samples in (train, scored)
    )
    found = predict(of_train, labels.value[train], of_scored)
    os.makedirs(folder, exist_ok=True)
    write_evaluation(table_of(labels, scored, found), labels, scored, folder)
