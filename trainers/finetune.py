"""Fine-tuning of a pretrained encoder, and the same training from scratch, through nnU-Net's own `nnUNetv2_train`."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import groupby
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet import output_folder, weights_and_biases
from pcrl_nnunet.classification.targets import FILES
from pcrl_nnunet.commands import command, device_option
from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.errors import UserError, exit_on_user_error
from pcrl_nnunet.ingest.maskless import is_without_masks, trainer_for
from pcrl_nnunet.loading.cases import CaseVolume, find_cases
from pcrl_nnunet.loading.splits import fold_of, refuse_unwritable
from pcrl_nnunet.named_plans import refuse_outdated
from pcrl_nnunet.networks import encoder_of
from pcrl_nnunet.plans import check_configuration
from pcrl_nnunet.settings import pcrl_block
from pcrl_nnunet.transfer import weights as transfer

NNUNET_DEFAULT_DEVICE = torch.device("cuda")


class WarmupPolyLR(PolyLRScheduler):
    """nnU-Net's schedule after a linear warm-up; steps are epochs, given by nnU-Net at the start of each.

    A parameter group may have a ``factor`` of its rate, and a number of ``frozen_epochs``, the first ones, at rate 0.
    """

    def __init__(self, optimizer: Optimizer, initial_lr: float, max_steps: int, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        super().__init__(optimizer, initial_lr, max_steps - warmup_steps)

    def step(self, current_step: int | None = None) -> None:
        """Set the rate of an epoch; None is the call that torch's base class makes before the first one."""
        step = current_step or 0
        super().step(max(0, step - self.warmup_steps))
        for group in self.optimizer.param_groups:
            factor = 0.0 if step < group.get("frozen_epochs", 0) else group.get("factor", 1.0)
            group["lr"] *= min(1.0, (step + 1) / max(1, self.warmup_steps)) * factor
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def _with_own_groups(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint the momentum is taken: rates and decay are those of the plan, which may have changed since."""
    return {**state, "param_groups": optimizer.state_dict()["param_groups"]}


class PCRLScratchTrainer(nnUNetTrainer):
    """`PCRLFinetuneTrainer` without the weights: the fair control.

    nnU-Net's training with the settings of the plan's ``pcrl.finetune`` part (`FinetuneSettings`). Its checkpoints name
    the stock trainer, so that predicting, ensembling and exporting need none of our code.
    Overrides: __init__, configure_optimizers, on_train_start, get_dataloaders, get_tr_and_val_datasets, train_step,
    on_train_epoch_end, save_checkpoint, load_checkpoint.
    """

    epochs: int | None = None  # of a sibling class; wins over the plan's
    needs_masks = True
    defaults: Mapping[str, Any] = MappingProxyType({})  # of settings, where a sibling class has others
    saved_as = nnUNetTrainer.__name__  # whom those that load a checkpoint take it for
    for_classification = "PCRLClassificationScratchTrainer"  # the trainer for a dataset without masks
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
            _check_surroundings(plans, configuration, device)
            self._refuse_without_masks(plans, configuration, fold, dataset_json, device)
            if fold != "all":
                self._check_fold(plans, configuration, int(fold))
            overrides = {} if self.epochs is None else {"epochs": self.epochs}
            self.settings = FinetuneSettings.from_plan(plans, self.defaults, **overrides)
        # nnU-Net takes an item out of the plan that it is given, and requires it
        plans = {"continue_training": False, **copy.deepcopy(plans)}
        with exit_on_user_error(), output_folder.creating(), weights_and_biases.held_back():
            super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.settings.epochs
        # nnU-Net's 50, but a short training, too, goes on near to where it was stopped
        self.save_every: int = min(50, max(1, self.num_epochs // 20))
        self.num_iterations_per_epoch = self.settings.iters_per_epoch
        self.num_val_iterations_per_epoch = self.settings.val_iters_per_epoch
        self.initial_lr = self.settings.initial_lr
        self.weight_decay = self.settings.weight_decay

    @classmethod
    def _refuse_without_masks(
        cls,
        plans: Mapping[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        """Raise `UserError` for a segmentation of a dataset whose only labels are the foreground that we have found."""
        name = plans["dataset_name"]
        if not (cls.needs_masks and is_without_masks(name, dataset_json)):
            return
        remedy = (
            f"for a classification put a {' or '.join(FILES.values())} into {name} in nnUNet_raw, or bring its "
            f"pretraining into a dataset with masks by pcrl_nnunet_transfer"
        )
        if trainer_for(plans, dataset_json) is not None:
            remedy = "to classify: " + command(
                *("nnUNetv2_train", name, configuration, fold),
                tr=cls.for_classification,
                p=plans["plans_name"],
                device=device_option(device.type),
            )
        raise UserError(f"{name} has no masks, so that a segmentation has nothing to learn; {remedy}")

    @classmethod
    def _check_fold(cls, plans: Mapping[str, Any], configuration: str, fold: int) -> None:
        """Raise `UserError` for what nnU-Net would end in a traceback for, or draw another split for.

        A training that is finished may have lost its training cases: to validate it, its validation cases will do.
        """
        folder = os.path.join(nnUNet_preprocessed, plans["dataset_name"])
        output = f"{cls.__name__}__{plans['plans_name']}__{configuration}"
        final = os.path.join(nnUNet_results, plans["dataset_name"], output, f"fold_{fold}", checkpoint_file.FINAL)
        identifier = PlansManager(dict(plans)).get_configuration(configuration).data_identifier
        names = [case.name for case in find_cases(os.path.join(folder, identifier))]
        fold_of(folder, fold, names, ("val",) if os.path.isfile(final) else ("train", "val"))
        refuse_unwritable(folder)

    def configure_optimizers(self) -> tuple[Optimizer, LRScheduler]:
        """nnU-Net's optimiser, with the warm-up in the schedule."""
        optimizer, _ = super().configure_optimizers()
        optimizer.register_load_state_dict_pre_hook(_with_own_groups)
        return optimizer, WarmupPolyLR(optimizer, self.initial_lr, self.num_epochs, self.settings.warmup_epochs)

    def on_train_start(self) -> None:
        """As nnU-Net's; the effective settings go to the log."""
        self.print_to_log_file(f"{type(self).__name__}: {self.settings}", add_timestamp=False)
        self._not_finite: set[str] = set()
        super().on_train_start()
        self._has_begun = True

    def get_dataloaders(self) -> tuple[Any, Any]:
        """As nnU-Net's; a run of Weights & Biases begins, as nothing is refused after this."""
        return self._with_run(super().get_dataloaders())

    def _with_run(self, loaders: tuple[Any, Any]) -> tuple[Any, Any]:
        with self._or_nothing_left_behind():
            try:
                weights_and_biases.begin(self)
            except UserError:
                for loader in loaders:  # their processes have been started
                    getattr(loader, "_finish", lambda: None)()
                raise
        return loaders

    def get_tr_and_val_datasets(self) -> tuple[nnUNetBaseDataset, nnUNetBaseDataset]:
        """As nnU-Net's; opens every case: where one cannot be read, the loaders' processes end without a reason."""
        if self.fold != "all":
            with self._or_nothing_left_behind():
                names = [case.name for case in find_cases(self.preprocessed_dataset_folder)]
                fold_of(self.preprocessed_dataset_folder_base, self.fold, names)
        datasets: tuple[nnUNetBaseDataset, nnUNetBaseDataset] = super().get_tr_and_val_datasets()
        used = {*datasets[0].identifiers, *datasets[1].identifiers}
        with self._or_nothing_left_behind():
            for case in find_cases(self.preprocessed_dataset_folder, segmentations=True):
                if case.name.removesuffix("_seg") in used and not case.path.endswith(".npz"):  # to open is to read it
                    CaseVolume(case)
        return datasets

    @contextmanager
    def _or_nothing_left_behind(self) -> Iterator[None]:
        """A `UserError` ends the process with its sentence, and leaves nothing behind unless the training has begun."""
        with exit_on_user_error():
            try:
                yield
            except UserError:
                if self.local_rank == 0 and not self._has_begun:
                    output_folder.remove_unused(self.output_folder, self.log_file)
                raise

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """As nnU-Net's; remembers the cases of a loss that is not finite."""
        result: dict[str, Any] = super().train_step(batch)
        if not np.isfinite(result["loss"]):
            self._not_finite |= set(map(str, batch["keys"]))
        return result

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """As nnU-Net's; stops before weights that are not finite are saved or validated.

        With mixed precision nnU-Net leaves out a step that is not finite, and the training goes on: a warning.
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
        """As nnU-Net's; a file that cannot be read is said in a sentence."""
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SystemExit(
                f"Error: checkpoint {filename_or_checkpoint} cannot be used ({reason}); it is damaged or of another "
                f"network: remove it, to go on from an older one in its folder or to start again"
            ) from None

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net's, but whole or not at all, and with the stock trainer's name for those who load it."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)  # which says so in the log
            return
        draft = f"{filename}.draft"
        try:
            super().save_checkpoint(draft)
            content = torch.load(draft, map_location="cpu", weights_only=False)  # the file of a line ago
        except (OSError, RuntimeError) as error:  # torch raises the latter where the disk is full
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
        """What a subclass adds to its checkpoints."""
        return {}


class PCRLFinetuneTrainer(PCRLScratchTrainer):
    """nnU-Net's training of the plan's network, starting from a pretrained encoder.

    The encoder is loaded when a training starts: not when one continues (``--c``), not for ``--val``, not where
    nnU-Net has loaded other weights (``-pretrained_weights``). It is that of the plan's ``pcrl.checkpoint`` or of this
    dataset's own finished pretraining for the same plan and configuration. None found is an error.
    Its encoder may have a rate of its own (``encoder_lr_factor``, ``layer_lr_decay``), and be frozen (a factor of 0, or
    ``frozen_epochs``).
    Overrides, besides `PCRLScratchTrainer`'s: initialize, on_train_epoch_start.
    """

    control: type[PCRLScratchTrainer] = PCRLScratchTrainer  # the same training without the weights
    for_classification = "PCRLClassificationTrainer"

    _continues = False
    _weights_at_start = ""

    def initialize(self) -> None:
        """As nnU-Net's; remembers the random weights, as nnU-Net does not tell us of ``-pretrained_weights``."""
        with self._or_nothing_left_behind():
            super().initialize()
        self._weights_at_start = self._weights_hash()

    def configure_optimizers(self) -> tuple[Optimizer, LRScheduler]:
        """Groups of parameters that follow each other in the network and have the same share of the rate.

        So the parameters have the same numbers in the optimiser's state, however many groups there are.
        """
        optimizer, schedule = super().configure_optimizers()
        settings = self.settings
        if (settings.encoder_lr_factor, settings.frozen_epochs, settings.layer_lr_decay) == (1, 0, 1):
            return optimizer, schedule
        encoder = encoder_of(transfer.unwrap(self.network))
        shares: dict[int, tuple[float, int]] = {}
        for coarser, part in enumerate([*reversed(encoder.stages[1:]), encoder]):  # last what is left: stem and stage 0
            factor = settings.encoder_lr_factor * settings.layer_lr_decay**coarser
            for parameter in part.parameters():
                shares.setdefault(id(parameter), (factor, settings.frozen_epochs))
        (group,) = optimizer.param_groups
        optimizer.param_groups[:] = [
            {**group, "params": list(parameters), "factor": factor, "frozen_epochs": frozen_epochs}
            for (factor, frozen_epochs), parameters in groupby(group["params"], lambda p: shares.get(id(p), (1.0, 0)))
        ]
        schedule.step(0)  # its first one was for the one group
        return optimizer, schedule

    def on_train_epoch_start(self) -> None:
        """As nnU-Net's, which logs the first group's rate: the others', too, go to the log."""
        super().on_train_epoch_start()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if len(rates) > 1:
            of_encoder = ", ".join(f"{rate:.3g}" for rate in rates[:-1])
            self.print_to_log_file(f"Rate of the encoder, from its first stage on: {of_encoder}; rest: {rates[-1]:.3g}")

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """As nnU-Net's; parameters at rate 0 count nothing in the clipping of gradients, and gather no momentum.

        They keep requires_grad: DDP synchronises only those that have it when it wraps the network.
        """
        frozen = [p for group in self.optimizer.param_groups if group["lr"] == 0 for p in group["params"]]

        def leave_out(*_: Any) -> None:
            for parameter in frozen:
                parameter.grad = None

        with ExitStack() as hooks:
            for parameter in frozen:
                hooks.enter_context(parameter.register_hook(torch.zeros_like))  # not none yet: DDP waits for all
            hooks.enter_context(self.optimizer.register_step_pre_hook(leave_out))  # or weight decay were momentum
            return super().train_step(batch)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """As nnU-Net's; remembers that the weights are those of an earlier training."""
        self._continues = True
        super().load_checkpoint(filename_or_checkpoint)

    def on_train_start(self) -> None:
        """Load the pretrained encoder before nnU-Net starts the loaders' processes."""
        if not self.was_initialized:
            self.initialize()
        with self._or_nothing_left_behind():
            self._load_pretrained_encoder()
        super().on_train_start()

    def _load_pretrained_encoder(self) -> None:
        if self._continues:
            self.print_to_log_file("The training continues: no pretrained encoder is loaded.")
            return
        if self._weights_hash() != self._weights_at_start:
            message = "-pretrained_weights were given: they stay, no other pretrained encoder is loaded."
            self._report({"checkpoint": None, "reason": message}, message)
            return
        path = self._find_checkpoint()
        checkpoint = checkpoint_file.read_encoder(path)
        partial, plans = self.settings.allow_partial_encoder, self.plans_manager.plans
        label_channels = len(self.label_manager.foreground_labels) if self.is_cascaded else 0
        try:
            transfer.check_architecture(
                checkpoint, plans, self.configuration_name, self.preprocessed_dataset_folder_base, partial
            )
            report = transfer.load_encoder(
                self.network, checkpoint, label_channels, partial, self.settings.input_channels
            )
        except UserError as error:
            raise UserError(f"{path}: {error}; or pretrain for this one: {self._pretraining_command()}") from error
        differences = transfer.architecture_differences(
            checkpoint,
            self.configuration_manager.network_arch_class_name,
            self.configuration_manager.network_arch_init_kwargs,
        )
        if self.settings.encoder_lr_factor == 0 and (label_channels or report.encoder_share < 1):
            left = "weights of the cascade's labels at zero" if label_channels else "random weights"
            raise UserError(
                f"pcrl.finetune.encoder_lr_factor is 0, but an encoder from {path} has {left} that would never learn; "
                f"set a factor above 0, or frozen_epochs instead"
            )
        if self.settings.load_decoder:
            transfer.load_decoder(self.network, checkpoint, report)

        train, validation = self.do_split()
        unseen = set(validation) - set(train)  # none for fold `all`
        held_out = [case for case in find_cases(self.preprocessed_dataset_folder) if case.name in unseen]
        seen = transfer.cases_seen(checkpoint, self.plans_manager.dataset_name, held_out)
        origin = {key: checkpoint[key] for key in ("method", "datasets", "configuration", "fold", "epochs")}
        described = ", ".join(f"{key} {value}" for key, value in origin.items())
        data_differences = transfer.data_differences(checkpoint, self.plans_manager.plans, self.configuration_name)
        adapted = checkpoint.get("adapted")  # by pcrl_nnunet_transfer
        content = {
            "checkpoint": path,
            **origin,
            "adapted": adapted,
            "architecture_differences": differences,
            "data_differences": data_differences,
            "validation_cases_seen": seen,
            **report.as_dict(),
        }
        notes = f"\nAdapted by pcrl_nnunet_transfer from {adapted['checkpoint']}" if adapted else ""
        for of, of_them in (("another network", differences), ("other data", data_differences)):
            notes += "".join(f"\nNote, pretrained on {of}: {difference}" for difference in of_them)
        self._report(content, f"Pretrained encoder {path}\n  {described}\n{report.summary()}{notes}")
        for kind in ("loaded", "random"):
            names = "\n  ".join(getattr(report, kind))
            self.print_to_log_file(f"{kind}:\n  {names}", also_print_to_console=False, add_timestamp=False)
        if not checkpoint.get("all_cases_known", True):
            self.print_to_log_file(transfer.UNKNOWN_CASES)
        self.print_to_log_file(
            f"Pretraining saw the images of {len(seen)} of this fold's {len(held_out)} validation cases"
            + (f": {', '.join(seen)}. Pretrain with -f {self.fold} to leave them out." if seen else ".")
        )

    def _find_checkpoint(self) -> str:
        """The plan's `pcrl.checkpoint`, else this dataset's own pretraining.

        Raises:
            UserError: neither is there; names every place and the command to run.
        """
        plan = self.plans_manager.plans
        named = pcrl_block(plan).get("checkpoint")
        if named is not None:
            path = os.path.join(self.preprocessed_dataset_folder_base, os.path.expanduser(named))
            if not os.path.isfile(path):
                raise UserError(
                    f"the plan's pcrl.checkpoint {path} does not exist; correct it in {plan['plans_name']}.json, or "
                    f"remove it there to use this dataset's own pretraining"
                )
            return path
        results = os.path.join(nnUNet_results.get(), self.plans_manager.dataset_name)
        tried = [
            path
            for configuration in dict.fromkeys((self.configuration_name, self._image_configuration()))
            for path in transfer.candidates(results, self.plans_manager.plans_name, configuration, self.fold)
        ]
        for path in tried:
            if os.path.isfile(path):
                newer = os.path.join(os.path.dirname(path), checkpoint_file.LATEST)
                if os.path.isfile(newer) and os.path.getmtime(newer) > os.path.getmtime(path):
                    self.print_to_log_file(
                        f"WARNING: {path} is of an earlier pretraining; a newer one is not finished: {newer}"
                    )
                return path
        latest = [os.path.join(os.path.dirname(path), checkpoint_file.LATEST) for path in tried]
        unfinished = "".join(f" (that pretraining is not finished: {p})" for p in latest if os.path.isfile(p))
        raise UserError(
            f"no pretrained encoder for fold {self.fold} was found: the plan names no pcrl.checkpoint, and there is no "
            f"{', no '.join(tried)}{unfinished}; run {self._pretraining_command()}, "
            f"or train without: -tr {self.control.__name__}"
        )

    def _pretraining_command(self) -> str:
        plan = self.plans_manager.plans
        return command(
            "pcrl_nnunet_pretrain", d=plan["dataset_name"], p=plan["plans_name"], c=self._image_configuration()
        )

    def _image_configuration(self) -> str:
        """The configuration with the same network and data: for a cascade 3d_fullres, without the labels' channels."""
        this = self.plans_manager.plans["configurations"][self.configuration_name]
        return this.get("inherits_from", "3d_fullres") if self.is_cascaded else self.configuration_name

    def _weights_hash(self) -> str:
        return checkpoint_file.encoder_hash(dict(transfer.unwrap(self.network).named_parameters()))

    def _report(self, content: dict[str, Any], text: str) -> None:
        self.print_to_log_file(text)
        if self.local_rank == 0:
            save_json(content, os.path.join(self.output_folder, "transfer.json"), sort_keys=False)


class PCRLScratchTrainer_50epochs(PCRLScratchTrainer):
    epochs = 50


class PCRLScratchTrainer_250epochs(PCRLScratchTrainer):
    epochs = 250


class PCRLFinetuneTrainer_50epochs(PCRLFinetuneTrainer):
    epochs = 50
    control = PCRLScratchTrainer_50epochs


class PCRLFinetuneTrainer_250epochs(PCRLFinetuneTrainer):
    epochs = 250
    control = PCRLScratchTrainer_250epochs


def _check_surroundings(plan: Mapping[str, Any], configuration: str, device: torch.device) -> None:
    """Raise `UserError` where nnU-Net would end in a traceback."""
    if not nnUNet_results.is_set():
        raise UserError("nnUNet_results is not set; set it to the folder that trainings are written to")
    check_configuration(plan, configuration)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU was found, and nnU-Net trains on one by default; add -device cpu to train without")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("-device mps was asked for, but torch finds none; add -device cpu to train without")
    identifier = PlansManager(dict(plan)).get_configuration(configuration).data_identifier
    folder = os.path.join(nnUNet_preprocessed, plan["dataset_name"])
    find_cases(os.path.join(folder, identifier))  # or says that there are none
    refuse_outdated(plan, configuration, folder)
    weights_and_biases.check()
