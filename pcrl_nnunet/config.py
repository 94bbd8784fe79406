"""Settings of fine-tuning and of classification. Every default holds for every plan; the plan's ``pcrl`` block changes
them, see `pcrl_nnunet.settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.settings import part, pcrl_block, replaced

INPUT_CHANNELS = ("repeat", "first", "mean")


@dataclass(frozen=True)
class FinetuneSettings:
    """Fine-tuning and its scratch control: nnU-Net's own schedule after a linear warm-up of the rate.

    The control has no pretrained encoder, and ignores the settings for it.
    """

    epochs: int = 1000
    iters_per_epoch: int = 250
    val_iters_per_epoch: int = 50
    initial_lr: float = 1e-2
    warmup_share: float = 0.05  # share of the epochs
    weight_decay: float = 3e-5
    encoder_lr_factor: float = 1.0  # the encoder's rate, as a factor of the rate; 0 freezes the encoder
    frozen_epochs: int = 0  # number of first epochs in which the encoder is frozen
    layer_lr_decay: float = 1.0  # factor of the rate from each encoder stage to the next finer one
    load_decoder: bool = False  # load what fits of a decoder that is the method's own, such as PCRLv2's
    allow_partial_encoder: bool = False  # start from an encoder of which some stages stay random
    input_channels: Literal["repeat", "first", "mean"] = "repeat"  # if the pretraining had another number

    def __post_init__(self) -> None:
        for name in ("epochs", "iters_per_epoch", "val_iters_per_epoch"):
            if getattr(self, name) < 1:
                raise UserError(f"pcrl.finetune.{name} is {getattr(self, name)}; expected 1 or more")
        if self.initial_lr <= 0 or self.weight_decay < 0 or self.encoder_lr_factor < 0:
            raise UserError(
                f"pcrl.finetune has initial_lr {self.initial_lr}, weight_decay {self.weight_decay}, encoder_lr_factor "
                f"{self.encoder_lr_factor}; expected a rate above 0, and no negative decay or factor (a factor of 0 "
                f"freezes the encoder)"
            )
        if not 0 <= self.frozen_epochs < self.epochs:
            raise UserError(
                f"pcrl.finetune.frozen_epochs is {self.frozen_epochs}; expected 0 or more, and fewer than the "
                f"{self.epochs} epochs: to freeze the encoder in all of them, set encoder_lr_factor to 0"
            )
        if not 0 < self.layer_lr_decay <= 1:
            raise UserError(
                f"pcrl.finetune.layer_lr_decay is {self.layer_lr_decay}; expected a number above 0, up to 1 (the same "
                f"rate for all stages of the encoder): to freeze the encoder, set encoder_lr_factor to 0"
            )
        if self.input_channels not in INPUT_CHANNELS:
            raise UserError(
                f"pcrl.finetune.input_channels is '{self.input_channels}'; expected {', '.join(INPUT_CHANNELS)}"
            )
        if not 0 <= self.warmup_share < 1:
            raise UserError(f"pcrl.finetune.warmup_share is {self.warmup_share}; expected a number from 0 to below 1")

    @property
    def warmup_epochs(self) -> int:
        """The number of epochs in which the rate rises linearly."""
        return int(self.epochs * self.warmup_share)

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> FinetuneSettings:
        """Return the defaults, changed by `defaults` and then by the plan's ``pcrl.finetune``."""
        return replaced(cls(**(defaults or {})), "pcrl.finetune", part(pcrl_block(plan), "finetune", "pcrl."))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the log and the checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class ClassifySettings:
    """Labels and inputs of a classification. Its schedule is that of `FinetuneSettings`, at a tenth of the rate."""

    table: Literal["", "classes", "candidates"] = ""  # empty: the one that is there
    patch_mm: float = 40.0  # edge of the cube, or square, around a point
    jitter_mm: float = 4.0  # distance along each axis that a point may move while training
    batch_size: int = 0  # 0: as many voxels as the plan's batch, up to 32 inputs
    balanced: bool = True  # draw classes, or a label's positives and negatives, equally often

    def __post_init__(self) -> None:
        if self.table not in ("", "classes", "candidates"):
            raise UserError(f"pcrl.classify.table is '{self.table}'; expected 'classes' or 'candidates'")
        if self.patch_mm <= 0 or self.jitter_mm < 0 or self.batch_size < 0:
            raise UserError(
                f"pcrl.classify has patch_mm {self.patch_mm}, jitter_mm {self.jitter_mm}, batch_size "
                f"{self.batch_size}; expected a size above 0 and no negative number"
            )

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> ClassifySettings:
        """Return the defaults, changed by the plan's ``pcrl.classify``."""
        return replaced(cls(), "pcrl.classify", part(pcrl_block(plan), "classify", "pcrl."))
