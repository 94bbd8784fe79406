"""Settings of a semi-supervised training: the plan's ``pcrl.semi``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pcrl_nnunet.config import BOX_SHARE
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.settings import number, part, pcrl_block, replaced

WHERE = "pcrl.semi"


@dataclass(frozen=True)
class SemiSettings:
    """The settings of a training in two phases: on labelled cases only, then with a teacher's pseudo-labels.

    Lengths are shares of the epochs of ``pcrl.finetune``.

    Attributes:
        supervised_share: share of the epochs in the first phase. Source: ours.
        longest_supervised_share: the first phase goes on, up to this share of the epochs, until the network finds each
            class in the labelled patches. With 1, the second phase never begins if a class is never found. With
            `supervised_share` or less, the first phase has a fixed length. Source: ours.
        teacher_momentum: momentum of the teacher's weights, a moving average of the network's weights. Source:
            Bai et al.
        pseudo_weight: weight of the pseudo-labelled part in the loss. The labelled part has weight 1. Source:
            Bai et al.
        box_share: edge of the box that mixes labelled and unlabelled patches, as a share of the patch. Source:
            Bai et al.
        mixing_ratio: with this many unlabelled cases for each labelled case, all steps may mix patches. With fewer
            unlabelled cases, proportionally fewer steps may, in both phases. The other steps are nnU-Net's. With 0, all
            steps may mix. Source: ours.
        leave_out: names of cases that are never used as unlabelled ones, such as test cases. Source: ours.
        seed: seed of boxes and steps. Source: ours.
    """

    supervised_share: float = number(
        0.4, ": the teacher starts from what the first phase has learned", above=0, below=1
    )
    longest_supervised_share: float = number(1.0, at_least=0, at_most=1)
    teacher_momentum: float = number(0.99, at_least=0, below=1)
    pseudo_weight: float = number(0.5, above=0)
    box_share: float = number(BOX_SHARE, above=0, below=1)
    mixing_ratio: float = number(8.0, at_least=0)
    leave_out: tuple[str, ...] = ()
    seed: int = number(0, at_least=0)

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> SemiSettings:
        """Return the settings: defaults, then the plan's ``pcrl.semi``."""
        settings = replaced(cls(), WHERE, part(pcrl_block(plan), "semi", "pcrl."))
        for name in settings.leave_out:
            if not isinstance(name, str):
                raise UserError(
                    f'{WHERE}.leave_out has the entry {json.dumps(name)}; expected names of cases: ["NAME", ...]'
                )
        return settings

    def supervised_epochs(self, epochs: int) -> tuple[int, int]:
        """Return the least and the largest number of epochs of the first phase.

        Each phase has at least one epoch, but with a `longest_supervised_share` of 1 there may be no second phase.

        Raises:
            UserError: there are too few epochs for two phases.
        """
        if epochs < 2:
            raise UserError(
                f"pcrl.finetune.epochs is {epochs}; a semi-supervised training has two phases: give 2 epochs or more"
            )
        least = min(epochs - 1, max(1, round(self.supervised_share * epochs)))
        if self.longest_supervised_share == 1:
            return least, epochs
        return least, max(least, min(epochs - 1, round(self.longest_supervised_share * epochs)))
