"""A linear probe: how well the segmentation's labels are told apart by the features of the frozen encoder.

Of some of the dataset's cases that the pretraining uses, voxels are drawn, as many of every label in each of a few
boxes. A logistic regression a label is fitted to the encoder's features at the voxels of one half of these cases, and
scored on those of the other half by its AUROC (0.5 is chance, whatever the number of labels). Cases, boxes and voxels
follow from the seed, so that the values of a training's epochs can be compared with each other, and with that of the
encoder before the first step: there, too, most labels can be told apart somewhat.

Labels are used for that alone. Neither the weights nor a generator of random numbers is touched.

N voxels, c channels of a stage, L labels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle

from pcrl_nnunet.classification.auroc import auroc
from pcrl_nnunet.classification.patches import cut
from pcrl_nnunet.classification.shortcuts import predict
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case, CaseVolume
from pcrl_nnunet.plans import lacks_masks
from pcrl_nnunet.views.boxes import Box

ALL_STAGES, AT_START = "probe", "probe_start"  # names of values: of all stages together, now and before the first step
MAX_CASES = 40
BOXES = 4  # a case
VOXELS = 10  # a label and box


def names_of_values(num_stages: int) -> list[str]:
    """Of what a `Probe` finds: a stage each, and of all stages together."""
    return [*(f"probe_stage_{i + 1}" for i in range(num_stages)), ALL_STAGES]


@dataclass(frozen=True)
class Patch:
    """A box of a case and some of its voxels.

    Attributes:
        centre: of the box, as `cut` takes it.
        voxels: (N, axes) counted from the first voxel of what `cut` gives.
        labels: (N,)
    """

    case: Case
    centre: tuple[int, ...]
    voxels: np.ndarray
    labels: np.ndarray


class Probe:
    """Call it with an encoder for its AUROC by the names of `names_of_values`.

    Args:
        cases: with segmentations, see `labelled`.
        size: of the boxes, voxels; for a 2d configuration of a slice.
        seed: of cases, boxes and voxels.
        ignored: nnU-Net's ignore label, if the dataset has one.

    Raises:
        UserError: the cases show fewer than two labels in both halves.
    """

    def __init__(self, cases: Sequence[Case], size: Sequence[int], seed: int, ignored: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        drawn = [cases[i] for i in rng.permutation(len(cases))[:MAX_CASES]]
        half = len(drawn) // 2
        self.size = tuple(size)
        self.halves = [
            [patch for case in part for patch in _patches(case, self.size, ignored, rng)]
            for part in (drawn[:half], drawn[half:])
        ]
        fitted, scored = ({int(label) for patch in part for label in patch.labels} for part in self.halves)
        self.labels = np.array(sorted(fitted & scored), int)
        if len(self.labels) < 2:
            raise UserError(
                f"a probe needs two labels to tell apart, background being one, in {half} cases to fit and "
                f"{len(drawn) - half} to score, and found {sorted(fitted)} in the former and {sorted(scored)} in the "
                f"latter; leave probe_every out"
            )

    def __str__(self) -> str:
        fitted, scored = (f"{len({p.case.name for p in part})} cases" for part in self.halves)
        return (
            f"The probe tells {len(self.labels)} labels apart, fitted to {fitted}, scored on {scored} by its AUROC "
            f"(0.5 is chance). Labels are used for nothing else"
        )

    def __call__(self, encoder: Any, device: torch.device) -> dict[str, float]:
        """AUROC, mean over the labels, each against the others; NaN where features are not finite.

        Args:
            encoder: gives the features of all its stages, fine to coarse, each (1, c, *).
            device: where it is.
        """
        was_training = encoder.training
        encoder.eval()  # running statistics stay as they are, and dropout draws nothing
        try:
            fitted, scored = (self._features(encoder, part, device) for part in self.halves)
        finally:
            encoder.train(was_training)
        of_stages = list(zip(fitted, scored, strict=True))
        together = np.concatenate(fitted, 1), np.concatenate(scored, 1)
        values = [self._score(*features) for features in (*of_stages, together)]
        return dict(zip(names_of_values(len(of_stages)), values, strict=True))

    @torch.no_grad()
    def _features(self, encoder: Any, patches: Sequence[Patch], device: torch.device) -> list[np.ndarray]:
        """Of every stage (N, c), at the voxels of the patches."""
        rows: list[list[np.ndarray]] = []
        for patch in patches:
            image = torch.from_numpy(cut(CaseVolume(patch.case), patch.centre, self.size))[None].to(device)
            rows.append([_at(stage[0].float().cpu().numpy(), patch.voxels, self.size) for stage in encoder(image)])
        return [np.concatenate(of_stage).astype(float) for of_stage in zip(*rows, strict=True)]

    def _score(self, fitted: np.ndarray, scored: np.ndarray) -> float:
        if not (np.isfinite(fitted).all() and np.isfinite(scored).all()):
            return float("nan")  # the training's own step will say it, with the cases
        of_fitted, of_scored = (  # (N, L), 1 or 0
            (np.concatenate([patch.labels for patch in part])[:, None] == self.labels).astype(float)
            for part in self.halves
        )
        found = predict(fitted, of_fitted, scored)
        return float(np.mean([auroc(of_scored[:, i], found[:, i]) for i in range(len(self.labels))]))


def labelled(cases: Sequence[Case], folder: str) -> list[Case]:
    """Those of the cases that a probe can take: of this folder, with a segmentation. Nothing is opened.

    Args:
        cases: that the pretraining uses.
        folder: of the dataset's own preprocessed data; other datasets' labels mean other things.

    Raises:
        UserError: there are none, or what there is was made from the images (see `maskless`).
    """
    name = os.path.basename(os.path.dirname(folder))
    if lacks_masks(name):
        raise UserError(
            f"{name} has no masks in nnUNet_raw, and a probe is of labels of voxels, not of classes of images or "
            f"points; leave probe_every out"
        )
    own = [case for case in cases if os.path.dirname(case.path) == folder]
    found = [case for case in own if _segmentation(case) and os.path.isfile(_properties(case))]
    if not found:
        raise UserError(
            f"a probe needs labels, and of the {len(own)} cases in {folder} that this pretraining uses none has "
            f"NAME_seg.b2nd (or NAME_seg.npy) and NAME.pkl beside it; leave probe_every out, or preprocess them with "
            f"nnUNetv2_preprocess"
        )
    return found


def _properties(case: Case) -> str:
    return os.path.splitext(case.path)[0] + ".pkl"


def _segmentation(case: Case) -> Case | None:
    name, suffix = os.path.splitext(case.path)
    path = f"{name}_seg{suffix}"
    return Case(f"{case.name} (segmentation)", path) if os.path.isfile(path) else None


def _patches(case: Case, size: tuple[int, ...], ignored: int | None, rng: np.random.Generator) -> list[Patch]:
    """Boxes that have a voxel of the case's labels in turn somewhere, and voxels in them."""
    segmentation = _segmentation(case)
    assert segmentation is not None
    volume = CaseVolume(segmentation)
    shape = volume.shape[1:]
    flat = len(shape) - len(size)  # 1 in 2D
    whole = Box.of_size([0] * len(shape), shape)
    places = [np.asarray(p)[:, 1:] for p in load_pickle(_properties(case))["class_locations"].values() if len(p)]
    rng.shuffle(places)
    patches = []
    for i in range(BOXES):
        of_label = places[i % len(places)] if places else None
        place = rng.integers(shape) if of_label is None else of_label[rng.integers(len(of_label))]
        box = Box.of_size([*place[:flat], *_lower(place[flat:], shape[flat:], size, rng)], [1] * flat + [*size])
        inside = box.clamp(whole)
        voxels, labels = _voxels(volume[inside.index()][0], ignored, rng)
        voxels = (voxels + inside.lower - np.array(box.lower))[:, flat:]
        centre = tuple(low + n // 2 for low, n in zip(box.lower, box.shape, strict=True))
        patches.append(Patch(case, centre, voxels, labels))
    return patches


def _lower(place: np.ndarray, shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[int]:
    """First voxel of a box in the image that has a voxel at any place in it; smaller images lie in its middle."""
    return [
        int(rng.integers(max(0, at - n + 1), min(at, length - n) + 1)) if length >= n else (length - n) // 2
        for at, length, n in zip(place, shape, size, strict=True)
    ]


def _voxels(labels: np.ndarray, ignored: int | None, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Up to `VOXELS` of every label: (N, axes) and their labels (N,); -1 is nnU-Net's for what is not to be learned."""
    drawn = []
    for label in np.unique(labels):
        if label >= 0 and label != ignored:
            of_label = np.argwhere(labels == label)
            drawn.append(of_label[rng.permutation(len(of_label))[:VOXELS]])
    voxels = np.concatenate(drawn) if drawn else np.empty((0, labels.ndim), int)
    return voxels, labels[tuple(voxels.T)].astype(int)


def _at(features: np.ndarray, voxels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(N, c) of a stage (c, *), of the nearest places: a strided convolution's place j has its middle at j x stride."""
    cells = np.array(features.shape[1:])
    place = np.minimum((voxels * cells + np.array(size) // 2) // size, cells - 1)
    found: np.ndarray = features[tuple([slice(None), *place.T])].T
    return found
