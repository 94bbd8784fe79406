"""nnU-Net's loss for patches with a labelled and a pseudo-labelled part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import Tensor, nn

Targets = Tensor | Sequence[Tensor]  # a tensor for each output of deep supervision


def ignoring(loss: Any, ignored: int) -> Any:
    """Make nnU-Net's loss skip ignored voxels, even if the dataset has no ignore label.

    Args:
        loss: a `DC_and_CE_loss` or `DC_and_BCE_loss`, with deep supervision or without; changed in place.
        ignored: value of ignored voxels in label maps; the last channel of regions marks them.
    """
    inner = loss.loss if isinstance(loss, DeepSupervisionWrapper) else loss
    if not isinstance(inner, DC_and_BCE_loss):
        inner.ignore_label = inner.ce.ignore_index = ignored
    elif not inner.use_ignore_label:
        inner.use_ignore_label, inner.ce = True, _MeanOfRegions(reduction="none")
    return loss


class _MeanOfRegions(nn.BCEWithLogitsLoss):
    """Cross-entropy over the number of regions, because nnU-Net's loss sums over regions if there is an ignore label.

    Without the division, a dataset without that label would give the cross-entropy more weight in the second phase.
    """

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each voxel and region."""
        return super().forward(output, target) / output.shape[1]


class WatchedLoss(nn.Module):
    """nnU-Net's loss, whose inputs at full resolution are watched, too.

    Args:
        loss: nnU-Net's loss.
        watch: called with the output and the labels, both at full resolution.
    """

    def __init__(self, loss: Any, watch: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.loss, self.watch = loss, watch

    def forward(self, output: Any, target: Targets) -> Tensor:
        """Return the loss."""
        deep = not isinstance(target, Tensor)
        self.watch(output[0].detach() if deep else output.detach(), target[0] if deep else target)  # type: ignore[arg-type]
        return torch.as_tensor(self.loss(output, target))


class PartsLoss(nn.Module):
    """The loss of the labelled part plus the weighted loss of the pseudo-labelled part, over the sum of the weights.

    Bai et al. 2023, Eq. 8 and 9, with nnU-Net's Dice and cross-entropy. The division keeps the loss as large as in a
    supervised step.

    Args:
        loss: nnU-Net's loss, which skips ignored voxels.
        pseudo_weight: weight of the pseudo-labelled part.
        watch: called with the output and the pseudo-labels, both at full resolution.
    """

    def __init__(self, loss: Any, pseudo_weight: float, watch: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.loss, self.pseudo_weight, self.watch = loss, pseudo_weight, watch

    def forward(self, output: Any, target: Targets) -> Tensor:
        """Return the loss.

        Args:
            target: the targets of both parts, concatenated in the channels.
        """
        labelled: Any
        pseudo: Any
        if isinstance(target, Tensor):
            labelled, pseudo = target.chunk(2, dim=1)
            self.watch(output.detach(), pseudo)
        else:
            halves = [level.chunk(2, dim=1) for level in target]
            labelled, pseudo = (list(part) for part in zip(*halves, strict=True))
            self.watch(output[0].detach(), pseudo[0])
        total = self.loss(output, labelled) + self.pseudo_weight * self.loss(output, pseudo)
        return torch.as_tensor(total / (1 + self.pseudo_weight))
