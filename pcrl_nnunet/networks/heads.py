"""The heads of a decoder level. B batch, c channels of the level, C image channels, * space."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BATCH_NORM: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_INTERPOLATION = {4: "bilinear", 5: "trilinear"}


class RestorationHead(nn.Module):
    """R_i: Conv-BN-ReLU-Conv, stride 1, resized to the target's space (PCRLv2, Eq. 2-4).

    The output is linear, not the authors' sigmoid: targets are z-scored, not in [0, 1].

    Args:
        conv_op: nn.Conv2d or nn.Conv3d.
        channels: c of the level.
        image_channels: C; all channels are restored.
        kernel_size: of the first convolution.
    """

    def __init__(self, conv_op: type[nn.Module], channels: int, image_channels: int, kernel_size: int | Sequence[int]):
        super().__init__()
        self.layers = nn.Sequential(
            conv_op(channels, channels, kernel_size, padding="same", bias=False),
            _BATCH_NORM[conv_op](channels),
            nn.ReLU(inplace=True),
            conv_op(channels, image_channels, 1),
        )

    def forward(self, feature: Tensor, size: Sequence[int]) -> Tensor:
        """(B, c, *) to (B, C, *size)."""
        image = self.layers(feature)
        if image.shape[2:] == tuple(size):
            return image
        return F.interpolate(image, size=tuple(size), mode=_INTERPOLATION[image.ndim], align_corners=False)


class ComparisonHead(nn.Module):
    """v = BN(GAP(F_i)), p = FC(ReLU(BN(FC(v)))), widths c -> 2c -> c (PCRLv2, Eq. 5-6).

    BatchNorm1d also where the backbone uses InstanceNorm: over one vector a sample InstanceNorm would give zeros.

    Args:
        channels: c of the level.
        width: that the pooled features are projected to first, so that levels can be compared with each other.
    """

    def __init__(self, channels: int, width: int | None = None):
        super().__init__()
        self.project = nn.Identity() if width is None else nn.Linear(channels, width, bias=False)
        channels = width or channels
        self.norm = nn.BatchNorm1d(channels)
        self.predictor = nn.Sequential(
            nn.Linear(channels, 2 * channels, bias=False),  # the BN after it has the bias
            nn.BatchNorm1d(2 * channels),
            nn.ReLU(inplace=True),
            nn.Linear(2 * channels, channels),
        )

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """(B, c, *) to v and p, each (B, c), or (B, width)."""
        # float32 also under autocast: after InstanceNorm samples differ little, and BN would enlarge rounding errors
        with nullcontext() if feature.is_meta else torch.autocast(feature.device.type, enabled=False):
            v = self.norm(self.project(feature.float().flatten(2).mean(2)))
            return v, self.predictor(v)
