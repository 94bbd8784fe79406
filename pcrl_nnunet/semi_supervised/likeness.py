"""A warning if unlabelled scans do not look like the labelled cases. C: channels, K: cases, F: features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pcrl_nnunet.loading.cases import Case, CaseVolume, UnreadableCase, evenly_spaced

MOST_CASES = 32  # number of cases of each kind that are looked at
SLICES = 5  # of a case
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEATURES = (*(f"{share:.0%} quantile of the intensities" for share in QUANTILES), "log of the roughness")
# A difference counts if it is this many times the spread of the unlabelled scans. Measured with hippocampus, heart and
# liver in MRI and nodules in CT: with two or more labelled cases, at most 2 % of the draws of one dataset are called
# unlike. With five, 49 to 100 % of the draws of another dataset are.
TIMES_SPREAD = 3.0
LEAST_SPREAD = 0.15  # intensities have a standard deviation of about 1 after nnU-Net's normalisation


def features_of(case: Case) -> np.ndarray:
    """Return features (C, F) of some slices: quantiles of the intensities, and the log of the roughness.

    The roughness is the mean difference of neighbouring voxels in a slice, over the standard deviation.

    Raises:
        UnreadableCase: the case cannot be read.
    """
    volume = CaseVolume(case)
    length, of_plane = volume.shape[1], tuple(slice(0, edge) for edge in volume.shape[2:])
    chosen = sorted({(2 * i + 1) * length // (2 * SLICES) for i in range(SLICES)})
    indices = [(slice(None), slice(i, i + 1), *of_plane) for i in chosen]
    slices = np.concatenate([volume[index] for index in indices], 1)
    quantiles = np.quantile(slices, QUANTILES, axis=(1, 2, 3)).T
    steps = [np.abs(np.diff(slices, axis=axis)).mean((1, 2, 3)) for axis in (2, 3) if slices.shape[axis] > 1]
    tiny = 1e-6  # a constant image has no roughness
    mean = np.mean(steps, axis=0) if steps else np.zeros(len(slices))
    roughness = np.log((mean + tiny) / (slices.std((1, 2, 3)) + tiny))
    return np.concatenate([quantiles, roughness[:, None]], 1)


def unlikeness(labelled: np.ndarray, unlabelled: np.ndarray) -> np.ndarray:
    """Return how far most unlabelled scans lie outside the range of the labelled cases (C, F), in spreads.

    Args:
        labelled, unlabelled: features (K, C, F) of the cases.
    """
    median = np.median(unlabelled, 0)
    spread = np.maximum(unlabelled.std(0), LEAST_SPREAD)
    outside = np.maximum(labelled.min(0) - median, median - labelled.max(0))
    return np.maximum(outside, 0) / spread


def warning_of_unlike(labelled: Sequence[Case], unlabelled: Sequence[Case], channels: Sequence[str]) -> str:
    """Return a sentence if most unlabelled scans do not look like the labelled cases, or nothing.

    Unlabelled cases that cannot be read are not counted here. The loader names them.

    Args:
        channels: labels of the C channels.

    Raises:
        UnreadableCase: a labelled case that is looked at cannot be read, or has values that are not finite.
    """
    ours = np.stack([features_of(labelled[index]) for index in evenly_spaced(len(labelled), MOST_CASES)])
    theirs = _readable_features(unlabelled)
    if not len(theirs):
        return ""
    found = unlikeness(ours, theirs)
    if found.max() <= TIMES_SPREAD:
        return ""
    channel, feature = map(int, np.unravel_index(found.argmax(), found.shape))
    low, high = ours[:, channel, feature].min(), ours[:, channel, feature].max()
    median = np.median(theirs[:, channel, feature])
    return (
        f"WARNING: the unlabelled scans do not look like the labelled cases: the {FEATURES[feature]} of channel "
        f"{channels[channel]} is {median:.2f} in the median of the unlabelled scans, and {low:.2f} to {high:.2f} in "
        f"the labelled cases. Are they scans of the same kind and region?"
    )


def _readable_features(cases: Sequence[Case]) -> np.ndarray:
    """Return the features (K, C, F) of the readable ones of at most `MOST_CASES` evenly spaced cases."""
    found = []
    for index in evenly_spaced(len(cases), MOST_CASES):
        try:
            found.append(features_of(cases[index]))
        except UnreadableCase:
            continue
    return np.stack(found) if found else np.zeros((0, 1, len(FEATURES)))
