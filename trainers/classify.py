"""Classification of cases or points with a plan's encoder, through nnU-Net's own `nnUNetv2_train`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import autocast, nn

from pcrl_nnunet import checkpoint
from pcrl_nnunet.classification import figures
from pcrl_nnunet.classification.auroc import auroc
from pcrl_nnunet.classification.checks import check_cases
from pcrl_nnunet.classification.drawing import Drawing
from pcrl_nnunet.classification.folds import write_split_by_patient
from pcrl_nnunet.classification.label_table import FILES, LabelTable, bring_tables, read_labels
from pcrl_nnunet.classification.loader import ClassificationLoader
from pcrl_nnunet.classification.patches import fitting_batch, input_size
from pcrl_nnunet.classification.prediction import Predictor, write_evaluation
from pcrl_nnunet.config import ClassifySettings, FinetuneSettings
from pcrl_nnunet.errors import UserError, exit_on_user_error
from pcrl_nnunet.loading.cases import find_cases
from pcrl_nnunet.loading.splits import SPLITS
from pcrl_nnunet.losses import classification_loss
from pcrl_nnunet.networks import Classifier
from pcrl_nnunet.output_folder import title_of
from pcrl_nnunet.pretraining import distributed
from pcrl_nnunet.report.progress import ClassificationLogger
from pcrl_nnunet.settings import changes
from pcrl_nnunet.trainers.finetune import PCRLFinetuneTrainer
from pcrl_nnunet.trainers.scratch import NNUNET_DEFAULT_DEVICE, PCRLScratchTrainer
from pcrl_nnunet.transfer.weights import unwrap

NUM_MAPS = 4  # number of activation maps that a validation draws


class _Classification(PCRLScratchTrainer):
    """The common part of both classification trainers, over `PCRLScratchTrainer`.

    Overrides: __init__, build_network_architecture, _build_loss, do_split, get_dataloaders, validation_step,
    on_validation_epoch_end, print_to_log_file, extra_content, load_checkpoint, perform_actual_validation.
    """

    # nnU-Net's 1e-2 soon erases the pretraining of an encoder. From scratch that rate is better: comparisons run it as
    # `stock` (docs/evidence/classification.md).
    defaults = MappingProxyType({"initial_lr": 1e-3})
    needs_masks = False

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = NNUNET_DEFAULT_DEVICE,
    ) -> None:
        with exit_on_user_error():  # before nnU-Net creates the output folder
            self.classify = ClassifySettings.from_plan(plans)
            if PlansManager(plans).get_configuration(configuration).previous_stage_name is not None:
                raise UserError(f"{configuration} takes the labels of another stage as input; choose another with -c")
            folder = os.path.join(nnUNet_preprocessed or "", plans["dataset_name"])
            raw = os.path.join(nnUNet_raw or "", plans["dataset_name"])
            changed = bring_tables(raw, folder)
            self.labels: LabelTable = read_labels(folder, self.classify.table or None)
            finetune = FinetuneSettings.from_plan(plans, self.defaults)
            for name in ("load_decoder", "seg_layers_only_epochs"):
                if getattr(finetune, name):
                    raise UserError(f"a classification has no decoder; remove pcrl.finetune.{name} from the plan")
            if finetune.pasted_share:
                raise UserError("a classification pastes no masks; remove pcrl.finetune.pasted_share from the plan")
            planned = PlansManager(plans).get_configuration(configuration)
            self.size = input_size(self.labels, self.classify.patch_mm, planned)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.saved_as = type(self).__name__
        self.enable_deep_supervision = False
        self.logger.local_logger = ClassificationLogger(
            title_of(type(self).__name__, plans["dataset_name"], plans["plans_name"], configuration, fold)
        )
        for name in changed:
            self.print_to_log_file(f"{name} was taken from {raw} into {folder}")

    def build_network_architecture(  # a method, because the table sets the number of outputs
        self,
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return the plan's encoder with a head for the table's labels."""
        network = super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        return Classifier(network, len(self.labels.names))

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: the network has no deep supervision."""

    def _build_loss(self) -> Any:
        return lambda logits, target: classification_loss(logits, target, self.labels.exclusive)

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return nnU-Net's split, by patient if the table has patients."""
        base, patient = self.preprocessed_dataset_folder_base, self.labels.patient
        if self.fold != "all":  # every rank writes the same file
            names = [case.name for case in find_cases(self.preprocessed_dataset_folder)]
            with self._or_nothing_left_behind():
                made = write_split_by_patient(names, self.labels, base)
            if made is not None:
                self.print_to_log_file(f"Wrote {made}: folds by patient")
        train, validation = super().do_split()
        shared = {patient[c] for c in train if c in patient} & {patient[c] for c in validation if c in patient}
        if shared and self.fold != "all":
            self.print_to_log_file(
                f"WARNING: {os.path.join(base, SPLITS)} has patients on both sides, so that scores will be too good: "
                f"{', '.join(sorted(shared)[:5])}"
            )
        return train, validation

    def samples(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the labelled samples for training and validation.

        Raises:
            SystemExit: training or validation has no samples.
        """
        train, validation = (self.labels.of_cases(cases) for cases in self.do_split())
        with self._or_nothing_left_behind():
            for what, of_split in (("training", train), ("validation", validation)):
                if not len(of_split):
                    raise UserError(
                        f"{FILES[self.labels.kind]} has no label of the {what} cases of fold {self.fold}; check its "
                        f"names of cases against those in {self.preprocessed_dataset_folder}"
                    )
        return train, validation

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Return our loaders with nnU-Net's augmentation and processes."""
        self.get_tr_and_val_datasets()  # opens every case
        rotation, dummy_2d, _, mirror_axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        transforms = (
            self.get_training_transforms(self.size, rotation, None, mirror_axes, dummy_2d),
            self.get_validation_transforms(None),
        )
        read_size = [int(n) for n in get_patch_size(self.size, rotation, rotation, rotation, (0.85, 1.25))]
        if dummy_2d:
            read_size[0] = self.size[0]
        spacing = self.configuration_manager.spacing
        points = self.labels.point is not None
        jitter = [self.classify.jitter_mm / s for s in spacing] if points else []
        cases = {case.name: case for case in find_cases(self.preprocessed_dataset_folder)}
        with self._or_nothing_left_behind():
            for warning in check_cases(self.labels, cases, self.plans_manager.transpose_forward):
                self.print_to_log_file(warning)
        batch = self.classify.batch_size or fitting_batch(
            self.configuration_manager.patch_size, self.configuration_manager.batch_size, self.size
        )
        batch = math.ceil(batch / distributed.world_size())  # for all ranks together
        size = "x".join(map(str, self.size))
        differing = changes(asdict(self.classify), asdict(ClassifySettings()))
        self.print_to_log_file(f"Batches of {batch} inputs of {size} voxels. Settings of classification: {differing}")
        loaders = []
        for samples, transform, train in zip(self.samples(), transforms, (True, False), strict=True):
            loader = ClassificationLoader(
                cases,
                self.labels,
                samples,
                batch,
                self.size,
                read_size if train else self.size,
                transform,
                self.classify.balanced,
                self.plans_manager.transpose_forward,
                jitter if train else [0.0] * len(jitter),
            )
            loaders.append(self._augmenter(loader, train))
        return self._with_run((loaders[0], loaders[1]))

    def _augmenter(self, loader: ClassificationLoader, train: bool) -> Any:
        processes = get_allowed_n_proc_DA()
        if processes == 0:
            return SingleThreadedAugmenter(loader, None)
        processes = processes if train else max(1, processes // 2)
        return NonDetMultiThreadedAugmenter(
            loader, None, processes, num_cached=max(3, processes // 2), pin_memory=self.device.type == "cuda"
        )

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the loss, logits and labels of a batch."""
        data, target = (batch[name].to(self.device, non_blocking=True) for name in ("data", "target"))
        with autocast(self.device.type, enabled=self.device.type == "cuda"):
            logits = self.network(data)
        loss = self.loss(logits, target)
        return {"loss": loss.cpu().numpy(), "logits": logits.float().cpu().numpy(), "target": target.cpu().numpy()}

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log every output's AUROC and their mean in place of nnU-Net's Dice."""
        val_outputs = [output for of_rank in distributed.of_all_ranks(val_outputs) for output in of_rank]
        logits, target = (np.concatenate([output[name] for output in val_outputs]) for name in ("logits", "target"))
        areas = [auroc(target[:, i], logits[:, i]) for i in range(logits.shape[1])]
        known = [value for value in areas if not np.isnan(value)]
        self.logger.log("mean_fg_dice", float(np.mean(known)) if known else 0.5, self.current_epoch)
        self.logger.log("dice_per_class_or_region", areas, self.current_epoch)
        self.logger.log("val_losses", float(np.mean([output["loss"] for output in val_outputs])), self.current_epoch)

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Print like nnU-Net, with AUROC instead of Dice."""
        told = [
            a.replace("pseudo Dice", "AUROC").replace("Pseudo dice", "AUROC") if isinstance(a, str) else a for a in args
        ]
        super().print_to_log_file(*told, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)

    def extra_content(self) -> dict[str, Any]:
        """Return the checkpoint entries that `pcrl_nnunet_classify` needs."""
        return {
            "pcrl_classification": {
                "kind": self.labels.kind,
                "names": list(self.labels.names),
                "exclusive": self.labels.exclusive,
                "size": list(self.size),
            }
        }

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Load a checkpoint if the network was trained with the present table and input size."""
        then: Mapping[str, Any] = {}
        with suppress(UserError):  # an unreadable file is reported below
            then = checkpoint.read_any(str(filename_or_checkpoint)).get("pcrl_classification", {})
        now = self.extra_content()["pcrl_classification"]
        differing = [f"{key} {value}, now {now[key]}" for key, value in then.items() if now[key] != value]
        if differing:
            raise SystemExit(
                f"Error: {FILES[self.labels.kind]} or pcrl.classify of the plan has changed since "
                f"{filename_or_checkpoint} was trained ({'; '.join(differing)}); put it back, or train anew without --c"
            )
        super().load_checkpoint(filename_or_checkpoint)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Write predictions.csv, auroc.json, roc.png and a few activation maps for the validation cases."""
        if self.local_rank != 0:
            return
        _, samples = self.samples()
        folder = os.path.join(self.output_folder, "validation")
        os.makedirs(folder, exist_ok=True)
        network = unwrap(self.network)
        network.eval()
        self.print_to_log_file(f"Validating {len(samples)} {self.labels.kind}")
        predictor = Predictor([network], self.labels.names, self.labels.exclusive, self.size, self.device)
        cases = {case.name: case for case in find_cases(self.preprocessed_dataset_folder)}
        table = predictor.of_samples(self.labels, samples, cases, self.plans_manager.transpose_forward)
        for line in write_evaluation(table, self.labels, samples, folder):
            self.print_to_log_file(line)
        groups = Drawing(self.labels, samples, balanced=True).groups[:NUM_MAPS]  # positives are few
        each = max(1, NUM_MAPS // len(groups))
        chosen = {int(group[i]) for group in groups for i in np.linspace(0, len(group) - 1, each).astype(int)}
        for index in sorted(chosen):
            image, maps = predictor.activation(self.labels, int(index), cases, self.plans_manager.transpose_forward)
            name = f"{self.labels.case[index]}_{index}"
            (row,) = np.flatnonzero(samples == index)
            said = [f"{column} {table[column][row]:.2f}" for column in predictor.columns]
            titles = [f"{a}\ntruth {v:g}" for a, v in zip(said, self.labels.value[index], strict=True)]
            figures.activation(image, maps, titles, name, os.path.join(folder, f"activation_{name}.png"))


class PCRLClassificationScratchTrainer(_Classification):
    """`PCRLClassificationTrainer` without pretrained weights: the fair control."""


class PCRLClassificationTrainer(_Classification, PCRLFinetuneTrainer):
    """Classification of cases or points from a pretrained encoder, found as in `PCRLFinetuneTrainer`."""

    of_any_method = "PCRLClassificationTrainer"
    control = PCRLClassificationScratchTrainer
