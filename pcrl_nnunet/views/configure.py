"""The rule that derives sizes of views and the batch size from a plan.

Sizes are in voxels of the preprocessed image, axes in nnU-Net's order (the first one has the largest spacing).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.views.settings import Size, ViewSettings
from pcrl_nnunet.views.turns import turnable

MAX_CROP_TO_INPUT = 1.75  # paper, 3D: crops of up to 112 voxels are resized to 64
MAX_CROP_TO_INPUT_THROUGH_PLANE = 3.0  # and of up to 96 slices to 32
LOCAL_CROP_TO_GLOBAL_INPUT = (1 / 8, 1 / 4, 3 / 8, 1 / 2)  # paper, 3D: 8 to 32 voxels against 64
LOCAL_INPUT_TO_GLOBAL_INPUT = 1 / 4  # 16 against 64
NUM_GLOBAL_CROP_SIZES = 4
MIN_SAMPLES = 8
MAX_SAMPLES = {2: 256, 3: 32}  # the paper's batches
MIN_BOTTLENECK_VOXELS = 3  # InstanceNorm turns one voxel into 0 and two into +-1


def configure_views(
    patch_size: Sequence[int],
    batch_size: int,
    strides: Sequence[Sequence[int]],
    median_size: Sequence[float],
    spacing: Sequence[float],
    num_local: int = 6,
) -> tuple[ViewSettings, int]:
    """Return view sizes and batch size for a plan, with the ratios of the paper's sizes (PCRLv2, section 4.1).

    1. Along each axis the largest global crop is 1.75 times the patch, but at most the median image.
    2. The global input is this size over 1.75, rounded to a multiple of the encoder's total stride.
    3. At least 8 samples (pairs with their local views) should fit into the plan's own voxel budget (patch x batch).
       Until they do, the input's largest axis relative to the patch shrinks by one total stride. Views thus shrink
       before the batch does, and keep the patch's proportions.
    4. Crops are 1 to 1.75 times the input, within the median image. Through the planes (the first axis in 3D) they are
       up to 3 times the input if this axis is shorter.
    5. Local crops are 1/8 to 1/2 of the global input, and the local input is 1/4. Through the planes these double at
       most. The local input is at least one voxel larger than the total stride, so that at least 3 voxels remain for
       InstanceNorm at the bottleneck: it turns 2 voxels into +1 and -1. The local input may therefore exceed 1/4. No
       crop is magnified more than the paper's smallest crop, 2 times.

    Args:
        num_local: number of local views of a sample.

    Returns:
        the views, and the number of samples that fit, 8 to 32 (2D: to 256).
    """
    total = [math.prod(stride[axis] for stride in strides) for axis in range(len(patch_size))]
    reach = [max(1, math.floor(min(MAX_CROP_TO_INPUT * p, m))) for p, m in zip(patch_size, median_size, strict=True)]
    size = [max(1, math.floor(r / MAX_CROP_TO_INPUT / t + 0.5)) * t for r, t in zip(reach, total, strict=True)]

    def of(size: Sequence[int]) -> ViewSettings:
        return _views(size, reach, total, spacing, num_local)

    while bottleneck_voxels(of(size).local_input_size, total) < MIN_BOTTLENECK_VOXELS:
        smallest = min((a for a, t in enumerate(total) if t > 1), key=lambda a: size[a] / patch_size[a])
        size = _changed(size, smallest, total[smallest])
    views = of(size)
    while fitting_samples(patch_size, batch_size, views) < MIN_SAMPLES:
        smaller = {a: _changed(size, a, -t) for a, t in enumerate(total) if size[a] > t}
        fine = [
            a for a, s in smaller.items() if bottleneck_voxels(of(s).local_input_size, total) >= MIN_BOTTLENECK_VOXELS
        ]
        if not fine:
            break
        # max() returns the first of equals: nnU-Net's first axis has the largest spacing
        size = smaller[max(fine, key=lambda a: smaller[a][a] / patch_size[a])]
        views = of(size)
    return views, max(MIN_SAMPLES, fitting_samples(patch_size, batch_size, views))


def _views(
    size: Sequence[int], reach: Sequence[int], total: Sequence[int], spacing: Sequence[float], num_local: int
) -> ViewSettings:
    # the longest axis over the axis through the planes; in the plane shapes keep their proportions
    longer = [max(size) / s if axis == 0 and len(size) == 3 else 1.0 for axis, s in enumerate(size)]
    largest = [
        min(r, round(s * min(MAX_CROP_TO_INPUT_THROUGH_PLANE, MAX_CROP_TO_INPUT * k)))
        for r, s, k in zip(reach, size, longer, strict=True)
    ]
    # if images are smaller than 1.75 x the input, smaller crops keep the crops of a pair different
    smallest = [max(1, min(s, round(big / MAX_CROP_TO_INPUT))) for s, big in zip(size, largest, strict=True)]
    shares = [i / (NUM_GLOBAL_CROP_SIZES - 1) for i in range(NUM_GLOBAL_CROP_SIZES)]
    global_crops = [
        tuple(round(lo * (hi / lo) ** share) for lo, hi in zip(smallest, largest, strict=True)) for share in shares
    ]
    longer = [min(2.0, k) for k in longer]
    local_input = tuple(
        min(s, max(t + 1 if t > 1 else 1, round(s * min(1.0, LOCAL_INPUT_TO_GLOBAL_INPUT * k))))
        for s, t, k in zip(size, total, longer, strict=True)
    )
    local_crops = [
        tuple(
            max(1, min(lo, max(math.ceil(i / 2), round(s * min(1.0, share * k)))))
            for lo, i, s, k in zip(smallest, local_input, size, longer, strict=True)
        )
        for share in LOCAL_CROP_TO_GLOBAL_INPUT
    ]
    return ViewSettings(
        global_crop_sizes=tuple(dict.fromkeys(global_crops)),
        local_crop_sizes=tuple(dict.fromkeys(local_crops)),
        global_input_size=tuple(size),
        local_input_size=local_input,
        spacing=tuple(float(s) for s in spacing),
        num_local=num_local,
    )


def check_views(views: ViewSettings, strides: Sequence[Sequence[int]]) -> None:
    """Raise `UserError` if InstanceNorm would see fewer than three voxels at the bottleneck.

    InstanceNorm turns one voxel into 0, and two into +-1 times a constant, whatever their values.
    """
    for name in ("global_input_size", "local_input_size"):
        check_size(f"views.{name}", getattr(views, name), strides)


def check_size(name: str, size: Sequence[int], strides: Sequence[Sequence[int]]) -> None:
    """Raise `UserError` if InstanceNorm would see fewer than three voxels at the bottleneck of an input.

    Args:
        name: name of the setting.
        size: size of the input, voxels.
        strides: strides of each encoder stage.
    """
    total = total_stride(strides)
    left = bottleneck_voxels(size, total)
    if left < MIN_BOTTLENECK_VOXELS:
        raise UserError(
            f"{name} {tuple(size)} leaves {left} voxel{'s' * (left > 1)} at the bottleneck of an encoder with total "
            f"stride {total}, too few for normalisation; at least {MIN_BOTTLENECK_VOXELS} are needed: "
            f"raise it above the total stride on more axes"
        )


def total_stride(strides: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the product of the strides of all encoder stages along each axis."""
    return tuple(math.prod(of_axis) for of_axis in zip(*strides, strict=True))


def _changed(size: Sequence[int], axis: int, by: int) -> list[int]:
    return [s + by if i == axis else s for i, s in enumerate(size)]


def bottleneck_voxels(size: Sequence[int], total: Sequence[int]) -> int:
    """Return the number of voxels at the bottleneck of an encoder with this total stride."""
    return math.prod(math.ceil(s / t) for s, t in zip(size, total, strict=True))


def fitting_samples(patch_size: Sequence[int], batch_size: int, views: ViewSettings) -> int:
    budget = math.prod(patch_size) * batch_size
    return min(budget // views.voxels_per_sample, MAX_SAMPLES[len(patch_size)])


def turnable_crop(plan: PlanFacts) -> Size:
    """Return the largest turnable crop within the patch and the median image.

    A crop that exceeds the image has repeated borders on some axes, and these would tell quarter turns. The crop grows
    if its bottleneck would have fewer than 3 voxels.
    """
    total = total_stride(plan.strides)
    limit = [min(patch, int(median)) for patch, median in zip(plan.patch_size, plan.median_size, strict=True)]
    while bottleneck_voxels(size := turnable(limit, plan.spacing, plan.strides), total) < MIN_BOTTLENECK_VOXELS:
        limit = [length + stride for length, stride in zip(limit, total, strict=True)]
    return size
