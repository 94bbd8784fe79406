"""The search for copies of an image under other names, by preprocessed voxels.

Name, format, compression and number type of the files do not matter. A rotated or rounded image has other voxels and is
not found. An image that another plan normalises differently is not found either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import TypeVar

import numpy as np
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from pcrl_nnunet.loading.cases import Case, CaseVolume, fingerprint

_Known = TypeVar("_Known")


def find_copies(cases: Sequence[Case], originals: Sequence[Case]) -> dict[Case, Case]:
    """Map each case with the voxels of an original to that original.

    Shapes are compared first: among thousands of cases, only the few with an original's shape are read.

    Raises:
        UserError: a case cannot be read.
    """
    if not cases or not originals:
        return {}
    with _threads() as pool:
        shape_of = dict(zip((*cases, *originals), pool.map(_shape, (*cases, *originals)), strict=True))
        shared = {shape_of[case] for case in cases} & {shape_of[case] for case in originals}
        of_shape = [case for case in originals if shape_of[case] in shared]
        known = dict(zip(pool.map(fingerprint, of_shape), of_shape, strict=True))
    alike = with_known_voxels([case for case in cases if shape_of[case] in shared], known)
    return {case: original for case, original in alike.items() if _same_voxels(case, original)}


def with_known_voxels(cases: Sequence[Case], known: Mapping[str, _Known]) -> dict[Case, _Known]:
    """Map each case with a known fingerprint to the known value.

    Args:
        known: values by `fingerprint`.
    """
    if not known:
        return {}
    with _threads() as pool:
        prints = pool.map(fingerprint, cases)
    return {case: known[of_case] for case, of_case in zip(cases, prints, strict=True) if of_case in known}


def _same_voxels(one: Case, other: Case) -> bool:
    """Compare whole images, slice by slice of the first axis: a fingerprint covers only the central voxels."""
    volumes = CaseVolume(one), CaseVolume(other)
    every = slice(None)
    return all(
        np.array_equal(volumes[0][every, slice(index, index + 1)], volumes[1][every, slice(index, index + 1)])
        for index in range(volumes[0].shape[1])
    )


def _shape(case: Case) -> tuple[int, ...]:
    return CaseVolume(case).shape


def _threads() -> ThreadPool:
    """Return a pool of threads: reading and hashing release the GIL. Each thread holds one central box in memory."""
    return ThreadPool(max(1, get_allowed_n_proc_DA()))
