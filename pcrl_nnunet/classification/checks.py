"""Checks that a label table fits the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pcrl_nnunet.classification.label_table import FILES, LabelTable
from pcrl_nnunet.classification.world import opened, outside
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case

MAX_OUTSIDE = 0.1  # largest tolerated share of points outside their image


def check_cases(labels: LabelTable, cases: Mapping[str, Case], transpose: Sequence[int]) -> list[str]:
    """Return warnings about missing cases, and about points outside their image.

    Args:
        cases: the preprocessed cases, by name.
        transpose: the plan's transpose_forward.

    Raises:
        UserError: many points lie outside.
    """
    file, warnings = FILES[labels.kind], []
    missing = sorted(set(labels.case) - cases.keys())
    if missing:
        warnings.append(
            f"WARNING: {file} has {len(missing)} cases that are not among the {len(cases)} preprocessed ones: "
            f"{', '.join(missing[:3])}{' ...' * (len(missing) > 3)}"
        )
    if labels.point is None:
        return warnings
    beyond: list[str] = []
    known = np.flatnonzero(np.isin(labels.case, list(cases)))
    for of_case, volume, points in opened(labels, known, cases, transpose):
        assert points is not None
        beyond += labels.case[known[of_case[outside(points, volume.shape[1:])]]].tolist()
    if beyond:
        told = (
            f"{len(beyond)} of {len(known)} points of {file} lie outside of their image, such as one of {beyond[0]}; "
            f"they have to be mm of the world in LPS, as SimpleITK and DICOM count"
        )
        if len(beyond) > MAX_OUTSIDE * len(known):
            raise UserError(told)
        warnings.append(f"WARNING: {told}")
    return warnings
