"""The outcome of loading pretrained weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("loaded", "adapted", "skipped", "random")
NOT_PRETRAINED = "nothing pretrained is loaded for them"


@dataclass
class TransferReport:
    """The outcome for every tensor, as its name and its number of elements.

    State dicts of nnU-Net's networks name most tensors several times (``decoder.encoder.*``, ``all_modules.*``). A
    tensor is reported and counted once, under its first name.
    """

    loaded: dict[str, int] = field(default_factory=dict)  # unchanged from the checkpoint
    adapted: dict[str, int] = field(default_factory=dict)  # to other input channels or another kernel size
    skipped: dict[str, int] = field(default_factory=dict)  # pretrained but not used
    random: dict[str, int] = field(default_factory=dict)  # keeps its random initialisation
    notes: dict[str, str] = field(default_factory=dict)  # the adaptation, or the reason for skipping

    @property
    def encoder_share(self) -> float:
        """The pretrained share of the encoder's parameters, from 0 to 1."""
        return self._share("encoder.")

    @property
    def decoder_share(self) -> float:
        """The pretrained share of the decoder's parameters, from 0 to 1."""
        return self._share("decoder.")

    def move(self, name: str, kind: str, note: str = "") -> None:
        """Move a tensor of the network from `random` to another kind."""
        getattr(self, kind)[name] = self.random.pop(name)
        self.skipped.pop(name, None)
        if note:
            self.notes[name] = note

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for transfer.json."""
        totals = {kind: {"tensors": len(tensors), "elements": sum(tensors.values())} for kind, tensors in self._kinds()}
        shares = {"encoder_share": self.encoder_share, "decoder_share": self.decoder_share}
        return {"totals": totals, **asdict(self), **shares}

    def rows(self) -> list[tuple[str, str, int, str]]:
        """Return a row for each tensor, sorted by kind: name, kind, number of elements, note."""
        return [
            (name, kind, size, self.notes.get(name, NOT_PRETRAINED if kind == "random" else ""))
            for kind, tensors in self._kinds()
            for name, size in tensors.items()
        ]

    def summary(self, notes: bool = True) -> str:
        """Return a line with the total of each kind, and the notes."""
        lines = [f"{self.encoder_share:.1%} of the encoder's parameters are pretrained"]
        if self.decoder_share:
            lines.append(f"{self.decoder_share:.1%} of the decoder's parameters are pretrained")
        lines += [f"  {kind:8} {_count(tensors)}" for kind, tensors in self._kinds() if kind != "random"]
        of_encoder = {name: size for name, size in self.random.items() if name.startswith("encoder.")}
        of_decoder = {name: size for name, size in self.random.items() if name not in of_encoder}
        if of_encoder:
            lines.append(f"  random   {_count(of_encoder)}, of the encoder: the checkpoint has none that fit")
        lines.append(f"  random   {_count(of_decoder)}, of nnU-Net's decoder: {NOT_PRETRAINED}")
        return "\n".join([*lines, *(f"  {name}: {note}" for name, note in self.notes.items() if notes)])

    def _share(self, part: str) -> float:
        sizes = {
            kind: sum(size for name, size in tensors.items() if name.startswith(part))
            for kind, tensors in self._kinds()
        }
        pretrained = sizes["loaded"] + sizes["adapted"]
        return pretrained / max(1, pretrained + sizes["random"])

    def _kinds(self) -> Iterator[tuple[str, dict[str, int]]]:
        return ((kind, getattr(self, kind)) for kind in KINDS)


def origin(content: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Return some entries of a checkpoint in words, such as "method mae, datasets Dataset004_Hippocampus"."""
    values = {key: content[key] for key in keys}
    return ", ".join(f"{key} {' + '.join(v) if isinstance(v, (list, tuple)) else v}" for key, v in values.items())


def _count(tensors: Mapping[str, int]) -> str:
    return f"{len(tensors):4} tensors, {sum(tensors.values()):12,} parameters"
