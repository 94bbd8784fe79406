"""Features at points of an image. B: batch, P: points, d: axes, c: channels of a feature, *: space."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import grid_sample


def at_points(feature: Tensor, points: Tensor, size: Sequence[int]) -> Tensor:
    """Return the features (B, P, c), float32, at points of an image, by linear interpolation.

    Voxel k of a feature lies at voxel k * stride of the image. nnU-Net pads a convolution by (kernel - 1) / 2 on each
    side, so the centre of the receptive field is there, also for kernels of 1 voxel. Transposed convolutions return to
    the grid of the stage above. Beyond the last voxel of a feature, its border is repeated.

    Args:
        feature: (B, c, *).
        points: (B, P, d), indices of voxels of the image, which may be fractions.
        size: size of the image, voxels.
    """
    there = feature.shape[2:]
    at = points.float() * points.new_tensor([short / long for short, long in zip(there, size, strict=True)])
    # grid_sample counts from -1 to 1 between the centres of the first and the last voxel, and the last axis first
    grid = (2 * at / points.new_tensor([max(length - 1, 1) for length in there]) - 1).flip(-1)
    grid = grid.reshape(*points.shape[:2], *[1] * (len(there) - 1), len(there))
    sampled = grid_sample(feature.float(), grid, padding_mode="border", align_corners=True)
    return sampled.flatten(2).transpose(1, 2)
