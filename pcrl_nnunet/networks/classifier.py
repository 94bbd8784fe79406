"""A plan's encoder with a linear head. B batch, C image channels, c channels of a stage, L outputs, * space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


class Classifier(nn.Module):
    """Mean and maximum over space of the encoder's stages, and a linear layer.

    The papers pool the last stage alone, of a network with batch norm. nnU-Net's instance norm takes the mean of every
    channel away, and what is left of it after the nonlinearity is little: in
    docs/evidence/classification.md a head on the last stage's mean alone hardly learns.

    Args:
        network: a plan's network; its encoder is taken, with the names under which its weights are found.
        num_outputs: L.
    """

    def __init__(self, network: Any, num_outputs: int) -> None:
        super().__init__()
        self.encoder = network.encoder
        accept_any_size(self.encoder)
        self.head = nn.Linear(2 * sum(self.encoder.output_channels), num_outputs)
        # where transfer finds the encoder
        self.key_to_encoder, self.key_to_stem = network.key_to_encoder, network.key_to_stem
        self.keys_to_in_proj = network.keys_to_in_proj

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *) to logits (B, L)."""
        stages = [feature.flatten(2) for feature in self.encoder(image)]
        pooled = [part for stage in stages for part in (stage.mean(2), stage.amax(2))]
        logits: Tensor = self.head(torch.cat(pooled, 1))
        return logits

    def activation_maps(self, image: Tensor) -> Tensor:
        """Class-activation maps (Zhou et al., CVPR 2016), the sum of every stage's: (B, C, *) to (B, L, *).

        Of a stage, mean + bias is its part of the logit: what is weighted by its maximum counts where that is.
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


def accept_any_size(encoder: nn.Module) -> None:
    """Let the encoder take images whose size is no multiple of its strides, in place.

    The shortcut of a residual block has to end where the strided convolution beside it ends. There is no other
    difference.
    """
    for module in encoder.modules():
        if isinstance(module, (nn.AvgPool2d, nn.AvgPool3d)):
            module.ceil_mode = True
