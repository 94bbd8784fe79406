"""Scans without labels beside the tiny dataset, in the form of pcrl_nnunet_preprocess -i."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from tiny_dataset import DATASET_JSON, intensities, make_plan

from pcrl_nnunet.ingest.scans import Target
from pcrl_nnunet.ingest.unlabelled import _write_manifest, unlabelled_folder


def make_full_plan(num_channels: int = 1, **pcrl: Any) -> dict[str, Any]:
    """The tiny dataset's plan with all entries for preprocessing."""
    plan, resampling = make_plan(**pcrl), {"order": 1, "order_z": 0, "force_separate_z": None}
    statistics = intensities(np.arange(5))
    plan["foreground_intensity_properties_per_channel"] = {str(c): statistics for c in range(num_channels)}
    plan["configurations"]["3d_fullres"] |= {
        "normalization_schemes": ["ZScoreNormalization"] * num_channels,
        "use_mask_for_norm": [False] * num_channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, **resampling},
    }
    return plan


def write_scans(
    dataset_folder: Path,
    plan: dict[str, Any],
    scans: Mapping[str, int],
    shape: tuple[int, ...] = (1, 15, 14, 13),
    dataset_json: dict[str, Any] | None = None,
) -> Path:
    """Write images of noise and the manifest; returns their folder.

    Args:
        scans: seed by name.
        shape: (C, *spatial).
    """
    identifier = plan["configurations"]["3d_fullres"]["data_identifier"]
    folder = Path(unlabelled_folder(str(dataset_folder), identifier))
    folder.mkdir(exist_ok=True)
    for name, seed in scans.items():
        image = np.random.default_rng(100 + seed).normal(size=shape).astype(np.float32)
        blosc2.asarray(image, urlpath=str(folder / f"{name}.b2nd"), mode="w")
    target = Target(plan, dataset_json or dict(DATASET_JSON), "3d_fullres")
    _write_manifest(str(folder), target, {})
    return folder
