"""The cases of a dataset that a pretraining saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pcrl_nnunet.ingest.unlabelled import UNLABELLED
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.copies import with_known_voxels

UNKNOWN_CASES = (
    "WARNING: the checkpoint does not list the cases that it was trained on: nobody can tell whether validation "
    "cases were among them"
)


def cases_seen(checkpoint: Mapping[str, Any], dataset_name: str, cases: Sequence[Case]) -> list[str]:
    """Name the cases of a dataset that the pretraining saw, under their own name or as copies."""
    # paths are relative to nnUNet_preprocessed: the dataset's folder comes first
    own = [case for case in checkpoint["cases"] if PurePath(case["path"]).parts[0] == dataset_name]
    names = {(case["name"], _is_unlabelled(case["path"])) for case in own}
    by_name = [case for case in cases if (case.name, _is_unlabelled(case.path)) in names]
    by_voxels = {case["sha256"]: case["name"] for case in checkpoint["cases"]}
    twins = with_known_voxels([case for case in cases if case not in by_name], by_voxels)
    named = {case: f"{case.name} (as {twin})" for case, twin in twins.items()}
    return [named.get(case, case.name) for case in cases if case in by_name or case in named]


def _is_unlabelled(path: str) -> bool:
    """Tell if a case is a scan of ``pcrl_nnunet_preprocess -i``: its name may also be the name of a labelled case."""
    return PurePath(path).parent.name.endswith(UNLABELLED)
