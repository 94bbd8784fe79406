"""The comparison of features at points that both views of a pair show.

B: samples, P: points of a sample, D: channels of all features together, c: channels of a vector, d: axes, *: space.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.losses import paired_contrastive_loss
from pcrl_nnunet.methods.pairs import number_of_pairs
from pcrl_nnunet.methods.quantities import right_over_chance
from pcrl_nnunet.networks import at_points, gathered
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.views.configure import total_stride
from pcrl_nnunet.views.settings import ViewSettings

MOST_PAIRS = 32  # similarities of all points with all grow with the square of the batch
POINTS = 64
TEMPERATURE = 0.1
HIDDEN_CHANNELS = 128
VECTOR_CHANNELS = 64


class PointHead(nn.Sequential):
    """Two layers with batch normalisation between them, which turn the features at a point into a vector.

    Args:
        channels: D.
        hidden: channels between the two layers.
        vector: c.
    """

    def __init__(self, channels: int, hidden: int = HIDDEN_CHANNELS, vector: int = VECTOR_CHANNELS) -> None:
        super().__init__(
            nn.Linear(channels, hidden, bias=False),  # the next norm has the bias
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, vector),
        )

    def vectors(self, features: Sequence[Tensor], points: Tensor, size: Sequence[int]) -> Tensor:
        """Return the vectors (B, 2, P, c), float32.

        Args:
            features: (2B, *) each, of the first and the second view in turns.
            points: (B, 2, P, d), indices of voxels of the views.
            size: size of the views, voxels.
        """
        sampled = torch.cat([at_points(feature, points.flatten(0, 1), size) for feature in features], 2)  # (2B, P, D)
        # float32 even under autocast: half precision would round small differences away
        with nullcontext() if sampled.is_meta else torch.autocast(sampled.device.type, enabled=False):
            vectors: Tensor = self(sampled.flatten(0, 1)).unflatten(0, points.shape[:3])
        return vectors


def point_comparison(vectors: Tensor, temperature: float = TEMPERATURE) -> tuple[Tensor, Tensor]:
    """Return InfoNCE over all points of the batch, and the share of right answers over chance.

    A point has to find itself in the other view, among all points of all samples. Samples of other processes count,
    because the number of candidates must not depend on the number of processes.

    Args:
        vectors: (B, 2, P, c).
        temperature: divides the cosines.
    """
    one, two = (gathered(of_view.contiguous()).flatten(0, 1) for of_view in vectors.unbind(1))  # (BP, c) each
    return paired_contrastive_loss(one, two, temperature), partners_over_chance(one.detach(), two.detach())


def partners_over_chance(one: Tensor, two: Tensor) -> Tensor:
    """Return the share of points whose partner is the most similar point of the other view, over chance.

    Args:
        one, two: (K, c), the vectors of the same points in both views.
    """
    with nullcontext() if one.is_meta else torch.autocast(one.device.type, enabled=False):
        cosines = F.normalize(one.float(), dim=1) @ F.normalize(two.float(), dim=1).T
    return right_over_chance(cosines, torch.arange(len(one), device=one.device))


def number_of_pairs_with_points(views: ViewSettings, plan: PlanFacts, where: str, title: str) -> int:
    """Return the number of pairs that fit the plan's budget of voxels, at most 32. See `number_of_pairs`.

    Raises:
        UserError: there are local views, or the place of a voxel of the bottleneck in these views is not known.
    """
    size, total = views.global_input_size, total_stride(plan.strides)
    if any(length % stride for length, stride in zip(size, total, strict=True)):
        raise UserError(
            f"{where}.views.global_input_size is {size}; expected multiples of the network's total stride {total}: "
            f"change global_input_size"
        )
    return min(MOST_PAIRS, number_of_pairs(views, plan, where, title))
