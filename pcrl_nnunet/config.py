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
    """Fine-tuning and its scratch control: nnU-Net's own schedule with a linear warm-up of the rate before it.

    The control has no pretrained encoder: it moves as the rest, whatever is set for the encoder.
    """

    epochs: int = 1000
    iters_per_epoch: int = 250
    val_iters_per_epoch: int = 50
    initial_lr: float = 1e-2
    warmup_share: float = 0.05  # of the epochs, so that shorter trainings warm up for less
    weight_decay: float = 3e-5
    encoder_lr_factor: float = 1.0  # of the rate, for the encoder; 0: frozen, it stays as it was pretrained
    frozen_epochs: int = 0  # the first ones, in which the encoder is frozen
    layer_lr_decay: float = 1.0  # of the encoder's rate from each stage to the next finer one, which moves less
    load_decoder: bool = False  # also what fits of the pretraining's decoder
    allow_partial_encoder: bool = False
    input_channels: Literal["repeat", "first", "mean"] = "repeat"  # where the pretraining had another number

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
        """Epochs in which the rate rises linearly."""
        return int(self.epochs * self.warmup_share)

    @classmethod
    def from_plan(
        cls, plan: Mapping[str, Any], defaults: Mapping[str, Any] | None = None, **overrides: Any
    ) -> FinetuneSettings:
        """The plan's ``pcrl.finetune`` part over the defaults, some of which may be others, and overrides over both."""
        given = part(pcrl_block(plan), "finetune", "pcrl.")
        return replaced(cls(**(defaults or {})), "pcrl.finetune", {**given, **overrides})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the log and the checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class ClassifySettings:
    """What a classification learns on; its schedule is fine-tuning's (`FinetuneSettings`), at a tenth of the rate."""

    target: Literal["", "classes", "candidates"] = ""  # which of the two tables; empty: the one that is there
    crop_mm: float = 40.0  # edge of the cube, or square, around a point
    jitter_mm: float = 4.0  # how far, an axis, a point may move while training
    batch_size: int = 0  # 0: what has as many voxels as the plan's batch of patches, up to 32
    balanced: bool = True  # draw classes, or a label's positives and negatives, alike often
    class_weights: bool = False  # weigh them in the loss by their frequency, instead

    def __post_init__(self) -> None:
        if self.target not in ("", "classes", "candidates"):
            raise UserError(f"pcrl.classify.target is '{self.target}'; expected 'classes' or 'candidates'")
        if self.crop_mm <= 0 or self.jitter_mm < 0 or self.batch_size < 0:
            raise UserError(
                f"pcrl.classify has crop_mm {self.crop_mm}, jitter_mm {self.jitter_mm}, batch_size {self.batch_size}; "
                f"expected a size above 0 and no negative number"
            )
        if self.balanced and self.class_weights:
            raise UserError(
                "pcrl.classify has class_weights and balanced (the default), which make up for the same imbalance, "
                "together twice; set balanced to false to weigh the loss instead"
            )

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any], **overrides: Any) -> ClassifySettings:
        """The plan's ``pcrl.classify`` part over the defaults, and overrides over both."""
        return replaced(cls(), "pcrl.classify", {**part(pcrl_block(plan), "classify", "pcrl."), **overrides})
