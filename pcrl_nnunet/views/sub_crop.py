"""Sub-crop: which views a sample has, and the one read of the voxels that they need."""

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
LOCAL_TRIES = 10  # places of a local crop, which cost no read
MAX_BACKGROUND = 0.85  # the paper's share for CT (-150 HU and less); the authors' code has the filter inverted
LOCAL_PROBES = 16  # voxels an axis of a local crop that are looked at


class Volume(Protocol):
    """An image that is read by slicing: an array, or one on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


class SubCropTransform(AbstractTransform):
    """Draw two global and several local crops of ``data`` with their spatial maps, and read what they need.

    Only the box around all views is read: the bounding box of the pair, and the voxels that rotated corners and
    anti-aliasing reach outside it. These are real voxels, where repeated borders would be streaks in the targets. How
    many depends on the strengths, not on the volume: at the paper's sizes, 10 degrees and scale 0.1, 1.6 times the
    voxels of the bounding box are read in the median and 2.3 times at most (300 draws).

    While over 85 % of its bounding box is background another pair is drawn, up to 4 in all; then the one with the least
    is kept. A local crop of which over 85 % is background moves to another place, see `move_empty`.

    Reads ``data``, a `Volume` (C, *spatial) of one sample, and ``rng``. Replaces ``data`` by the float32 array read,
    which has memory of its own, and adds ``maps`` {"target": 2 maps, "local": N maps} and ``boxes``, both counted from
    that array's first voxel, and ``origin``, the index of that voxel in the volume. For views with one axis less than
    the volume, a slice of its first spatial axis is drawn, and ``data`` is (C, Y, X).
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
            the index of the slice, empty in 3D; the boxes; the maps, under the names of the arrays they are for.
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
    """Read the voxels of a box, (C, *region), in the slice `plane` of a volume with one axis more, if it is given."""
    in_volume = Box((*plane, *region.lower), (*(i + 1 for i in plane), *region.upper))
    return volume[in_volume.index()].reshape(volume.shape[0], *region.shape)


def read_views(
    volume: Volume, plane: tuple[int, ...], boxes: ViewBoxes, maps: dict[str, list[AffineMap]]
) -> dict[str, Any]:
    """Read the box around the pair and the footprints of all maps, and count boxes and maps from its first voxel."""
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
    """Move local crops of which over 85 % is background to other places within the bounds of the pair.

    A crop tries up to 10 places, the first among them; then the place with the least background is kept. A crop keeps
    its size, flip, rotation and scale. Nothing is read again: a crop moves only where its map finds all voxels in what
    has been read. Numbers are drawn for crops that move alone.

    Args:
        drawn: as `read_views` gives it.
        values: the background's, in the box around the pair.
        shape: spatial shape of the volume.
        rng: the only source of randomness.

    Returns:
        ``boxes`` and ``maps``, new ones.
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
    """Return the first draw with no more background than `MAX_BACKGROUND`, else the draw with the least.

    Args:
        draws: one or more shares of background, each with what was drawn. None is made after the one that is returned.
    """
    best: list[tuple[float, _Drawn]] = []
    for draw in draws:
        if not best or draw[0] < best[0][0]:
            best = [draw]
        if draw[0] <= MAX_BACKGROUND:
            break
    return best[0][1]


def _owned(part: np.ndarray) -> np.ndarray:
    """The part as float32 with memory of its own: whatever comes after may write into it."""
    array = np.ascontiguousarray(part, dtype=np.float32)
    return array if array.base is None else array.copy()
