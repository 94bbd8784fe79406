"""Attention that tells a decoder which transformation to apply (Zhou et al., ICCV 2021, Eq. 1-4).

B: batch, K: bits of the indicator, c: channels of the feature, *: space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN = 256  # width of the indicator's first layer; the authors' code


class OuterProductAttention(nn.Module):
    """The paper's attention: channels are scaled by a function of all products of indicator and feature.

    The layer from all products to the channels has c^3 weights.

    Args:
        conv_op: nn.Conv2d or nn.Conv3d.
        bits: K.
        channels: c.
    """

    def __init__(self, conv_op: type[nn.Module], bits: int, channels: int) -> None:
        super().__init__()
        self.of_indicator = layers_of_indicator(bits, channels)
        self.of_products = nn.Linear(channels**2, channels)
        self.conv = conv_op(channels, channels, 3, padding=1)

    def forward(self, feature: Tensor, indicator: Tensor) -> Tensor:
        """Return a feature (B, c, *) for the decoder from (B, c, *) and (B, K)."""
        pooled = feature.flatten(2).mean(2)
        products = self.of_indicator(indicator)[:, :, None] * pooled[:, None]  # (B, c, c), Eq. 1 and 2
        scale = torch.sigmoid(torch.relu(self.of_products(products.flatten(1))))  # Eq. 3
        attended: Tensor = self.conv(_scaled(feature, scale))  # Eq. 4
        return attended


class ChannelAttention(nn.Module):
    """The attention of the authors' code: channels are scaled by a function of the indicator alone.

    Args:
        bits: K.
        channels: c.
    """

    def __init__(self, bits: int, channels: int) -> None:
        super().__init__()
        self.of_indicator = layers_of_indicator(bits, channels)

    def forward(self, feature: Tensor, indicator: Tensor) -> Tensor:
        """Return a feature (B, c, *) for the decoder from (B, c, *) and (B, K)."""
        return _scaled(feature, torch.sigmoid(self.of_indicator(indicator)))


def layers_of_indicator(bits: int, channels: int) -> nn.Sequential:
    """Return the two layers that map an indicator (B, K) to a vector (B, c)."""
    return nn.Sequential(nn.Linear(bits, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, channels))


def _scaled(feature: Tensor, scale: Tensor) -> Tensor:
    return feature * scale.reshape(*scale.shape, *[1] * (feature.ndim - 2))
