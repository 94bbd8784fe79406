"""The settings of fine-tuning and classification. The defaults hold for every plan; the plan's ``pcrl`` block changes
them, see `pcrl_nnunet.settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.settings import number, part, pcrl_block, replaced

WHERE = "pcrl.finetune"
FREEZE = "to freeze the encoder in all of them, set encoder_lr_factor to 0"
INPUT_CHANNELS = ("repeat", "first", "mean")
# The changes of each recipe. The recipe of pretrained networks comes from nnU-Net's main branch.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "nnunet": {},
    "pretrained": {"initial_lr": 1e-3, "deep_supervision": False},
}
PASTED_SHARE = 0.5  # `pasted_share` of semi-supervised training. Source: ours; Bai et al. have 1
BOX_SHARE = 2 / 3  # edge of a pasted box, as a share of the patch's edge. Source: Bai et al., CVPR 2023
ADAMW_RATE = 0.1  # factor of SGD's rate
ADAMW_WEIGHT_DECAY = 1e-2  # torch's default: AdamW's decay scales with the rate and is not part of the gradient


@dataclass(frozen=True)
class FinetuneSettings:
    """The settings of fine-tuning and its scratch control: nnU-Net's own schedule after a linear warm-up of the rate.

    The defaults belong to the recipe ``nnunet`` and to SGD. The control ignores the settings for pretrained weights.

    Attributes:
        recipe: defaults of `initial_lr` and `deep_supervision`: nnU-Net's own, or those for pretrained networks.
            Source: ours.
        epochs: number of epochs. Source: nnU-Net.
        iters_per_epoch: training steps of an epoch. Source: nnU-Net.
        val_iters_per_epoch: validation steps of an epoch. Source: nnU-Net.
        optimizer: SGD or AdamW. With AdamW, the defaults are a tenth of the rate and a weight decay of 0.01. Source:
            nnU-Net.
        initial_lr: learning rate after the warm-up. Source: nnU-Net.
        warmup_share: share of the epochs in which the rate rises linearly. Source: nnU-Net's main branch, 50 epochs of
            1000.
        weight_decay: weight decay of the optimizer. Source: nnU-Net.
        deep_supervision: also learn from the decoder's coarser outputs, in a segmentation. Source: nnU-Net.
        pasted_share: share of the steps in which a box of each labelled patch is pasted into another one, with its
            labels, in a segmentation. Source: nnU-Net, which pastes nothing.
        seg_layers_only_epochs: number of first epochs in which the segmentation layers alone are trained. Fewer than
            `epochs`. Source: nnU-Net, which has none.
        encoder_lr_factor: learning rate of the encoder, as a factor of the rate. 0 freezes the encoder. Source:
            nnU-Net, which has one rate.
        frozen_epochs: number of first epochs in which the encoder is frozen. Fewer than `epochs`. Source: nnU-Net,
            which has none.
        layer_lr_decay: factor of the learning rate from each encoder stage to the next finer one. Source: nnU-Net,
            which has one rate.
        load_decoder: also load the tensors that fit from a decoder that only the method has, such as PCRLv2. Source:
            ours.
        allow_partial_encoder: allow some encoder stages to stay random. Source: ours.
        input_channels: how the first convolution is fitted if the pretraining had another number of channels: repeat
            and divide, take the first ones, or take the mean of all. Source: ours.
    """

    recipe: Literal["nnunet", "pretrained"] = "nnunet"
    epochs: int = number(1000, at_least=1)
    iters_per_epoch: int = number(250, at_least=1)
    val_iters_per_epoch: int = number(50, at_least=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    initial_lr: float = number(1e-2, above=0)
    warmup_share: float = number(0.05, at_least=0, below=1)
    weight_decay: float = number(3e-5, at_least=0)
    deep_supervision: bool = True
    pasted_share: float = number(0.0, at_least=0, at_most=1)
    seg_layers_only_epochs: int = 0
    encoder_lr_factor: float = number(1.0, " (a factor of 0 freezes the encoder)", at_least=0)
    frozen_epochs: int = 0
    layer_lr_decay: float = number(1.0, f" (the same rate for all stages): {FREEZE}", above=0, at_most=1)
    load_decoder: bool = False
    allow_partial_encoder: bool = False
    input_channels: Literal["repeat", "first", "mean"] = "repeat"

    def __post_init__(self) -> None:
        for name, hint in (("frozen_epochs", f": {FREEZE}"), ("seg_layers_only_epochs", "")):
            if not 0 <= getattr(self, name) < self.epochs:
                raise UserError(
                    f"{WHERE}.{name} is {getattr(self, name)}; expected 0 or more, and fewer than the "
                    f"{self.epochs} epochs{hint}"
                )

    @property
    def warmup_epochs(self) -> int:
        """Number of epochs in which the rate rises linearly."""
        return int(self.epochs * self.warmup_share)

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> FinetuneSettings:
        """Return the settings: defaults, then `defaults`, recipe and optimizer, then the plan's ``pcrl.finetune``."""
        given = part(pcrl_block(plan), "finetune", "pcrl.")
        chosen = replaced(cls(**(defaults or {})), WHERE, given)
        of_recipe = {**(defaults or {}), **RECIPES[chosen.recipe]}
        if chosen.optimizer == "adamw":
            rate = of_recipe.get("initial_lr", cls.initial_lr)
            of_recipe |= {"initial_lr": ADAMW_RATE * rate, "weight_decay": ADAMW_WEIGHT_DECAY}
        return replaced(cls(), WHERE, {**of_recipe, **given})


@dataclass(frozen=True)
class ClassifySettings:
    """Labels and inputs of a classification. Its schedule is ``pcrl.finetune``, at a tenth of the rate.

    Attributes:
        table: table of labels: classes.csv or candidates.csv. By default the table that exists. Source: ours.
        patch_mm: edge of the cube, or of the square in 2D, around a point, mm. Source: ours.
        jitter_mm: distance along each axis that a point may move while training, mm. Source: ours.
        batch_size: inputs of a step. 0: as many voxels as the plan's batch, up to 32 inputs. Source: the plan. 32 is
            PCRLv2's batch on LUNA.
        balanced: draw classes, or a label's positives and negatives, equally often. Source: ours.
    """

    table: Literal["", "classes", "candidates"] = ""
    patch_mm: float = number(40.0, above=0)
    jitter_mm: float = number(4.0, at_least=0)
    batch_size: int = number(0, at_least=0)
    balanced: bool = True

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> ClassifySettings:
        """Return the settings: defaults, then the plan's ``pcrl.classify``."""
        return replaced(cls(), "pcrl.classify", part(pcrl_block(plan), "classify", "pcrl."))
