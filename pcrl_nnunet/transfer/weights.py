"""Pretrained encoder weights into the network of a plan, with a report of what became of every tensor.

State dicts of nnU-Net's networks name most tensors several times (``decoder.encoder.*``, ``all_modules.*``). Here a
tensor is reported and counted once, under the first of its names.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.copies import with_known_voxels
from pcrl_nnunet.named_plans import COPY_KEY

PRETRAINER = "PCRLPretrainTrainer"  # its name is part of the folder's, as with every trainer of nnU-Net
FITTED_KEY = "pcrl_fitted"  # of a plan that pcrl_nnunet_transfer wrote: the checkpoint that it is for
NOT_TO_CHOOSE = {FITTED_KEY, COPY_KEY, "pcrl_target"}
MOST_NAMED = 3
DECODER_NAMES = {"stages": "blocks", "transpconvs": "upsample"}  # of nnU-Net's, and of the pretraining's
DATA_KEYS = ("spacing", "patch_size", "normalization_schemes", "use_mask_for_norm")
LONG = "foreground_intensity_properties_per_channel"
DECODER_ONLY = ("n_conv_per_stage_decoder", "deep_supervision")  # settings of an architecture that the encoder lacks
NOT_PRETRAINED = "nothing pretrained is loaded for them"
UNKNOWN_CASES = (
    "WARNING: the checkpoint does not list the cases that it was trained on: whether validation cases were among them "
    "cannot be told"
)


@dataclass
class TransferReport:
    """The outcome for every tensor: its name and its number of elements, aliases counted once."""

    loaded: dict[str, int] = field(default_factory=dict)  # as it is in the checkpoint
    adapted: dict[str, int] = field(default_factory=dict)  # to other input channels or another kernel size
    skipped: dict[str, int] = field(default_factory=dict)  # pretrained, but not used
    random: dict[str, int] = field(default_factory=dict)  # of the network, stays as it was initialised
    notes: dict[str, str] = field(default_factory=dict)  # how it was adapted, why it was skipped
    encoder_share: float = 0.0  # of the encoder's elements that are pretrained, from 0 to 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for transfer.json."""
        totals = {kind: {"tensors": len(tensors), "elements": sum(tensors.values())} for kind, tensors in self._kinds()}
        return {"totals": totals, **asdict(self)}

    def rows(self) -> list[tuple[str, str, int, str]]:
        """Return a row a tensor: its name, kind, number of elements, how or why; in the order of the kinds."""
        return [
            (name, kind, size, self.notes.get(name, NOT_PRETRAINED if kind == "random" else ""))
            for kind, tensors in self._kinds()
            for name, size in tensors.items()
        ]

    def summary(self, notes: bool = True) -> str:
        """Return the totals, one line a kind, and the notes."""
        lines = [f"{self.encoder_share:.1%} of the encoder's parameters are pretrained"]
        lines += [f"  {kind:8} {_count(tensors)}" for kind, tensors in self._kinds() if kind != "random"]
        of_encoder = {name: size for name, size in self.random.items() if name.startswith("encoder.")}
        of_decoder = {name: size for name, size in self.random.items() if name not in of_encoder}
        if of_encoder:
            lines.append(f"  random   {_count(of_encoder)}, of the encoder: the checkpoint has none that fit")
        lines.append(f"  random   {_count(of_decoder)}, of nnU-Net's decoder: {NOT_PRETRAINED}")
        return "\n".join([*lines, *(f"  {name}: {note}" for name, note in self.notes.items() if notes)])

    def _kinds(self) -> Iterable[tuple[str, dict[str, int]]]:
        return ((kind, getattr(self, kind)) for kind in ("loaded", "adapted", "skipped", "random"))


def _count(tensors: Mapping[str, int]) -> str:
    return f"{len(tensors):4} tensors, {sum(tensors.values()):12,} parameters"


def unwrap(network: nn.Module) -> nn.Module:
    """The plan's own network, without what DDP and torch.compile have put around it."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    if isinstance(network, OptimizedModule):
        network = network._orig_mod
    return network


def candidates(results_folder: str, plans_name: str, configuration: str, fold: int | str) -> list[str]:
    """Where a finished pretraining may lie, best first: the fold's own, then `all`; never another fold's.

    Args:
        results_folder: ``nnUNet_results/DatasetXXX_NAME``.
    """
    folder = os.path.join(results_folder, f"{PRETRAINER}__{plans_name}__{configuration}")
    folds = dict.fromkeys((str(fold), "all"))
    return [os.path.join(folder, f"fold_{name}", checkpoint_file.FINAL) for name in folds]


@dataclass(frozen=True)
class EncoderShape:
    """What has to agree for weights to load: the kind of network, its dimensions, the widths of its stages."""

    network: str  # PlainConvUNet or ResidualEncoderUNet
    dimensions: int
    widths: tuple[int, ...]  # from full resolution to the bottleneck

    def __str__(self) -> str:
        return f"{self.network} in {self.dimensions}D with {', '.join(map(str, self.widths))} features"

    def loads_into(self, other: EncoderShape) -> bool:
        """Whether every stage that both have is alike; either may have more."""
        return (self.network, self.dimensions) == (other.network, other.dimensions) and all(
            ours == theirs for ours, theirs in zip(self.widths, other.widths, strict=False)
        )

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor]) -> EncoderShape | None:
        """Of a state dict with nnU-Net's names; None where it has no such encoder."""
        widths: dict[int, int] = {}
        residual, dimensions = False, 0
        for name, tensor in weights.items():
            match = re.match(r"encoder\.stages\.(\d+)\.", name)
            if match and tensor.ndim >= 4:
                widths[int(match[1])], dimensions = tensor.shape[0], tensor.ndim - 2
                residual |= ".blocks." in name
        network = "ResidualEncoderUNet" if residual else "PlainConvUNet"
        return cls(network, dimensions, tuple(widths[stage] for stage in sorted(widths))) if widths else None

    @classmethod
    def of_plan(cls, plans: Mapping[str, Any], configuration: str) -> EncoderShape | None:
        """Of a plan's network; None for one without stages, such as Primus."""
        architecture = PlansManager(dict(plans)).get_configuration(configuration).configuration["architecture"]
        widths = architecture["arch_kwargs"].get("features_per_stage")
        if widths is None:
            return None
        dimensions = len(architecture["arch_kwargs"]["strides"][0])
        return cls(architecture["network_class_name"].rsplit(".", 1)[-1], dimensions, tuple(widths))


def check_architecture(
    checkpoint: Mapping[str, Any],
    plans: Mapping[str, Any],
    configuration: str,
    folder: str,
    allow_partial: bool = False,
) -> None:
    """Raises `UserError` where a checkpoint's encoder cannot load into a plan's network, and says what it would fit.

    Args:
        checkpoint: what `checkpoint.read_encoder` read.
        folder: the dataset's preprocessed one, whose other plans are looked through for one that fits.
        allow_partial: other widths in some stages are no error.
    """
    random = set(checkpoint.get("random_keys", ()))
    pretrained = {name: tensor for name, tensor in checkpoint["network_weights"].items() if name not in random}
    theirs, ours = EncoderShape.of_weights(pretrained), EncoderShape.of_plan(plans, configuration)
    this = f"{configuration} of {plans['plans_name']}"
    if theirs is None:
        raise UserError(
            "the checkpoint has no encoder with stages of convolutions (encoder.stages.0...); expected one of a "
            "PlainConvUNet or ResidualEncoderUNet: take another checkpoint"
        )
    if ours is None:
        raise UserError(
            f"the network of {this} has no stages; expected a PlainConvUNet or ResidualEncoderUNet: choose another plan"
        )
    some_fits = (theirs.network, theirs.dimensions) == (ours.network, ours.dimensions) and allow_partial
    if theirs.loads_into(ours) or some_fits:
        return
    fitting = [
        shlex.join(["-c", name, "-p", plan])
        for plan, name, shape in _shapes_in(folder)
        if shape and theirs.loads_into(shape)
    ]
    would = f"none of the dataset's plans fits: it needs a {theirs}, at the stages that both have"
    if fitting:
        would = f"it would load into {' or '.join(fitting[:MOST_NAMED])}"
    raise UserError(f"the checkpoint is of a {theirs}, {this} of a {ours}; {would}")


def _shapes_in(folder: str) -> Iterator[tuple[str, str, EncoderShape | None]]:
    """Plan, configuration and encoder of a dataset's plans; not of those made for or by transfers, or of cascades."""
    for file in sorted(glob.glob(os.path.join(glob.escape(folder), "*.json"))):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
            with open(file, encoding="utf-8") as content:
                plans = json.load(content)
            for name, configuration in plans["configurations"].items():
                if not (plans.keys() & NOT_TO_CHOOSE or configuration.get("previous_stage")):
                    yield plans["plans_name"], name, EncoderShape.of_plan(plans, name)


def architecture_differences(
    checkpoint: Mapping[str, Any], network_class_name: str, arch_kwargs: Mapping[str, Any]
) -> list[str]:
    """What differs between the encoder of a checkpoint and that of a plan's configuration, one sentence part each.

    Weights do not show it all: a network with other strides takes them, and computes something else.
    """
    theirs = checkpoint["nnssl_adaptation_plan"].get("architecture_plans") or {}
    if theirs.get("arch_kwargs") is None:  # a preset of nnssl
        return [f"the checkpoint does not state its architecture, only a name: {theirs.get('arch_class_name')}"]
    pairs: dict[str, tuple[Any, Any]] = {"network": (theirs["arch_class_name"], network_class_name.rsplit(".", 1)[-1])}
    for name in sorted({*theirs["arch_kwargs"], *arch_kwargs} - {*DECODER_ONLY}):
        pairs[name] = (theirs["arch_kwargs"].get(name), arch_kwargs.get(name))
    differing = {name: (a, b) for name, (a, b) in pairs.items() if not same_setting(a, b)}
    return [f"{name}: {a} in the checkpoint, {b} in the plan" for name, (a, b) in differing.items()]


def data_differences(checkpoint: Mapping[str, Any], plans: Mapping[str, Any], configuration: str) -> list[str]:
    """What differs between the data that a checkpoint was pretrained on and a plan's, one sentence part each.

    Weights of the same shapes load all the same, but were trained on images of other voxels or other intensities.
    """
    ours, theirs, missing = dict(plans), checkpoint["plans"], []
    of_ours = PlansManager(ours).get_configuration(configuration).configuration
    pairs: dict[str, tuple[Any, Any]] = {}
    if theirs is None:  # of nnssl, which tells some of it
        stated = checkpoint["nnssl_adaptation_plan"].get("pretrain_plan") or {}
        of_theirs = (stated.get("configurations") or {}).get(checkpoint["configuration"]) or {}
        missing = [name for name in DATA_KEYS if of_theirs.get(name) is None]
    else:
        of_theirs = PlansManager(dict(theirs)).get_configuration(checkpoint["configuration"]).configuration
        for name in ("transpose_forward", LONG):
            pairs[name] = (theirs.get(name), ours.get(name))
    pairs |= {name: (of_theirs.get(name), of_ours.get(name)) for name in DATA_KEYS if name not in missing}
    differences = [
        f"{name}: different" if name == LONG else f"{name}: {a} in the checkpoint's plan, {b} in this one"
        for name, (a, b) in pairs.items()
        if not same_setting(a, b)
    ]
    return [*differences, *([f"the checkpoint does not state {', '.join(missing)}"] if missing else [])]


def load_encoder(
    network: nn.Module,
    checkpoint: Mapping[str, Any],
    label_channels: int = 0,
    allow_partial: bool = False,
    input_channels: str = "repeat",
) -> TransferReport:
    """Copy the pretrained encoder into a network, in place; nothing is copied when it is refused.

    Args:
        network: a plan's network, PlainConvUNet or ResidualEncoderUNet, 2D or 3D; may be compiled or wrapped by DDP.
        checkpoint: content of a file that `checkpoint.read_encoder` read.
        label_channels: how many of the network's input channels, the last ones, hold a cascade's labels.
        allow_partial: load what fits, where the checkpoint does not cover the encoder.
        input_channels: what becomes of other numbers of them, see `adapt_input_channels`.

    Raises:
        UserError: the encoder is not covered in full, or not at all, or its weights are not finite.
    """
    plain_network: Any = unwrap(network)  # nnU-Net's networks have attributes that nn.Module lacks
    if not hasattr(plain_network, "key_to_encoder"):
        raise UserError(f"network {type(plain_network).__name__} names no encoder to load; choose another plan")
    encoder_prefixes = (f"{plain_network.key_to_encoder}.", f"{plain_network.key_to_stem}.")
    random_keys = set(checkpoint["random_keys"])
    source = {name: tensor for name, tensor in checkpoint["network_weights"].items() if name not in random_keys}

    report = TransferReport()
    new_values: list[tuple[Tensor, Tensor]] = []
    encoder_size = 0
    used: set[str] = set()
    for names, tensor in _tensors(plain_network.state_dict(keep_vars=True)):
        name, size = names[0], tensor.numel()
        if not any(n.startswith(encoder_prefixes) for n in names):
            report.random[name] = size
            continue
        encoder_size += size
        given = next((source[n] for n in names if n in source), None)
        if given is None:
            report.random[name] = size
            report.notes[name] = "not in the checkpoint"
            continue
        used.update(names)
        value, how = given, []
        if any(n.removesuffix(".weight") in plain_network.keys_to_in_proj for n in names):
            image = given[:, : checkpoint["num_input_channels"]]  # a cascade's labels come after them
            value = adapt_input_channels(image, tensor.shape[1], label_channels, input_channels)
            if not (value.shape == given.shape and torch.equal(value, given)):
                labels = f" and {label_channels} of labels, which get zero" * bool(label_channels)
                how.append(f"{image.shape[1]} input channels made {tensor.shape[1] - label_channels}{labels}")
        if value.ndim == tensor.ndim > 2 and value.shape[2:] != tensor.shape[2:]:
            how.append(f"kernel {_x(value.shape[2:])} made {_x(tensor.shape[2:])}")
            value = adapt_kernel_size(value, tensor.shape[2:])
        if value.shape != tensor.shape:
            report.random[name] = size
            report.skipped[name] = given.numel()
            report.notes[name] = f"{tuple(given.shape)} in the checkpoint, {tuple(tensor.shape)} in the network"
            continue
        new_values.append((tensor, value))
        if how:
            report.adapted[name] = size
            report.notes[name] = ", ".join(how)
        else:
            report.loaded[name] = size
    unused = {name: tensor for name, tensor in source.items() if name not in used and not _is_alias(name)}
    report.skipped.update({names[0]: tensor.numel() for names, tensor in _tensors(unused)})
    covered = sum(report.loaded.values()) + sum(report.adapted.values())
    report.encoder_share = covered / encoder_size

    if covered == 0 or (covered < encoder_size and not allow_partial):
        first = next(name for name in report.random if name in report.notes)
        way_out = "set pcrl.finetune.allow_partial_encoder to true in the plan to train the rest from random weights"
        raise UserError(
            f"the checkpoint covers {report.encoder_share:.1%} of the encoder, the first difference being {first} "
            f"({report.notes[first]}); {way_out if covered else 'take another checkpoint'}"
        )
    if not all(torch.isfinite(value).all() for _, value in new_values):
        raise UserError("the checkpoint has weights that are not finite numbers; take another one")
    with torch.no_grad():
        for tensor, value in new_values:
            tensor.copy_(value)
    return report


def load_decoder(network: nn.Module, checkpoint: Mapping[str, Any], report: TransferReport) -> None:
    """Copy what fits of the pretraining's decoder into a network's, in place, and say so in the report.

    The pretraining's has no skip connections: of the first convolution of a stage, the part that sees the up-sampled
    features gets its weights, the part that sees the skip connection stays random.
    """
    plain_network: Any = unwrap(network)
    if "method_weights" not in checkpoint:
        raise UserError(
            f"the checkpoint, of {checkpoint['method']}, has no decoder of a pretraining; set "
            f"pcrl.finetune.load_decoder to false in the plan"
        )
    source = checkpoint["method_weights"]
    # both count from the deepest stage, of which there may be more on one side: what is alike is alike from above
    deeper = decoder_levels(source) - len(plain_network.decoder.transpconvs)
    for names, tensor in _tensors(plain_network.decoder.state_dict(keep_vars=True)):
        name = f"decoder.{names[0]}"
        _, kind, number, rest = name.split(".", 3)
        if kind not in DECODER_NAMES:
            continue
        given = source.get(f"decoder.{DECODER_NAMES[kind]}.{int(number) + deeper}.{rest}")
        if given is None or given.shape[:1] + given.shape[2:] != tensor.shape[:1] + tensor.shape[2:]:
            continue
        if given.shape[1:2] > tensor.shape[1:2]:
            continue
        with torch.no_grad():
            (tensor if given.ndim == 1 else tensor[:, : given.shape[1]]).copy_(given)
        size = report.random.pop(name)
        if given.shape == tensor.shape:
            report.loaded[name] = size
        else:
            report.adapted[name] = size
            report.notes[name] = f"{given.shape[1]} of {tensor.shape[1]} input channels, the up-sampled features'"


def decoder_levels(method_weights: Iterable[str]) -> int:
    """How many levels a pretraining's decoder has, by the names of its weights."""
    return len({name.split(".")[2] for name in method_weights if name.startswith("decoder.upsample.")})


def adapt_input_channels(weight: Tensor, channels: int, label_channels: int = 0, how: str = "repeat") -> Tensor:
    """The first convolution's weight for another number of input channels.

    Image channels, where their number changes:
    - ``repeat``: the response to identical channels stays the same, so that activations keep their scale. From one
      channel this is the usual "repeat and divide"; several have no counterparts in other data, so their sum is shared
      out.
    - ``first``: channel for channel as far as both go; further ones get zero.
    - ``mean``: every channel gets the mean.
    Channels of labels (a cascade's, after the image's) get zero: at first, the network sees the image alone.

    Args:
        weight: (out, C, *kernel)
        channels: of the result, those of labels included.

    Returns:
        (out, channels, *kernel); `weight` itself if nothing changes.
    """
    image_channels = channels - label_channels
    if weight.shape[1] != image_channels:
        if how == "first":
            missing = weight.new_zeros(len(weight), max(0, image_channels - weight.shape[1]), *weight.shape[2:])
            weight = torch.cat([weight[:, :image_channels], missing], dim=1)
        else:
            shared = weight.mean(1, keepdim=True) if how == "mean" else weight.sum(1, keepdim=True) / image_channels
            weight = shared.repeat_interleave(image_channels, dim=1)
    if label_channels:
        weight = torch.cat([weight, weight.new_zeros(len(weight), label_channels, *weight.shape[2:])], dim=1)
    return weight


def adapt_kernel_size(weight: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """A convolution's weight for another kernel size; sizes that are not both odd or both even stay.

    Along an axis that becomes longer, the weights stay in the middle, between zeros: the convolution is the same. Along
    one that becomes shorter, what is cut is added to the ends that remain: the response is the same wherever the image
    does not change along that axis. [3, 3, 3] to [1, 3, 3] is thus a sum over the first axis, and back from it exact.

    Args:
        weight: (out, in, *kernel)
        kernel_size: of the result.
    """
    for axis, size in enumerate(kernel_size, start=2):
        more, odd = divmod(size - weight.shape[axis], 2)
        if odd:
            continue
        if more > 0:
            zeros = weight.new_zeros(*weight.shape[:axis], more, *weight.shape[axis + 1 :])
            weight = torch.cat([zeros, weight, zeros], dim=axis)
        elif more < 0:
            before, kept, after = weight.split([-more, size, -more], dim=axis)
            weight = kept.clone()
            weight.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
            weight.narrow(axis, size - 1, 1).add_(after.sum(axis, keepdim=True))
    return weight


def _x(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def cases_seen(checkpoint: Mapping[str, Any], dataset_name: str, cases: Sequence[Case]) -> list[str]:
    """Name the cases of a dataset that the pretraining saw, under their own name or as a copy under another."""
    # paths are relative to nnUNet_preprocessed: the dataset's folder comes first
    names = {case["name"] for case in checkpoint["cases"] if PurePath(case["path"]).parts[0] == dataset_name}
    by_voxels = {case["sha256"]: case["name"] for case in checkpoint["cases"]}
    twins = with_known_voxels([case for case in cases if case.name not in names], by_voxels)
    named = {case: f"{case.name} (as {twin})" for case, twin in twins.items()}
    return [named.get(case, case.name) for case in cases if case.name in names or case in named]


def _is_alias(name: str) -> bool:
    """Under such names nnU-Net's networks have tensors of others again; in some files as copies."""
    return name.startswith("decoder.encoder.") or ".all_modules." in name


def _tensors(state: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Every tensor of a state dict once, with all of its names."""
    names: dict[tuple[int, Sequence[int]], list[str]] = {}
    for name, tensor in state.items():
        names.setdefault((tensor.data_ptr(), tuple(tensor.shape)), []).append(name)
    return [(aliases, state[aliases[0]]) for aliases in names.values()]


def same_setting(a: Any, b: Any) -> bool:
    """Whether two values of a plan are one setting, in whatever spelling.

    A single value is the same as a list that repeats it, as nnU-Net's networks take both; so are a tuple and a list, a
    class under its long and its short name, and nothing and no arguments.
    """
    a, b = _spelled(a), _spelled(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_setting(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_setting, a, b))
    if isinstance(a, list) or isinstance(b, list):
        several, single = (a, b) if isinstance(a, list) else (b, a)
        return bool(several) and all(same_setting(item, single) for item in several)
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-6)  # float32 and float64
    return bool(a == b)


def _spelled(value: Any) -> Any:
    """Return a value in one spelling, at its first level: list, dict, class, number, or None."""
    if isinstance(value, (Tensor, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()} or None
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, str) and (found := _class_of_torch(value)) is not None:
        return found
    return value


def _class_of_torch(name: str) -> Any:
    """Return what torch has under a dotted name; None for another name. No other package is imported."""
    root, *parts = name.split(".")
    found: Any = torch if root == "torch" and parts else None
    for part in parts:
        found = getattr(found, part, None)
    return found
