"""Settings: frozen dataclasses, and the one rule that takes a plan to view sizes and batch.

Everything has a default derived from the plan. A plan may carry a ``pcrl`` block that overrides it::

    "pcrl": {"pretrain": {"epochs": 240, ..., "views": {"3d_fullres": {"num_local": 6, ...}}},
             "finetune": {"epochs": 1000, ...},
             "classify": {"patch_mm": 40, ...},
             "checkpoint": "/path/to/checkpoint_final.pth"}

Sizes are in voxels of the preprocessed image, axes in nnU-Net's order (the first one has the largest spacing).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar

from pcrl_nnunet.errors import UserError

MAX_CROP_TO_INPUT = 1.75  # paper, 3D: crops of up to 112 voxels are resized to 64
MAX_CROP_TO_INPUT_THROUGH_PLANE = 3.0  # and of up to 96 slices to 32
LOCAL_CROP_TO_GLOBAL_INPUT = (1 / 8, 1 / 4, 3 / 8, 1 / 2)  # paper, 3D: 8 to 32 voxels against 64
LOCAL_INPUT_TO_GLOBAL_INPUT = 1 / 4  # 16 against 64
NUM_GLOBAL_CROP_SIZES = 4
DEFAULT_MIN_PAIRS = 8
MIN_BOTTLENECK_VOXELS = 3  # InstanceNorm turns one voxel into 0, and two into +-1
MIN_PAIRS = 4  # BatchNorm of the comparison heads on 2 samples maps every feature to +-1
ADAMW_LR = 1e-3
MAX_PAIRS = {2: 256, 3: 32}  # the paper's batches
PARTS = ("pretrain", "finetune", "classify", "checkpoint")  # of a plan's block

Size = tuple[int, ...]


@dataclass(frozen=True)
class Views:
    """Sizes of the views, 3-tuples or, for a 2d configuration, 2-tuples of voxels; spacing in mm."""

    global_crop_sizes: tuple[Size, ...]
    local_crop_sizes: tuple[Size, ...]
    global_input_size: Size
    local_input_size: Size
    spacing: tuple[float, ...]
    num_local: int = 6
    min_iou: float = 0.3
    crops: Literal["sub_crop", "multi_crop"] = "sub_crop"  # multi_crop: the paper's other way, in 2D and Table 3
    pairs_per_read: int = 1  # more save reading on slow disks, and make a batch's pairs come from fewer places

    def __post_init__(self) -> None:
        dim = len(self.spacing)
        if not all(isinstance(s, (int, float)) and math.isfinite(s) and s > 0 for s in self.spacing):
            raise UserError(f"views.spacing is {self.spacing}; expected a number of mm above 0 for each axis")
        for name in ("global_crop_sizes", "local_crop_sizes"):
            given = getattr(self, name)
            if not given or not all(_is_size(size, dim) for size in given):
                raise UserError(f"views.{name} is {given}; expected sizes of {dim} positive numbers of voxels each")
            object.__setattr__(self, name, tuple(tuple(size) for size in given))
        for name in ("global_input_size", "local_input_size"):
            given = getattr(self, name)
            if not _is_size(given, dim):
                raise UserError(f"views.{name} is {given}; expected {dim} positive numbers of voxels")
            object.__setattr__(self, name, tuple(given))
        if self.num_local < 0:
            raise UserError(f"views.num_local is {self.num_local}; expected 0 or more")
        if not 0 <= self.min_iou < 1:
            raise UserError(f"views.min_iou is {self.min_iou}; expected a number from 0 to below 1")
        if self.crops not in ("sub_crop", "multi_crop"):
            raise UserError(f"views.crops is '{self.crops}'; expected 'sub_crop' or 'multi_crop'")
        if self.pairs_per_read < 1:
            raise UserError(f"views.pairs_per_read is {self.pairs_per_read}; expected 1 or more")

    @property
    def voxels_per_pair(self) -> int:
        """Voxels that the network sees for one sample: two global and all local views."""
        return 2 * math.prod(self.global_input_size) + self.num_local * math.prod(self.local_input_size)


def _are_levels(given: Any) -> bool:
    """Whether it is [restored from, compared], each a level or None, and not both of them None."""
    return (
        isinstance(given, (list, tuple))
        and len(given) == 2
        and all(level is None or (type(level) is int and level >= 0) for level in given)
        and any(level is not None for level in given)
    )


def _is_size(given: Any, dim: int) -> bool:
    return (
        isinstance(given, (list, tuple))
        and len(given) == dim
        and all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in given)
    )


@dataclass(frozen=True)
class Augmentation:
    """Strengths of the views' augmentation (method.md 2, "Augmentations"); 0 everywhere is the identity."""

    p_flip: float = 0.5  # an axis
    rotation_degrees: float = 10.0  # about every axis, in mm; in the plane for 2D
    scale: float = 0.1
    p_noise: float = 0.5
    noise_sd: float = 0.25  # of z-scored intensities
    p_blur: float = 0.5
    blur_sigma: float = 2.0  # voxels of the preprocessed image
    p_gamma: float = 0.5
    gamma: float = 0.3  # exponent exp(U(-gamma, gamma)) on the range-normalised image
    p_swap: float = 0.5  # global views only
    swap_blocks: int = 100  # the authors' code: 100 swaps of 8x4x4 in 64x64x32
    swap_size: float = 0.1  # of the global input an axis: about the authors' share of the volume
    p_grey: float = 0.5  # 2D only
    grey: float = 0.4  # brightness and contrast factors 1 +- this; the authors' ColorJitter
    p_cutout: float = 0.5  # 2D only, global views only
    cutout_holes: int = 3
    cutout_size: float = 1 / 7  # of the global input an axis: the authors' 32 of 224

    def __post_init__(self) -> None:
        below_1 = ("scale", "swap_size", "grey", "cutout_size")
        for name, value in asdict(self).items():
            if value < 0 or (value > 1 and name.startswith("p_")) or (value >= 1 and name in below_1):
                raise UserError(f"pcrl.pretrain.augmentation.{name} is {value}; it is out of its range")


@dataclass(frozen=True)
class PretrainSettings:
    """One pretraining. A step sees `batch_size` pairs; an epoch has `iters_per_epoch` steps."""

    views: Views
    batch_size: int
    epochs: int = 240
    iters_per_epoch: int = 250
    seed: int = 0
    restoration: Literal["single", "full"] = "single"
    levels: tuple[tuple[int | None, int | None], ...] = ()  # drawn ones: [restored from, compared]; empty: all, alike
    comparison: Literal["pairwise", "cross_scale"] = "pairwise"
    comparison_weight: float = 1.0  # against the restoration: the paper's
    skip_connections: bool = False
    optimizer: Literal["sgd", "adamw"] = "sgd"
    initial_lr: float = 0.03  # hippocampus in 2D, 200 steps: error 0.58 of the variance; 0.65 and less rank at 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    augmentation: Augmentation = Augmentation()
    probe_every: int = 0  # epochs between two linear probes, which take labels; 0: none

    def __post_init__(self) -> None:
        if self.batch_size < MIN_PAIRS:
            raise UserError(
                f"batch_size is {self.batch_size}; the comparison heads' batch normalisation needs at least "
                f"{MIN_PAIRS} pairs: raise -batch_size, or make the views smaller under pcrl.pretrain.views in the plan"
            )
        for name in ("epochs", "iters_per_epoch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if self.probe_every < 0:
            raise UserError(f"probe_every is {self.probe_every}; expected a number of epochs, or 0 for no probe")
        if self.initial_lr <= 0 or not 0 <= self.momentum < 1 or self.weight_decay < 0 or self.seed < 0:
            raise UserError(
                f"initial_lr {self.initial_lr}, momentum {self.momentum}, weight_decay {self.weight_decay}, seed "
                f"{self.seed}: expected a rate above 0, a momentum from 0 to below 1, and no negative number"
            )
        if self.comparison_weight <= 0:
            raise UserError(
                f"pcrl.pretrain.comparison_weight is {self.comparison_weight}; expected a number above 0 (to leave the "
                f"comparison out, set levels to [[1, null], [2, null], ...] and views to num_local 0)"
            )
        choices = {"restoration": ("single", "full"), "comparison": ("pairwise", "cross_scale")}
        for name, known in {**choices, "optimizer": ("sgd", "adamw")}.items():
            if getattr(self, name) not in known:
                given = getattr(self, name)
                raise UserError(f"pcrl.pretrain.{name} is '{given}'; expected '{known[0]}' or '{known[1]}'")
        for drawn in self.levels:
            if not _are_levels(drawn):
                raise UserError(
                    f"pcrl.pretrain.levels has {drawn!r}; expected pairs of the level to restore from and that to "
                    f"compare, such as [1, 1], with null for none"
                )
        object.__setattr__(self, "levels", tuple(tuple(drawn) for drawn in self.levels))

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the log and the checkpoint."""
        return asdict(self)


def without_probe(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A pretraining's settings as plain values, less what its weights do not depend on."""
    return {name: value for name, value in settings.items() if name != "probe_every"}


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
        return _with(cls(**(defaults or {})), "pcrl.finetune", _part(pcrl_block(plan), "finetune", "pcrl."))

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
        return _with(cls(), "pcrl.classify", _part(pcrl_block(plan), "classify", "pcrl."))


def pcrl_block(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan's ``pcrl`` block, empty where there is none; `UserError` for a part that it does not have."""
    block = _part(plan, "pcrl")
    for name in block.keys() - {*PARTS}:
        raise UserError(f"pcrl.{name} is no part of the plan's settings; expected {', '.join(PARTS)}: correct its name")
    named = block.get("checkpoint")
    if named is not None and not isinstance(named, str):
        raise UserError(f"pcrl.checkpoint is {named!r}; expected the path of a checkpoint_final.pth")
    return block


def without_settings(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The plan less our block: what preprocessing and network depend on."""
    return {key: value for key, value in plan.items() if key != "pcrl"}


def _part(settings: Mapping[str, Any], name: str, where: str = "") -> dict[str, Any]:
    """A copy of a block of settings, empty where there is none."""
    given = settings.get(name, {})
    if not isinstance(given, Mapping):
        raise UserError(f'{where}{name} is {given!r}; expected a block of settings: {{"NAME": VALUE, ...}}')
    return dict(given)


_Settings = TypeVar("_Settings", FinetuneSettings, ClassifySettings, PretrainSettings, Views, Augmentation)


def _with(settings: _Settings, where: str, given: Mapping[str, Any]) -> _Settings:
    """`settings` with the given fields replaced; a name or a type that it does not have is the user's error."""
    known = {f.name for f in fields(settings)}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"{where}.{name} is not a setting; expected one of {', '.join(sorted(known))}")
        default = getattr(settings, name)
        wanted = (int, float) if isinstance(default, float) else type(default)
        sequence = isinstance(default, tuple) and isinstance(value, (list, tuple))
        if not sequence and (not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool)):
            raise UserError(f"{where}.{name} is {value!r}; expected a value like {default!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}.{name} is {value}; expected a finite number")
    return replace(settings, **given)


def pretrain_settings(
    plan: Mapping[str, Any], name: str, configuration: Mapping[str, Any], **overrides: Any
) -> PretrainSettings:
    """Effective settings: defaults derived from the plan, then its ``pcrl.pretrain`` part, then overrides.

    Args:
        plan: nnU-Net's plan.
        name: of the configuration, such as 3d_fullres.
        configuration: what nnU-Net's `ConfigurationManager` holds for it (inheritance resolved).
        overrides: fields of `PretrainSettings`; None means not given.
    """
    strides = configuration["architecture"]["arch_kwargs"].get("strides")
    if strides is None:
        raise UserError(
            f"the network {configuration['architecture']['network_class_name']} of {name} has no strided stages; "
            f"expected a PlainConvUNet or ResidualEncoderUNet: choose another plan with -p"
        )
    given = _part(pcrl_block(plan), "pretrain", "pcrl.")
    views_by_configuration = _part(given, "views", "pcrl.pretrain.")
    for other in views_by_configuration.keys() - plan["configurations"].keys():
        raise UserError(
            f"pcrl.pretrain.views.{other} is for no configuration of the plan; expected one of "
            f"{', '.join(plan['configurations'])}, with the sizes in it"
        )
    given_views = _part(views_by_configuration, name, "pcrl.pretrain.views.")
    given_augmentation = _part(given, "augmentation", "pcrl.pretrain.")
    given = {key: value for key, value in given.items() if key not in ("views", "augmentation")}
    views, batch_size = configure_views(
        patch_size=configuration["patch_size"],
        batch_size=configuration["batch_size"],
        strides=strides,
        median_size=configuration["median_image_size_in_voxels"],
        spacing=configuration["spacing"],
    )
    # of this configuration: the other ones' views have other sizes
    given_batch = given_views.pop("batch_size", None)
    if given_batch is not None and (not isinstance(given_batch, int) or isinstance(given_batch, bool)):
        raise UserError(f"pcrl.pretrain.views.{name}.batch_size is {given_batch!r}; expected a number of pairs")
    if given_views:
        views = _with(views, f"pcrl.pretrain.views.{name}", given_views)
        batch_size = _fitting_pairs(configuration["patch_size"], configuration["batch_size"], views)
    check_views(views, strides)
    settings = PretrainSettings(
        views=views,
        batch_size=given_batch or max(batch_size, DEFAULT_MIN_PAIRS),
        augmentation=_with(Augmentation(), "pcrl.pretrain.augmentation", given_augmentation),
    )
    given.update({key: value for key, value in overrides.items() if value is not None})
    if given.get("optimizer") == "adamw":
        given.setdefault("initial_lr", ADAMW_LR)
    return _with(settings, "pcrl.pretrain", given)


def configure_views(
    patch_size: Sequence[int],
    batch_size: int,
    strides: Sequence[Sequence[int]],
    median_size: Sequence[float],
    spacing: Sequence[float],
) -> tuple[Views, int]:
    """View sizes and number of pairs for a plan, with the ratios of the paper's sizes (method.md 2).

    1. The largest global crop an axis is 1.75 times the patch, but no more than the median image.
    2. The global input is that over 1.75, rounded to a multiple of the encoder's total stride.
    3. While fewer than 8 pairs fit into the plan's own voxel budget (patch x batch), the axis of the input that stays
       the largest in relation to the patch shrinks by one total stride: views shrink before the batch does, and keep
       the patch's proportions.
    4. Crops reach from 1 to 1.75 times the input within the median image; through the planes (the first axis in 3D),
       where that is the shorter one, to 3 times.
    5. Local crops are 1/8 to 1/2 of the global input, the local input 1/4 (through the planes up to twice these), and
       the input at least one voxel more than the total stride: at least 3 voxels remain for InstanceNorm at the
       bottleneck, of which 2 would be +1 and -1 whatever they were. That can make the input larger than 1/4; no crop
       is magnified more than the paper's smallest, 2 times.

    Returns:
        views, and the number of pairs that fit, 8 to 32 (2D: to 256).
    """
    total = [math.prod(stride[axis] for stride in strides) for axis in range(len(patch_size))]
    reach = [max(1, math.floor(min(MAX_CROP_TO_INPUT * p, m))) for p, m in zip(patch_size, median_size, strict=True)]
    size = [max(1, math.floor(r / MAX_CROP_TO_INPUT / t + 0.5)) * t for r, t in zip(reach, total, strict=True)]
    while _bottleneck_voxels(_views(size, reach, total, spacing).local_input_size, total) < MIN_BOTTLENECK_VOXELS:
        smallest = min((a for a, t in enumerate(total) if t > 1), key=lambda a: size[a] / patch_size[a])
        size = _changed(size, smallest, total[smallest])
    views = _views(size, reach, total, spacing)
    while _fitting_pairs(patch_size, batch_size, views) < DEFAULT_MIN_PAIRS:
        smaller = {a: _changed(size, a, -t) for a, t in enumerate(total) if size[a] > t}
        fine = [
            a
            for a, s in smaller.items()
            if _bottleneck_voxels(_views(s, reach, total, spacing).local_input_size, total) >= MIN_BOTTLENECK_VOXELS
        ]
        if not fine:
            break
        # max() takes the first of equals: nnU-Net's first axis is the one with the largest spacing
        size = smaller[max(fine, key=lambda a: smaller[a][a] / patch_size[a])]
        views = _views(size, reach, total, spacing)
    return views, max(DEFAULT_MIN_PAIRS, _fitting_pairs(patch_size, batch_size, views))


def _views(size: Sequence[int], reach: Sequence[int], total: Sequence[int], spacing: Sequence[float]) -> Views:
    # how much longer the longest axis is, of the axis through the planes; in the plane shapes keep their proportions
    longer = [max(size) / s if axis == 0 and len(size) == 3 else 1.0 for axis, s in enumerate(size)]
    largest = [
        min(r, round(s * min(MAX_CROP_TO_INPUT_THROUGH_PLANE, MAX_CROP_TO_INPUT * k)))
        for r, s, k in zip(reach, size, longer, strict=True)
    ]
    # where the images end below 1.75 x the input, smaller crops keep the pairs from being one and the same box
    smallest = [max(1, min(s, round(big / MAX_CROP_TO_INPUT))) for s, big in zip(size, largest, strict=True)]
    shares = [i / (NUM_GLOBAL_CROP_SIZES - 1) for i in range(NUM_GLOBAL_CROP_SIZES)]
    global_crops = [
        tuple(round(lo * (hi / lo) ** share) for lo, hi in zip(smallest, largest, strict=True)) for share in shares
    ]
    longer = [min(2.0, k) for k in longer]
    local_input = tuple(
        min(s, max(t + 1 if t > 1 else 1, round(s * min(1.0, LOCAL_INPUT_TO_GLOBAL_INPUT * k))))
        for s, t, k in zip(size, total, longer, strict=True)
    )
    local_crops = [
        tuple(
            max(1, min(lo, max(math.ceil(i / 2), round(s * min(1.0, share * k)))))
            for lo, i, s, k in zip(smallest, local_input, size, longer, strict=True)
        )
        for share in LOCAL_CROP_TO_GLOBAL_INPUT
    ]
    return Views(
        global_crop_sizes=tuple(dict.fromkeys(global_crops)),
        local_crop_sizes=tuple(dict.fromkeys(local_crops)),
        global_input_size=tuple(size),
        local_input_size=local_input,
        spacing=tuple(float(s) for s in spacing),
    )


def check_views(views: Views, strides: Sequence[Sequence[int]]) -> None:
    """Raises `UserError` where InstanceNorm would see fewer than three voxels at the bottleneck.

    It turns one into 0, and two into +-1 times a constant, whatever they were.
    """
    total = [math.prod(stride[axis] for stride in strides) for axis in range(len(views.spacing))]
    for name in ("global_input_size", "local_input_size"):
        size = getattr(views, name)
        left = _bottleneck_voxels(size, total)
        if left < MIN_BOTTLENECK_VOXELS:
            raise UserError(
                f"views.{name} {size} leaves {left} voxel{'s' * (left > 1)} at the bottleneck of an encoder with total "
                f"stride {tuple(total)}, of which normalisation leaves nothing; at least {MIN_BOTTLENECK_VOXELS} are "
                f"needed: raise it above the total stride on more axes"
            )


def _changed(size: Sequence[int], axis: int, by: int) -> list[int]:
    return [s + by if i == axis else s for i, s in enumerate(size)]


def _bottleneck_voxels(size: Sequence[int], total: Sequence[int]) -> int:
    return math.prod(math.ceil(s / t) for s, t in zip(size, total, strict=True))


def _fitting_pairs(patch_size: Sequence[int], batch_size: int, views: Views) -> int:
    budget = math.prod(patch_size) * batch_size
    return min(budget // views.voxels_per_pair, MAX_PAIRS[len(patch_size)])
