"""Recognition of label maps, which are not scans, by their voxels. A telling name lowers the threshold.

A label map has few values for its size, in flat regions. A scan has noise: neighbours rarely agree. Labels are usually
whole numbers, but some programs scale them.
"""

from __future__ import annotations

import os
import re

import numpy as np

MAX_LABEL_VALUES = 8  # an image with so few different values has no noise, so it is not a scan
VOXELS_A_VALUE = 100  # few values for its size: at least so many voxels for each value
FLAT = 0.75  # share of equal neighbours: to 0.15 in CT and MRI, to 0.4 in 8-bit radiographs, above 0.9 in label maps
FLAT_IF_NAMED = 0.6
SAMPLED = 500_000  # this many voxels are enough to count values
NAMES = frozenset(
    {"label", "labels", "labelmap", "seg", "segs", "segm", "segmentation", "segmentations", "mask", "masks"}
    | {"aseg", "aparc", "parcellation", "gt"}
)


def label_word(path: str) -> str:
    """Return the part of a file's or folder's name that points to a label map; empty without such a part.

    Parts are split at ``_``, ``-``, ``.`` and spaces, so that ``unlabelled_001`` has none. Digits at the end of a part
    do not count: ``label0001`` is "label".

    Args:
        path: relative to the folder of scans.
    """
    parts = re.split(r"[_\-.\s]+", path.lower().replace(os.sep, "."))
    return next((part for part in parts if part.rstrip("0123456789") in NAMES), "")


def looks_like_labels(image: np.ndarray, named: bool = False) -> str:
    """Explain why an image looks like a label map; empty if it does not.

    The comparison of neighbours leaves out the most frequent, the smallest and the largest value. The air of a CT, the
    zeros around a brain and clipped intensities are flat in scans, too.

    Args:
        image: (Z, Y, X), one channel.
        named: the file's or folder's name points to a label map, too.
    """
    sample = image.reshape(-1)[:: 1 + image.size // SAMPLED]
    values, counts = np.unique(sample, return_counts=True)
    listed = ", ".join(f"{value:g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")
    if len(values) <= MAX_LABEL_VALUES:
        return f"only {len(values)} different values: {listed}"
    if len(values) * VOXELS_A_VALUE > image.size:
        return ""
    flat = _flatness(image, [values[counts.argmax()], values[0], values[-1]])
    if flat < (FLAT_IF_NAMED if named else FLAT):
        return ""
    return f"flat regions of {len(values)} different values: {listed}"


def _flatness(image: np.ndarray, besides: list[float]) -> float:
    """Return the share of equal neighbours, 0 to 1, among pairs in which neither has a value in `besides`."""
    counted = ~np.isin(image, besides)
    equal = pairs = 0
    for axis in range(image.ndim):
        one, other = (np.moveaxis(image, axis, 0)[part] for part in (slice(1, None), slice(None, -1)))
        both = np.moveaxis(counted, axis, 0)[1:] & np.moveaxis(counted, axis, 0)[:-1]
        equal += np.count_nonzero((one == other) & both)
        pairs += np.count_nonzero(both)
    return equal / max(1, pairs)
