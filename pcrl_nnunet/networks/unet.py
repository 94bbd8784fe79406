"""nnU-Net's own U-Net with skip connections, as a network that restores images. B: batch, C: channels, *: space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.networks.decoder import encoder_of, seg_layers_of


class RestoringUNet(nn.Module):
    """The encoder and decoder of a plan's network, with an output of image channels after the last stage.

    It shares the parameters of the plan's network, without the segmentation layers.

    Args:
        network: network of the plan.
        channels: C, channels of the image.
    """

    def __init__(self, network: Any, channels: int) -> None:
        super().__init__()
        self.encoder = encoder_of(network)
        layers = seg_layers_of(network)
        if not layers:
            raise UserError(
                f"the plan's network {type(network).__name__} has no decoder of nnU-Net's form; expected a "
                f"PlainConvUNet or ResidualEncoderUNet: choose another plan with -p, or another -method"
            )
        self.transpconvs, self.stages = network.decoder.transpconvs, network.decoder.stages
        self.output = self.encoder.conv_op(layers[-1].in_channels, channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Restore (B, C, *) from (B, C, *). Sizes are multiples of the strides, as in nnU-Net."""
        return self.decode(self.encoder(image))

    def decode(self, stages: Sequence[Tensor]) -> Tensor:
        """Restore (B, C, *) from the encoder's outputs (B, c, *), from full resolution to the bottleneck."""
        *skips, x = stages
        for up, stage, skip in zip(self.transpconvs, self.stages, reversed(skips), strict=True):
            x = stage(torch.cat((up(x), skip), 1))
        restored: Tensor = self.output(x)
        return restored
