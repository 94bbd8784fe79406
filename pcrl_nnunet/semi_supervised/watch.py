"""The monitor: what the network has learned from labels, and whether pseudo-labels can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from pcrl_nnunet.semi_supervised.label_facts import LabelFacts

RARE, FREQUENT = 0.05, 20.0  # share among pseudo-labels, as a multiple of the share in labelled scans
ALMOST_NONE = 0.1  # the same for all classes together
TOO_MUCH = 0.5  # share of the voxels without the class in labelled scans that pseudo-labels give to the class
AGREE = 0.3  # Dice of student and teacher below which they do not agree
LEARNED = 0.3  # Dice on labelled patches from which the network finds a class
PATIENCE = 3  # epochs in a row after which the log warns
ENOUGH = 50  # unlabelled patches of an epoch; the shares and the agreement of fewer patches come from chance


@dataclass(frozen=True)
class Pseudo:
    """The pseudo-labels of an epoch, by class.

    Attributes:
        shares: share of the voxels of unlabelled patches.
        agreement: Dice of the student's prediction on pasted patches and the pseudo-labels; NaN if both lack the class.
        patches: number of unlabelled patches.
    """

    shares: list[float]
    agreement: list[float]
    patches: int = 0


class Watch:
    """A collector of an epoch's pseudo-labels, and of the student's Dice.

    Args:
        num_classes: number of classes without background.
        regions: whether labels are regions of bool instead of label maps.
        ignored: value of ignored voxels in label maps.
    """

    def __init__(self, num_classes: int, regions: bool, ignored: int, device: torch.device) -> None:
        self.num_classes, self.regions, self.ignored, self.device = num_classes, regions, ignored, device
        self._reset()

    def _reset(self) -> None:
        # whole numbers, exact in float64, which mps lacks
        kind = torch.float64 if self.device.type != "mps" else torch.float32
        self.counts = torch.zeros(self.num_classes, dtype=kind, device=self.device)
        self.dice = torch.zeros(2, self.num_classes, dtype=kind, device=self.device)  # twice the overlap, sum of sizes
        self.voxels = self.patches = 0

    def of_teacher(self, labels: Tensor) -> None:
        """Count the teacher's labels of unlabelled patches."""
        self.counts += torch.stack([self._mask(labels, number).sum() for number in range(self.num_classes)])
        self.voxels += labels[:, :1].numel()
        self.patches += len(labels)

    def of_student(self, output: Tensor, labels: Tensor) -> None:
        """Compare the student's output with labels: in the first phase true ones, in the second phase pseudo-labels.

        Args:
            output: logits (B, classes, *patch).
            labels: label maps with `ignored`, or regions of bool; a further channel marks ignored voxels.
        """
        predicted = output > 0 if self.regions else output.argmax(1, keepdim=True)
        part = ~labels[:, self.num_classes :].any(1) if self.regions else torch.ne(labels[:, 0], self.ignored)
        for number in range(self.num_classes):  # masks of all classes at once would take much memory
            wanted, given = self._mask(labels, number) & part, self._mask(predicted, number) & part
            self.dice[0, number] += 2 * (wanted & given).sum()
            self.dice[1, number] += wanted.sum() + given.sum()

    def _mask(self, labels: Tensor, number: int) -> Tensor:
        """Return the mask (B, *patch) of a class."""
        return labels[:, number].bool() if self.regions else torch.eq(labels[:, 0], number + 1)

    def finish_epoch(self, is_ddp: bool) -> Pseudo:
        """Return the epoch's numbers of all processes, and begin a new epoch. Without pseudo-labels, shares are NaN."""
        total = torch.cat([self.counts, self.dice.flatten(), self.counts.new_tensor([self.voxels, self.patches])])
        if is_ddp:
            distributed.all_reduce(total)
        *values, voxels, patches = total.tolist()
        n = self.num_classes
        self._reset()
        dice = [_ratio(a, b) for a, b in zip(values[n : 2 * n], values[2 * n :], strict=True)]
        return Pseudo([_ratio(count, voxels) for count in values[:n]], dice, int(patches))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def as_text(pseudo: Pseudo, facts: LabelFacts) -> str:
    """Return a line for the log."""
    parts = [
        f"{name} {share:.2%} of the voxels (labels {usual:.2%}), Dice of student and teacher {dice:.2f}"
        for name, share, usual, dice in zip(facts.names, pseudo.shares, facts.shares, pseudo.agreement, strict=True)
    ]
    return f"Pseudo-labels: {'; '.join(parts)}"


def as_dice(labelled: Pseudo, facts: LabelFacts) -> str:
    """Return a line for the log about an epoch of the first phase."""
    return "Dice on labelled patches: " + ", ".join(
        f"{name} {dice:.2f}" for name, dice in zip(facts.names, labelled.agreement, strict=True)
    )


def not_learned(dice: Sequence[float], facts: LabelFacts) -> list[str]:
    """Return the names of the classes that the labelled cases have and that the network does not find.

    Args:
        dice: Dice of each class on labelled patches; NaN if no patch and no prediction has had the class.
    """
    by_class = zip(facts.names, facts.shares, dice, strict=True)
    return [name for name, share, value in by_class if share > 0 and not value >= LEARNED]


def alarms(history: Sequence[Pseudo], facts: LabelFacts) -> dict[tuple[str, str], str]:
    """Return sentences about failures in all of the last epochs, by kind and class.

    If one of these epochs has fewer than `ENOUGH` patches, no failure can be told from chance.

    Args:
        history: one element for each epoch of the second phase so far.
    """
    recent = history[-PATIENCE:]
    if len(recent) < PATIENCE or any(epoch.patches < ENOUGH for epoch in recent):
        return {}
    numbers = [n for n, share in enumerate(facts.shares) if share > 0]
    lost = [n for n in numbers if all(epoch.shares[n] < RARE * facts.shares[n] for epoch in recent)]
    total = sum(facts.shares[n] for n in numbers)
    if numbers and all(sum(epoch.shares[n] for n in numbers) < ALMOST_NONE * total for epoch in recent):
        return {
            ("background", ""): "ALARM: the teacher finds almost no class in the unlabelled scans, and the student "
            "will unlearn all classes; train the first phase longer (pcrl.semi.supervised_share), or check that the "
            "scans show the classes"
        }
    found = {}
    for n in numbers:
        name, usual, now = facts.names[n], facts.shares[n], recent[-1].shares[n]
        if all(epoch.shares[n] > usual + TOO_MUCH * (1 - usual) for epoch in recent):
            found["everything", name] = (
                f"ALARM: the teacher labels {now:.0%} of the unlabelled voxels as {name}, and labels have {usual:.2%}; "
                f"train the first phase longer (pcrl.semi.supervised_share), or check the kind of the scans"
            )
        elif n in lost:
            found["rare", name] = (
                f"WARNING: the teacher hardly finds {name} in the unlabelled scans: {now:.3%} of the voxels, "
                f"{usual:.3%} in the labelled ones; do the scans show this class?"
            )
        elif all(epoch.shares[n] > FREQUENT * usual for epoch in recent):
            found["frequent", name] = (
                f"WARNING: the teacher finds much more of {name} in the unlabelled scans: {now:.2%} of the voxels, "
                f"{usual:.2%} in the labelled ones; are the scans of the same kind and region?"
            )
        elif all(epoch.agreement[n] < AGREE for epoch in recent):
            found["agreement", name] = (
                f"WARNING: student and teacher do not agree about {name} in the unlabelled scans: their Dice is "
                f"{recent[-1].agreement[n]:.2f}; are the scans of the same kind as the labelled ones?"
            )
    return found


def as_plain(history: Sequence[Pseudo]) -> list[dict[str, Any]]:
    """Return plain values for the checkpoint."""
    return [asdict(epoch) for epoch in history]
