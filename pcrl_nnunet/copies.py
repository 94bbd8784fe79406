"""Cases that are one image under several names, found by their preprocessed voxels.

Name, format, compression and number type of the files do not matter. An image that was turned or rounded has other
voxels and is not found, nor is an image that another plan normalises otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from typing import TypeVar

from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from pcrl_nnunet.data import Case, CaseVolume, fingerprint

Shape = tuple[int, ...]
_Known = TypeVar("_Known")


def find_copies(cases: Sequence[Case], originals: Sequence[Case]) -> dict[Case, Case]:
    """Map each case that has the voxels of an original to that original.

    Shapes are compared first: of thousands of cases, voxels are read of the few that have the shape of an original.

    Raises:
        UserError: a case cannot be read.
    """
    if not cases or not originals:
        return {}
    with _threads() as pool:
        shapes = set(pool.map(_shape, cases))
        shared = [case for case in originals if _shape(case) in shapes]
        known = dict(zip(pool.map(fingerprint, shared), shared, strict=True))
    return with_known_voxels(cases, known, {_shape(case) for case in shared})


def with_known_voxels(
    cases: Sequence[Case], known: Mapping[str, _Known], shapes: Collection[Shape] | None = None
) -> dict[Case, _Known]:
    """Map each case whose fingerprint is known to what is known by it.

    Args:
        known: by `fingerprint`.
        shapes: of the known images, where they can be told: a case of another shape is not read.
    """

    def look_up(case: Case) -> _Known | None:
        return known.get(fingerprint(case)) if shapes is None or _shape(case) in shapes else None

    if not known:
        return {}
    with _threads() as pool:
        found = pool.map(look_up, cases)
    return {case: of_case for case, of_case in zip(cases, found, strict=True) if of_case is not None}


def _shape(case: Case) -> Shape:
    return CaseVolume(case).shape


def _threads() -> ThreadPool:
    """Threads, as neither reading nor hashing holds the interpreter; each has one central box in memory."""
    return ThreadPool(max(1, get_allowed_n_proc_DA()))
