"""The cheap look at a classification: a logistic regression on frozen vectors, scored by AUROC."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from pcrl_nnunet.classification.drawing import Drawing
from pcrl_nnunet.classification.label_table import LabelTable
from pcrl_nnunet.classification.patches import cut, input_size
from pcrl_nnunet.classification.shortcuts import MAX_TRAINING, features, predict, shortcuts_of
from pcrl_nnunet.classification.world import opened
from pcrl_nnunet.config import ClassifySettings
from pcrl_nnunet.features.embedding import embedding
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.plans import PlannedConfiguration

Rows = list[tuple[str, int, str, float, float]]


class TableTask:
    """The labels of cases or points, and the training and scoring of heads on them.

    Args:
        plan: the dataset's plan, with the settings of the comparison.
        table: the labels.
        cases: cases by name.
    """

    def __init__(self, plan: PlannedConfiguration, table: LabelTable, cases: Mapping[str, Case]) -> None:
        self.settings = ClassifySettings.from_plan(plan.plans)
        configuration = PlansManager(plan.plans).get_configuration(plan.configuration)
        self.size = input_size(table, self.settings.patch_mm, configuration)
        self.table, self.cases, self.axes = table, cases, plan.plans["transpose_forward"]

    @property
    def shortcuts(self) -> list[str]:
        """Names of the shortcuts that these labels can have."""
        return shortcuts_of(self.table)

    def scores(
        self,
        encoder: nn.Module,
        labelled: Mapping[int, Sequence[str]],
        scored: Sequence[str],
        device: torch.device,
    ) -> dict[int, Rows]:
        """Return case, sample, label, truth and score, by number of labelled cases.

        Args:
            labelled: labelled cases by their number.
            scored: scored cases.
        """
        return self._scores(lambda samples: self._vectors(encoder, samples, device), labelled, scored)

    def scores_of_shortcut(
        self, name: str, labelled: Mapping[int, Sequence[str]], scored: Sequence[str]
    ) -> dict[int, Rows]:
        """Return what `scores` returns, with a shortcut's features in place of an encoder's."""
        return self._scores(
            lambda samples: features(name, self.table, samples, self.cases, self.size, self.axes), labelled, scored
        )

    def _scores(
        self,
        features_of: Callable[[np.ndarray], np.ndarray],
        labelled: Mapping[int, Sequence[str]],
        scored: Sequence[str],
    ) -> dict[int, Rows]:
        """See `scores`; `features_of` returns (N, D) of N samples."""
        training = {number: self._training(names) for number, names in labelled.items()}
        test = self.table.of_cases(scored)
        needed = np.unique(np.concatenate([test, *training.values()]))
        vectors = features_of(needed)
        of_test = vectors[np.searchsorted(needed, test)]
        rows: dict[int, Rows] = {}
        for number, samples in training.items():
            found = predict(vectors[np.searchsorted(needed, samples)], self.table.value[samples], of_test)
            rows[number] = [
                (str(self.table.case[index]), sample, label, float(self.table.value[index, i]), float(found[sample, i]))
                for i, label in enumerate(self.table.names)
                for sample, index in enumerate(test)
            ]
        return rows

    def _training(self, names: Sequence[str]) -> np.ndarray:
        """Return the samples of the labelled cases, or some of them if there are very many."""
        samples = self.table.of_cases(names)
        if len(samples) <= MAX_TRAINING:
            return samples
        drawing = Drawing(self.table, samples, self.settings.balanced)
        return np.asarray(drawing(np.random.default_rng(0), MAX_TRAINING))

    def _vectors(self, encoder: nn.Module, samples: np.ndarray, device: torch.device) -> np.ndarray:
        """Return the vector of each case, or of the patch around each point, (N, D)."""
        rows: list[np.ndarray] = [np.empty(0)] * len(samples)
        for which, volume, centres in opened(self.table, samples, self.cases, self.axes):
            if centres is None:
                rows[which[0]] = embedding(encoder, volume, self.size, device)
                continue
            for i, place in zip(which, centres, strict=True):
                rows[i] = embedding(encoder, cut(volume, place, self.size), self.size, device)
        return np.stack(rows)
