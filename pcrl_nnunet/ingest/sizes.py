"""Sizes that cannot be: a case too small for the network, or too large for the memory, most often by a wrong unit.

They are told from the header's numbers, before a voxel is computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress

import nibabel
import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from pcrl_nnunet.ingest.scans import Target, Unusable

# A voxel edge, averaged over the axes, that differs from the plan's by this factor. Thick slices against thin ones stay
# below; millimetres for centimetres or micrometres do not.
ABSURD = 8.0
ABSURD_AXIS = 30.0  # the same of the longest or the shortest edge
COPIES = 4  # of a case in memory while nnU-Net resamples: before and after, each in double precision now and then


def check_spacing(spacing: Sequence[float], usual: Sequence[float], where: str) -> None:
    """Refuse a voxel size that is absurd beside the usual one.

    Args:
        spacing, usual: mm, of all axes in any order.
        where: of the usual one, for the message.

    Raises:
        Unusable: a factor of `ABSURD` or more in the mean edge, or of `ABSURD_AXIS` in one edge.
    """
    mean, other_mean = (math.prod(map(float, s)) ** (1 / len(s)) for s in (spacing, usual))
    ratios = {mean / other_mean: ABSURD, max(spacing) / max(usual): ABSURD_AXIS, min(spacing) / min(usual): ABSURD_AXIS}
    if not all(1 / limit < ratio < limit for ratio, limit in ratios.items()):
        raise Unusable(
            f"its voxels of {_x(spacing)} mm are absurd beside the {_x(usual)} mm of {where}; check the unit in its "
            f"header"
        )


def check_size(shape: Sequence[int], spacing: Sequence[float], files: Sequence[str], target: Target) -> None:
    """Refuse a scan that would be too small or too large a case of the plan's configuration.

    Args:
        shape: (Z, Y, X) voxels as read.
        spacing: mm, in the same order.
        files: of the scan, for the unit that their header has.

    Raises:
        Unusable: with the spacing, the size that the case would have, and the unit that was assumed.
    """
    axes = target.plans["transpose_forward"]
    shape, spacing = [shape[i] for i in axes], [float(spacing[i]) for i in axes]
    wanted = list(target.configuration_manager.spacing)
    if len(wanted) < len(spacing):  # 2D: slices keep their distance
        wanted = [spacing[0], *wanted]
    size = [int(n) for n in compute_new_shape(shape, spacing, wanted)]
    told = (
        f"voxels of {_x(spacing)} mm ({unit_of(files[0])}) make a case of {_x(size)} voxels at the plan's "
        f"{_x(wanted)} mm"
    )
    if too_small := below_stride(size, target):
        raise Unusable(f"{told}, and {too_small}")
    needed = COPIES * 4 * target.images.num_channels * math.prod(size)
    if needed > memory():
        raise Unusable(
            f"{told}, which takes {needed / 2**30:.0f} GB of memory to make; this machine has {memory() / 2**30:.0f} GB"
        )
    usual = target.plans.get("original_median_spacing_after_transp")
    if usual and not target.images.is_2d:
        check_spacing(spacing, usual, "the dataset")


def below_stride(size: Sequence[int], target: Target) -> str:
    """Say which axis of a preprocessed case is shorter than the network's total stride; empty if none is.

    Args:
        size: spatial shape of the case, voxels.
    """
    strides = target.configuration_manager.configuration["architecture"].get("arch_kwargs", {}).get("strides")
    if not strides:
        return ""
    total = np.prod([np.broadcast_to(s, len(target.configuration_manager.patch_size)) for s in strides], axis=0)
    last = size[-len(total) :]
    if all(n >= stride for n, stride in zip(last, total, strict=True)):
        return ""
    return f"the network needs {_x(total)} voxels at least (its total stride)"


def unit_of(file: str) -> str:
    """Say which unit of length a file's header names, or that mm was assumed."""
    unit = "unknown"
    if file.lower().endswith((".nii", ".nii.gz")):
        with suppress(Exception):  # a header that cannot be read is reported where the file is checked
            unit = nibabel.load(file).header.get_xyzt_units()[0]
    return "mm was assumed" if unit == "unknown" else f"its header says {unit}"


def memory() -> float:
    """Bytes of this machine or, if less, of this process's control group; infinite where the system does not say."""
    found = math.inf
    with suppress(AttributeError, ValueError, OSError):
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
        found = min(found, int(file.read()))
    return found


def _x(numbers: Sequence[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
