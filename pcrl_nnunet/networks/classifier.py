"""A plan's encoder with a linear head. B: batch, C: image channels, c: channels of a stage, L: outputs, *: space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


class Classifier(nn.Module):
    """A linear layer on the mean and maximum over space of all encoder stages.

    The papers pool only the last stage, in a network with batch norm. With instance norm, a head on the last stage's
    mean hardly learns (docs/evidence/classification.md).

    Args:
        network: a plan's network, which provides the encoder.
        num_outputs: L.
    """

    def __init__(self, network: Any, num_outputs: int) -> None:
        super().__init__()
        self.encoder = network.encoder
        accept_any_size(self.encoder)
        self.head = nn.Linear(2 * sum(self.encoder.output_channels), num_outputs)
        # transfer finds the encoder by these keys
        self.key_to_encoder, self.key_to_stem = network.key_to_encoder, network.key_to_stem
        self.keys_to_in_proj = network.keys_to_in_proj

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, L) of images (B, C, *)."""
        return self.head(torch.cat([mean_and_maximum(feature) for feature in self.encoder(image)], 1))

    def activation_maps(self, image: Tensor) -> Tensor:
        """Return class-activation maps (Zhou et al., CVPR 2016) of images (B, C, *), summed over stages: (B, L, *).

        The mean of a map plus the bias is the logit. The weight of a maximum counts only at the maximum's place.
        """
        features = self.encoder(image)
        weights = self.head.weight.split([n for feature in features for n in 2 * [feature.shape[1]]], 1)
        maps = []
        for feature, of_mean, of_max in zip(features, weights[::2], weights[1::2], strict=True):
            stage = feature.flatten(2)
            at_maximum = torch.zeros_like(stage).scatter_(2, stage.argmax(2, keepdim=True), float(stage.shape[2]))
            of_stage = of_mean @ stage + of_max @ (stage * at_maximum)
            maps.append(interpolate(of_stage.unflatten(2, feature.shape[2:]), image.shape[2:], mode="nearest"))
        return torch.stack(maps).sum(0)


def mean_and_maximum(feature: Tensor) -> Tensor:
    """Pool a feature (B, c, *) over space: means, then maxima, (B, 2c).

    nnU-Net's instance norm removes the mean of every channel, so that means after the nonlinearity hardly differ
    between images.
    """
    flat = feature.flatten(2)
    return torch.cat((flat.mean(2), flat.amax(2)), 1)


def accept_any_size(encoder: nn.Module) -> None:
    """Make the encoder accept image sizes that are not multiples of its strides, in place.

    The shortcut of a residual block then ends where the strided convolution beside it ends.
    """
    for module in encoder.modules():
        if isinstance(module, (nn.AvgPool2d, nn.AvgPool3d)):
            module.ceil_mode = True
