"""PCRLv2 (Zhou et al., TPAMI 2023), one training step: method.md 1 in code.

B pairs, N local views, C image channels, c channels of a level, G global and L local input sizes. Level i = 1..n-1 is
the decoder's, from coarse to full resolution; level 0 is the encoder's last output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pcrl_nnunet.config import PretrainSettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.losses import comparison_loss, local_comparison_loss, restoration_loss
from pcrl_nnunet.networks import ComparisonHead, Decoder, RestorationHead, accept_any_size


class Levels(NamedTuple):
    """What a step restores from, and compares; None: it does not."""

    restoration: int | None
    comparison: int | None
    comparison_of_second: int | None  # of the second global view: another level only in a cross-scale comparison

    @property
    def deepest(self) -> int:
        """The level where the decoder can stop."""
        return max(level for level in self if level is not None)


@dataclass(frozen=True)
class StepOutput:
    """The loss of a step, its named terms (their weighted sum is the loss), and what the monitor looks at."""

    loss: Tensor
    terms: dict[str, Tensor]
    levels: Levels
    restored: Tensor | None  # (B, 2, C, *G), of the drawn level
    v: Tensor | None  # (B, 2, c)
    p: Tensor | None  # (B, 2, c)


class PCRLv2(nn.Module):
    """The encoder of a plan, a decoder without skip connections, and the heads of every level.

    Args:
        encoder: of the plan's network, shared with it: training this module trains that network's encoder.
        image_channels: C.
        restoration: ``single``: both losses on one level drawn a step, where the decoder stops (the paper);
            ``full``: also restoration at full resolution in every step, with the drawn level's restoration
            fading out by a cosine (the authors' code).
        levels: of which a step draws one: [restoration, comparison], None for none of it (Table 3); empty: every level
            of the decoder for both.
        comparison: ``pairwise``: of the same level (the paper's choice); ``cross_scale``: of two drawn ones (Table 2).
        skip_connections: of the decoder (Table 1).
        comparison_weight: of both comparison terms; 1 in the paper. Behind instance norm the averages that are compared
            differ little between samples: their batch norm makes gradients of the encoder that at first are 5 to 20
            times those of the restoration (docs/evidence/classification.md).
    """

    name = "pcrlv2"
    citations = (
        "Zhou, H.-Y., Lu, C., Chen, C., Yang, S., & Yu, Y. (2023). A unified visual information preservation framework "
        "for self-supervised pre-training in medical image analysis. IEEE TPAMI, 45(7), 8020-8035.",
    )

    def __init__(
        self,
        encoder: Any,
        image_channels: int,
        restoration: str = "single",
        levels: Sequence[Sequence[int | None]] = (),
        comparison: str = "pairwise",
        skip_connections: bool = False,
        comparison_weight: float = 1.0,
    ):
        super().__init__()
        self.comparison_weight = comparison_weight
        self.encoder = encoder
        accept_any_size(encoder)  # local views' sizes are no multiples of the strides
        self.decoder = Decoder(encoder, skip_connections)
        self.full_resolution = restoration == "full"
        n = self.decoder.num_levels
        self.levels = [tuple(drawn) for drawn in levels] or [(i, i) for i in range(1, n + 1)]
        for drawn in self.levels:
            restored, compared = drawn
            if (
                restored not in (None, *range(1, n + 1))
                or compared not in (None, *range(n + 1))
                or drawn == (None, None)
            ):
                raise UserError(
                    f"pcrl.pretrain.levels has {list(drawn)}; expected the level to restore from, 1 to {n} or null, "
                    f"and that to compare, 0 to {n} or null"
                )
        self.compared = sorted({level for _, level in self.levels if level is not None})
        self.crosses_scales = comparison == "cross_scale"
        channels, kernels = [encoder.output_channels[-1], *self.decoder.channels], encoder.kernel_sizes[::-1]
        restored_levels = {n} if self.full_resolution else set()
        restored_levels |= {level for level, _ in self.levels if level is not None}
        self.restoration_heads = nn.ModuleDict(
            {
                str(i): RestorationHead(encoder.conv_op, channels[i], image_channels, kernels[i])
                for i in sorted(restored_levels)
            }
        )
        width = max((channels[i] for i in self.compared), default=0) if self.crosses_scales else None
        self.comparison_heads = nn.ModuleDict({str(i): ComparisonHead(channels[i], width) for i in self.compared})

    @classmethod
    def from_settings(cls, encoder: Any, image_channels: int, settings: PretrainSettings) -> PCRLv2:
        """With the settings of a pretraining."""
        s = settings
        return cls(
            encoder, image_channels, s.restoration, s.levels, s.comparison, s.skip_connections, s.comparison_weight
        )

    def draw_levels(self, seed: int, step: int) -> Levels:
        """i ~ U{1..n-1}, a function of (seed, step) alone: equal on all ranks and after resuming."""
        rng = np.random.default_rng((seed, step))
        restoration, comparison = self.levels[rng.integers(len(self.levels))]
        other = comparison
        if self.crosses_scales and comparison is not None:
            other = self.compared[rng.integers(len(self.compared))]
        return Levels(restoration, comparison, other)

    def all_levels(self) -> list[Levels]:
        """One step each touches all that a training can touch, the deepest last."""
        each = [Levels(restored, compared, compared) for restored, compared in self.levels]
        return sorted(each, key=lambda levels: levels.deepest)

    def forward(self, batch: Mapping[str, Tensor], levels: Levels, progress: float = 0.0) -> StepOutput:
        """Losses of one batch.

        Args:
            batch: ``input`` and ``target`` (B, 2, C, *G), ``local`` (B, N, C, *L) unless N is 0.
            levels: the drawn ones.
            progress: share of the training that is done, 0 to 1.
        """
        target, local = batch["target"], batch.get("local")
        deepest = self.decoder.num_levels if self.full_resolution else levels.deepest
        of_local = None
        if levels.comparison is not None and local is not None:
            of_local = self._features_of_local(local.flatten(0, 1), levels.comparison)
        features = self._features(batch["input"].flatten(0, 1), deepest)
        terms: dict[str, Tensor] = {}
        restored = v = p = None
        if levels.restoration is not None:
            restored = self._restored(features, levels.restoration, target)
            terms["restoration"] = _both_views(restored, target)
        if self.full_resolution:
            whole = _both_views(self._restored(features, self.decoder.num_levels, target), target)
            fading = 0.5 * (1 + math.cos(math.pi * progress))
            terms["restoration"] = whole + fading * terms.get("restoration", torch.zeros_like(whole))
        if levels.comparison is not None and levels.comparison_of_second is not None:
            v, p = self._compared_global(features, levels.comparison, levels.comparison_of_second)
            terms["comparison_global"] = comparison_loss(v[:, 0], p[:, 0], v[:, 1], p[:, 1])
            if local is not None:
                both = self.comparison_heads[str(levels.comparison)](of_local)
                v_l, p_l = (x.unflatten(0, local.shape[:2]) for x in both)
                terms["comparison_local"] = local_comparison_loss(v_l, p_l, v, p)
        weighted = [t if name == "restoration" else self.comparison_weight * t for name, t in terms.items()]
        loss = torch.stack(weighted).sum()
        detached = {name: term.detach() for name, term in terms.items()}
        return StepOutput(loss, detached, levels, *(None if x is None else x.detach() for x in (restored, v, p)))

    def _features(self, x: Tensor, level: int) -> list[Tensor]:
        features: list[Tensor] = self.decoder(self.encoder(x), level)
        return features

    def _features_of_local(self, x: Tensor, level: int) -> Tensor:
        """Of the level alone.

        At full resolution, where a step takes the most memory, the backward pass computes them again instead of keeping
        what is before them: as the first of the forward pass they are its last, when the global views' are freed.
        """
        if level < self.decoder.num_levels:
            return self._features(x, level)[-1]
        feature: Tensor = checkpoint(lambda x: self._features(x, level)[-1], x, use_reentrant=False)
        return feature

    def _compared_global(self, features: list[Tensor], first: int, second: int) -> tuple[Tensor, Tensor]:
        """v and p (B, 2, c) of the global views, the first one of one level, the second of another or the same."""
        if first == second:
            both = self.comparison_heads[str(first)](features[first])
            v, p = (x.unflatten(0, (-1, 2)) for x in both)
            return v, p
        of_views = [
            self.comparison_heads[str(level)](features[level].unflatten(0, (-1, 2))[:, view])
            for view, level in enumerate((first, second))
        ]
        v, p = (torch.stack(x, 1) for x in zip(*of_views, strict=True))
        return v, p

    def _restored(self, features: list[Tensor], level: int, target: Tensor) -> Tensor:
        """(B, 2, C, *G)"""
        restored: Tensor = self.restoration_heads[str(level)](features[level], target.shape[3:])
        return restored.unflatten(0, target.shape[:2])


def _both_views(restored: Tensor, target: Tensor) -> Tensor:
    """L_R = MSE of the first view + MSE of the second (PCRLv2, Eq. 4)."""
    return restoration_loss(restored[:, 0], target[:, 0]) + restoration_loss(restored[:, 1], target[:, 1])
