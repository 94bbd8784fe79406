"""Sub-crop: which views a sample has, and the one read of the voxels that they need."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform

from pcrl_nnunet.boxes import Box, ViewBoxes, sample_inside, sample_view_boxes
from pcrl_nnunet.config import Augmentation, Views
from pcrl_nnunet.transforms.spatial import AffineMap, sample_map

MAX_TRIES = 4
MAX_BACKGROUND = 0.85  # the paper's share for CT (-150 HU and less); the authors' code has the filter inverted
BACKGROUND_WIDTH = 0.2  # in sd of z-scored data
PROBES = 32  # voxels an axis that `background` looks at
WINDOW = 1.5  # largest global crops that a shared read has an axis


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

    A pair is drawn again, at most 4 times in all, while over 85 % of its bounding box is background; then the one with
    the least is kept.

    Reads ``data``, a `Volume` (C, *spatial), and ``rng``. Replaces ``data`` by the float32 array read and adds
    ``maps`` {"target": 2 maps, "local": N maps} and ``boxes``, both counted from that array's first voxel, and
    ``origin``, the index of that voxel in the volume. For views with one axis less than the volume, a slice of its
    first spatial axis is drawn, and ``data`` is (C, Y, X).
    """

    def __init__(self, views: Views, augmentation: Augmentation) -> None:
        self.views = views
        self.augmentation = augmentation

    def __call__(self, **data_dict: Any) -> dict[str, Any]:
        volume, rng = data_dict["data"], data_dict["rng"]
        best: tuple[float, dict[str, Any]] | None = None
        for _ in range(MAX_TRIES):
            plane, boxes, maps = self.sample(volume.shape[1:], rng)
            drawn = read_views(volume, plane, boxes, maps)
            share = background(drawn["data"][drawn["boxes"].bounds.index()])
            if best is None or share < best[0]:
                best = share, drawn
            if share <= MAX_BACKGROUND:
                break
        assert best is not None
        return {**data_dict, **best[1]}

    def sample(
        self, shape: tuple[int, ...], rng: np.random.Generator
    ) -> tuple[tuple[int, ...], ViewBoxes, dict[str, list[AffineMap]]]:
        """Draw the views of a volume with spatial `shape`.

        Returns:
            the index of the slice, empty in 3D; the boxes; the maps, under the names of the arrays they are for.
        """
        views = self.views
        extra = len(shape) - len(views.spacing)
        plane = tuple(int(rng.integers(length)) for length in shape[:extra])
        boxes = sample_view_boxes(shape[extra:], views, rng)
        maps = {
            name: [sample_map(box, size, views.spacing, self.augmentation, rng) for box in group]
            for name, group, size in (
                ("target", boxes.pair, views.global_input_size),
                ("local", boxes.local, views.local_input_size),
            )
        }
        return plane, boxes, maps


def read_views(
    volume: Volume, plane: tuple[int, ...], boxes: ViewBoxes, maps: dict[str, list[AffineMap]]
) -> dict[str, Any]:
    """Read the box around the pair and the footprints of all maps, and count boxes and maps from its first voxel."""
    whole = Box.of_size([0] * len(boxes.bounds.lower), volume.shape[1 + len(plane) :])
    region = boxes.bounds
    for affine in (affine for group in maps.values() for affine in group):
        region = region.union_bounds(affine.footprint())
    region = region.clamp(whole)
    in_volume = Box((*plane, *region.lower), (*(i + 1 for i in plane), *region.upper))
    data = np.ascontiguousarray(volume[in_volume.index()], dtype=np.float32)
    data = data.reshape(data.shape[0], *region.shape)
    origin = region.lower
    return {
        "data": data,
        "origin": (*plane, *origin),
        "boxes": boxes.shifted(origin),
        "maps": {name: [affine.shifted(origin) for affine in group] for name, group in maps.items()},
    }


def read_window(volume: Volume, views: Views, rng: np.random.Generator) -> np.ndarray:
    """Read a part of the volume that several pairs are then drawn from, anywhere in it.

    It is 1.5 times as long as the largest global crop on each axis; for views with one axis less than the volume it has
    as many slices as there are pairs.

    Returns:
        (C, *spatial) float32
    """
    shape = volume.shape[1:]
    largest = [round(WINDOW * max(lengths)) for lengths in zip(*views.global_crop_sizes, strict=True)]
    slices = [views.pairs_per_read] * (len(shape) - len(largest))
    window = sample_inside(Box.of_size([0] * len(shape), shape), (*slices, *largest), rng)
    return np.ascontiguousarray(volume[window.index()], dtype=np.float32)


def background(data: np.ndarray) -> float:
    """Share of voxels, 0 to 1, that are background, judged on the first channel.

    Background is air, clipped air, or the zeros around images that were normalised inside a mask: voxels close to the
    smallest one, or equal to 0.

    Args:
        data: (C, *spatial), z-scored. A regular part of it is looked at: at most 63 voxels an axis.
    """
    every = tuple(slice(None, None, max(1, length // PROBES)) for length in data.shape[1:])
    probes = data[0][every]
    return float(np.mean((probes <= probes.min() + BACKGROUND_WIDTH) | (np.abs(probes) < 1e-3)))
