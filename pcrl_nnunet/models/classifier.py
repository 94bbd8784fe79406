"""A plan's encoder with a linear head. B batch, C image channels, c channels of the last stage, L outputs, * space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Mean over space of the encoder's last stage, and a linear layer.

    Args:
        network: a plan's network; its encoder is taken, with the names under which its weights are found.
        num_outputs: L.
    """

    def __init__(self, network: Any, num_outputs: int) -> None:
        super().__init__()
        self.encoder = network.encoder
        accept_any_size(self.encoder)
        self.head = nn.Linear(self.encoder.output_channels[-1], num_outputs)
        # where transfer finds the encoder
        self.key_to_encoder, self.key_to_stem = network.key_to_encoder, network.key_to_stem
        self.keys_to_in_proj = network.keys_to_in_proj

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, *) to logits (B, L)."""
        logits: Tensor = self.head(self._feature(image).flatten(2).mean(2))
        return logits

    def activation_maps(self, image: Tensor) -> Tensor:
        """Class-activation maps (Zhou et al., CVPR 2016): (B, C, *) to (B, L, *stage); mean + bias is the logit."""
        return torch.einsum("bc...,lc->bl...", self._feature(image), self.head.weight)

    def _feature(self, image: Tensor) -> Tensor:
        feature: Tensor = self.encoder(image)[-1]
        return feature


def accept_any_size(encoder: nn.Module) -> None:
    """Let the encoder take images whose size is no multiple of its strides, in place.

    The shortcut of a residual block has to end where the strided convolution beside it ends. There is no other
    difference.
    """
    for module in encoder.modules():
        if isinstance(module, (nn.AvgPool2d, nn.AvgPool3d)):
            module.ceil_mode = True
