"""Settings of a semi-supervised training: the plan's ``pcrl.semi``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.settings import number, part, pcrl_block, replaced

WHERE = "pcrl.semi"


@dataclass(frozen=True)
class SemiSettings:
    """The settings of a training in two stages: on labelled cases only, then with a teacher's pseudo-labels.

    Lengths are shares of the epochs of ``pcrl.finetune``.
    """

    # share of the epochs in the first stage
    supervised_share: float = number(
        0.4, ": the teacher starts from what the first stage has learned", above=0, below=1
    )
    # share of the first stage's steps that paste labelled patches into each other
    pasted_share: float = number(0.5, at_least=0, at_most=1)
    teacher_momentum: float = number(0.99, at_least=0, below=1)  # for the moving average of the student's weights
    pseudo_weight: float = number(0.5, above=0)  # of the pseudo-labelled part; the labelled part has weight 1
    box_share: float = number(2 / 3, above=0, below=1)  # edge of the pasted box, as a share of the patch
    leave_out: tuple[str, ...] = ()  # cases that must not be used as unlabelled cases, such as test cases
    seed: int = number(0, at_least=0)

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> SemiSettings:
        """Return the settings: defaults, then the plan's ``pcrl.semi``."""
        return replaced(cls(), WHERE, part(pcrl_block(plan), "semi", "pcrl."))

    def supervised_epochs(self, epochs: int) -> int:
        """Return the number of epochs of the first stage. Each stage has at least one epoch.

        Raises:
            UserError: there are too few epochs for two stages.
        """
        if epochs < 2:
            raise UserError(
                f"pcrl.finetune.epochs is {epochs}; a semi-supervised training has two stages: give 2 epochs or more"
            )
        return min(epochs - 1, max(1, round(self.supervised_share * epochs)))
