"""The views that make a sample of a case: the part of a method that the loader needs. C image channels."""

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
    """The shape and the type of one sample's array. The loader reserves memory by it."""

    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class ShownView:
    """A view as people see it.

    Attributes:
        kind: name of its colour in the picture, such as "global 1" or "local".
        title: above the view.
        images: (C, *size) by the name of the row, such as "before" and "after pixel augmentation".
        box: where it lies, in voxels of the image; None: nowhere in particular.
    """

    kind: str
    title: str
    images: Mapping[str, np.ndarray]
    box: Box | None = None


@dataclass(frozen=True)
class ShownSample:
    """A sample as people see it.

    Attributes:
        sample: its arrays.
        views: drawn from left to right.
        bounds: box around the views, in voxels of the image.
        slice: first spatial index of the image for 2D views of a 3D image; empty otherwise.
    """

    sample: Sample
    views: Sequence[ShownView]
    bounds: Box | None = None
    slice: tuple[int, ...] = ()


class Views(ABC):
    """Makes a sample from a case. Works in loading processes: it pickles, uses numpy, and draws from `rng` alone.

    Attributes:
        arrays: of one sample. ``input``, which is needed, is what the network gets: (..., C, *size).
        spacing: of the preprocessed images, mm.
    """

    arrays: Mapping[str, ArraySpec]
    spacing: tuple[float, ...]

    @abstractmethod
    def __call__(self, case: Case, volume: Volume, rng: np.random.Generator) -> Sample:
        """Make the arrays of one sample.

        Args:
            case: that the sample is drawn from.
            volume: the case's image (C, *spatial), read by slicing.
            rng: the only source of randomness, seeded by (seed, step, sample).
        """

    def show(self, case: Case, volume: Volume, rng: np.random.Generator) -> ShownSample:
        """Make a sample for people to look at. By default every array that looks like an image is a view."""
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
        """Return the shares of background, 0 to 1, of a sample's views by kind; empty: not known."""
        return {}
