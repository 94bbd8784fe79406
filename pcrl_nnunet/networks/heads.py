"""The heads of a decoder level. B: batch, c: channels of the level, C: image channels, *: space."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_BATCH_NORM: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_INTERPOLATION = {4: "bilinear", 5: "trilinear"}


class RestorationHead(nn.Module):
    """The restoration head R_i: Conv-BN-ReLU-Conv, stride 1, resized to the target's size (PCRLv2, Eq. 2-4).

    The output is linear instead of the authors' sigmoid, because targets are z-scored and not in [0, 1].

    Args:
        conv_op: nn.Conv2d or nn.Conv3d.
        channels: c, channels of the level.
        image_channels: C; all channels are restored.
        kernel_size: kernel size of the first convolution.
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
        """Restore (B, C, *size) from (B, c, *)."""
        image = self.layers(feature)
        if image.shape[2:] == tuple(size):
            return image
        return F.interpolate(image, size=tuple(size), mode=_INTERPOLATION[image.ndim], align_corners=False)


class ComparisonHead(nn.Module):
    """The comparison head: v = BN(GAP(F_i)), p = FC(ReLU(BN(FC(v)))), widths c -> 2c -> c (PCRLv2, Eq. 5-6).

    The head uses BatchNorm1d even if the backbone uses InstanceNorm, which would turn a single vector into zeros.

    Args:
        channels: c, channels of the level.
        width: width of a first projection of the pooled features, which makes levels comparable.
    """

    def __init__(self, channels: int, width: int | None = None):
        super().__init__()
        self.project = nn.Identity() if width is None else nn.Linear(channels, width, bias=False)
        channels = width or channels
        self.norm = nn.BatchNorm1d(channels)
        self.predictor = nn.Sequential(
            nn.Linear(channels, 2 * channels, bias=False),  # the next BN has the bias
            nn.BatchNorm1d(2 * channels),
            nn.ReLU(inplace=True),
            nn.Linear(2 * channels, channels),
        )

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return v and p of (B, c, *), each (B, c) or (B, width)."""
        # float32 even under autocast: after InstanceNorm samples differ little, and BN would enlarge rounding errors
        with nullcontext() if feature.is_meta else torch.autocast(feature.device.type, enabled=False):
            v = self.norm(self.project(feature.float().flatten(2).mean(2)))
            return v, self.predictor(v)
