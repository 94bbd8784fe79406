"""The length of a comparison that has to end within some hours."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Any

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.forecast import Work
from pcrl_nnunet.files import write_text
from pcrl_nnunet.plans import read_json

FILE = "hours.json"  # in the comparison's folder
KEPT = 0.1  # share of the hours for scores, light heads and delays, which are not measured
FAR = 0.5  # a smaller share of the default length deserves a warning


@dataclass(frozen=True)
class Lengths:
    """The chosen numbers of epochs.

    Attributes:
        hours: the hours that were asked for.
        pretrain_epochs, finetune_epochs: the chosen numbers.
        share: the part of the default length that the hours allow, at most 1.
        number: number of trainings for which the lengths were chosen.
        frozen: the lengths were chosen for pretrainings alone.
    """

    hours: float
    pretrain_epochs: int
    finetune_epochs: int
    share: float
    number: int
    frozen: bool

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the comparison."""
        tuned = {} if self.frozen else {"finetune": {"epochs": self.finetune_epochs}}
        return {"pretrain": {"epochs": self.pretrain_epochs}, **tuned}

    def __str__(self) -> str:
        labels = "" if self.frozen else f", and trainings with labels {self.finetune_epochs}"
        text = (
            f"In {self.hours:g} hours, pretrainings can have {self.pretrain_epochs} epochs{labels}: {self.share:.0%} "
            f"of the default length."
        )
        if self.share < FAR:
            text += " This is far from the defaults: trainings may end before they have learned what they can learn."
        return text


def lengths_for(
    hours: float, work: Work, at_a_time: int, pretrain_epochs: int, finetune_epochs: int, frozen: bool = False
) -> Lengths:
    """Shorten all trainings by the same factor, so that they fit.

    Args:
        hours: the hours for the whole comparison.
        work: all trainings at their default length.
        at_a_time: trainings that run side by side.
        pretrain_epochs, finetune_epochs: the default lengths.
        frozen: there are pretrainings alone.

    Raises:
        UserError: the hours are too few for an epoch of each training.
    """
    needed, other = sum(work.hours.values()), work.other_hours
    share = min(1.0, (hours * (1 - KEPT) * at_a_time - other) / needed) if needed > 0 else 1.0
    fewest = pretrain_epochs if frozen else min(pretrain_epochs, finetune_epochs)
    if share * fewest < 1:
        least = (needed / fewest + other) / at_a_time / (1 - KEPT)
        raise UserError(
            f"-hours is {hours:g}, but one epoch of each training needs about {math.ceil(10 * least) / 10:g} hours; "
            f"allow more hours, or give fewer -methods, -labelled or -seeds"
        )
    pretraining, fine_tuning = (max(1, math.floor(share * full)) for full in (pretrain_epochs, finetune_epochs))
    return Lengths(hours, pretraining, fine_tuning, share, work.number, frozen)


def read(folder: str, hours: float, frozen: bool) -> Lengths | None:
    """Return the lengths that a comparison in this folder has; None: it was not begun with hours.

    Args:
        hours, frozen: what the command wants.

    Raises:
        UserError: the lengths were chosen for other hours, or for pretrainings alone.
    """
    path = os.path.join(folder, FILE)
    if not os.path.isfile(path):
        return None
    chosen = Lengths(**read_json(path, "remove it to choose the lengths anew"))
    if chosen.hours != hours:
        raise UserError(
            f"-hours is {hours:g}, but the comparison in {folder} was begun with {chosen.hours:g}; give -hours "
            f"{chosen.hours:g}, or another folder with -o"
        )
    if chosen.frozen and not frozen:
        raise UserError(
            f"the comparison in {folder} was begun with -hours {hours:g} for -frozen, which trains with no labels; "
            f"give another folder with -o"
        )
    return chosen


def write(folder: str, lengths: Lengths) -> None:
    """Keep the lengths, so that the same command continues the same comparison on any machine."""
    write_text(os.path.join(folder, FILE), json.dumps(asdict(lengths), indent=2))
