"""Cubes of a crop, and their turns (Tao et al., "Revisiting Rubik's Cube", MICCAI 2020).

C: channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from pcrl_nnunet.views.turns import Turn, planes_of_quarters, turns

LARGEST_CUBE = 16  # voxels; PCRLv1's supplement
SMALLEST_CUBE = 4


def cube_size(size: Sequence[int]) -> tuple[int, ...]:
    """Return the size of the cubes of a crop: edges of up to 16 voxels that divide the crop into at least two parts.

    An axis without such an edge of at least 4 voxels stays whole.
    """
    return tuple(_edge(length) for length in size)


def _edge(length: int) -> int:
    fitting = [edge for edge in range(SMALLEST_CUBE, min(LARGEST_CUBE, length // 2) + 1) if length % edge == 0]
    return max(fitting, default=length)


def turned_cubes(
    image: np.ndarray, cube: Sequence[int], spacing: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Turn each cube by a random turn that keeps its shape.

    Args:
        image: (C, *size); unchanged.
        cube: size of the cubes, which divides the image. Axes that a quarter turn exchanges have equal edges.
        spacing: mm for each axis.
        rng: the only source of randomness.
    """
    turned, possible = image.copy(), turns(spacing)
    for corner in itertools.product(
        *(range(0, length, edge) for length, edge in zip(image.shape[1:], cube, strict=True))
    ):
        inside = (slice(None), *(slice(low, low + edge) for low, edge in zip(corner, cube, strict=True)))
        turned[inside] = possible[rng.integers(len(possible))].apply(image[inside])
    return turned


def turned_layers(
    image: np.ndarray, cube: Sequence[int], spacing: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Turn layers of cubes within their planes, as with Rubik's cube.

    All layers across an axis are turned, each by a random turn, then all layers across another axis, and the third. The
    order of the axes is random.

    Args:
        image: (C, Z, Y, X); unchanged.
        cube: size of the cubes, which divides the image.
        spacing: mm for each axis. The image has equal edges on axes that a quarter turn exchanges.
        rng: the only source of randomness.
    """
    turned = image.copy()
    for axis in rng.permutation(3).tolist():
        for layer in _layers(turned, axis, cube[axis]):
            layer[...] = _turn_about(axis, spacing, rng).apply(layer)
    return turned


def _layers(image: np.ndarray, axis: int, thickness: int) -> Iterator[np.ndarray]:
    """Yield the parts of an image along an axis, as views of its memory."""
    for first in range(0, image.shape[axis + 1], thickness):
        yield image[(slice(None),) * (axis + 1) + (slice(first, first + thickness),)]


def _turn_about(axis: int, spacing: Sequence[float], rng: np.random.Generator) -> Turn:
    """Draw a turn in the plane of the other two axes, or none."""
    first, second = (other for other in range(3) if other != axis)
    possible = turns(spacing, [(first, second)])
    return possible[rng.integers(len(possible))]


def keeps_cubes(cube: Sequence[int], spacing: Sequence[float]) -> bool:
    """Tell whether all turns keep the shape of a cube."""
    return all(cube[a] == cube[b] for a, b in planes_of_quarters(spacing))
