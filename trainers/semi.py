"""Semi-supervised training: nnU-Net's training on labelled and unlabelled scans."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import dummy_context
from torch import autocast

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet import output_folder
from pcrl_nnunet.config import PASTED_SHARE, FinetuneSettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.finetuning import mixing
from pcrl_nnunet.ingest.unlabelled import unlabelled_cases
from pcrl_nnunet.loading.cases import find_cases
from pcrl_nnunet.plans import channel_labels, channel_names, resolve
from pcrl_nnunet.report.pseudo_labels import draw_pseudo_labels
from pcrl_nnunet.semi_supervised import watch
from pcrl_nnunet.semi_supervised.cases import PREFIX, SemiCases
from pcrl_nnunet.semi_supervised.label_facts import LabelFacts
from pcrl_nnunet.semi_supervised.likeness import warning_of_unlike
from pcrl_nnunet.semi_supervised.loader import UnlabelledDataset, UnlabelledLoader, make_unlabelled_loader
from pcrl_nnunet.semi_supervised.loss import PartsLoss, WatchedLoss, ignoring
from pcrl_nnunet.semi_supervised.settings import WHERE, SemiSettings
from pcrl_nnunet.semi_supervised.teacher import Teacher, keep_largest_pieces
from pcrl_nnunet.settings import changes
from pcrl_nnunet.trainers.finetune import PCRLFinetuneTrainer
from pcrl_nnunet.trainers.scratch import PCRLScratchTrainer
from pcrl_nnunet.transfer.seen import cases_seen
from pcrl_nnunet.transfer.weights import unwrap

NOT_COUNTED = -1  # value of ignored voxels if the dataset has no ignore label
PICTURE = "pseudo_labels.png"
SHOWN = 4  # patches in the picture
EVERY = 20  # epochs after which the log repeats an alarm


class _SemiSupervised(PCRLScratchTrainer):
    """Two phases: nnU-Net's training on labelled cases, then mean teacher with bidirectional copy-paste.

    In the second phase, a step sees as many patches as a step of nnU-Net. In a mixed step, one part of each patch is
    labelled. The other part shows an unlabelled case, and a teacher predicts its labels. With few unlabelled cases only
    some steps are mixed. See `pcrl_nnunet.semi_supervised`.
    Overrides, besides `PCRLScratchTrainer`'s: initialize, get_training_transforms, on_train_epoch_start, on_train_end.
    """

    defaults = MappingProxyType({"pasted_share": PASTED_SHARE})
    _finished: Mapping[str, Any] | None = None  # content of the checkpoint of a finished training that ``--c`` loads

    @classmethod
    def supervised(cls) -> str:
        """Name the trainer of the same training without unlabelled cases."""
        return PCRLScratchTrainer.__name__

    @classmethod
    def check(
        cls, plans: Mapping[str, Any], configuration: str, fold: int | str, dataset_json: Mapping[str, Any]
    ) -> None:
        """Raise `UserError` for a cascade, invalid settings, or a fold without labelled or unlabelled cases."""
        super().check(plans, configuration, fold, dataset_json)
        if resolve(plans, configuration).get("previous_stage") is not None:
            raise UserError(
                f"{configuration} is a cascade, whose input has labels that unlabelled scans lack; train another "
                f"configuration, or {configuration} with -tr {cls.supervised()}"
            )
        semi = SemiSettings.from_plan(plans)
        semi.supervised_epochs(FinetuneSettings.from_plan(plans, cls.defaults).epochs)
        output = output_folder.path_of(cls.__name__, plans["dataset_name"], plans["plans_name"], configuration, fold)
        if not os.path.isfile(os.path.join(output, checkpoint_file.FINAL)):  # validation does not need the scans
            SemiCases.find(plans, configuration, dataset_json, fold, semi.leave_out, cls.supervised())

    def initialize(self) -> None:
        """Add the loss of the second phase."""
        super().initialize()
        manager = self.label_manager
        self.semi = SemiSettings.from_plan(self.plans_manager.plans)
        self.seed = self.semi.seed
        self._regions = bool(manager.has_regions)
        self._ignored: int = manager.ignore_label if manager.has_ignore_label else NOT_COUNTED
        classes = manager.foreground_regions if self._regions else manager.foreground_labels
        self._watch = watch.Watch(len(classes), self._regions, self._ignored, self.device)
        loss = ignoring(self._build_loss(), self._ignored)
        self._loss_of_parts = PartsLoss(loss, self.semi.pseudo_weight, self._watch.of_student)
        self._teacher: Teacher | None = None
        self._mixed_steps = self.num_iterations_per_epoch  # of an epoch; the cases tell later if it is less
        self._history: list[watch.Pseudo] = []
        self._learned = [math.nan] * len(classes)  # last known Dice of each class on labelled patches
        self._set_aside: set[str] = set()
        self._used_before: list[str] = []  # unlabelled cases of the resumed training
        self._said: dict[tuple[str, str], int] = {}  # last epoch in which an alarm was logged

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Return the loaders of labelled cases, and start a loader of unlabelled cases beside them.

        A finished training needs no unlabelled cases: ``--c`` only repeats its end, before nnU-Net validates it.
        """
        if self._finished is not None:
            return super().get_dataloaders()
        plans, this = self.plans_manager.plans, self.configuration_manager
        with self._or_nothing_left_behind():  # before nnU-Net's loaders start their processes
            self._cases = SemiCases.find(
                plans, self.configuration_name, self.dataset_json, self.fold, self.semi.leave_out, self.supervised()
            )
            channels = channel_labels("", self.dataset_json, len(channel_names(self.dataset_json)))
            unlike = warning_of_unlike(self._cases.labelled, [*self._cases.unlabelled.values()], channels)
        loaders = super().get_dataloaders()
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        transforms = self.get_training_transforms(
            this.patch_size, rotation, None, mirror_axes, dummy_2d, use_mask_for_norm=this.use_mask_for_norm
        )
        dataset = UnlabelledDataset(self._cases.unlabelled, this.use_mask_for_norm)
        loader = UnlabelledLoader(
            dataset, self.batch_size, initial_patch_size, this.patch_size, self.label_manager, transforms=transforms
        )
        self.dataloader_unlabelled = make_unlabelled_loader(loader, self.device.type == "cuda")
        changed = set(self._used_before) ^ {*self._cases.unlabelled} if self._used_before else ()
        if changed:
            self.print_to_log_file(f"WARNING: other unlabelled cases than before: {', '.join(sorted(changed))}")
        differing = changes(asdict(self.semi), asdict(SemiSettings()))
        lines = [f"Settings of semi-supervised training: {differing}", self._cases, f"Labels: {self._facts}"]
        steps = self.num_iterations_per_epoch
        self._mixed_steps = self._cases.mixed_steps(steps, self.semi.mixing_ratio)
        if self._mixed_steps < steps:
            lines.append(
                f"Steps of an epoch that may mix patches: {self._mixed_steps} of {steps}. Labelled cases: "
                f"{len(self._cases.labelled)}, unlabelled ones: {len(self._cases.unlabelled)}, which is fewer than "
                f"{self.semi.mixing_ratio:g} for each ({WHERE}.mixing_ratio; with 0, all steps mix)"
            )
        patches = self._mixed_steps * self.configuration_manager.batch_size
        if patches < watch.ENOUGH:
            lines.append(
                f"The log will not judge the pseudo-labels: an epoch has {patches} unlabelled patches, and "
                f"{watch.ENOUGH} are needed. Look at {PICTURE}"
            )
        self.print_to_log_file("\n".join(map(str, lines)), add_timestamp=False)
        if self.local_rank == 0:  # the log's process
            for warning in filter(None, (self._facts.warning_of_missing(), unlike)):
                self.print_to_log_file(warning)
        return loaders

    def get_tr_and_val_datasets(self) -> tuple[nnUNetBaseDataset, nnUNetBaseDataset]:
        """Return nnU-Net's datasets, and read facts from the labels before the loaders start their processes."""
        datasets = super().get_tr_and_val_datasets()
        if self._finished is None:
            self._facts = self._label_facts()
            with self._or_nothing_left_behind():
                self._facts.refuse_without_classes()
        return datasets

    def _label_facts(self) -> LabelFacts:
        """Read facts about the classes from the labelled cases."""
        manager = self.label_manager
        classes = manager.foreground_regions if self._regions else manager.foreground_labels
        labels = {_as_tuple(value): name for name, value in self.dataset_json["labels"].items()}
        names = [case.name for case in self._cases.labelled]
        dataset = self.dataset_class(self.preprocessed_dataset_folder, names)

        def read(name: str) -> tuple[Any, Any]:
            _, segmentation, _, properties = dataset.load_case(name)
            return segmentation, properties["class_locations"]

        return LabelFacts.of_cases(
            names,
            read,
            {labels[_as_tuple(value)]: tuple(value) if isinstance(value, list) else value for value in classes},
            self.configuration_manager.patch_size,
            manager.ignore_label,
        )

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
        """Return nnU-Net's augmentation.

        Without loading processes it skips timing the faster way to blur, which would make runs differ.
        """
        transforms = PCRLScratchTrainer.get_training_transforms(*args, **kwargs)
        if get_allowed_n_proc_DA() == 0:
            for transform in transforms.transforms:
                inner = transform.transform if isinstance(transform, RandomTransform) else transform
                if isinstance(inner, GaussianBlurTransform):
                    inner.benchmark = False
        return transforms

    def on_train_epoch_start(self) -> None:
        """Begin the second phase after the first phase. Loading in this process draws from the epoch's seed."""
        super().on_train_epoch_start()
        seed = np.random.SeedSequence((self.semi.seed, self.current_epoch, self.local_rank)).generate_state(1)[0]
        random.seed(int(seed))
        np.random.seed(seed)
        torch.manual_seed(int(seed))
        if self._teacher is None and self._is_first_phase_over():
            self.print_to_log_file("The second phase begins: a teacher labels the unlabelled patches.")
            self._teacher = self._new_teacher()

    def _is_first_phase_over(self) -> bool:
        """Tell if the second phase can begin. A class that the network does not find yet would be unlearned in it."""
        least, longest = self.semi.supervised_epochs(self.num_epochs)
        if self.current_epoch < least:
            return False
        missing = watch.not_learned(self._learned, self._facts)
        is_last = self.current_epoch >= longest
        if missing and (is_last or (self.current_epoch - least) % EVERY == 0):
            waits = "The first phase goes on."
            ends = "The second phase begins all the same; train longer (pcrl.finetune.epochs)"
            self.print_to_log_file(
                f"WARNING: after {self.current_epoch} epochs the network does not find {', '.join(missing)} in the "
                f"labelled patches. {ends if is_last else waits}"
            )
        return is_last or not missing

    def _new_teacher(self) -> Teacher:
        student = unwrap(self.network)
        teacher = Teacher(student, self.semi.teacher_momentum)
        teacher.update(student)  # the first update copies
        return teacher

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train nnU-Net's step. In the second phase, the parts of a mixed patch have a loss of their own."""
        if self._teacher is None:
            with self._with_loss(WatchedLoss(self.loss, self._watch.of_student)):
                return super().train_step(batch)
        with self._with_loss(self._loss_of_parts) if self._mixes() else nullcontext():
            result = super().train_step(batch)
        self._teacher.update(unwrap(self.network))
        return result

    def mix(self, batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Mix labelled patches with each other in the first phase, and with unlabelled ones in the second."""
        if not self._mixes():
            return batch
        return super().mix(batch, rng) if self._teacher is None else self._mixed(batch, self._teacher, rng)

    def _mixes(self) -> bool:
        """Tell if this step may mix patches: the mixed steps lie evenly in the epoch."""
        steps, mixed = self.num_iterations_per_epoch, self._mixed_steps
        return (self._step + 1) * mixed // steps > self._step * mixed // steps

    @contextmanager
    def _with_loss(self, loss: torch.nn.Module) -> Iterator[None]:
        usual: Any = self.loss
        self.loss: Any = loss
        try:
            yield
        finally:
            self.loss = usual

    def _mixed(self, batch: dict[str, Any], teacher: Teacher, rng: np.random.Generator) -> dict[str, Any]:
        """Paste labelled and unlabelled patches into each other, with the teacher's labels of unlabelled patches."""
        data, labels = self.on_device(batch)
        unlabelled = next(self.dataloader_unlabelled)
        with self._or_nothing_left_behind():
            if "error" in unlabelled:
                raise UserError(unlabelled["error"])
        for name, sentence in unlabelled["set_aside"].items():
            if name not in self._set_aside:  # each loading process reports it
                self.print_to_log_file(f"WARNING: set aside: {sentence}")
                self._set_aside.add(name)
        images = unlabelled["data"].to(self.device, non_blocking=True)
        with autocast(self.device.type) if self.device.type == "cuda" else dummy_context():
            pseudo = teacher.labels(images, self._regions)
        first = 0 if self._regions else 1  # in label maps, background comes before the classes
        pseudo = keep_largest_pieces(pseudo, [first + number for number in self._facts.in_one_piece])
        self._watch.of_teacher(pseudo)
        self._shown = images[:SHOWN], pseudo[:SHOWN]
        if self._regions:
            nowhere = torch.zeros_like(pseudo[:, :1])
            pseudo = torch.cat([pseudo, nowhere], 1)
            labels = labels if self.label_manager.has_ignore_label else torch.cat([labels, nowhere], 1)
        boxes = mixing.random_boxes(rng, len(data), data.shape[2:], self.semi.box_share).to(self.device)
        part = mixing.labelled_parts(boxes, self._labelled_around(len(data), rng))
        halves = [mixing.with_ignored(labels, part, self._ignored), mixing.with_ignored(pseudo, ~part, self._ignored)]
        target = mixing.at_scales(torch.cat(halves, 1), batch["target"])
        keys = [*batch["keys"], *unlabelled["keys"]]
        return {"data": mixing.paste(data, images, part), "target": target, "keys": keys}

    def _labelled_around(self, number: int, rng: np.random.Generator) -> int:
        """Return the number of first patches with the labelled case around the box; the others have it in the box.

        nnU-Net centres the last patches on a voxel of a class, where the box would hide it.
        """
        if number > 1:
            return number // 2
        looks_for_classes = self.oversample_foreground_percent  # 0 or 1 if each process has one patch
        return int(rng.random() >= looks_for_classes)

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log the teacher's labels, warn if they cannot be trusted, and draw them."""
        super().on_train_epoch_end(train_outputs)
        pseudo = self._watch.finish_epoch(self.is_ddp)
        if self._teacher is None:
            both = zip(pseudo.agreement, self._learned, strict=True)
            self._learned = [before if math.isnan(dice) else dice for dice, before in both]
            self.print_to_log_file(watch.as_dice(pseudo, self._facts))
            return
        self._history.append(pseudo)
        self.print_to_log_file(watch.as_text(pseudo, self._facts))
        if not self._teacher.all_finite:
            self.print_to_log_file("WARNING: the teacher's output was not finite: look at the losses of this training")
        for key, sentence in watch.alarms(self._history, self._facts).items():
            if self.current_epoch - self._said.get(key, -EVERY) >= EVERY:
                self.print_to_log_file(sentence)
                self._said[key] = self.current_epoch
        if self.local_rank == 0:
            path = os.path.join(self.output_folder, PICTURE)
            images, labels = (shown.cpu().numpy() for shown in self._shown)
            names = self.plans_manager.dataset_name, self.plans_manager.plans_name
            run = output_folder.title_of(type(self).__name__, *names, self.configuration_name, self.fold)
            first = self.current_epoch + 1 - len(self._history)
            draw_pseudo_labels(self._history, self._facts, first, images, labels, run, path)

    def on_train_end(self) -> None:
        """End the training, and the processes that load unlabelled cases."""
        if self._teacher is None and self._finished is None:
            missing = ", ".join(watch.not_learned(self._learned, self._facts)) or "each class in time"
            self.print_to_log_file(
                f"WARNING: the second phase never began, because the network did not find {missing}. No unlabelled "
                f"patch was used: this is a training on the labelled cases alone. Train longer (pcrl.finetune.epochs)"
            )
        super().on_train_end()
        if self._finished is None:
            getattr(self.dataloader_unlabelled, "_finish", lambda: None)()

    def extra_content(self) -> dict[str, Any]:
        """Return the entries that a resumed training needs, and the cases in use or left out."""
        if self._finished is not None:
            return {**super().extra_content(), "semi": self._finished}
        return {
            **super().extra_content(),
            "semi": {
                "settings": vars(self.semi),
                "teacher": None if self._teacher is None else self._teacher.state_dict(),
                "history": watch.as_plain(self._history),
                "learned": self._learned,
                "labelled_cases": [case.name for case in self._cases.labelled],
                "unlabelled_cases": list(dict.fromkeys((*self._used_before, *self._cases.unlabelled))),
                "copies": dict(self._cases.copies),
                "unreadable": list(self._cases.unreadable),
                "set_aside": sorted(self._set_aside),
            },
        }

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Load a checkpoint with the teacher and the history of pseudo-labels. Changed settings are logged."""
        super().load_checkpoint(filename_or_checkpoint)
        assert isinstance(filename_or_checkpoint, str)  # nnU-Net's own code only passes a path
        content = torch.load(filename_or_checkpoint, map_location="cpu", weights_only=False)["semi"]
        self._history = [watch.Pseudo(**epoch) for epoch in content["history"]]
        self._learned = content["learned"]
        self._used_before = content["unlabelled_cases"]
        self._set_aside = {*content["set_aside"]}
        if self.current_epoch >= self.num_epochs:
            self._finished = content
        else:
            self._log_changed_settings(content["settings"])
        if content["teacher"] is not None:
            self._teacher = self._new_teacher()
            self._teacher.load_state_dict(content["teacher"])

    def _log_changed_settings(self, before: Mapping[str, Any]) -> None:
        """Warn of settings that differ from the settings of the training that continues, or that it did not have."""
        for name, now in vars(self.semi).items():
            if name not in before or before[name] != now:
                was = f"was {json.dumps(before[name])}" if name in before else "did not exist"
                self.print_to_log_file(f"WARNING: {WHERE}.{name} {was} so far, and is {json.dumps(now)} from now on")


def _as_tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


class PCRLSemiSupervisedScratchTrainer(_SemiSupervised):
    """Semi-supervised training from random weights: the control of pretraining."""


class PCRLSemiSupervisedTrainer(_SemiSupervised, PCRLFinetuneTrainer):
    """Semi-supervised training from a pretrained network, found and loaded as in `PCRLFinetuneTrainer`."""

    of_any_method = "PCRLSemiSupervisedTrainer"
    control = PCRLSemiSupervisedScratchTrainer

    @classmethod
    def supervised(cls) -> str:
        """Name the trainer of the same training without unlabelled cases."""
        return PCRLFinetuneTrainer.__name__ + (f"_{cls.method}" if cls.method else "")

    def _seen_of_others(self, checkpoint: Mapping[str, Any]) -> dict[str, list[str]]:
        """Log the cases of ``leave_out`` that the pretraining saw: it does not know this setting."""
        dataset, wanted = self.plans_manager.dataset_name, self.semi.leave_out
        if not wanted:
            return {}
        own = [case for case in find_cases(self.preprocessed_dataset_folder) if case.name in wanted]
        folder, identifier = self.preprocessed_dataset_folder_base, self.configuration_manager.data_identifier
        scans = [case for case in unlabelled_cases(folder, identifier) if f"{PREFIX}{case.name}" in wanted]
        seen = cases_seen(checkpoint, dataset, own)
        seen += [f"{PREFIX}{name}" for name in cases_seen(checkpoint, dataset, scans)]
        self.print_to_log_file(
            f"Pretraining saw the images of {len(seen)} of the {len(wanted)} cases of {WHERE}.leave_out"
            + (f": {', '.join(seen)}. It does not know this setting: see docs/semi_supervised.md." if seen else ".")
        )
        return {"left_out_cases_seen": seen}
