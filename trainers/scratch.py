"""nnU-Net's training from random weights with the settings of fine-tuning."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet import output_folder, weights_and_biases
from pcrl_nnunet.config import BOX_SHARE, FinetuneSettings
from pcrl_nnunet.errors import UserError, exit_on_user_error
from pcrl_nnunet.finetuning import mixing
from pcrl_nnunet.finetuning.checks import check_fold, check_surroundings, refuse_gap_in_labels, refuse_without_masks
from pcrl_nnunet.finetuning.schedule import WarmupPolyLR, keep_own_groups
from pcrl_nnunet.loading.cases import CaseVolume, find_cases
from pcrl_nnunet.loading.splits import fold_of
from pcrl_nnunet.networks import seg_layers_of
from pcrl_nnunet.settings import changes
from pcrl_nnunet.transfer.weights import unwrap

NNUNET_DEFAULT_DEVICE = torch.device("cuda")


class PCRLScratchTrainer(nnUNetTrainer):
    """`PCRLFinetuneTrainer` without pretrained weights: the fair control.

    This is nnU-Net's training with the settings of the plan's ``pcrl.finetune`` part (`FinetuneSettings`). Its
    checkpoints name the stock trainer, so that predicting, ensembling and exporting need none of our code.
    Overrides: __init__, configure_optimizers, on_train_start, get_dataloaders, get_tr_and_val_datasets,
    on_train_epoch_start, train_step, on_train_epoch_end, save_checkpoint, load_checkpoint.
    """

    needs_masks = True
    defaults: Mapping[str, Any] = MappingProxyType({})  # defaults that differ from `FinetuneSettings`
    saved_as = nnUNetTrainer.__name__  # the trainer that checkpoints name
    for_classification = "PCRLClassificationScratchTrainer"  # the trainer for a dataset without masks
    seed = 0  # of the pasted patches
    _step = 0  # of the epoch
    _has_begun = False

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = NNUNET_DEFAULT_DEVICE,
    ) -> None:
        with exit_on_user_error():  # before nnU-Net creates the output folder
            check_surroundings(plans, configuration, device)
            if self.needs_masks:
                refuse_without_masks(plans, configuration, fold, dataset_json, device, self.for_classification)
                refuse_gap_in_labels(plans, dataset_json)
            if fold != "all":
                check_fold(type(self), plans, configuration, int(fold))
            self.settings = FinetuneSettings.from_plan(plans, self.defaults)
            self.check(plans, configuration, fold, dataset_json)
        # nnU-Net pops this item from the given plan and requires it
        plans = {"continue_training": False, **copy.deepcopy(plans)}
        with exit_on_user_error(), output_folder.creating(), weights_and_biases.held_back():
            super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.settings.epochs
        # nnU-Net's 50; shorter for short trainings, to resume near the stop
        self.save_every: int = min(50, max(1, self.num_epochs // 20))
        self.num_iterations_per_epoch = self.settings.iters_per_epoch
        self.num_val_iterations_per_epoch = self.settings.val_iters_per_epoch
        self.initial_lr = self.settings.initial_lr
        self.weight_decay = self.settings.weight_decay
        self.enable_deep_supervision = self.settings.deep_supervision

    @classmethod
    def check(
        cls, plans: Mapping[str, Any], configuration: str, fold: int | str, dataset_json: Mapping[str, Any]
    ) -> None:
        """Raise `UserError` if a subclass lacks something. Nothing has been written yet."""

    def configure_optimizers(self) -> tuple[Optimizer, LRScheduler]:
        """Return nnU-Net's optimiser or AdamW, and nnU-Net's schedule with a warm-up."""
        if not self.enable_deep_supervision:  # DDP wraps the network later and waits for every gradient
            for layer in seg_layers_of(unwrap(self.network))[:-1]:
                layer.requires_grad_(False)
        optimizer, _ = super().configure_optimizers()
        if self.settings.optimizer == "adamw":
            optimizer = AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        keep_own_groups(optimizer)
        return optimizer, WarmupPolyLR(optimizer, self.initial_lr, self.num_epochs, self.settings.warmup_epochs)

    def on_train_start(self) -> None:
        """Log the settings in effect, then start like nnU-Net."""
        differing = changes(asdict(self.settings), asdict(FinetuneSettings.from_plan({}, self.defaults)))
        self.print_to_log_file(f"{type(self).__name__}, settings: {differing}", add_timestamp=False)
        self._not_finite: set[str] = set()
        other = getattr(self.optimizer, "other_kind", None)
        with self._or_nothing_left_behind():
            if other is not None:
                raise UserError(
                    f"the training to continue has the optimiser {other}, and the plan's pcrl.finetune has "
                    f"{self.settings.optimizer}; set optimizer to {other}, or start again without --c"
                )
        super().on_train_start()
        self._has_begun = True

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Return nnU-Net's loaders, and start the run of Weights & Biases, because nothing is refused after this."""
        return self._with_run(super().get_dataloaders())

    def _with_run(self, loaders: tuple[Any, Any]) -> tuple[Any, Any]:
        with self._or_nothing_left_behind():
            try:
                weights_and_biases.begin(self)
            except UserError:
                for loader in loaders:  # their processes are running
                    getattr(loader, "_finish", lambda: None)()
                raise
        return loaders

    def get_tr_and_val_datasets(self) -> tuple[nnUNetBaseDataset, nnUNetBaseDataset]:
        """Return nnU-Net's datasets, and open every case: an unreadable case would end loaders without a reason."""
        if self.fold != "all":
            with self._or_nothing_left_behind():
                names = [case.name for case in find_cases(self.preprocessed_dataset_folder)]
                fold_of(self.preprocessed_dataset_folder_base, self.fold, names)
        datasets: tuple[nnUNetBaseDataset, nnUNetBaseDataset] = super().get_tr_and_val_datasets()
        used = {*datasets[0].identifiers, *datasets[1].identifiers}
        with self._or_nothing_left_behind():
            for case in find_cases(self.preprocessed_dataset_folder, segmentations=True):
                if case.name.removesuffix("_seg") in used and not case.path.endswith(".npz"):  # opening .npz reads it
                    CaseVolume(case)
        return datasets

    @contextmanager
    def _or_nothing_left_behind(self) -> Iterator[None]:
        """End the process with the sentence of a `UserError`. Before the training begins, leave no files behind."""
        with exit_on_user_error():
            try:
                yield
            except UserError:
                if self.local_rank == 0 and not self._has_begun:
                    output_folder.remove_unused(self.output_folder, self.log_file)
                raise

    def on_train_epoch_start(self) -> None:
        """Start like nnU-Net, and count the epoch's steps."""
        super().on_train_epoch_start()
        self._step = 0

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train a step like nnU-Net, with pasted patches, and remember the cases of a loss that is not finite."""
        rng = np.random.default_rng((self.seed, self.current_epoch, self._step, self.local_rank))
        batch = self.mix(batch, rng)
        result: dict[str, Any] = super().train_step(batch)
        self._step += 1
        if not np.isfinite(result["loss"]):
            self._not_finite |= set(map(str, batch["keys"]))
        return result

    def mix(self, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Return nnU-Net's batch. In a share of the steps, a box of each patch is pasted into the next patch."""
        if rng.random() >= self.settings.pasted_share:
            return batch
        data, labels = self.on_device(batch)
        # each of several processes may have only one patch
        other = self.on_device(next(self.dataloader_train)) if len(data) == 1 else (data.roll(1, 0), labels.roll(1, 0))
        boxes = mixing.random_boxes(rng, len(data), data.shape[2:], BOX_SHARE).to(self.device)
        target = mixing.at_scales(mixing.paste(other[1], labels, boxes), batch["target"])
        return {**batch, "data": mixing.paste(other[0], data, boxes), "target": target}

    def on_device(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return patches and their labels at full resolution."""
        target = batch["target"]
        labels = (target[0] if isinstance(target, list) else target).to(self.device, non_blocking=True)
        labels = labels.bool() if self.label_manager.has_regions else labels
        return batch["data"].to(self.device, non_blocking=True), labels

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Stop before weights that are not finite are saved or validated.

        With mixed precision nnU-Net skips a step that is not finite, and the training continues with a warning.
        """
        if self._not_finite:
            cases = f"with the cases {', '.join(sorted(self._not_finite))}"
            with self._or_nothing_left_behind():
                if not all(torch.isfinite(p).all() for p in self.network.parameters()):
                    raise UserError(
                        f"the loss was not finite in a step {cases}, and the weights are lost; look for NaN in these "
                        f"images, or lower pcrl.finetune.initial_lr, and go on from the last checkpoint with --c"
                    )
            self.print_to_log_file(f"WARNING: the loss was not finite in steps {cases}: look for NaN in these images")
            self._not_finite.clear()
        super().on_train_epoch_end(train_outputs)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Load like nnU-Net. An unreadable file ends the process with a sentence."""
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SystemExit(
                f"Error: checkpoint {filename_or_checkpoint} cannot be used ({reason}); it is damaged or of another "
                f"network: remove it, to go on from an older one in its folder or to start again"
            ) from None

    def save_checkpoint(self, filename: str) -> None:
        """Save like nnU-Net, but completely or not at all, and with the stock trainer's name."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)  # logs that checkpoints are off
            return
        draft = f"{filename}.draft"
        try:
            super().save_checkpoint(draft)
            content = torch.load(draft, map_location="cpu", weights_only=False)  # just written
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            raise SystemExit(
                f"Error: could not write {filename} ({error}); the file of that name, if any, is the last good one: "
                f"make room or the folder writable and continue with --c"
            ) from None
        finally:
            if os.path.exists(draft):
                os.remove(draft)
        content |= {"trainer_name": self.saved_as, **self.extra_content()}
        with exit_on_user_error():
            checkpoint_file.write(filename, content)

    def extra_content(self) -> dict[str, Any]:
        """Return a subclass's further entries of checkpoints."""
        return {}
