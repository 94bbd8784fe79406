"""Corruption of a crop that a network restores (Zhou et al., "Models Genesis", Medical Image Analysis 2021, section 3):
local shuffling, intensities along a Bezier curve, painting of the inside and the outside.

C channels. Shuffling and painting change the same voxels in all channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.views import kernels

CURVE_POINTS = 1024  # of the table that a Bezier curve is read from
ROBUST = (0.005, 0.995)  # quantiles that count as the range of a crop's intensities
PROBES = 1 << 15  # voxels in which the range is looked for, and up to twice as many
MAX_BLOCKS = 5  # that are painted
ANOTHER_BLOCK = 0.95  # probability
INNER_BLOCK = (1 / 6, 1 / 3)  # size as a share of an axis
OUTER_BLOCK = (3 / 7, 4 / 7)  # of the blocks that stay


@dataclass(frozen=True)
class Corruption:
    """Strengths of the corruption.

    Attributes:
        p_shuffle: probability of local shuffling.
        shuffled_windows: number of windows in 3D, in which voxels are shuffled. In 2D as many as cover the same share.
        shuffled_size: largest size of a window, as a share of an axis.
        p_curve: probability that intensities follow a Bezier curve.
        p_inverted: probability that such a curve falls.
        p_paint: probability of painting.
        p_inner: probability that painting covers blocks inside; else the outside of blocks is covered.
    """

    p_shuffle: float = 0.5
    shuffled_windows: int = 10_000
    shuffled_size: float = 0.1
    p_curve: float = 0.9
    p_inverted: float = 0.5
    p_paint: float = 0.9
    p_inner: float = 0.2

    def __post_init__(self) -> None:
        for name in ("p_shuffle", "p_curve", "p_inverted", "p_paint", "p_inner", "shuffled_size"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise UserError(f"corruption.{name} is {value}; expected a number from 0 to 1")
        if self.shuffled_windows < 0:
            raise UserError(f"corruption.shuffled_windows is {self.shuffled_windows}; expected 0 or more")


def corrupt(image: np.ndarray, corruption: Corruption, rng: np.random.Generator) -> np.ndarray:
    """Corrupt a crop: shuffle, change intensities, paint, each with its probability, in this order.

    Args:
        image: (C, *size) float32; left as it is.
        corruption: probabilities and strengths.
        rng: the only source of randomness.

    Returns:
        (C, *size) float32, a new array.
    """
    size, corrupted = image.shape[1:], image
    ranges = [robust_range(channel) for channel in image]
    if rng.random() < corruption.p_shuffle:
        corners, sizes = draw_windows(size, corruption, rng)
        uniform = rng.random(int(sizes.prod(1).sum()))
        corrupted = kernels.shuffle_windows(corrupted, corners, sizes, uniform)
    if rng.random() < corruption.p_curve:
        curve = draw_curve(corruption.p_inverted, rng)
        corrupted = np.stack([along(curve, channel, *of) for channel, of in zip(corrupted, ranges, strict=True)])
    if rng.random() < corruption.p_paint:
        noise = rng.random(image.shape, dtype=np.float32)
        for channel, (low, high) in zip(noise, ranges, strict=True):
            channel *= np.float32(high - low)
            channel += np.float32(low)
        corrupted = np.where(draw_painted(size, rng.random() < corruption.p_inner, rng), noise, corrupted)
    return corrupted.copy() if corrupted is image else corrupted


def robust_range(channel: np.ndarray) -> tuple[float, float]:
    """Return the quantiles of intensities that are taken for 0 and 1; equal ones of a constant channel."""
    step = max(1, channel.size // PROBES)
    low, high = np.quantile(channel.reshape(-1)[::step], ROBUST)
    return float(low), float(high)


def draw_windows(
    size: Sequence[int], corruption: Corruption, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw windows of 1 voxel to a share of each axis: their first voxels and their sizes, (windows, d) each."""
    largest = np.maximum(1, np.floor(np.multiply(size, corruption.shuffled_size)).astype(int))
    share = 1.0 if len(size) == 3 else float(np.mean((largest + 1) / 2 / size))  # of windows that reach a slice
    number = math.ceil(share * corruption.shuffled_windows)
    sizes = rng.integers(1, largest + 1, (number, len(size)))
    corners = np.floor(rng.random(sizes.shape) * (np.subtract(size, sizes) + 1)).astype(int)
    return corners, sizes


def draw_curve(p_inverted: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a monotonic curve from 0 to 1, or from 1 to 0: its values at `CURVE_POINTS` even places.

    It is a cubic Bezier curve from (0, 0) to (1, 1) with two random points between, or that curve upside down.
    """
    t = np.linspace(0, 1, CURVE_POINTS)
    x, y = (3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3 for a, b in rng.random((2, 2)))
    values = np.interp(t, x, y)  # x and y rise with t, as the points lie in the unit square
    return (1 - values if rng.random() < p_inverted else values).astype(np.float32)


def along(curve: np.ndarray, channel: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map intensities by a curve, of which 0 and 1 stand for the ends of a range; a constant channel stays."""
    if not high > low:
        return channel
    place = (channel - np.float32(low)) * np.float32((len(curve) - 1) / (high - low))
    np.clip(place, 0, len(curve) - 1, out=place)
    below = np.minimum(place.astype(np.int32), len(curve) - 2)
    value = curve[below]
    value += (place - below) * (curve[below + 1] - value)
    value *= np.float32(high - low)
    value += np.float32(low)
    return value


def draw_painted(size: Sequence[int], inner: bool, rng: np.random.Generator) -> np.ndarray:
    """Draw the voxels that are painted: one to five blocks, or all but these; (*size) of bool."""
    low, high = INNER_BLOCK if inner else OUTER_BLOCK
    covered = np.zeros(tuple(size), bool)
    for number in range(MAX_BLOCKS):
        if number > 0 and rng.random() >= ANOTHER_BLOCK:
            break
        edges = [max(1, round(length * rng.uniform(low, high))) for length in size]
        starts = [int(rng.integers(0, length - edge + 1)) for length, edge in zip(size, edges, strict=True)]
        covered[tuple(slice(start, start + edge) for start, edge in zip(starts, edges, strict=True))] = True
    return covered if inner else ~covered
