"""What the labels of the labelled cases say about the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cc3d
import numpy as np

MOST_CASES = 32  # that are read; the labels of a large dataset say the same
ONE_PIECE = 0.98  # share of a class in its largest piece, on average, from which on the class counts as one piece


@dataclass(frozen=True)
class LabelFacts:
    """Facts by class, in the order of the network's outputs (without background).

    Attributes:
        names: of the classes.
        shares: share of the voxels that are of the class; voxels with the ignore label do not count.
        in_largest_piece: share of the class's voxels that lie in its largest piece, the mean over volumes, or over
            slices for a 2D network.
    """

    names: Sequence[str]
    shares: Sequence[float]
    in_largest_piece: Sequence[float]

    @property
    def in_one_piece(self) -> list[int]:
        """Numbers of the classes that come in one piece, such as organs; lesions come in several."""
        return [number for number, share in enumerate(self.in_largest_piece) if share >= ONE_PIECE]

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {share:.2%} of the voxels, {largest:.0%} of it in its largest piece"
            for name, share, largest in zip(self.names, self.shares, self.in_largest_piece, strict=True)
        )

    @classmethod
    def of_cases(
        cls,
        names: Sequence[str],
        read: Callable[[str], np.ndarray],
        classes: Mapping[str, Any],
        dim: int,
        ignored: int | None = None,
    ) -> LabelFacts:
        """Read the labels of some of the cases.

        Args:
            names: of the labelled cases.
            read: returns the labels of a case: (1, *spatial).
            classes: label, or labels of a region, by name.
            dim: 2 for a network of slices along the first axis, else 3.
            ignored: the ignore label, if there is one.
        """
        chosen = np.unique(np.linspace(0, len(names) - 1, min(MOST_CASES, len(names))).round()).astype(int)
        counts, voxels = np.zeros(len(classes)), 0
        largest: list[list[float]] = [[] for _ in classes]
        for labels in (read(names[index])[0] for index in chosen):
            voxels += labels.size if ignored is None else int(np.sum(labels != ignored))
            for number, values in enumerate(classes.values()):
                mask = np.isin(labels, values)
                counts[number] += mask.sum()
                for part in mask if dim == 2 else mask[None]:
                    if part.any():
                        largest[number].append(share_of_largest_piece(part))
        means = [float(np.mean(shares)) if shares else 0.0 for shares in largest]
        return cls(list(classes), [float(share) for share in counts / max(1, voxels)], means)


def share_of_largest_piece(mask: np.ndarray) -> float:
    """Return the share of a mask's voxels that lie in its largest piece.

    Args:
        mask: (*spatial) of bool, not empty; pieces are connected by faces, edges or corners.
    """
    pieces = cc3d.connected_components(mask, connectivity=8 if mask.ndim == 2 else 26)
    return float(np.bincount(pieces.ravel())[1:].max() / mask.sum())
