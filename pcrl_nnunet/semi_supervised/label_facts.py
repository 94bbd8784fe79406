"""Facts about the classes, from the labelled cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import evenly_spaced

MOST_CASES = 32  # number of cases to read if they show all classes: more would hardly change the facts
CROPS, CROPS_OF_A_CASE = 32, 4  # of each class, to search for pieces
ONE_PIECE = 0.98  # a class counts as one piece from this mean share in its largest piece


@dataclass(frozen=True)
class LabelFacts:
    """Facts by class, in the order of the network's outputs (without background).

    Attributes:
        names: names of the classes.
        shares: the class's share of the voxels; voxels with the ignore label do not count.
        in_largest_piece: share of the class's voxels in its largest piece, averaged over crops of the patch size around
            voxels of the class. An organ that a patch cuts in two is not one piece.
    """

    names: Sequence[str]
    shares: Sequence[float]
    in_largest_piece: Sequence[float]

    @property
    def in_one_piece(self) -> list[int]:
        """Numbers of the classes that form one piece, such as organs; lesions form several."""
        return [number for number, share in enumerate(self.in_largest_piece) if share >= ONE_PIECE]

    def refuse_without_classes(self) -> None:
        """Raise `UserError` if the labelled cases show no class: a teacher would label noise."""
        if not any(self.shares):
            raise UserError(
                f"no labelled case of this fold shows {' or '.join(self.names)}, so that the network has nothing to "
                f"learn; put a case that shows a class into the fold's 'train'"
            )

    def warning_of_missing(self) -> str:
        """Return a sentence about the classes that no labelled case shows, or nothing."""
        missing = [name for name, share in zip(self.names, self.shares, strict=True) if not share]
        if not missing:
            return ""
        return (
            f"WARNING: no labelled case shows {', '.join(missing)}; the training teaches that this is nowhere. Add a "
            f"labelled case that shows it"
        )

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {share:.2%} of the voxels, {largest:.0%} of it in its largest piece"
            for name, share, largest in zip(self.names, self.shares, self.in_largest_piece, strict=True)
        )

    @classmethod
    def of_cases(
        cls,
        names: Sequence[str],
        read: Callable[[str], tuple[np.ndarray, Mapping[Any, np.ndarray]]],
        classes: Mapping[str, Any],
        patch: Sequence[int],
        ignored: int | None = None,
    ) -> LabelFacts:
        """Collect the facts from some of the cases, and from further cases if these lack a class.

        Args:
            names: names of the labelled cases.
            read: returns the labels of a case, (1, *spatial), as an array or a file that is read when it is indexed,
                and nnU-Net's ``class_locations``: some voxels of each class, (N, 1 + 3).
            classes: label, or labels of a region, by name; the keys of the locations.
            patch: size of the network's patches; a 2D network sees slices along the first axis.
            ignored: the ignore label.
        """
        rng, counts, voxels = np.random.default_rng(0), np.zeros(len(classes)), 0
        size = (1, *patch) if len(patch) == 2 else tuple(patch)
        largest: list[list[float]] = [[] for _ in classes]
        for labels, places in _some_of_each_class(names, read, classes):
            of_value = dict(zip(*(part.tolist() for part in np.unique(labels, return_counts=True)), strict=True))
            voxels += sum(number for value, number in of_value.items() if value != ignored)
            for shares, (number, values) in zip(largest, enumerate(classes.values()), strict=True):
                counts[number] += sum(of_value.get(value, 0) for value in np.atleast_1d(values).tolist())
                for place in rng.permutation(places.get(values, ()))[: min(CROPS_OF_A_CASE, CROPS - len(shares))]:
                    crop = labels[0][_around(place[1:], size, labels.shape[1:])]
                    shares.append(share_of_largest_piece(np.isin(crop, values).squeeze(0 if len(patch) == 2 else ())))
        means = [float(np.mean(shares)) if shares else 0.0 for shares in largest]
        return cls(list(classes), [float(share) for share in counts / max(1, voxels)], means)


def _some_of_each_class(
    names: Sequence[str],
    read: Callable[[str], tuple[Any, Mapping[Any, np.ndarray]]],
    classes: Mapping[str, Any],
) -> Iterator[tuple[np.ndarray, Mapping[Any, np.ndarray]]]:
    """Yield labels and places of at most `MOST_CASES` cases, then of a case for each class that these lack."""
    chosen = evenly_spaced(len(names), MOST_CASES)
    lacking = {*classes.values()}
    for number, index in enumerate([*chosen, *sorted({*range(len(names))} - {*chosen})]):
        if number >= len(chosen) and not lacking:
            return
        labels, places = read(names[index])
        shown = {values for values in lacking if len(places.get(values, ()))}
        lacking -= shown
        if number < len(chosen) or shown:
            yield np.asarray(labels[:1]), places


def _around(place: Sequence[int], size: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return a box of a size around a voxel, shifted into the image."""
    starts = [min(max(0, int(p) - n // 2), max(0, total - n)) for p, n, total in zip(place, size, shape, strict=True)]
    return tuple(slice(start, start + n) for start, n in zip(starts, size, strict=True))


def share_of_largest_piece(mask: np.ndarray) -> float:
    """Return the share of a mask's voxels in its largest piece.

    Args:
        mask: (*spatial) of bool, not empty; pieces are connected by faces, edges or corners.
    """
    pieces = cc3d.connected_components(mask, connectivity=8 if mask.ndim == 2 else 26)
    return float(np.bincount(pieces.ravel())[1:].max() / mask.sum())
