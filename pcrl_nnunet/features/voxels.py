"""Features of single voxels, from all stages of a network that is not trained further.

B: batch, C: image channels, D: features of a voxel, K: voxels, *: space.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from pcrl_nnunet.features.embedding import precision
from pcrl_nnunet.features.windows import Window, read
from pcrl_nnunet.networks import encoder_of
from pcrl_nnunet.views.sub_crop import Volume

CHUNK_BYTES = 2**26  # of the features of a chunk of voxels
BATCH_VOXELS, MOST_IN_BATCH = 2**18, 32  # image voxels and images of a batch


class Stages(nn.Module):
    """The stages of a plan's network: the encoder's, from fine to coarse, then the decoder's, from coarse to fine.

    Args:
        network: a plan's network.
        with_decoder: include nnU-Net's own decoder.
    """

    def __init__(self, network: Any, with_decoder: bool = False) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder_of(network), network.decoder if with_decoder else None

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return a feature (B, c, *) for each stage, of images (B, C, *)."""
        skips = list(self.encoder(image))
        decoded, x = [], skips[-1]
        if self.decoder is not None:
            for up, stage, skip in zip(self.decoder.transpconvs, self.decoder.stages, skips[-2::-1], strict=True):
                x = stage(torch.cat((up(x), skip), 1))
                decoded.append(x)
        return skips + decoded


def at_voxels(stages: Sequence[Tensor], size: Sequence[int], places: np.ndarray) -> np.ndarray:
    """Return the features (K, D) at voxels of an image, by linear interpolation in each stage.

    Voxel k of a stage lies at voxel k * stride of the image, where the centre of its receptive field is. Beyond the
    last voxel of a stage, its border is repeated.

    Args:
        stages: a feature (c, *) for each stage.
        size: size of the image.
        places: (K, axes), voxels.
    """
    found = []
    for stage in stages:
        there = np.array(stage.shape[1:])
        at = np.minimum(places * (there / np.array(size)), there - 1)
        # grid_sample counts from -1 to 1, and the last axis first
        grid = np.ascontiguousarray((2 * at / np.maximum(there - 1, 1) - 1)[:, ::-1], np.float32)
        shaped = torch.from_numpy(grid).reshape(1, len(at), *[1] * (len(there) - 1), len(there))
        values = grid_sample(stage[None].float().cpu(), shaped, padding_mode="border", align_corners=True)
        found.append(values.reshape(stage.shape[0], len(at)).T)
    return torch.cat(found, 1).numpy()


def staged(
    stages: nn.Module, volume: Volume, windows: Sequence[Window], size: Sequence[int], device: torch.device
) -> Iterator[tuple[Window, list[Tensor]]]:
    """Yield each window with the features (c, *) of its stages. Only a batch of windows is in memory."""
    for start in range(0, len(windows), batch_of(size)):
        some = windows[start : start + batch_of(size)]
        images = np.stack([read(volume, window.lower, size) for window in some])
        with torch.no_grad(), precision(device):
            features = stages(torch.from_numpy(images).to(device))
        for number, window in enumerate(some):
            yield window, [feature[number] for feature in features]


def chunks(stages: Sequence[Tensor], size: Sequence[int], places: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the features (k, D) of chunks of at most `CHUNK_BYTES`, with their part of the places (K, axes)."""
    at_once = max(1, CHUNK_BYTES // (4 * sum(stage.shape[0] for stage in stages)))
    for start in range(0, len(places), at_once):
        part = slice(start, min(start + at_once, len(places)))
        yield part, at_voxels(stages, size, places[part])


def batch_of(size: Sequence[int]) -> int:
    """Return the number of images of a size to compute at once."""
    return min(MOST_IN_BATCH, max(1, BATCH_VOXELS // math.prod(size)))
