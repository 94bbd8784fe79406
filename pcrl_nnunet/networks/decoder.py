"""The U-Net without skip connections (nsUNet; PCRLv2, Eq. 1) on the encoder of any nnU-Net plan.

B: batch, C: channels, *: space (2D or 3D), n: encoder stages. Levels i = 1..n-1 go from coarse to full resolution;
level 0 is the bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.helper import get_matching_convtransp
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from torch import Tensor, nn

from pcrl_nnunet.errors import UserError

CONVS_PER_LEVEL = 2  # "two conv-norm-act blocks"
_NEEDED = ("output_channels", "strides", "kernel_sizes", "conv_op", "norm_op", "nonlin")


def encoder_of(network: nn.Module) -> Any:
    """Return the encoder of a plan's network. Raise `UserError` if it lacks nnU-Net's form (stages with strides)."""
    encoder = getattr(network, "encoder", None)
    if not isinstance(encoder, nn.Module) or any(not hasattr(encoder, name) for name in _NEEDED):
        raise UserError(
            f"the plan's network {type(network).__name__} has no encoder of convolutional stages; expected a "
            f"PlainConvUNet or ResidualEncoderUNet: choose a plan of nnU-Net's default or ResEnc planners with -p"
        )
    return encoder


def seg_layers_of(network: Any) -> Sequence[nn.Module]:
    """Return the segmentation layers of nnU-Net's own decoder, the finest last; empty without such a decoder."""
    return tuple(getattr(getattr(network, "decoder", None), "seg_layers", ()))


class Decoder(nn.Module):
    """The decoder: F_i = two blocks on the up-sampled F_{i-1}, with the bottleneck as F_0.

    Each level up-samples by its stage's own stride.

    Args:
        encoder: encoder of the plan's network; the decoder mirrors its channels, kernels, strides, norm and activation.
        skip_connections: give each level its stage's features, as in a U-Net (Table 1 has both; the paper uses none).
    """

    def __init__(self, encoder: Any, skip_connections: bool = False):  # has attributes that nn.Module lacks
        super().__init__()
        self.skip_connections = skip_connections
        channels, strides, kernels = list(encoder.output_channels), encoder.strides, encoder.kernel_sizes
        upsample = get_matching_convtransp(conv_op=encoder.conv_op)
        self.channels: list[int] = channels[-2::-1]  # for levels 1..n-1
        self.upsample = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for stage in range(len(channels) - 1, 0, -1):
            below, here, stride = channels[stage], channels[stage - 1], strides[stage]
            self.upsample.append(upsample(below, here, stride, stride, bias=encoder.conv_bias))
            self.blocks.append(
                StackedConvBlocks(
                    CONVS_PER_LEVEL,
                    encoder.conv_op,
                    2 * here if skip_connections else here,
                    here,
                    kernels[stage - 1],
                    1,
                    encoder.conv_bias,
                    encoder.norm_op,
                    encoder.norm_op_kwargs,
                    encoder.dropout_op,
                    encoder.dropout_op_kwargs,
                    encoder.nonlin,
                    encoder.nonlin_kwargs,
                )
            )

    @property
    def num_levels(self) -> int:
        """Number of levels: n - 1 for n encoder stages."""
        return len(self.channels)

    def forward(self, stages: Sequence[Tensor], level: int) -> list[Tensor]:
        """Return F_0..F_level. Finer levels are not computed.

        Without skip connections, only the bottleneck is decoded, and the encoder's other outputs provide their size. If
        the size is not a multiple of the stride, the up-sampled feature is larger and is cut to it: voxel k of a stage
        is voxel k * stride of the stage above, and a local view of 9 voxels is not decoded as a view of 16.

        Args:
            stages: the encoder's outputs (B, C, *), from full resolution to the bottleneck.
            level: 0 to `num_levels`.
        """
        x = stages[-1]
        features = [x]
        for i in range(level):
            x = self.upsample[i](x)
            for axis, size in enumerate(stages[-2 - i].shape[2:], start=2):
                x = x.narrow(axis, 0, size)
            if self.skip_connections:
                x = torch.cat((x, stages[-2 - i]), 1)
            x = self.blocks[i](x)
            features.append(x)
        return features
