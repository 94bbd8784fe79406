"""Conversion of world points to voxels of a preprocessed image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from batchgenerators.utilities.file_and_folder_operations import load_pickle

from pcrl_nnunet.classification.label_table import LabelTable
from pcrl_nnunet.loading.cases import Case, CaseVolume

# entries of nnU-Net's readers in a case's .pkl
GEOMETRY = (
    *("sitk_stuff", "nibabel_stuff", "spacing"),
    *("bbox_used_for_cropping", "shape_after_cropping_and_before_resampling"),
)


def places(points: np.ndarray, case: Case, shape: Sequence[int], transpose: Sequence[int]) -> np.ndarray:
    """Convert points (N, 3) in world mm to voxels (N, 3) of a case's image.

    Args:
        shape: the image's shape without channels.
        transpose: the plan's transpose_forward.
    """
    return to_voxels(points, _geometry(case.path.rsplit(".", 1)[0] + ".pkl"), shape, transpose)


def opened(
    labels: LabelTable, samples: np.ndarray, cases: Mapping[str, Case], transpose: Sequence[int]
) -> Iterator[tuple[np.ndarray, CaseVolume, np.ndarray | None]]:
    """Open each image of the samples once, and yield it with the samples' points.

    Args:
        samples: (N,) indices into the table.
        cases: cases by name.
        transpose: the plan's transpose_forward.

    Yields:
        indices (n,) of the image's samples among the N, the image, and points (n, 3) in voxels; None for cases.
    """
    for name, of_case in pd.Series(range(len(samples))).groupby(labels.case[samples], sort=False):
        case, which = cases[str(name)], of_case.to_numpy(int)
        volume, points = CaseVolume(case), None
        if labels.point is not None:
            points = places(labels.point[samples[which]], case, volume.shape[1:], transpose)
        yield which, volume, points


@cache
def _geometry(path: str) -> dict[str, Any]:
    """Read the properties of a case that `to_voxels` needs, once: the file holds megabytes of label locations."""
    properties = load_pickle(path)
    return {name: properties[name] for name in GEOMETRY if name in properties}


def to_voxels(
    point: np.ndarray, properties: Mapping[str, Any], shape: Sequence[int], transpose: Sequence[int]
) -> np.ndarray:
    """Convert world points to voxels of a preprocessed image.

    The conversion follows the geometry that nnU-Net's reader recorded: from the world to voxels of the file, to
    nnU-Net's order of axes, to the crop of the non-zero region, and through resampling. Resampling moves voxel centre k
    to (k + 0.5) * new / old - 0.5. The first voxel of images without a place in the world (PNG, TIFF) lies at 0. 2D
    images have no third coordinate.

    Args:
        point: (N, 3) world mm, LPS.
        properties: the case's properties, as saved by nnU-Net's preprocessing.
        shape: the preprocessed image's shape without channels.
        transpose: the plan's transpose_forward.

    Returns:
        (N, 3) in voxels, not rounded; points may lie outside the image.
    """
    matrix, origin = _voxel_to_world(properties)
    axes = len(origin)
    index = np.zeros((len(point), 3))  # (z, y, x)
    index[:, 3 - axes :] = np.linalg.solve(matrix, (np.asarray(point)[:, :axes] - origin).T).T[:, ::-1]
    index = index[:, list(transpose)] - np.array([lower for lower, _ in properties["bbox_used_for_cropping"]])
    old = np.asarray(properties["shape_after_cropping_and_before_resampling"], float)
    return (index + 0.5) * np.asarray(shape) / old - 0.5


def _voxel_to_world(properties: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrix (axes, axes) and origin (axes,) from voxels (x, y, z), in 2D (x, y), to mm in LPS."""
    if "sitk_stuff" in properties:
        geometry = properties["sitk_stuff"]
        axes = len(geometry["origin"])
        return np.reshape(geometry["direction"], (axes, axes)) * geometry["spacing"], np.asarray(geometry["origin"])
    if "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = np.diag([-1, -1, 1, 1]) @ np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]))
        return affine[:3, :3], affine[:3, 3]
    return np.diag(np.asarray(properties["spacing"], float)[::-1]), np.zeros(3)


def outside(voxels: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the mask (N,) of the points (N, 3) that lie more than a voxel beyond an image of this shape."""
    return np.any((voxels < -1) | (voxels > np.asarray(shape)), axis=1)
