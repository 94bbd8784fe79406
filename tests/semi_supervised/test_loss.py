"""The loss of labelled and pseudo-labelled parts, against Dice and cross-entropy of each part's voxels in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from pcrl_nnunet.finetuning import mixing
from pcrl_nnunet.semi_supervised.loss import PartsLoss, ignoring

SMOOTH, WEIGHT = 1e-5, 0.5


def nnunets_loss(regions: bool, batch_dice: bool, ignore_label: int | None, scales: list[float] | None) -> Any:
    """Return the loss that nnUNetTrainer._build_loss makes."""
    dice = {"batch_dice": batch_dice, "do_bg": regions, "smooth": SMOOTH, "ddp": False}
    loss: Any
    if regions:
        loss = DC_and_BCE_loss({}, dice, use_ignore_label=ignore_label is not None)
    else:
        loss = DC_and_CE_loss(dice, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)
    return loss if scales is None else DeepSupervisionWrapper(loss, scales)


def plain_loss(
    logits: np.ndarray, wanted: np.ndarray, counts: np.ndarray, regions: bool, batch_dice: bool, has_ignore: bool
) -> float:
    """Negative soft Dice plus cross-entropy of the voxels that count, a mean over regions.

    nnU-Net takes a sum over regions instead, where a dataset has an ignore label.

    Args:
        logits: (B, K, *patch).
        wanted: the same shape, 1 where the voxel is of the class or region.
        counts: (B, *patch) of bool.
    """
    logits = logits.astype(np.float64)
    probability = 1 / (1 + np.exp(-logits)) if regions else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    of_voxels = -(wanted * np.log(probability) + (regions * (1 - wanted) * np.log(1 - probability + (not regions))))
    entropy = of_voxels.sum(1)[counts].mean() / (logits.shape[1] if regions and not has_ignore else 1)
    sums = []
    for of_patch, wanted_of_patch, inside in zip(probability, wanted, counts, strict=True):
        p, w = of_patch[:, inside], wanted_of_patch[:, inside]
        sums.append([(p * w).sum(1), p.sum(1), w.sum(1)])
    overlap, predicted, true = np.array(sums).transpose(1, 0, 2)  # (B, K) each
    if batch_dice:
        overlap, predicted, true = overlap.sum(0), predicted.sum(0), true.sum(0)
    dice = (2 * overlap + SMOOTH) / (predicted + true + SMOOTH)
    return float(entropy - dice[..., (0 if regions else 1) :].mean())


def example(regions: bool, ignore_label: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels as nnU-Net gives them, pseudo-labels, and the labelled part."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 3, 6, 7)).astype(np.float32))
    part = mixing.labelled_parts(mixing.random_boxes(rng, 2, (6, 7), 2 / 3), 1)
    if regions:
        labels, pseudo = torch.from_numpy(rng.random((2, 2, 4, 6, 7)) > 0.5)
        labels[:, 3] &= ignore_label is not None
        pseudo[:, 3] = False
    else:
        highest = 3 if ignore_label is None else 4
        labels = torch.from_numpy(rng.integers(0, highest, (2, 1, 6, 7))).to(torch.int16)
        pseudo = torch.from_numpy(rng.integers(0, 3, (2, 1, 6, 7))).to(torch.int16)
    return logits, labels, pseudo, part


def expected_loss(
    logits: torch.Tensor, labels: torch.Tensor, part: torch.Tensor, ignore_label: int | None, batch_dice: bool
) -> float:
    """The plain loss of labels in a part, without voxels of the dataset's ignore label."""
    regions, inside, values = labels.dtype == torch.bool, part[:, 0].numpy(), labels.numpy()
    if regions:
        wanted, counts = values[:, :3].astype(float), inside & ~values[:, 3]
    else:
        wanted, counts = (values == np.arange(3).reshape(1, 3, 1, 1)).astype(float), inside & (values[:, 0] != 3)
    return plain_loss(logits.numpy(), wanted, counts, regions, batch_dice, ignore_label is not None)


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("ignore_label", [None, 3])
@pytest.mark.parametrize("regions", [False, True])
def test_the_loss_is_the_weighted_mean_of_both_parts(
    regions: bool, ignore_label: int | None, batch_dice: bool, deep_supervision: bool
) -> None:
    logits, labels, pseudo, part = example(regions, ignore_label)
    ignored = -1 if ignore_label is None else ignore_label
    halves = [mixing.with_ignored(labels, part, ignored), mixing.with_ignored(pseudo, ~part, ignored)]
    output: Any = logits
    target: Any = torch.cat(halves, 1)
    scales = None
    expected = (
        expected_loss(logits, labels, part, ignore_label, batch_dice)
        + WEIGHT * expected_loss(logits, pseudo, ~part, ignore_label, batch_dice)
    ) / (1 + WEIGHT)
    if deep_supervision:  # the second output is of every other voxel, the third one has no weight
        scales, coarse = [0.75, 0.25, 0.0], (..., slice(None, None, 2), slice(None, None, 2))
        output = [logits, logits[coarse], logits[coarse]]
        target = [target, target[coarse], target[coarse]]
        of_coarse = (
            expected_loss(logits[coarse], labels[coarse], part[coarse], ignore_label, batch_dice)
            + WEIGHT * expected_loss(logits[coarse], pseudo[coarse], ~part[coarse], ignore_label, batch_dice)
        ) / (1 + WEIGHT)
        expected = 0.75 * expected + 0.25 * of_coarse
    seen: list[torch.Tensor] = []
    nnunets = ignoring(nnunets_loss(regions, batch_dice, ignore_label, scales), ignored)
    loss = PartsLoss(nnunets, WEIGHT, lambda *given: seen.extend(given))
    assert loss(output, target).item() == pytest.approx(expected, rel=1e-5)
    assert [torch.equal(a, b) for a, b in zip(seen, (logits, halves[1]), strict=True)] == [True, True]


@pytest.mark.parametrize("regions", [False, True])
def test_equal_weights_of_equal_parts_are_the_supervised_loss(regions: bool) -> None:
    """The loss stays as large as in a supervised step for any weight."""
    logits, labels, _, _ = example(regions, None)
    everywhere = torch.ones(2, 1, 6, 7, dtype=torch.bool)
    whole = mixing.with_ignored(labels, everywhere, -1)
    supervised = nnunets_loss(regions, False, None, None)(logits, labels[:, :3])
    for weight in (0.5, 2.0):
        loss = PartsLoss(ignoring(nnunets_loss(regions, False, None, None), -1), weight, lambda *_: None)
        assert loss(logits, torch.cat([whole, whole], 1)).item() == pytest.approx(supervised.item(), rel=1e-6)


@pytest.mark.parametrize("regions", [False, True])
def test_every_voxel_has_a_gradient_of_its_own_label_alone(regions: bool) -> None:
    logits, labels, pseudo, part = example(regions, None)
    loss = PartsLoss(ignoring(nnunets_loss(regions, True, None, None), -1), WEIGHT, lambda *_: None)

    def gradient(labels: torch.Tensor, pseudo: torch.Tensor) -> torch.Tensor:
        halves = [mixing.with_ignored(labels, part, -1), mixing.with_ignored(pseudo, ~part, -1)]
        given = logits.clone().requires_grad_()
        loss(given, torch.cat(halves, 1)).backward()
        assert given.grad is not None
        return given.grad

    usual = gradient(labels, pseudo)
    assert usual.abs().sum(1).all()
    other_labels, other_pseudo = (torch.where(here, x.flip(0), x) for x, here in ((labels, ~part), (pseudo, part)))
    if regions:
        other_labels[:, 3] = other_pseudo[:, 3] = False
    assert torch.equal(gradient(other_labels, other_pseudo), usual)  # labels that do not show
    changed = gradient(torch.where(part, labels.flip(0), labels), pseudo)
    moved = (changed != usual).any(1, keepdim=True)
    assert moved[part].any()
    assert not moved[~part].any()
