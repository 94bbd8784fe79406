"""Sub-crop: the choice of a sample's views, and a single read of their voxels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform

from pcrl_nnunet.views.background import Background
from pcrl_nnunet.views.boxes import Box, ViewBoxes, sample_shift, sample_view_boxes
from pcrl_nnunet.views.settings import Augmentation, ViewSettings
from pcrl_nnunet.views.spatial import AffineMap, sample_map

MAX_TRIES = 4  # reads of a pair
LOCAL_TRIES = 10  # places of a local crop; they cost no read
MAX_BACKGROUND = 0.85  # the paper's share for CT (-150 HU and less); the authors' code has the filter inverted
LOCAL_PROBES = 16  # voxels sampled along an axis of a local crop


class Volume(Protocol):
    """An image that is read by slicing: an array or a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


class SubCropTransform(AbstractTransform):
    """Draw two global and several local crops of ``data`` with their spatial maps, and read their voxels.

    Only the box around all views is read: the bounding box of the pair, and the voxels outside it that rotated corners
    and anti-aliasing need. Real voxels matter there, because repeated borders would be streaks in the targets. Their
    number depends on the strengths, not on the volume. At the paper's sizes, 10 degrees and scale 0.1, the read voxels
    are 1.6 times the bounding box in the median and at most 2.3 times (300 draws).

    If over 85 % of its bounding box is background, another pair is drawn, up to 4 in all. Then the pair with the least
    background is kept. A local crop with over 85 % background moves to another place, see `move_empty`.

    Reads ``data``, a `Volume` (C, *spatial) of one sample, and ``rng``. Replaces ``data`` by the float32 array read,
    which has its own memory. Adds ``maps`` {"target": 2 maps, "local": N maps} and ``boxes``, both counted from the
    array's first voxel, and ``origin``, the index of this voxel in the volume. If views have one axis less than the
    volume, a slice of its first spatial axis is drawn, and ``data`` is (C, Y, X).
    """

    def __init__(self, views: ViewSettings, augmentation: Augmentation) -> None:
        self.views = views
        self.augmentation = augmentation

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        volume, rng = data_dict["data"], data_dict["rng"]
        shape = volume.shape[1:]

        def pairs() -> Iterator[tuple[float, tuple[dict[str, Any], Background]]]:
            for _ in range(MAX_TRIES):
                drawn = read_views(volume, *self.sample(shape, rng))
                part = drawn["data"][drawn["boxes"].bounds.index()]
                values = Background.of(part)
                yield values.share(part), (drawn, values)

        drawn, values = least_background(pairs())
        return {**data_dict, **drawn, **move_empty(drawn, values, shape, rng)}

    def sample(
        self, shape: Sequence[int], rng: np.random.Generator
    ) -> tuple[tuple[int, ...], ViewBoxes, dict[str, list[AffineMap]]]:
        """Draw views of a volume.

        Args:
            shape: spatial shape of the volume.
            rng: the only source of randomness.

        Returns:
            the index of the slice (empty in 3D), the boxes, and the maps by the names of their arrays.
        """
        views = self.views
        extra = len(shape) - len(views.spacing)
        plane = tuple(int(rng.integers(length)) for length in shape[:extra])
        boxes = sample_view_boxes(tuple(shape[extra:]), views, rng)
        maps = {
            name: [sample_map(box, size, views.spacing, self.augmentation, rng) for box in group]
            for name, group, size in (
                ("target", boxes.pair, views.global_input_size),
                ("local", boxes.local, views.local_input_size),
            )
            if group
        }
        return plane, boxes, maps


def read_region(volume: Volume, plane: tuple[int, ...], region: Box) -> np.ndarray:
    """Read the voxels (C, *region) of a box, in the slice `plane` if the volume has one axis more."""
    in_volume = Box((*plane, *region.lower), (*(i + 1 for i in plane), *region.upper))
    return volume[in_volume.index()].reshape(volume.shape[0], *region.shape)


def read_views(
    volume: Volume, plane: tuple[int, ...], boxes: ViewBoxes, maps: dict[str, list[AffineMap]]
) -> dict[str, Any]:
    """Read the box around the pair and all maps' footprints, and shift boxes and maps to its first voxel."""
    whole = Box.of_size([0] * len(boxes.bounds.lower), volume.shape[1 + len(plane) :])
    region = boxes.bounds
    for affine in (affine for group in maps.values() for affine in group):
        region = region.union_bounds(affine.footprint())
    region = region.clamp(whole)
    data = _owned(read_region(volume, plane, region))
    origin = region.lower
    return {
        "data": data,
        "origin": (*plane, *origin),
        "boxes": boxes.shifted(origin),
        "maps": {name: [affine.shifted(origin) for affine in group] for name, group in maps.items()},
    }


def move_empty(
    drawn: dict[str, Any], values: Background, shape: Sequence[int], rng: np.random.Generator
) -> dict[str, Any]:
    """Move local crops with over 85 % background to other places within the bounds of the pair.

    A crop tries up to 10 places, its first place included. Then the place with the least background is kept. A crop
    keeps its size, flip, rotation and scale. Nothing is read again: a crop moves only to places whose voxels have been
    read. Random numbers are drawn only for crops that move.

    Args:
        drawn: the result of `read_views`.
        values: the background's values in the box around the pair.
        shape: spatial shape of the volume.
        rng: the only source of randomness.

    Returns:
        new ``boxes`` and ``maps``.
    """
    data, boxes, maps = drawn["data"], drawn["boxes"], drawn["maps"]
    read = Box.of_size([0] * (data.ndim - 1), data.shape[1:])
    whole = Box.of_size([-start for start in drawn["origin"][-read.dim :]], shape[-read.dim :])
    readable = read.beyond_edges_of(whole)

    def places(box: Box, affine: AffineMap) -> Iterator[tuple[float, tuple[Box, AffineMap]]]:
        yield values.share(data[box.index()], LOCAL_PROBES), (box, affine)
        for _ in range(LOCAL_TRIES - 1):
            shift = sample_shift([(box, boxes.bounds), (affine.footprint(), readable)], rng)
            moved = box.shifted(shift)
            yield values.share(data[moved.index()], LOCAL_PROBES), (moved, affine.shifted(shift))

    local = maps.get("local", [])
    kept = [least_background(places(*crop)) for crop in zip(boxes.local, local, strict=True)]
    return {
        "boxes": replace(boxes, local=tuple(box for box, _ in kept)),
        "maps": {**maps, **({"local": [affine for _, affine in kept]} if kept else {})},
    }


def background_of_views(sample: dict[str, Any]) -> dict[str, list[float]]:
    """Return the shares of background of a sample's ``global`` and ``local`` crops, after `SubCropTransform`."""
    data, boxes = sample["data"], sample["boxes"]
    values = Background.of(data[boxes.bounds.index()])
    crops = {"global": boxes.pair, "local": boxes.local}
    return {kind: [values.share(data[box.index()]) for box in group] for kind, group in crops.items()}


_Drawn = TypeVar("_Drawn")


def least_background(draws: Iterable[tuple[float, _Drawn]]) -> _Drawn:
    """Return the first draw with at most `MAX_BACKGROUND`, else the draw with the least background.

    Args:
        draws: one or more pairs of a share of background and a draw. The iteration stops at the returned draw.
    """
    best: list[tuple[float, _Drawn]] = []
    for draw in draws:
        if not best or draw[0] < best[0][0]:
            best = [draw]
        if draw[0] <= MAX_BACKGROUND:
            break
    return best[0][1]


def _owned(part: np.ndarray) -> np.ndarray:
    """Copy the part to float32 with its own memory, because later transforms may write into it."""
    array = np.ascontiguousarray(part, dtype=np.float32)
    return array if array.base is None else array.copy()
