"""Background: the voxels of an image that show nothing, recognised by the image's own values.

C: channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WIDTH = 0.2  # sd of z-scored data: air reaches this far above the smallest value
EQUAL = 1e-3  # resampling changes a constant by rounding
PROBES = 32  # voxels sampled along an axis, up to twice as many minus one
MODE_PROBES = 4096  # voxels that are searched for the most frequent value


@dataclass(frozen=True)
class Background:
    """The background values of one image, learned from a part of the image.

    In a channel these values are background:

    - values close to the smallest value: air and clipped air;
    - 0, which surrounds images that were normalised inside a mask;
    - the most frequent value. It surrounds skull-stripped images, and after normalisation or resampling it may be
      neither 0 nor the smallest value. No value of a noisy image is frequent enough to matter.

    A voxel is background if it is background in every channel.

    Attributes:
        air: (C,), the largest value that is close to the smallest value.
        constant: (C,), the most frequent value.
    """

    air: np.ndarray
    constant: np.ndarray

    @classmethod
    def of(cls, data: np.ndarray) -> Background:
        """Learn the values from a z-scored part (C, *spatial) of the image that is larger than a structure."""
        probes = regular_part(data, PROBES)
        return cls(probes.min(1) + WIDTH, np.array([_most_frequent(channel) for channel in probes], probes.dtype))

    def share(self, data: np.ndarray, probes: int = PROBES) -> float:
        """Return the share of background voxels, 0 to 1.

        Args:
            data: (C, *spatial), a part of the same image.
            probes: voxels sampled along an axis, up to twice as many minus one, on a regular grid.
        """
        looked_at = regular_part(data, probes)
        empty = looked_at <= self.air[:, None]
        empty |= np.abs(looked_at) < EQUAL
        empty |= np.abs(looked_at - self.constant[:, None]) < EQUAL
        return float(empty.all(0).mean())


def regular_part(data: np.ndarray, number: int) -> np.ndarray:
    """Sample (C, *spatial) on a regular grid as (C, K): `number` voxels along an axis, or up to twice as many."""
    every = (slice(None), *(slice(None, None, max(1, length // number)) for length in data.shape[1:]))
    return data[every].reshape(len(data), -1)


def _most_frequent(values: np.ndarray) -> float:
    """Return the most frequent of (K,) values. Values that differ by less than `EQUAL` count as equal."""
    steps, counts = np.unique(np.rint(values[:: max(1, len(values) // MODE_PROBES)] / EQUAL), return_counts=True)
    return float(steps[counts.argmax()] * EQUAL)
