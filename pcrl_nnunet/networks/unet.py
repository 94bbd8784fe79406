"""nnU-Net's own U-Net with skip connections, with its features, or as a network that restores images.

B: batch, C: image channels, c: channels of a feature, *: space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.networks.decoder import encoder_of, seg_layers_of


class UNet(nn.Module):
    """The encoder and decoder of a plan's network, without the segmentation layers.

    It shares the parameters of the plan's network.

    Args:
        network: network of the plan.

    Attributes:
        channels: c of the bottleneck, then of each level of the decoder, from coarse to full resolution.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.encoder = encoder_of(network)
        if not seg_layers_of(network):
            raise UserError(
                f"the plan's network {type(network).__name__} has no decoder of nnU-Net's form; expected a "
                f"PlainConvUNet or ResidualEncoderUNet: choose another plan with -p, or another -method"
            )
        self.transpconvs, self.stages = network.decoder.transpconvs, network.decoder.stages
        self.channels: list[int] = list(self.encoder.output_channels[::-1])

    def features(self, image: Tensor) -> list[Tensor]:
        """Return the bottleneck and each level of the decoder, (B, c, *), of images (B, C, *).

        Sizes are multiples of the strides, as in nnU-Net.
        """
        return self.decoded(self.encoder(image))

    def decoded(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Return the bottleneck and each level of the decoder from the encoder's outputs, the bottleneck last."""
        *skips, x = stages
        levels = [x]
        for up, stage, skip in zip(self.transpconvs, self.stages, reversed(skips), strict=True):
            x = stage(torch.cat((up(x), skip), 1))
            levels.append(x)
        return levels


class RestoringUNet(UNet):
    """The U-Net with an output of image channels after the last level.

    Args:
        network: network of the plan.
        channels: C, channels of the image.
    """

    def __init__(self, network: Any, channels: int) -> None:
        super().__init__(network)
        self.output = self.encoder.conv_op(self.channels[-1], channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Restore (B, C, *) from (B, C, *). Sizes are multiples of the strides, as in nnU-Net."""
        return self.decode(self.encoder(image))

    def decode(self, stages: Sequence[Tensor]) -> Tensor:
        """Restore (B, C, *) from the encoder's outputs (B, c, *), from full resolution to the bottleneck."""
        restored: Tensor = self.output(self.decoded(stages)[-1])
        return restored
