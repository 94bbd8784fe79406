"""Background: the voxels of an image that show nothing, told by the image's own values.

C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

WIDTH = 0.2  # sd of z-scored data: as far above the smallest value air reaches
EQUAL = 1e-3  # resampling leaves a constant equal up to rounding
PROBES = 32  # voxels an axis that are looked at, and up to twice as many less one
MODE_PROBES = 4096  # voxels in which the most frequent value is looked for


@dataclass(frozen=True)
class Background:
    """The values that are background in one image, learned from a part of that image.

    In a channel these values are background:

    - values close to the smallest one: air and clipped air;
    - 0, which surrounds images that were normalised inside a mask;
    - the most frequent value. It surrounds skull-stripped images, and normalisation or the overshoot of resampling can
      leave it neither 0 nor the smallest. No value of a noisy image is frequent enough to matter.

    A voxel is background if it is background in every channel.

    Attributes:
        air: (C,), the largest value that is close to the smallest one.
        constant: (C,), the most frequent value.
    """

    air: np.ndarray
    constant: np.ndarray

    @classmethod
    def of(cls, data: np.ndarray) -> Background:
        """Learn the values from a part of the image, (C, *spatial) and z-scored, that is larger than a structure."""
        probes = regular_part(data, PROBES)
        return cls(probes.min(1) + WIDTH, np.array([_most_frequent(channel) for channel in probes], probes.dtype))

    def share(self, data: np.ndarray, probes: int = PROBES) -> float:
        """Return the share of voxels, 0 to 1, that are background.

        Args:
            data: (C, *spatial), a part of the same image.
            probes: voxels an axis; a regular part of the data is looked at, at most twice as many voxels less one.
        """
        looked_at = regular_part(data, probes)
        empty = looked_at <= self.air[:, None]
        empty |= np.abs(looked_at) < EQUAL
        empty |= np.abs(looked_at - self.constant[:, None]) < EQUAL
        return float(empty.all(0).mean())


def regular_part(data: np.ndarray, number: int) -> np.ndarray:
    """Return a regular part of the voxels of (C, *spatial) as (C, K): `number` an axis, or up to twice as many."""
    every = (slice(None), *(slice(None, None, max(1, length // number)) for length in data.shape[1:]))
    return data[every].reshape(len(data), -1)


def _most_frequent(values: np.ndarray) -> float:
    """Return the most frequent of (K,) values, which count as one where they differ by less than `EQUAL`."""
    steps, counts = np.unique(np.rint(values[:: max(1, len(values) // MODE_PROBES)] / EQUAL), return_counts=True)
    return float(steps[counts.argmax()] * EQUAL)
