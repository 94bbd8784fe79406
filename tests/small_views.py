"""Views of other packages' methods: with whole numbers, and with faults. Loading processes import them from here."""

from __future__ import annotations

import numpy as np

from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.samples import ArraySpec, Sample, Views
from pcrl_nnunet.views.sub_crop import Volume

LARGE = 2**40  # no float32 and no int32 holds all whole numbers up to it


class NumberedViews(Views):
    """An image and whole numbers of it."""

    def __init__(self) -> None:
        self.spacing = (1.0, 1.0, 1.0)
        self.arrays = {
            "input": ArraySpec((2, 2, 3, 4)),
            "places": ArraySpec((5,), "int64"),
            "known": ArraySpec((), "bool"),
        }

    def __call__(self, case: Case, volume: Volume, rng: np.random.Generator) -> Sample:
        image = volume[(slice(None), slice(0, 2), slice(0, 3), slice(0, 4))]
        places = LARGE + rng.integers(LARGE, size=5)
        return {"input": image, "places": places, "known": np.array(rng.random() < 0.5)}


class WrongViews(NumberedViews):
    """Promises other arrays than it makes."""

    def __init__(self, name: str, spec: ArraySpec) -> None:
        super().__init__()
        self.arrays = {**self.arrays, name: spec}


class FailingViews(NumberedViews):
    """Fails at the case "a" with its own exception."""

    def __call__(self, case: Case, volume: Volume, rng: np.random.Generator) -> Sample:
        return self._looked_up({}) if case.name == "a" else super().__call__(case, volume, rng)

    def _looked_up(self, table: dict[str, Sample]) -> Sample:
        return table["no such sample"]
