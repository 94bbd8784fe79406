"""PCRLv2 (Zhou et al., TPAMI 2023), one training step: method.md 1 in code.

B pairs, N local views, C image channels, c channels of the drawn level, G global and L local input sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pcrl_nnunet.losses import comparison_loss, local_comparison_loss, restoration_loss
from pcrl_nnunet.models import ComparisonHead, NonSkipDecoder, RestorationHead


@dataclass(frozen=True)
class StepOutput:
    """The loss of a step, its named terms (their sum is the loss), and what the monitor looks at."""

    loss: Tensor
    terms: dict[str, Tensor]
    level: int
    restored: Tensor  # (B, 2, C, *G), of the drawn level
    v: Tensor  # (B, 2, c)
    p: Tensor  # (B, 2, c)


class PCRLv2(nn.Module):
    """The encoder of a plan, a decoder without skip connections, and two heads a level.

    Args:
        encoder: of the plan's network, shared with it: training this module trains that network's encoder.
        image_channels: C.
        restoration: ``single``: both losses on one level drawn a step, where the decoder stops (the paper);
            ``full``: also restoration at full resolution in every step, with the drawn level's restoration
            fading out by a cosine (the authors' code).
    """

    name = "pcrlv2"
    citations = (
        "Zhou, H.-Y., Lu, C., Chen, C., Yang, S., & Yu, Y. (2023). A unified visual information preservation framework "
        "for self-supervised pre-training in medical image analysis. IEEE TPAMI, 45(7), 8020-8035.",
    )

    def __init__(self, encoder: Any, image_channels: int, restoration: str = "single"):
        super().__init__()
        self.encoder = encoder
        for module in encoder.modules():
            if isinstance(module, (nn.AvgPool2d, nn.AvgPool3d)):
                # The shortcut of a residual block: it has to end where the strided convolution beside it ends, also
                # where a local view's size is no multiple of the stride. There is no other difference.
                module.ceil_mode = True
        self.decoder = NonSkipDecoder(encoder)
        self.full_resolution = restoration == "full"
        kernels = encoder.kernel_sizes[-2::-1]
        self.restoration_heads = nn.ModuleList(
            RestorationHead(encoder.conv_op, c, image_channels, kernel)
            for c, kernel in zip(self.decoder.channels, kernels, strict=True)
        )
        self.comparison_heads = nn.ModuleList(ComparisonHead(c) for c in self.decoder.channels)

    def draw_level(self, seed: int, step: int) -> int:
        """i ~ U{1..n-1}, a function of (seed, step) alone: equal on all ranks and after resuming."""
        return int(np.random.default_rng((seed, step)).integers(1, self.decoder.num_levels + 1))

    def forward(self, batch: Mapping[str, Tensor], level: int, progress: float = 0.0) -> StepOutput:
        """Losses of one batch.

        Args:
            batch: ``input`` and ``target`` (B, 2, C, *G), ``local`` (B, N, C, *L).
            level: the drawn level i.
            progress: share of the training that is done, 0 to 1.
        """
        target, local = batch["target"], batch["local"]
        num_pairs, space = target.shape[0], target.shape[3:]
        deepest = self.decoder.num_levels if self.full_resolution else level

        features = self._features(batch["input"].flatten(0, 1), deepest)
        v, p = (x.unflatten(0, (num_pairs, 2)) for x in self.comparison_heads[level - 1](features[level - 1]))
        local_features = self._features(local.flatten(0, 1), level)[-1]
        v_l, p_l = (x.unflatten(0, local.shape[:2]) for x in self.comparison_heads[level - 1](local_features))

        restored = self._restored(features, level, space).unflatten(0, (num_pairs, 2))
        terms = {
            "restoration": _both_views(restored, target),
            "comparison_global": comparison_loss(v[:, 0], p[:, 0], v[:, 1], p[:, 1]),
            "comparison_local": local_comparison_loss(v_l, p_l, v, p),
        }
        if self.full_resolution:
            whole = self._restored(features, deepest, space).unflatten(0, (num_pairs, 2))
            fading = 0.5 * (1 + math.cos(math.pi * progress))
            terms["restoration"] = _both_views(whole, target) + fading * terms["restoration"]
        loss = torch.stack(list(terms.values())).sum()
        detached = {name: term.detach() for name, term in terms.items()}
        return StepOutput(loss, detached, level, restored.detach(), v.detach(), p.detach())

    def _features(self, x: Tensor, level: int) -> list[Tensor]:
        return self.decoder(self.encoder(x), level)

    def _restored(self, features: list[Tensor], level: int, space: tuple[int, ...]) -> Tensor:
        return self.restoration_heads[level - 1](features[level - 1], space)


def _both_views(restored: Tensor, target: Tensor) -> Tensor:
    """L_R = MSE of the first view + MSE of the second (PCRLv2, Eq. 4)."""
    return restoration_loss(restored[:, 0], target[:, 0]) + restoration_loss(restored[:, 1], target[:, 1])
