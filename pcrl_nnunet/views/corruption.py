"""Corruption of a crop that a network restores (Zhou et al., "Models Genesis", Medical Image Analysis 2021, section 3):
local shuffling, intensities along a Bezier curve, inner and outer painting.

C: channels. Shuffling and painting change the same voxels in all channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pcrl_nnunet.settings import number, probability
from pcrl_nnunet.views import kernels
from pcrl_nnunet.views.background import regular_part
from pcrl_nnunet.views.boxes import Box, sample_inside

CURVE_POINTS = 1024  # entries in the table of a Bezier curve
ROBUST = (0.005, 0.995)  # quantiles that define the range of a crop's intensities
PROBES = 32  # voxels along an axis that are searched for the range
MAX_BLOCKS = 5  # largest number of painted blocks
ANOTHER_BLOCK = 0.95  # probability
INNER_BLOCK = (1 / 6, 1 / 3)  # size as a share of an axis
OUTER_BLOCK = (3 / 7, 4 / 7)  # size of the blocks that stay
WAYS = ("shuffling", "curve", "inner painting", "outer painting")  # of `corrupt_once`

Ranges = list[tuple[float, float]]  # lowest and highest intensity of each channel


@dataclass(frozen=True)
class Strengths:
    """Strengths of each kind of corruption.

    Attributes:
        shuffled_windows: number of windows with shuffled voxels in 3D. In 2D the number covers the same share.
            Source: Models Genesis' code.
        shuffled_size: largest size of a window, as a share of an axis. Source: Models Genesis' code.
        p_inverted: probability that the Bezier curve of intensities falls. Source: Models Genesis' code.
    """

    shuffled_windows: int = number(10_000, at_least=1, at_most=1_000_000)
    shuffled_size: float = number(0.1, above=0, at_most=1)
    p_inverted: float = probability(0.5)


@dataclass(frozen=True)
class Corruption(Strengths):
    """Strengths of the corruption, and the probability of each kind.

    Attributes:
        p_shuffle: probability of local shuffling. Source: Models Genesis' code.
        p_curve: probability that intensities follow a Bezier curve. Source: Models Genesis' code.
        p_paint: probability of painting. Source: Models Genesis' code.
        p_inner: probability that painting covers blocks; otherwise it covers everything outside blocks. Source:
            Models Genesis' code.
    """

    p_shuffle: float = probability(0.5)
    p_curve: float = probability(0.9)
    p_paint: float = probability(0.9)
    p_inner: float = probability(0.2)


def corrupt(image: np.ndarray, corruption: Corruption, rng: np.random.Generator) -> np.ndarray:
    """Corrupt a crop: shuffle, change intensities, paint, each with its probability, in this order.

    Args:
        image: (C, *size) float32; unchanged.
        corruption: probabilities and strengths.
        rng: the only source of randomness.

    Returns:
        (C, *size) float32, a new array.
    """
    corrupted, ranges = image, robust_ranges(image)
    if rng.random() < corruption.p_shuffle:
        corrupted = shuffle(corrupted, corruption, rng)
    if rng.random() < corruption.p_curve:
        corrupted = change_intensities(corrupted, corruption.p_inverted, ranges, rng)
    if rng.random() < corruption.p_paint:
        corrupted = paint(corrupted, corruption.p_inner, ranges, rng)
    return corrupted.copy() if corrupted is image else corrupted


def corrupt_once(image: np.ndarray, strengths: Strengths, rng: np.random.Generator) -> np.ndarray:
    """Corrupt a crop in exactly one way: shuffling, a Bezier curve, inner or outer painting, all equally likely.

    Args:
        image: (C, *size) float32; unchanged.
        strengths: strength of each way.
        rng: the only source of randomness.

    Returns:
        (C, *size) float32, a new array.
    """
    way = WAYS[rng.integers(len(WAYS))]
    if way == "shuffling":
        return shuffle(image, strengths, rng)
    ranges = robust_ranges(image)
    if way == "curve":
        return change_intensities(image, strengths.p_inverted, ranges, rng)
    return paint(image, 1.0 if way == "inner painting" else 0.0, ranges, rng)


def shuffle(image: np.ndarray, strengths: Strengths, rng: np.random.Generator) -> np.ndarray:
    """Shuffle the voxels within windows. Returns a new array."""
    corners, sizes = draw_windows(image.shape[1:], strengths, rng)
    return kernels.shuffle_windows(image, corners, sizes, rng.random(int(sizes.prod(1).sum())))


def change_intensities(image: np.ndarray, p_inverted: float, ranges: Ranges, rng: np.random.Generator) -> np.ndarray:
    """Map the intensities of all channels along one Bezier curve. Returns a new array."""
    curve = draw_curve(p_inverted, rng)
    return np.stack([along(curve, channel, *of) for channel, of in zip(image, ranges, strict=True)])


def paint(image: np.ndarray, p_inner: float, ranges: Ranges, rng: np.random.Generator) -> np.ndarray:
    """Replace blocks by noise, or with probability 1 - `p_inner` everything outside blocks. Returns a new array."""
    noise = rng.random(image.shape, dtype=np.float32)
    for channel, (low, high) in zip(noise, ranges, strict=True):
        channel *= np.float32(high - low)
        channel += np.float32(low)
    return np.where(draw_painted(image.shape[1:], rng.random() < p_inner, rng), noise, image)


def robust_ranges(image: np.ndarray) -> Ranges:
    """Return the quantiles of each channel that map to 0 and 1; they are equal for a constant channel."""
    low, high = np.quantile(regular_part(image, PROBES), ROBUST, axis=1)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def draw_windows(size: Sequence[int], strengths: Strengths, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw windows of 1 voxel up to a share of each axis, as first voxels and sizes, (windows, d) each."""
    largest = np.maximum(1, np.floor(np.multiply(size, strengths.shuffled_size)).astype(int))
    share = 1.0 if len(size) == 3 else float(np.mean((largest + 1) / 2 / size))  # share of windows that reach a slice
    windows = math.ceil(share * strengths.shuffled_windows)
    sizes = rng.integers(1, largest + 1, (windows, len(size)))
    corners = np.floor(rng.random(sizes.shape) * (np.subtract(size, sizes) + 1)).astype(int)
    return corners, sizes


def draw_curve(p_inverted: float, rng: np.random.Generator) -> np.ndarray:
    """Draw a monotonic curve from 0 to 1, or from 1 to 0, as values at `CURVE_POINTS` even places.

    It is a cubic Bezier curve from (0, 0) to (1, 1) with two random points between, possibly upside down.
    """
    t = np.linspace(0, 1, CURVE_POINTS)
    x, y = (3 * (1 - t) ** 2 * t * a + 3 * (1 - t) * t**2 * b + t**3 for a, b in rng.random((2, 2)))
    values = np.interp(t, x, y)  # x and y rise with t because the points lie in the unit square
    return (1 - values if rng.random() < p_inverted else values).astype(np.float32)


def along(curve: np.ndarray, channel: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map intensities by a curve whose 0 and 1 are the ends of a range. A constant channel stays."""
    if not high > low:
        return channel
    place = (channel - np.float32(low)) * np.float32((len(curve) - 1) / (high - low))
    np.clip(place, 0, len(curve) - 1, out=place)
    below = np.minimum(place.astype(np.int32), len(curve) - 2)
    value = curve[below]
    value += (place - below.astype(np.float32)) * (curve[below + 1] - value)
    value *= np.float32(high - low)
    value += np.float32(low)
    return value


def draw_painted(size: Sequence[int], inner: bool, rng: np.random.Generator) -> np.ndarray:
    """Draw the mask (*size) of painted voxels: one to five blocks, or everything outside them."""
    low, high = INNER_BLOCK if inner else OUTER_BLOCK
    covered, whole = np.zeros((1, *size), bool), Box.of_size([0] * len(size), size)
    for block in range(MAX_BLOCKS):
        if block > 0 and rng.random() >= ANOTHER_BLOCK:
            break
        edges = [max(1, round(length * rng.uniform(low, high))) for length in size]
        covered[sample_inside(whole, tuple(edges), rng).index()] = True
    return covered[0] if inner else ~covered[0]
