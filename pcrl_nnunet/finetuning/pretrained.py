"""The pretrained weights of a fine-tuning: search, loading and report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunetv2.paths import nnUNet_results
from torch import nn

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.commands import command
from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.plans import resolve
from pcrl_nnunet.settings import pcrl_block
from pcrl_nnunet.transfer import find
from pcrl_nnunet.transfer.differences import differences, notes_on
from pcrl_nnunet.transfer.foreign import read_encoder
from pcrl_nnunet.transfer.report import TransferReport, origin
from pcrl_nnunet.transfer.shapes import check_architecture
from pcrl_nnunet.transfer.weights import load_encoder, load_own_decoder, load_trained_decoder, trained_decoder

ORIGIN = ("method", "datasets", "configuration", "fold", "epochs")


@dataclass(frozen=True)
class Pretraining:
    """The pretraining that a fine-tuning needs.

    Attributes:
        folder: nnUNet_preprocessed/DatasetXXX_NAME.
        method: use this method's pretraining; None: the only pretraining.
        trainer: name of the trainer that uses the only pretraining; with _METHOD appended it uses a method's.
        control: name of the trainer without pretraining.
    """

    plan: Mapping[str, Any]
    configuration: str
    fold: int | str
    folder: str
    method: str | None
    trainer: str
    control: str

    def find(self) -> str:
        """Return the plan's checkpoint, else this dataset's own pretraining.

        Raises:
            UserError: neither exists, or there are pretrainings of several methods.
        """
        named = pcrl_block(self.plan).get("checkpoint")
        if named is not None:
            path = os.path.join(self.folder, os.path.expanduser(named))
            if os.path.isfile(path):
                return path
            raise UserError(
                f"the plan's pcrl.checkpoint {path} does not exist; correct it in {self.plan['plans_name']}.json, or "
                f"remove it there to use this dataset's own pretraining"
            )
        for configuration in self._configurations():
            found = find.pretrained(*self._place(configuration), self.method)
            if len(found) > 1:
                choices = " or ".join(f"-tr {self.trainer}_{method} for {path}" for method, path in found.items())
                raise UserError(f"there are pretrainings of {len(found)} methods for fold {self.fold}; give {choices}")
            if found:
                return next(iter(found.values()))
        raise UserError(self._none_found())

    def command(self) -> str:
        """Return the command that pretrains for the plan."""
        return command(
            "pcrl_nnunet_pretrain",
            d=self.plan["dataset_name"],
            p=self.plan["plans_name"],
            c=self._configurations()[-1],
            method=self.method,
        )

    def _configurations(self) -> list[str]:
        """Return the configuration. For a cascade add the configuration with the same network and unlabelled input."""
        cascade = resolve(self.plan, self.configuration).get("previous_stage") is not None
        images = self.plan["configurations"][self.configuration].get("inherits_from", "3d_fullres")
        return [self.configuration, images] if cascade else [self.configuration]

    def _place(self, configuration: str) -> tuple[str, str, str, int | str]:
        results = os.path.join(nnUNet_results.get(), self.plan["dataset_name"])
        return results, self.plan["plans_name"], configuration, self.fold

    def _none_found(self) -> str:
        places = [self._place(configuration) for configuration in self._configurations()]
        tried = [path for place in places for path in find.candidates(*place, self.method or "*")]
        states = [state for place in places for state in find.unfinished(*place, self.method)]
        unfinished = "".join(f" (that pretraining is not finished: {state})" for state in states)
        others = [method for place in places for method in find.pretrained(*place)] if self.method else []
        take = "".join(f"take -tr {self.trainer}_{method}, or " for method in dict.fromkeys(others))
        return (
            f"no pretrained encoder for fold {self.fold} was found: the plan names no pcrl.checkpoint, and there is no "
            f"{', no '.join(tried)}{unfinished}; {take}run {self.command()}, or train without: -tr {self.control}"
        )


def warning_of_newer(path: str) -> str | None:
    """Return a warning if a newer, unfinished pretraining lies beside a finished one."""
    newer = os.path.join(os.path.dirname(path), checkpoint_file.LATEST)
    if os.path.isfile(newer) and os.path.getmtime(newer) > os.path.getmtime(path):
        return f"WARNING: {path} is of an earlier pretraining; a newer one is not finished: {newer}"
    return None


@dataclass(frozen=True)
class Loaded:
    """Pretrained weights in a network.

    Attributes:
        content: plain values for transfer.json.
        text: the same content for the log.
    """

    checkpoint: Mapping[str, Any]
    report: TransferReport
    content: dict[str, Any]
    text: str


def load(network: nn.Module, path: str, wanted: Pretraining, settings: FinetuneSettings, label_channels: int) -> Loaded:
    """Load the pretrained encoder, and the decoder if the method trained it.

    Args:
        network: the plan's network, changed in place; may be compiled or wrapped by DDP.
        path: path of the checkpoint.
        label_channels: number of input channels that hold a cascade's labels.

    Raises:
        UserError: the checkpoint cannot be read or does not fit.
    """
    checkpoint, partial = read_encoder(path), settings.allow_partial_encoder
    try:
        check_architecture(checkpoint, wanted.plan, wanted.configuration, wanted.folder, partial)
        report = load_encoder(network, checkpoint, label_channels, partial, settings.input_channels)
    except UserError as error:
        raise UserError(f"{path}: {error}; or pretrain with this plan: {wanted.command()}") from error
    if settings.encoder_lr_factor == 0 and (label_channels or report.encoder_share < 1):
        left = "weights of the cascade's labels at zero" if label_channels else "random weights"
        raise UserError(
            f"pcrl.finetune.encoder_lr_factor is 0, but an encoder from {path} has {left} that would never learn; "
            f"set a factor above 0, or frozen_epochs instead"
        )
    load_trained_decoder(network, checkpoint, report)
    if settings.load_decoder:
        load_own_decoder(network, checkpoint, report)
    content = {
        "checkpoint": path,
        **{key: checkpoint[key] for key in ORIGIN},
        "trained_by_method": ["encoder", *(["decoder"] if trained_decoder(checkpoint) else [])],
        "adapted": checkpoint.get("adapted"),  # by pcrl_nnunet_transfer
        **differences(checkpoint, wanted.plan, wanted.configuration),
    }
    return Loaded(checkpoint, report, content, _text(content, report))


def _text(content: Mapping[str, Any], report: TransferReport) -> str:
    trained = " and ".join(content["trained_by_method"])
    lines = [
        f"Pretrained {trained} {content['checkpoint']}",
        f"  {origin(content, ORIGIN)}",
        report.summary(),
    ]
    if content["adapted"]:
        lines.append(f"Adapted by pcrl_nnunet_transfer from {content['adapted']['checkpoint']}")
    return "\n".join([*lines, *notes_on(content)])
