"""Settings of a semi-supervised training: the plan's ``pcrl.semi``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.settings import part, pcrl_block, replaced

WHERE = "pcrl.semi"


@dataclass(frozen=True)
class SemiSettings:
    """A training in two stages: on labelled cases alone, then with pseudo-labels of a teacher.

    Lengths are shares of the epochs of ``pcrl.finetune``.
    """

    supervised_share: float = 0.4  # share of the epochs in the first stage
    pasted_share: float = 0.5  # share of the first stage's steps in which labelled patches are pasted into each other
    teacher_momentum: float = 0.99  # of the moving average of the student's weights
    pseudo_weight: float = 0.5  # of the pseudo-labelled part in the loss; the labelled part has weight 1
    box_share: float = 2 / 3  # edge of the pasted box, as a share of the patch
    leave_out: tuple[str, ...] = ()  # cases that are not to be used as unlabelled ones: test cases
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.supervised_share < 1:
            raise UserError(
                f"{WHERE}.supervised_share is {self.supervised_share}; expected a share between 0 and 1: the teacher "
                f"starts from what the first stage has learned"
            )
        for name in ("pasted_share", "teacher_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{WHERE}.{name} is {getattr(self, name)}; expected a number from 0 to 1")
        if not 0 < self.box_share < 1 or self.pseudo_weight <= 0 or self.seed < 0:
            raise UserError(
                f"{WHERE} has box_share {self.box_share}, pseudo_weight {self.pseudo_weight} and seed {self.seed}; "
                f"expected a share between 0 and 1, a weight above 0 and no negative seed"
            )

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> SemiSettings:
        """Return the defaults, changed by the plan's ``pcrl.semi``."""
        return replaced(cls(), WHERE, part(pcrl_block(plan), "semi", "pcrl."))

    def supervised_epochs(self, epochs: int) -> int:
        """Return the number of epochs of the first stage; each stage has one at least.

        Raises:
            UserError: there are not enough epochs for two stages.
        """
        if epochs < 2:
            raise UserError(
                f"pcrl.finetune.epochs is {epochs}; a semi-supervised training has two stages: give 2 epochs or more"
            )
        return min(epochs - 1, max(1, round(self.supervised_share * epochs)))
