"""The views that make a sample from a case: the part of a method that the loader needs. C: image channels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.views.boxes import Box
from pcrl_nnunet.views.sub_crop import Volume

Sample = dict[str, np.ndarray]  # one sample's arrays by name


class ArraySpec(NamedTuple):
    """The shape and type of an array of a sample, for which the loader reserves memory."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class ShownView:
    """A view for display.

    Attributes:
        kind: kind of view, which sets its colour in the picture, such as "global 1" or "local".
        title: text above the view.
        images: (C, *size) by the name of the row, such as "before" and "after pixel augmentation".
        box: position of the view, in voxels of the image; None: no position.
        flipped: the axes that are flipped; None: unknown.
    """

    kind: str
    title: str
    images: Mapping[str, np.ndarray]
    box: Box | None = None
    flipped: Sequence[int] | None = None


@dataclass(frozen=True)
class ShownSample:
    """A sample for display.

    Attributes:
        sample: the sample's arrays.
        views: views from left to right.
        bounds: box around the views, in voxels of the image.
        slice: first spatial index of the image for 2D views of a 3D image; empty otherwise.
    """

    sample: Sample
    views: Sequence[ShownView]
    bounds: Box | None = None
    slice: tuple[int, ...] = ()


class Views(ABC):
    """A maker of samples. It works in loading processes, so it must pickle, use numpy, and draw only from `rng`.

    Attributes:
        arrays: shapes and types of a sample's arrays. ``input`` is required and goes to the network: (..., C, *size).
        spacing: spacing of the preprocessed images, mm.
    """

    arrays: Mapping[str, ArraySpec]
    spacing: tuple[float, ...]

    @abstractmethod
    def __call__(self, case: Case, volume: Volume, rng: np.random.Generator) -> Sample:
        """Make the arrays of one sample.

        Args:
            case: the sample's case.
            volume: the case's image (C, *spatial), read by slicing.
            rng: the only source of randomness, seeded by (seed, step, sample).
        """

    def show(self, case: Case, volume: Volume, rng: np.random.Generator) -> ShownSample:
        """Make a sample for display. By default every array with an image's shape is a view."""
        sample = self(case, volume, rng)
        axes = 1 + len(self.spacing)
        views = []
        for name, array in sample.items():
            images = array[None] if array.ndim == axes else array
            if images.ndim == axes + 1 and images.dtype.kind == "f":
                several = len(images) > 1
                views += [
                    ShownView(name, f"{name} {number}" if several else name, {"": image})
                    for number, image in enumerate(images, 1)
                ]
        return ShownSample(sample, views)

    def background(self, case: Case, volume: Volume, rng: np.random.Generator) -> Mapping[str, Sequence[float]]:
        """Return the share of background, 0 to 1, of a sample's views by kind; empty if unknown."""
        return {}
