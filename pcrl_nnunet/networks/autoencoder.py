"""An autoencoder of small images around a plan's encoder. B: batch, C: image channels, c: channels, *: space."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pcrl_nnunet.networks.classifier import accept_any_size
from pcrl_nnunet.networks.decoder import Decoder, encoder_of


class Autoencoder(nn.Module):
    """The plan's encoder, a decoder without skip connections, and a convolution to image channels.

    Images of any size are accepted, as long as some voxels remain at the bottleneck.

    Args:
        network: network of the plan.
        channels: C.
    """

    def __init__(self, network: Any, channels: int) -> None:
        super().__init__()
        self.encoder = encoder_of(network)
        accept_any_size(self.encoder)
        self.decoder = Decoder(self.encoder)
        self.output = self.encoder.conv_op(self.decoder.channels[-1], channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Restore (B, C, *) from the bottleneck of (B, C, *)."""
        restored: Tensor = self.output(self.decoder(self.encoder(image), self.decoder.num_levels)[-1])
        return restored

    def code(self, image: Tensor) -> Tensor:
        """Return the bottleneck of (B, C, *), all places of all channels, as (B, c * places)."""
        bottleneck: Tensor = self.encoder(image)[-1]
        return bottleneck.flatten(1)
