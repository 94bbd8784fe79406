"""Boxes of voxels, and positions of PCRLv2's views in a volume (sub-crop: two crops of IoU >= 0.3, six inside).

Everything here is integer geometry: no voxel is read. Lengths are voxels, boxes are half-open, and randomness comes
from the given generator. 2D and 3D use the same code. The work is bounded: nothing is drawn and rejected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pcrl_nnunet.views.settings import ViewSettings

Size = tuple[int, ...]

MULTI_CROP_GLOBAL = (0.3, 1.0)  # shares of the area, from the paper and the authors' code for 2D
MULTI_CROP_LOCAL = (0.05, 0.3)
MULTI_CROP_ASPECT = 4 / 3  # ratio of the largest to the smallest axis, relative to the area's own ratio


ENDLESS = 2**40  # voxels, more than any image has on an axis


@dataclass(frozen=True)
class Box:
    """The voxels `lower <= index < upper`, with an entry for each axis."""

    lower: Size
    upper: Size

    def __post_init__(self) -> None:
        if len(self.lower) != len(self.upper) or any(
            high <= low for low, high in zip(self.lower, self.upper, strict=True)
        ):
            raise ValueError(f"a box needs lower < upper on every axis, got {self.lower} and {self.upper}")

    @classmethod
    def of_size(cls, lower: Sequence[int], size: Sequence[int]) -> Box:
        """Return the box of `size` voxels that starts at `lower`."""
        return cls(tuple(int(low) for low in lower), tuple(int(low + s) for low, s in zip(lower, size, strict=True)))

    @property
    def shape(self) -> Size:
        return tuple(high - low for low, high in zip(self.lower, self.upper, strict=True))

    @property
    def dim(self) -> int:
        return len(self.lower)

    @property
    def volume(self) -> int:
        return math.prod(self.shape)

    def union_bounds(self, other: Box) -> Box:
        """Return the smallest box around both."""
        return Box(tuple(map(min, self.lower, other.lower)), tuple(map(max, self.upper, other.upper)))

    def clamp(self, outer: Box) -> Box:
        """Return the part of this box within `outer`; the nearest voxels of `outer` if the two do not meet."""
        lower = tuple(min(max(a, b), c - 1) for a, b, c in zip(self.lower, outer.lower, outer.upper, strict=True))
        upper = tuple(max(min(a, b), c + 1) for a, b, c in zip(self.upper, outer.upper, lower, strict=True))
        return Box(lower, upper)

    def beyond_edges_of(self, outer: Box) -> Box:
        """Return this box, endless on the sides where it reaches the edge of `outer`."""
        lower = (-ENDLESS if a <= b else a for a, b in zip(self.lower, outer.lower, strict=True))
        upper = (ENDLESS if a >= b else a for a, b in zip(self.upper, outer.upper, strict=True))
        return Box(tuple(lower), tuple(upper))

    def index(self) -> tuple[slice, ...]:
        """Index of the box's voxels in an array (C, *spatial), in all channels."""
        return (slice(None), *map(slice, self.lower, self.upper))

    def shifted(self, origin: Sequence[int]) -> Box:
        """The same voxels, counted from `origin`."""
        return Box.of_size([low - start for low, start in zip(self.lower, origin, strict=True)], self.shape)


def _iou(common: Any, sum_of_volumes: int) -> Any:
    """Return the IoU for a common volume, a number or an array (`sample_pair` needs both to round alike)."""
    return common / (sum_of_volumes - common)


def feasible(a: Size, b: Size, min_iou: float) -> bool:
    """Tell if two sizes can have an IoU of `min_iou` in some position. A size is always feasible with itself."""
    return bool(_iou(math.prod(map(min, a, b)), math.prod(a) + math.prod(b)) >= min_iou)


def sample_inside(box: Box, size: Size, rng: np.random.Generator) -> Box:
    """Draw a box of `size` uniformly among the positions inside `box`. A larger size is cut down to `box`."""
    fitting = tuple(map(min, size, box.shape))
    free = [outer - inner for outer, inner in zip(box.shape, fitting, strict=True)]
    return Box.of_size([low + int(rng.integers(0, f + 1)) for low, f in zip(box.lower, free, strict=True)], fitting)


def sample_shift(boxes: Sequence[tuple[Box, Box]], rng: np.random.Generator) -> Size:
    """Draw a shift uniformly among the shifts that keep every box inside its outer box.

    Args:
        boxes: inner and outer boxes; each inner box lies inside its outer one.
        rng: the only source of randomness.

    Returns:
        the new origin, for `Box.shifted`.
    """
    low = np.max([np.subtract(inner.upper, outer.upper) for inner, outer in boxes], axis=0)
    high = np.min([np.subtract(inner.lower, outer.lower) for inner, outer in boxes], axis=0)
    return tuple(rng.integers(low, high + 1).tolist())


def sample_pair(volume_shape: Size, sizes: Sequence[Size], min_iou: float, rng: np.random.Generator) -> tuple[Box, Box]:
    """Draw two boxes in the volume with an IoU of at least `min_iou`.

    The first size is drawn uniformly, so that every size gets its share; the second among the sizes feasible with it.
    The first box lies anywhere. The second box is placed axis by axis, uniformly among the positions that still allow
    the IoU if all remaining axes overlap as far as possible. The order of the axes is random, so that no axis is
    preferred. Every position with the IoU can be drawn. Overlaps near the threshold are slightly too frequent: at the
    paper's sizes the median IoU is 0.35, and 0.39 with rejection sampling.

    Args:
        volume_shape: shape of the image, in voxels.
        sizes: sizes to choose from; a size larger than the volume is cut down to it.
        min_iou: 0 to 1.
        rng: the only source of randomness.
    """
    fitting = [tuple(map(min, size, volume_shape)) for size in sizes]
    size_a = fitting[rng.integers(len(fitting))]
    partners = [b for b in fitting if feasible(size_a, b, min_iou)]
    size_b = partners[rng.integers(len(partners))]
    box_a = sample_inside(Box.of_size([0] * len(volume_shape), volume_shape), size_a, rng)

    total = math.prod(size_a) + math.prod(size_b)
    attainable = math.prod(map(min, size_a, size_b))  # overlap if the remaining axes overlap fully
    lower = [0] * len(volume_shape)
    for axis in rng.permutation(len(volume_shape)):
        starts = np.arange(volume_shape[axis] - size_b[axis] + 1)
        overlap = np.minimum(starts + size_b[axis], box_a.upper[axis]) - np.maximum(starts, box_a.lower[axis])
        common = np.maximum(overlap, 0) * (attainable // min(size_a[axis], size_b[axis]))
        allowed = np.flatnonzero(_iou(common, total) >= min_iou)
        lower[axis] = int(allowed[rng.integers(len(allowed))])
        attainable = int(common[lower[axis]])
    return box_a, Box.of_size(lower, size_b)


@dataclass(frozen=True)
class ViewBoxes:
    """The boxes of one sample's views.

    Attributes:
        pair: the two global crops.
        bounds: the smallest box around the pair; with multi-crop, around all crops.
        local: the local crops, all inside `bounds`.
    """

    pair: tuple[Box, Box]
    bounds: Box
    local: tuple[Box, ...]

    def shifted(self, origin: Sequence[int]) -> ViewBoxes:
        """The same voxels, counted from `origin`."""
        first, second = self.pair
        return ViewBoxes(
            (first.shifted(origin), second.shifted(origin)),
            self.bounds.shifted(origin),
            tuple(box.shifted(origin) for box in self.local),
        )


def sample_view_boxes(volume_shape: Size, views: ViewSettings, rng: np.random.Generator) -> ViewBoxes:
    """Draw the two global and the local crops of a volume by sub-crop, or by multi-crop if the views say so.

    The authors draw local corners in the box +-3 voxels, so that most of their local crops leave the box. The paper and
    we keep them inside.

    Args:
        volume_shape: spatial shape in voxels, with as many axes as the sizes of `views`.
        views: sizes and numbers of the crops.
        rng: the only source of randomness.
    """
    if views.crops == "multi_crop":
        return sample_multi_crop(volume_shape, views, rng)
    pair = sample_pair(volume_shape, views.global_crop_sizes, views.min_iou, rng)
    bounds = pair[0].union_bounds(pair[1])
    sizes = views.local_crop_sizes
    local = tuple(sample_inside(bounds, sizes[rng.integers(len(sizes))], rng) for _ in range(views.num_local))
    return ViewBoxes(pair, bounds, local)


def sample_multi_crop(volume_shape: Size, views: ViewSettings, rng: np.random.Generator) -> ViewBoxes:
    """Draw independent crops within a common area.

    The area has the largest global crop size, cut down to the image, and lies anywhere. A global crop covers 0.3 to 1
    of the area, a local crop 0.05 to 0.3. Its proportions differ from the area's by up to 4/3.

    Args:
        volume_shape: spatial shape in voxels.
        views: sizes and numbers of the crops.
        rng: the only source of randomness.
    """
    largest = tuple(max(lengths) for lengths in zip(*views.global_crop_sizes, strict=True))
    area = sample_inside(Box.of_size([0] * len(volume_shape), volume_shape), largest, rng)

    def crop(shares: tuple[float, float]) -> Box:
        stretch = rng.uniform(-0.5, 0.5, len(largest)) * math.log(MULTI_CROP_ASPECT)
        side = rng.uniform(*shares) ** (1 / len(largest)) * np.exp(stretch - stretch.mean())
        size = np.clip(np.rint(np.array(area.shape) * side), 1, area.shape)
        return sample_inside(area, tuple(size.astype(int).tolist()), rng)

    pair = crop(MULTI_CROP_GLOBAL), crop(MULTI_CROP_GLOBAL)
    local = tuple(crop(MULTI_CROP_LOCAL) for _ in range(views.num_local))
    bounds = pair[0]
    for box in (pair[1], *local):
        bounds = bounds.union_bounds(box)
    return ViewBoxes(pair, bounds, local)
