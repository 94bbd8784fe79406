"""Probabilities of a trained classification for cases or points. N: samples, L: outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from pcrl_nnunet.classification import figures
from pcrl_nnunet.classification.auroc import MIN_GROUPS, auroc_interval, mean_auroc_interval
from pcrl_nnunet.classification.label_table import CASE, COORDINATES, LabelTable
from pcrl_nnunet.classification.patches import patches_of, tiles
from pcrl_nnunet.classification.world import opened
from pcrl_nnunet.files import write_text
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.views.sub_crop import Volume

BATCH = 8
PREDICTIONS, EVALUATION = "predictions.csv", "auroc.json"
MEAN = "mean over the labels"  # in auroc.json, beside the labels


class Predictor:
    """A predictor of mean probabilities over one or several trained classifiers (folds).

    A case gets the mean logit over the patches that cover it. A point gets the logit of the patch around it.

    Args:
        networks: in evaluation mode.
        names: names of the L outputs.
        exclusive: use softmax instead of sigmoid.
        size: the networks' input, voxels.
    """

    def __init__(
        self, networks: Sequence[Any], names: Sequence[str], exclusive: bool, size: Sequence[int], device: torch.device
    ) -> None:
        self.networks, self.exclusive, self.size, self.device = networks, exclusive, size, device
        self.names = tuple(names)
        self.columns = tuple(f"p_{name}" for name in names)

    @torch.inference_mode()
    def of_volume(self, volume: Volume, centres: np.ndarray | None) -> np.ndarray:
        """Return the probabilities: (N, L) for points (N, axes) in voxels, or (1, L) for the whole volume."""
        around = tiles(volume.shape[1:], self.size) if centres is None else list(centres)
        logits: list[list[torch.Tensor]] = [[] for _ in self.networks]
        for batch in patches_of(volume, around, self.size, BATCH):
            on_device = batch.to(self.device)
            for of_network, network in zip(logits, self.networks, strict=True):
                of_network.append(network(on_device).float().cpu())
        probabilities = []
        for of_network in logits:
            all_of_them = torch.cat(of_network)
            if centres is None:
                all_of_them = all_of_them.mean(0, keepdim=True)
            probabilities.append(all_of_them.softmax(1) if self.exclusive else all_of_them.sigmoid())
        return np.asarray(torch.stack(probabilities).mean(0))

    def of_samples(
        self, labels: LabelTable, samples: np.ndarray, cases: Mapping[str, Case], transpose: Sequence[int]
    ) -> pd.DataFrame:
        """Predict labelled samples, and return their table, see `table_of`."""
        found = np.full((len(samples), len(self.columns)), np.nan, np.float32)
        for of_case, volume, centres in opened(labels, samples, cases, transpose):
            found[of_case] = self.of_volume(volume, centres)
        return table_of(labels, samples, found)

    @torch.inference_mode()
    def activation(
        self, labels: LabelTable, index: int, cases: Mapping[str, Case], transpose: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return an input (C, *size) and the first network's class-activation maps (L, *size).

        For a case the input is the patch with the highest logit.
        """
        ((_, volume, centres),) = opened(labels, np.array([index]), cases, transpose)
        around = tiles(volume.shape[1:], self.size) if centres is None else list(centres)
        network = self.networks[0]
        highest, image = -np.inf, torch.empty(0)
        for batch in patches_of(volume, around, self.size, BATCH):
            logits = network(batch.to(self.device)).amax(1)
            if float(logits.max()) > highest:
                highest, image = float(logits.max()), batch[[int(logits.argmax())]]
        maps = network.activation_maps(image.to(self.device)).float().cpu()
        return image[0].numpy(), maps[0].numpy()


def table_of(labels: LabelTable, samples: np.ndarray, found: np.ndarray) -> pd.DataFrame:
    """Return a line for each sample, in order: case, coordinates of a point, p_NAME, and the truth as NAME.

    Args:
        found: (N, L) probabilities.
    """
    table = pd.DataFrame({CASE[labels.kind]: labels.case[samples]})
    if labels.point is not None:
        table[list(COORDINATES)] = labels.point[samples]
    table[[f"p_{name}" for name in labels.names]] = found
    table[list(labels.names)] = labels.value[samples]
    return table


def write_evaluation(table: pd.DataFrame, labels: LabelTable, samples: np.ndarray, folder: str) -> list[str]:
    """Write predictions.csv, roc.png and last auroc.json, and return a line for each label's AUROC.

    Args:
        table: the result of `table_of`.
    """
    table.to_csv(os.path.join(folder, PREDICTIONS), index=False)
    return write_scores(table, labels, samples, os.path.join(folder, ""))


def write_scores(table: pd.DataFrame, labels: LabelTable, samples: np.ndarray, prefix: str) -> list[str]:
    """Write the ROC curves and last the AUROCs, and return a line for each label and for their mean.

    Args:
        table: the result of `table_of`.
        prefix: beginning of the two paths.
    """
    truth, score = labels.value[samples], table[[f"p_{name}" for name in labels.names]].to_numpy()
    groups = np.array([labels.patient.get(name, name) for name in labels.case[samples]])
    found = {name: auroc_interval(truth[:, i], score[:, i], groups) for i, name in enumerate(labels.names)}
    figures.roc(truth, score, labels.names, found, f"{prefix}roc.png")
    lines = [
        f"AUROC of {name}: {value['auroc']:.3f}, {_said(value)} ({value['positive']} of {value['known']} positive)"
        for name, value in found.items()
    ]
    mean = mean_auroc_interval(truth, score, groups) if len(labels.names) > 1 else None
    if mean is not None and mean["labels"]:
        lines.append(
            f"Mean AUROC over {mean['labels']} of {len(labels.names)} labels: {mean['auroc']:.3f}, {_said(mean)}"
        )
        found[MEAN] = mean
    # JSON has no NaN, the AUROC of a label with one value
    written = {name: {key: None if v != v else v for key, v in of.items()} for name, of in found.items()}
    write_text(f"{prefix}{EVALUATION}", json.dumps(written, indent=4))
    return lines


def _said(found: Mapping[str, float]) -> str:
    if np.isnan(found["low"]):
        return f"no interval, as positives or negatives are of fewer than {MIN_GROUPS} patients (or cases)"
    return f"95 % interval {found['low']:.3f} to {found['high']:.3f}"
