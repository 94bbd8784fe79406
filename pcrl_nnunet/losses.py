"""The losses of the methods, a function for each equation, and the loss of classification.

B: batch, N: local views, c: channels, C: image channels, L: labels or classes, *: space.

All arithmetic is float32, even under autocast: in half precision, small differences between cosines are lost.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F


def restoration_loss(restored: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over all elements of one view (PCRLv2, Eq. 2-4); both (B, C, *)."""
    return F.mse_loss(restored.float(), target.float())


def masked_restoration_loss(restored: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Return the MSE over masked voxels of each sample, mean over the batch (He et al., CVPR 2022, section 3).

    Args:
        restored, target: (B, C, *).
        masked: (B, 1, *) of bool, some voxels of every sample.
    """
    squared = (restored.float() - target.float()).square() * masked
    of_samples = squared.flatten(1).sum(1) / (masked.flatten(1).sum(1) * target.shape[1])
    return of_samples.mean()


def comparison_loss(v_u: Tensor, p_u: Tensor, v_w: Tensor, p_w: Tensor) -> Tensor:
    """Return -1/2 [cos(sg(v_u), p_w) + cos(p_u, sg(v_w))], mean over the batch (PCRLv2, Eq. 7-9); all (..., c)."""
    one = F.cosine_similarity(v_u.detach().float(), p_w.float(), dim=-1)
    other = F.cosine_similarity(p_u.float(), v_w.detach().float(), dim=-1)
    return -0.5 * (one + other).mean()


def local_comparison_loss(v_local: Tensor, p_local: Tensor, v_global: Tensor, p_global: Tensor) -> Tensor:
    """Return the mean comparison loss over all pairs of a local and a global view (PCRLv2, Eq. 10).

    The paper sums these 12 terms, the authors' code averages them. The mean keeps the weight of the restoration.

    Args:
        v_local, p_local: (B, N, c).
        v_global, p_global: (B, 2, c).
    """
    return comparison_loss(v_local[:, :, None], p_local[:, :, None], v_global[:, None], p_global[:, None])


def contrastive_loss(
    query: Tensor, key: Tensor, negatives: Tensor, allowed: Tensor, temperature: float, positive_below: bool = True
) -> Tensor:
    """Return InfoNCE, mean over the batch: -log of the share of the right key (He et al., CVPR 2020, Eq. 1).

    Args:
        query, key: (B, c); the cosine of the two is the positive's similarity.
        negatives: (K, c).
        allowed: (B, K) of bool, the negatives of each sample. Samples without any do not count, if there are others.
        temperature: divides the cosines.
        positive_below: the positive also stands in the denominator, as in MoCo. Otherwise the denominator holds the
            negatives alone, as in PCRLv1, Eq. 7.
    """
    query, key, negatives = (F.normalize(x.float(), dim=-1) for x in (query, key, negatives))
    positive = (query * key).sum(-1, keepdim=True) / temperature  # (B, 1)
    with nullcontext() if query.is_meta else torch.autocast(query.device.type, enabled=False):
        others = (query @ negatives.T / temperature).masked_fill(~allowed, -1e9)  # exp gives 0
    below = torch.cat((positive, others), 1) if positive_below else others
    losses = torch.logsumexp(below, 1) - positive[:, 0]
    counted = allowed.any(1)
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def paired_contrastive_loss(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE in both directions, mean over all pairs: each vector finds its partner among all others' partners.

    Only one matrix of similarities is kept for the backward pass, for both directions.

    Args:
        one, two: (K, c), the same row for partners.
        temperature: divides the cosines.
    """
    one, two = F.normalize(one.float(), dim=1) / temperature, F.normalize(two.float(), dim=1)
    with nullcontext() if one.is_meta else torch.autocast(one.device.type, enabled=False):
        similarities = one @ two.T  # (K, K)
    of_one, of_two = torch.logsumexp(similarities, 1), torch.logsumexp(similarities, 0)
    return (0.5 * (of_one + of_two) - similarities.diagonal()).mean()


def adversarial_loss(logits: Tensor, real: bool) -> Tensor:
    """Return the binary cross-entropy of a discriminator's logits with one answer for all (Goodfellow et al., 2014).

    Args:
        logits: (B, 1, *); above 0 means real.
        real: the answer.
    """
    return F.softplus(-logits.float() if real else logits.float()).mean()


def known_class_loss(logits: Tensor, classes: Tensor, known_share: Tensor) -> Tensor:
    """Return the cross-entropy of the samples whose class is known, as a share of the whole batch's mean.

    The sum over these samples is divided by B times `known_share`. So parts of a batch, weighted by their numbers of
    samples, sum to the mean over the known samples of the whole batch. Without known samples the loss is 0.

    Args:
        logits: (B, L).
        classes: (B,), -1 if unknown.
        known_share: share of known samples in the whole batch, of which the B samples may be a part.
    """
    total = F.cross_entropy(logits.float(), classes, ignore_index=-1, reduction="sum")
    return total / (len(classes) * known_share).clamp_min(1e-12)


def classification_loss(logits: Tensor, target: Tensor, exclusive: bool) -> Tensor:
    """Return the cross-entropy of exclusive classes, or the mean binary cross-entropy of labels, over known values.

    Without known values the loss is 0.

    Args:
        logits: (B, L).
        target: (B, L) 0 or 1, NaN if unknown. For exclusive classes exactly one is 1, or all are unknown.
    """
    logits, known = logits.float(), ~target.isnan()
    if exclusive:
        rows = known.all(1)
        if not rows.any():
            return logits.sum() * 0
        return F.cross_entropy(logits[rows], target[rows].argmax(1))
    losses = F.binary_cross_entropy_with_logits(logits, target.nan_to_num(), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)
