"""nnU-Net's training from a pretrained encoder, through nnU-Net's own `nnUNetv2_train`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.finetuning import pretrained
from pcrl_nnunet.finetuning.schedule import group_by_rate
from pcrl_nnunet.loading.cases import find_cases
from pcrl_nnunet.trainers.scratch import PCRLScratchTrainer
from pcrl_nnunet.transfer.seen import UNKNOWN_CASES, cases_seen
from pcrl_nnunet.transfer.weights import unwrap


class PCRLFinetuneTrainer(PCRLScratchTrainer):
    """nnU-Net's training of the plan's network, starting from a pretrained encoder.

    A training loads the pretrained weights at its start. It does not load them when it continues (``--c``), for
    ``--val``, or if nnU-Net has loaded other weights (``-pretrained_weights``). The weights come from the plan's
    ``pcrl.checkpoint``, or from this dataset's own finished pretraining for the same plan and configuration. Without
    any pretraining, or with pretrainings of several methods, the training ends with an error.
    ``PCRLFinetuneTrainer_METHOD`` uses a method's pretraining.
    The encoder may have its own rate (``encoder_lr_factor``, ``layer_lr_decay``) or be frozen (a factor of 0, or
    ``frozen_epochs``). The first epochs may train only the segmentation layers (``seg_layers_only_epochs``).
    Overrides, besides `PCRLScratchTrainer`'s: initialize, on_train_epoch_start.
    """

    method: str | None = None  # set in a class that `pcrl_nnunet.trainers` makes by its name
    of_any_method = "PCRLFinetuneTrainer"
    control: type[PCRLScratchTrainer] = PCRLScratchTrainer  # the same training without pretrained weights
    for_classification = "PCRLClassificationTrainer"

    _continues = False
    _weights_at_start = ""

    def initialize(self) -> None:
        """Store the random weights, to detect ``-pretrained_weights``, which nnU-Net does not report."""
        with self._or_nothing_left_behind():
            super().initialize()
        self._weights_at_start = self._weights_hash()

    def configure_optimizers(self) -> tuple[Optimizer, LRScheduler]:
        """Return the optimiser with a group for each factor of the rate, and its schedule."""
        optimizer, schedule = super().configure_optimizers()
        settings = self.settings
        epochs = settings.frozen_epochs or settings.seg_layers_only_epochs
        if epochs or (settings.encoder_lr_factor, settings.layer_lr_decay) != (1, 1):
            group_by_rate(optimizer, unwrap(self.network), settings)
            schedule.step(0)  # its first step was for a single group
        return optimizer, schedule

    def on_train_epoch_start(self) -> None:
        """Log the rates of all groups; nnU-Net logs only the first."""
        super().on_train_epoch_start()
        *others, last = self.optimizer.param_groups
        if not others:
            return
        if self.current_epoch < self.settings.seg_layers_only_epochs:
            self.print_to_log_file(f"Only the segmentation layers are trained, at the rate {last['lr']:.3g}")
            return
        of_encoder = ", ".join(f"{group['lr']:.3g}" for group in others if group["of_encoder"])
        self.print_to_log_file(f"Rate of the encoder, from its first stage on: {of_encoder}; rest: {last['lr']:.3g}")

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train a step in which parameters at rate 0 neither affect gradient clipping nor gather momentum.

        They keep requires_grad: DDP only synchronises parameters that have it when DDP wraps the network.
        """
        frozen = [p for group in self.optimizer.param_groups if group["lr"] == 0 for p in group["params"]]
        frozen = [p for p in frozen if p.requires_grad]

        def leave_out(*_: Any) -> None:
            for parameter in frozen:
                parameter.grad = None

        with ExitStack() as hooks:
            for parameter in frozen:
                hooks.enter_context(parameter.register_hook(torch.zeros_like))  # not None: DDP waits for all
            hooks.enter_context(self.optimizer.register_step_pre_hook(leave_out))  # or weight decay adds momentum
            return super().train_step(batch)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Load a checkpoint, and remember that the weights come from an earlier training."""
        self._continues = True
        super().load_checkpoint(filename_or_checkpoint)

    def on_train_start(self) -> None:
        """Load the pretrained weights before nnU-Net starts the loaders' processes."""
        if not self.was_initialized:
            self.initialize()
        with self._or_nothing_left_behind():
            self._load_pretrained()
        super().on_train_start()

    def _load_pretrained(self) -> None:
        if self._continues:
            self.print_to_log_file("The training continues: no pretrained encoder is loaded.")
            return
        if self._weights_hash() != self._weights_at_start:
            message = "-pretrained_weights were given: they stay, no other pretrained encoder is loaded."
            self._report({"checkpoint": None, "reason": message}, message)
            return
        path = self._find_checkpoint()
        label_channels = len(self.label_manager.foreground_labels) if self.is_cascaded else 0
        loaded = pretrained.load(self.network, path, self._pretraining(), self.settings, label_channels)

        train, validation = self.do_split()
        unseen = set(validation) - set(train)  # empty for fold `all`
        held_out = [case for case in find_cases(self.preprocessed_dataset_folder) if case.name in unseen]
        seen = cases_seen(loaded.checkpoint, self.plans_manager.dataset_name, held_out)
        others = self._seen_of_others(loaded.checkpoint)
        content = {**loaded.content, "validation_cases_seen": seen, **others, **loaded.report.as_dict()}
        self._report(content, loaded.text)
        for kind in ("loaded", "random"):
            names = "\n  ".join(getattr(loaded.report, kind))
            self.print_to_log_file(f"{kind}:\n  {names}", also_print_to_console=False, add_timestamp=False)
        if not loaded.checkpoint.get("all_cases_known", True):
            self.print_to_log_file(UNKNOWN_CASES)
        self.print_to_log_file(
            f"Pretraining saw the images of {len(seen)} of this fold's {len(held_out)} validation cases"
            + (f": {', '.join(seen)}. Pretrain with -f {self.fold} to leave them out." if seen else ".")
        )

    def _seen_of_others(self, checkpoint: Mapping[str, Any]) -> dict[str, list[str]]:
        """Return further held-out cases of a subclass that the pretraining saw, by their entry in transfer.json."""
        return {}

    def _pretraining(self) -> pretrained.Pretraining:
        return pretrained.Pretraining(
            self.plans_manager.plans,
            self.configuration_name,
            self.fold,
            self.preprocessed_dataset_folder_base,
            self.method,
            self.of_any_method,
            self.control.__name__,
        )

    def _find_checkpoint(self) -> str:
        path = self._pretraining().find()
        if warning := pretrained.warning_of_newer(path):
            self.print_to_log_file(warning)
        return path

    def _weights_hash(self) -> str:
        return checkpoint_file.encoder_hash(dict(unwrap(self.network).named_parameters()))

    def _report(self, content: dict[str, Any], text: str) -> None:
        self.print_to_log_file(text)
        if self.local_rank == 0:
            save_json(content, os.path.join(self.output_folder, "transfer.json"), sort_keys=False)
