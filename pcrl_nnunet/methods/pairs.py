"""Pairs of views of a case, for methods that compare views.

N: local views, C: image channels, G: global input size, L: local input size.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform, Compose

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.samples import ArraySpec, Sample, ShownSample, ShownView, Views
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.views import PixelTransform, SpatialViewTransform, SubCropTransform
from pcrl_nnunet.views.configure import MIN_SAMPLES, check_views, configure_views, fitting_samples
from pcrl_nnunet.views.points import PointsTransform
from pcrl_nnunet.views.settings import Augmentation, ViewSettings, names_of_large_crops
from pcrl_nnunet.views.sub_crop import Volume, background_of_views

AFTER = "after pixel\naugmentation"


def fitted_views(given: Mapping[str, Any], median: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
    """Adapt a method's block of settings: drop the crop sizes if one of them exceeds the median image.

    See `Method.fitted`.
    """
    left_out = [f"views.{name}" for name in names_of_large_crops(given.get("views"), median)]
    kept = {name: size for name, size in dict(given.get("views") or {}).items() if f"views.{name}" not in left_out}
    return ({**given, "views": kept} if left_out else dict(given)), left_out


def pair_settings(plan: PlanFacts) -> ViewSettings:
    """Return the sizes of pairs of global views without local ones, see `configure_views`."""
    rule = plan.patch_size, plan.batch_size, plan.strides, plan.median_size, plan.spacing
    return configure_views(*rule, num_local=0)[0]


def number_of_pairs(views: ViewSettings, plan: PlanFacts, where: str, title: str) -> int:
    """Return the number of pairs that fit the plan's budget of voxels.

    Args:
        where: name of the method's block of settings.
        title: name of the method for display.

    Raises:
        UserError: there are local views, or views are too small for the encoder.
    """
    if views.num_local:
        raise UserError(f"{where}.views.num_local is {views.num_local}; {title} has no local views: set 0")
    check_views(views, plan.strides)
    return max(MIN_SAMPLES, fitting_samples(plan.patch_size, plan.batch_size, views))


def editable_pairs(views: ViewSettings) -> dict[str, Any]:
    """Return the sizes that a planner writes into a plan for users to edit."""
    return {"views": {"global_crop_sizes": views.global_crop_sizes, "global_input_size": views.global_input_size}}


def facts_of_pairs(views: ViewSettings) -> dict[str, str]:
    """Return the views' sizes for the dry run."""
    sizes = ["x".join(map(str, size)) for size in views.global_crop_sizes]
    return {
        "crops": f"{', '.join(sizes)} voxels",
        "input": f"{'x'.join(map(str, views.global_input_size))} voxels",
    }


def case_number(case: Case) -> np.ndarray:
    """Return a number (1,) of int64 that stands for the case in all processes: a hash of its name, never negative."""
    return np.array([zlib.crc32(case.name.encode())], np.int64)


class PairViews(Views):
    """Two global and N local views of a case, drawn by sub-crop.

    The arrays, all float32: ``target`` (2, C, *G), the global views; ``input`` (2, C, *G), the same after pixel
    augmentation; ``local`` (N, C, *L), the local views after pixel augmentation, unless N is 0. Subclasses may choose
    among them, and may add ``case``, see `case_number`.

    Args:
        points: number P of points that both global views show, see `PointsTransform`. If it is not 0, there is also
            ``points`` (2, P, d).
    """

    def __init__(self, settings: ViewSettings, augmentation: Augmentation, channels: int, points: int = 0) -> None:
        self.settings, self.spacing = settings, settings.spacing
        pair = ArraySpec((2, channels, *settings.global_input_size))
        self.arrays = {"target": pair, "input": pair}
        if settings.num_local:
            self.arrays["local"] = ArraySpec((settings.num_local, channels, *settings.local_input_size))
        pairs = SubCropTransform(settings, augmentation)
        self._draw: AbstractTransform = PointsTransform(pairs, points) if points else pairs
        if points:
            self.arrays["points"] = ArraySpec((2, points, len(self.spacing)))
        self._resample = SpatialViewTransform()
        self._augment = Compose(
            [
                PixelTransform(augmentation, "target", "input", whole=True),
                *([PixelTransform(augmentation, "local", "local")] if settings.num_local else []),
            ]
        )

    def __call__(self, case: Case, volume: Volume, rng: np.random.Generator) -> Sample:
        """Make the arrays of one sample."""
        drawn = self._draw(data=volume, rng=rng, case=case_number(case))
        made = self._augment(**self._resample(**drawn))
        return {name: made[name] for name in self.arrays}

    def show(self, case: Case, volume: Volume, rng: np.random.Generator) -> ShownSample:
        """Make a sample with its boxes in the image and with the views before pixel augmentation."""
        plain = self._resample(**self._draw(data=volume, rng=rng, case=case_number(case)))
        before = [view.copy() for name in ("target", "local") for view in plain.get(name, ())]
        made = self._augment(**plain)
        after = [*made["input"], *made.get("local", ())]
        extra = len(made["origin"]) - len(self.spacing)
        boxes = made["boxes"].shifted([-first for first in made["origin"][extra:]])
        names = ["global 1", "global 2", *(f"local {i + 1}" for i in range(len(boxes.local)))]
        flipped = [*made["target_flipped"], *made.get("local_flipped", ())]
        views = [
            ShownView(
                name if number < 2 else "local",
                name,
                {"before": before[number], AFTER: after[number]},
                box,
                flipped[number],
            )
            for number, (name, box) in enumerate(zip(names, (*boxes.pair, *boxes.local), strict=True))
        ]
        sample = {name: made[name] for name in self.arrays}
        return ShownSample(sample, views, boxes.bounds, tuple(made["origin"][:extra]))

    def background(self, case: Case, volume: Volume, rng: np.random.Generator) -> dict[str, list[float]]:
        """Return the shares of background of the global and local crops. Voxels are read, but no view is made."""
        return background_of_views(self._draw(data=volume, rng=rng))
