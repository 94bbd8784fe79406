"""The discriminator of an adversarial loss. B: samples, C: image channels, *: space."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (16, 32, 64)
GROUPS = 4  # of the normalisation, which works for a single voxel, unlike instance norm


class Discriminator(nn.Module):
    """A small network that tells restored from real images, patch by patch (Isola et al., CVPR 2017, section 3.2.2).

    Three convolutions halve the image. A logit above 0 means that a patch looks real.

    Args:
        conv_op: nn.Conv2d or nn.Conv3d.
        channels: C.
    """

    def __init__(self, conv_op: type[nn.Module], channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, width in enumerate(WIDTHS):
            layers.append(conv_op(channels, width, 3, stride=2, padding=1))
            if number > 0:  # the first layer sees the image's own intensities
                layers.append(nn.GroupNorm(GROUPS, width))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            channels = width
        self.layers = nn.Sequential(*layers, conv_op(channels, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits (B, 1, *) of an image (B, C, *)."""
        logits: Tensor = self.layers(image)
        return logits
