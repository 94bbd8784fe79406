"""Loading of pretrained weights into a plan's network: the encoder, and a decoder that was pretrained with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.transfer.adapt import adapt_input_channels, adapt_kernel_size
from pcrl_nnunet.transfer.report import TransferReport

ALIASES = "decoder.encoder."  # nnU-Net's decoder holds the encoder a second time
HEADS = "decoder.seg_layers."  # depend on the labels, always random
OWN_NAMES = {"stages": "blocks", "transpconvs": "upsample"}  # nnU-Net's decoder, and `networks.Decoder`


def unwrap(network: nn.Module) -> nn.Module:
    """Return the plan's own network, without the wrappers of DDP and torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    if isinstance(network, OptimizedModule):
        network = network._orig_mod
    return network


def load_encoder(
    network: nn.Module,
    checkpoint: Mapping[str, Any],
    label_channels: int = 0,
    allow_partial: bool = False,
    input_channels: str = "repeat",
) -> TransferReport:
    """Copy the pretrained encoder into a network, in place. If it is refused, nothing is copied.

    Args:
        network: a plan's network, PlainConvUNet or ResidualEncoderUNet, 2D or 3D; may be compiled or wrapped by DDP.
        checkpoint: content of a file that `foreign.read_encoder` read.
        label_channels: number of the network's last input channels that hold a cascade's labels.
        allow_partial: accept a checkpoint that covers only a part of the encoder.
        input_channels: way to adapt the number of input channels, see `adapt_input_channels`.

        Raises:
            UserError: the encoder is not covered completely or not at all, or its weights are not finite.
    """
    plain: Any = unwrap(network)  # nnU-Net's networks have attributes that nn.Module lacks
    if not hasattr(plain, "key_to_encoder"):
        raise UserError(f"network {type(plain).__name__} names no encoder to load; choose another plan")
    prefixes = (f"{plain.key_to_encoder}.", f"{plain.key_to_stem}.")
    source = _pretrained(checkpoint)
    report = TransferReport()
    values: list[tuple[Tensor, Tensor]] = []
    used: set[str] = set()
    for names, tensor in _tensors(plain.state_dict(keep_vars=True)):
        name = names[0]
        report.random[name] = tensor.numel()
        if not any(n.startswith(prefixes) for n in names):
            continue
        given = next((source[n] for n in names if n in source), None)
        if given is None:
            report.notes[name] = "not in the checkpoint"
            continue
        used.update(names)
        value: Tensor = given
        how: list[str] = []
        if any(n.removesuffix(".weight") in plain.keys_to_in_proj for n in names):
            image = given[:, : checkpoint["num_input_channels"]]  # a cascade's label channels come after them
            value, how = _with_channels(image, given, tensor.shape[1], label_channels, input_channels)
        if value.ndim == tensor.ndim > 2 and value.shape[2:] != tensor.shape[2:]:
            how.append(f"kernel {_x(value.shape[2:])} made {_x(tensor.shape[2:])}")
            value = adapt_kernel_size(value, tensor.shape[2:])
        if value.shape != tensor.shape:
            report.skipped[name] = given.numel()
            report.notes[name] = f"{tuple(given.shape)} in the checkpoint, {tuple(tensor.shape)} in the network"
            continue
        values.append((tensor, value))
        report.move(name, "adapted" if how else "loaded", ", ".join(how))
    unused = {name: tensor for name, tensor in source.items() if name not in used and not _is_alias(name)}
    report.skipped.update({names[0]: tensor.numel() for names, tensor in _tensors(unused)})
    _refuse_uncovered(report, allow_partial)
    _copy(values)
    return report


def load_trained_decoder(network: nn.Module, checkpoint: Mapping[str, Any], report: TransferReport) -> None:
    """Copy the trained and fitting tensors of the plan's own decoder, in place, and record them in the report.

    ``random_keys`` name the tensors that the method did not train. Segmentation layers always stay random.
    """
    source = trained_decoder(checkpoint)
    _load_decoder(network, source, report, "transpconvs", lambda kind: kind)


def load_own_decoder(network: nn.Module, checkpoint: Mapping[str, Any], report: TransferReport) -> None:
    """Copy the method's own decoder, which is not the plan's, in place, and record it in the report.

    The decoder may lack skip connections. Then, in the first convolution of a stage, the channels of the up-sampled
    features get its weights, and the channels of the skip connection stay random.
    """
    source = checkpoint.get("method_weights", {})
    if not decoder_levels(source):
        if trained_decoder(checkpoint):
            return
        raise UserError(
            f"the checkpoint, of {checkpoint['method']}, has no decoder of a pretraining; set "
            f"pcrl.finetune.load_decoder to false in the plan"
        )
    _load_decoder(network, source, report, "upsample", OWN_NAMES.__getitem__)


def trained_decoder(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the plan's own decoder that the method trained, without the segmentation layers."""
    return {
        name: tensor
        for name, tensor in _pretrained(checkpoint).items()
        if name.startswith("decoder.") and not name.startswith((ALIASES, HEADS))
    }


def decoder_levels(weights: Iterable[str], kind: str = "upsample") -> int:
    """Count the levels of a decoder by the names of its weights.

    Args:
        kind: the part of the names that counts levels, ``transpconvs`` in nnU-Net's decoder.
    """
    return len({name.split(".")[2] for name in weights if name.startswith(f"decoder.{kind}.")})


def _load_decoder(
    network: nn.Module,
    source: Mapping[str, Tensor],
    report: TransferReport,
    levels_by: str,
    name_of: Callable[[str], str],
) -> None:
    plain: Any = unwrap(network)
    if not source or not hasattr(plain, "decoder"):  # a classifier
        return
    # both count from the deepest stage, and one side may be deeper: levels of the same resolution correspond
    deeper = decoder_levels(source, levels_by) - len(plain.decoder.transpconvs)
    values: list[tuple[Tensor, Tensor]] = []
    for names, tensor in _tensors(plain.decoder.state_dict(keep_vars=True)):
        name = f"decoder.{names[0]}"
        _, kind, number, rest = name.split(".", 3)
        if kind not in OWN_NAMES:
            continue
        given = source.get(f"decoder.{name_of(kind)}.{int(number) + deeper}.{rest}")
        if given is None or given.shape[:1] + given.shape[2:] != tensor.shape[:1] + tensor.shape[2:]:
            continue
        if given.shape[1:2] > tensor.shape[1:2]:
            continue
        values.append((tensor if given.ndim == 1 else tensor[:, : given.shape[1]], given))
        if given.shape == tensor.shape:
            report.move(name, "loaded")
        else:
            how = f"{given.shape[1]} of {tensor.shape[1]} input channels, the up-sampled features'"
            report.move(name, "adapted", how)
    _copy(values)


def _with_channels(
    image: Tensor, given: Tensor, channels: int, label_channels: int, how: str
) -> tuple[Tensor, list[str]]:
    """Return the first convolution for a number of input channels, with a note if it differs from `given`."""
    value = adapt_input_channels(image, channels, label_channels, how)
    if value.shape == given.shape and torch.equal(value, given):
        return value, []
    labels = f" and {label_channels} of labels, which get zero" * bool(label_channels)
    return value, [f"{image.shape[1]} input channels made {channels - label_channels}{labels}"]


def _refuse_uncovered(report: TransferReport, allow_partial: bool) -> None:
    """Raise `UserError` if no weights of the encoder are pretrained, or only some and that is not allowed."""
    missing = [name for name in report.random if name in report.notes]
    share = report.encoder_share
    if share > 0 and (allow_partial or not missing):
        return
    way_out = "set pcrl.finetune.allow_partial_encoder to true in the plan to train the rest from random weights"
    raise UserError(
        f"the checkpoint covers {share:.1%} of the encoder. The first difference is {missing[0]} "
        f"({report.notes[missing[0]]}); {way_out if share else 'take another checkpoint'}"
    )


def _copy(values: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy pairs of (tensor, value) if all values are finite, else raise `UserError`."""
    if not all(torch.isfinite(value).all() for _, value in values):
        raise UserError("the checkpoint has weights that are not finite numbers; take another one")
    with torch.no_grad():
        for tensor, value in values:
            tensor.copy_(value)


def _pretrained(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    random = set(checkpoint["random_keys"])
    return {name: tensor for name, tensor in checkpoint["network_weights"].items() if name not in random}


def _is_alias(name: str) -> bool:
    """Tell if this is a tensor's second name in nnU-Net's networks. Some files hold copies under such names."""
    return name.startswith(ALIASES) or ".all_modules." in name


def _tensors(state: Mapping[str, Tensor]) -> list[tuple[list[str], Tensor]]:
    """Return every tensor of a state dict once, with all its names."""
    names: dict[tuple[int, Sequence[int]], list[str]] = {}
    for name, tensor in state.items():
        names.setdefault((tensor.data_ptr(), tuple(tensor.shape)), []).append(name)
    return [(aliases, state[aliases[0]]) for aliases in names.values()]


def _x(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
