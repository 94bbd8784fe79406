"""Checks for impossible sizes: a case too small for the network or too large for the memory, often by a wrong unit.

The checks use the header's numbers, before a voxel is computed.
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

# The factor by which a voxel's edge, averaged over the axes, may differ from the plan's. Thick slices against thin
# slices stay below it; millimetres instead of centimetres or micrometres do not.
ABSURD = 8.0
ABSURD_AXIS = 30.0  # the same for the longest or the shortest edge
COPIES = 4  # nnU-Net resamples: a case is in memory before and after, each at times in double precision


def check_spacing(spacing: Sequence[float], usual: Sequence[float], where: str) -> None:
    """Refuse a voxel size that is absurd compared to the usual size.

    Args:
        spacing, usual: mm, all axes in any order.
        where: origin of the usual size, for the message.

    Raises:
        Unusable: the sizes differ by a factor of at least `ABSURD` in the mean edge, or `ABSURD_AXIS` in one edge.
    """
    mean, other_mean = (math.prod(map(float, s)) ** (1 / len(s)) for s in (spacing, usual))
    ratios = {mean / other_mean: ABSURD, max(spacing) / max(usual): ABSURD_AXIS, min(spacing) / min(usual): ABSURD_AXIS}
    if not all(1 / limit < ratio < limit for ratio, limit in ratios.items()):
        raise Unusable(
            f"its voxels of {_x(spacing)} mm are implausible beside the {_x(usual)} mm of {where}; check the unit in "
            f"its header"
        )


def check_size(shape: Sequence[int], spacing: Sequence[float], files: Sequence[str], target: Target) -> None:
    """Refuse a scan whose case would be too small or too large in the plan's configuration.

    Args:
        shape: (Z, Y, X) voxels as read.
        spacing: mm, in the same order.
        files: the scan's files, whose header may name a unit.

        Raises:
            Unusable: the message has the spacing, the case's size and the assumed unit.
    """
    axes = target.plans["transpose_forward"]
    shape, spacing = [shape[i] for i in axes], [float(spacing[i]) for i in axes]
    wanted = list(target.configuration_manager.spacing)
    if len(wanted) < len(spacing):  # in 2D slices keep their distance
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
    """Name the axis of a preprocessed case that is shorter than the network's total stride; empty without one.

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
    """Name the unit of length in a file's header, or say that mm was assumed."""
    unit = "unknown"
    if file.lower().endswith((".nii", ".nii.gz")):
        with suppress(Exception):  # an unreadable header is reported by the checks of the file
            unit = nibabel.load(file).header.get_xyzt_units()[0]
    return "mm was assumed" if unit == "unknown" else f"its header says {unit}"


def memory() -> float:
    """Return the smaller memory of this machine and this process's control group in bytes; infinite if unknown."""
    found = math.inf
    with suppress(AttributeError, ValueError, OSError):
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
        found = min(found, int(file.read()))
    return found


def _x(numbers: Sequence[float]) -> str:
    return " x ".join(f"{n:g}" for n in numbers)
