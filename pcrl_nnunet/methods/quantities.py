"""Quantities that show whether a pretraining learns, and the alarms that they raise.

A cosine loss near -1 is no proof of learning: constant features reach it, too. B: samples, K: vectors, c: channels of a
feature, C: image channels, *: space.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

COLLAPSED_SD = 1 / 3  # share of 1/sqrt(c), the sd of vectors spread evenly over the sphere
COLLAPSED_RANK = 2.0
NOT_TOLD_APART = 0.02  # matched minus shuffled cosine; 0 is chance
NOT_ABOVE_CHANCE = 1.1  # right answers, over the share that guessing reaches
DEAD_RESTORATION = 0.98  # restoration MSE over the target's variance; the mean of each view reaches 1
DIVERGED_RESTORATION = 2.0  # far worse than the mean of each view, which an untrained network nearly reaches
EARLY_STEPS = 200  # no verdict before: an epoch's mean still contains the first steps
# Before these steps a loss may stay constant and still begin to fall later (docs/evidence/hippocampus.md).
GRACE_STEPS = 500  # for the restoration
COMPARISON_GRACE_STEPS = 2000  # for the comparison, whose features at first hardly differ

Alarm = tuple[int, str]  # the number of steps from which it counts, and its sentence


def _no_alarm(group: str, values: Mapping[str, float]) -> Alarm | None:
    return None


@dataclass(frozen=True)
class Quantity:
    """A number that is monitored during a training, with its chart and its alarm.

    Attributes:
        name: name in `StepOutput.values`, log and checkpoint.
        heading: heading of the chart.
        good: description of a good training.
        caption: explanation of the chart.
        lower: lower end of the chart's axis.
        line: value of a dotted line, such as chance.
        of_vectors: computes the quantity from an epoch's vectors (K, c) of a group; None: the method's steps return it.
        alarm: returns what failed, from all quantities of a group in an epoch; None: nothing failed.
    """

    name: str
    heading: str
    good: str
    caption: str
    lower: float | None = None
    line: float | None = None
    of_vectors: Callable[[Tensor], Tensor] | None = None
    alarm: Callable[[str, Mapping[str, float]], Alarm | None] = _no_alarm


def matched_minus_shuffled(p: Tensor, v: Tensor) -> Tensor:
    """Return the mean cosine of p and v (B, c) within samples minus the mean between samples; 0: no distinction."""
    # float32 even under autocast: half precision would round away small differences
    with nullcontext() if p.is_meta else torch.autocast(p.device.type, enabled=False):
        cosines = F.normalize(p.float(), dim=1) @ F.normalize(v.float(), dim=1).T
    matched = cosines.diagonal().mean()
    shuffled = (cosines.sum() - cosines.diagonal().sum()) / (cosines.numel() - len(cosines))
    return matched - shuffled


def restoration_error(restored: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over the target's variance: 1 for the mean of each view, 0 for the target.

    The variance is computed within each view and channel, then averaged. Views and channels differ in their means, and
    restoring only these means must not look like a success.

    Args:
        restored, target: (B, views, C, *).
    """
    variance = target.float().flatten(3).var(3, correction=0).mean()
    return F.mse_loss(restored.float(), target.float()) / variance.clamp_min(1e-12)


def variance_within(target: Tensor, masked: Tensor | None = None) -> Tensor:
    """Return the variance within a sample and channel, averaged: the error of predicting each sample's mean.

    Args:
        target: (B, C, *).
        masked: (B, 1, *) of bool: only these voxels count, and every sample has some. None: all voxels.
    """
    target = target.float().flatten(2)
    if masked is None:
        return target.var(2, correction=0).mean().clamp_min(1e-12)
    where = masked.flatten(2)
    number = where.sum(2)
    means = (target * where).sum(2) / number
    squared = (target - means[..., None]).square() * where
    return (squared.sum(2) / number).mean().clamp_min(1e-12)


def right_over_chance(logits: Tensor, classes: Tensor) -> Tensor:
    """Return the share of samples whose own class has the largest logit, over chance.

    Args:
        logits: (B, L).
        classes: (B,), the right class of each sample.
    """
    return (logits.argmax(1) == classes).float().mean() * logits.shape[1]


def sd_ratio(v: Tensor) -> Tensor:
    """Return the sd of the L2-normalised v (K, c), averaged over channels, over 1/sqrt(c) (SimSiam, section 4.1).

    The BatchNorm before v hides most collapses from this ratio: `effective_rank` and `matched_minus_shuffled` see more.
    """
    return F.normalize(v.float(), dim=1).std(0).mean() * v.shape[1] ** 0.5


def effective_rank(v: Tensor) -> Tensor:
    """Return exp of the entropy of the normalised singular values of the centred v (K, c) (Roy & Vetterli, 2007)."""
    singular = torch.linalg.svdvals(v.float() - v.float().mean(0))
    share = singular / singular.sum().clamp_min(1e-12)
    return torch.exp(-(share * share.clamp_min(1e-12).log()).sum())


def _of(group: str) -> str:
    return f" of {group}" if group else ""


def _dead_restoration(group: str, values: Mapping[str, float]) -> Alarm | None:
    ratio = values["restoration_error"]
    if ratio < DEAD_RESTORATION:  # False for NaN, too
        return None
    diverged = ratio > DIVERGED_RESTORATION
    return (
        EARLY_STEPS if diverged else GRACE_STEPS,
        f"restoration{_of(group)} is {'far off' if diverged else 'dead'}: its error is {ratio:.2f} of the images' "
        f"variance, where the mean of each image reaches 1.00; lower initial_lr or check the images (--dry_run)",
    )


def _not_above_chance(group: str, values: Mapping[str, float]) -> Alarm | None:
    found = values["right_over_chance"]
    if found >= NOT_ABOVE_CHANCE:
        return None
    return (
        COMPARISON_GRACE_STEPS,
        f"the right answers{_of(group)} are {found:.2f} times chance; train longer, or check the images (--dry_run)",
    )


def _not_told_apart(group: str, values: Mapping[str, float]) -> Alarm | None:
    margin = values["margin"]
    if margin >= NOT_TOLD_APART:
        return None
    return (
        COMPARISON_GRACE_STEPS,
        f"features{_of(group)} do not tell scans apart: two views of the same scan are as alike as views of two scans "
        f"(cosine {margin:+.3f} more); train longer, or raise batch_size",
    )


def _collapsed(group: str, values: Mapping[str, float]) -> Alarm | None:
    spread, rank = values.get("spread", 1.0), values["rank"]  # a method may monitor only the rank
    if spread >= COLLAPSED_SD and rank >= COLLAPSED_RANK:
        return None
    sd = f"spread {spread:.2f}, " if "spread" in values else ""
    return (
        GRACE_STEPS,
        f"features{_of(group)} have collapsed: {sd}rank {rank:.1f}; lower initial_lr, or the "
        f"comparison's weight if the method has one, or raise batch_size",
    )


RESTORATION = Quantity(
    "restoration_error",
    "Restoration error",
    "falls well below 1",
    "The squared error of the restored image, over the variance of the original. 1 (dotted): nothing of the image is "
    "restored, a constant picture reaches as much. It should fall well below.",
    lower=0,
    line=1,
    alarm=_dead_restoration,
)
MATCHING = Quantity(
    "margin",
    "Margin",
    "rises above 0",
    "The cosine of features of two views of a scan, minus the cosine for two different scans. 0 (dotted): the network "
    "does not tell scans apart. It should rise. If all scans show the same small organ, this takes thousands of steps.",
    line=0,
    alarm=_not_told_apart,
)
RIGHT = Quantity(
    "right_over_chance",
    "Right answers over chance",
    "rises above 1",
    "The share of right answers, over the share that guessing reaches. 1 (dotted): no better than guessing.",
    lower=0,
    line=1,
    alarm=_not_above_chance,
)
SPREAD = Quantity(
    "spread",
    "Spread",
    "near 1",
    "How evenly the features fill all directions. 1: evenly. Below the dotted line they have collapsed: all views look "
    "the same to the network.",
    lower=0,
    line=COLLAPSED_SD,
    of_vectors=sd_ratio,
)
RANK = Quantity(
    "rank",
    "Rank",
    "well above 2",
    "How many directions the features use (effective rank). Below the dotted line they have collapsed.",
    lower=0,
    line=COLLAPSED_RANK,
    of_vectors=effective_rank,
    alarm=_collapsed,
)
