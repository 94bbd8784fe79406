"""The cheap look at a segmentation: a voxel classifier on frozen features, scored by Dice.

Images and labels are the preprocessed ones. K: voxels, D: features of a voxel, L: classes with the background. A class
is a value of the label files. Regions are sets of classes: the head tells classes apart, and regions are scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.features.heads import VoxelHead
from pcrl_nnunet.features.voxels import chunks, staged
from pcrl_nnunet.features.windows import Window, tiling
from pcrl_nnunet.loading.cases import Case, CaseVolume
from pcrl_nnunet.plans import PlannedConfiguration

VOXELS_OF_A_CASE = 4000  # to train a head, at most
TRAINING_BYTES = 2**28  # of all features that train a head, at most

Rows = list[tuple[str, str, float]]


class VoxelTask:
    """The labels of a dataset, and the training and scoring of heads on them.

    Args:
        plan: the dataset's plan.
        folder: folder of the preprocessed cases.
        cases: cases by name.
    """

    def __init__(self, plan: PlannedConfiguration, folder: str, cases: Mapping[str, Case]) -> None:
        labels = PlansManager(plan.plans).get_label_manager(plan.dataset_json)
        self.values, self.ignored = [0, *(value for value in labels.all_labels if value)], labels.ignore_label
        self.members = {
            name: [self.values.index(value) for value in np.atleast_1d(values)]
            for name, values in plan.dataset_json["labels"].items()
            if name not in ("background", "ignore")
        }
        self.folder, self.cases, self.size = folder, cases, tuple(plan.resolved["patch_size"])

    def head(self, stages: nn.Module, names: Sequence[str], seed: int, device: torch.device) -> VoxelHead:
        """Train a head on voxels of the labelled cases. All networks get the same voxels."""
        features, classes = [], []
        counts = np.zeros(len(self.values))
        for number, name in enumerate(names):
            rng = np.random.default_rng((seed, number))
            for part, found in self._sampled(stages, name, len(names), counts, rng, device):
                features.append(part)
                classes.append(found)
        if not features:
            raise UserError(f"the labelled cases {', '.join(names)} have no labelled voxel; label other cases")
        return VoxelHead(np.concatenate(features), np.concatenate(classes), counts / counts.sum(), seed)

    def scores(
        self, stages: nn.Module, heads: Mapping[Any, VoxelHead], name: str, device: torch.device
    ) -> dict[Any, Rows]:
        """Return case, label and Dice by head. A label that neither truth nor prediction contains has the Dice NaN."""
        num = len(self.values)
        counts = {key: np.zeros((num, num)) for key in heads}  # truth x prediction
        labels, volume = self._labels(name), CaseVolume(self.cases[name])
        windows = list(tiling(volume.shape[1:], self.size))
        for window, features in staged(stages, volume, windows, self.size, device):
            truth = self._classes(labels, window)
            known = np.flatnonzero(truth >= 0)
            for part, found in chunks(features, self.size, window.places(len(self.size))[known]):
                for key, head in heads.items():
                    pairs = truth[known[part]] * num + head.predict(found)
                    counts[key] += np.bincount(pairs, minlength=num * num).reshape(num, num)
        return {key: [(name, *row) for row in self._rows(found)] for key, found in counts.items()}

    def _rows(self, counts: np.ndarray) -> Iterator[tuple[str, float]]:
        """Yield label and Dice."""
        for name, members in self.members.items():
            both = counts[members].sum() + counts[:, members].sum()
            dice = 2 * counts[np.ix_(members, members)].sum() / both if both else float("nan")
            yield name, float(dice)

    def _labels(self, name: str) -> Any:
        """Open the labels (1, *) of a case."""
        return infer_dataset_class(self.folder)(self.folder, [name]).load_case(name)[1]

    def _classes(self, labels: Any, window: Window) -> np.ndarray:
        """Return the class (K,) of each voxel that a window owns; -1 is ignored."""
        found = np.asarray(labels[window.own_index])[0].ravel()
        classes = np.zeros(len(found), np.int64)  # nnU-Net marks voxels outside the image by -1: background
        for number, value in enumerate(self.values):
            classes[found == value] = number
        if self.ignored is not None:
            classes[found == self.ignored] = -1
        return classes

    def _sampled(
        self,
        stages: nn.Module,
        name: str,
        num_cases: int,
        counts: np.ndarray,
        rng: np.random.Generator,
        device: torch.device,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield features (K, D) and classes (K,) of voxels of a case, balanced by class.

        Args:
            num_cases: number of labelled cases that share the memory.
            counts: (L,), to which the numbers of all voxels of the case are added.
        """
        labels, volume = self._labels(name), CaseVolume(self.cases[name])
        windows = list(tiling(volume.shape[1:], self.size))
        of_windows = np.array(
            [np.bincount(c[c >= 0], minlength=len(self.values)) for c in (self._classes(labels, w) for w in windows)]
        )
        counts += of_windows.sum(0)
        width = self._width(stages, volume, windows, device)
        most = max(1, min(VOXELS_OF_A_CASE, TRAINING_BYTES // (4 * width * num_cases)))
        chosen = _chosen(of_windows, most, rng)
        wanted = [number for number, ranks in enumerate(chosen) if any(map(len, ranks))]
        for number, (window, features) in zip(
            wanted, staged(stages, volume, [windows[n] for n in wanted], self.size, device), strict=True
        ):
            classes = self._classes(labels, window)
            voxels = np.concatenate([np.flatnonzero(classes == c)[ranks] for c, ranks in enumerate(chosen[number])])
            for part, found in chunks(features, self.size, window.places(len(self.size))[voxels]):
                yield found, classes[voxels[part]]

    def _width(self, stages: nn.Module, volume: CaseVolume, windows: Sequence[Window], device: torch.device) -> int:
        """Return D."""
        ((_, features),) = staged(stages, volume, windows[:1], self.size, device)
        return sum(feature.shape[0] for feature in features)


def _chosen(counts: np.ndarray, most: int, rng: np.random.Generator) -> list[list[np.ndarray]]:
    """Draw voxels of each class in equal numbers, and return their ranks, by window and class.

    Args:
        counts: (windows, L), numbers of voxels.
        most: number of voxels to draw, at most.
    """
    totals = counts.sum(0)
    quota = max(1, most // max(1, int((totals > 0).sum())))
    chosen: list[list[np.ndarray]] = [[] for _ in counts]
    for label, total in enumerate(totals):
        ranks = np.sort(rng.choice(total, min(quota, total), replace=False)) if total else np.empty(0, np.int64)
        ends = np.cumsum(counts[:, label])
        starts = ends - counts[:, label]
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            chosen[number].append(ranks[(ranks >= start) & (ranks < end)] - start)
    return chosen
