"""The pretraining as an nnUNetTrainer: folders, logs, progress.png and resuming are what nnU-Net's users know."""

from __future__ import annotations

import copy
import os
import signal
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from time import time
from typing import Any

import numpy as np
import torch
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import autocast
from tqdm import tqdm

from pcrl_nnunet import checkpoint, output_folder, weights_and_biases
from pcrl_nnunet.commands import command, device_option
from pcrl_nnunet.config import PretrainSettings, without_probe, without_settings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.probe import ALL_STAGES, AT_START, Probe, labelled, names_of_values
from pcrl_nnunet.files import whole
from pcrl_nnunet.ingest.maskless import trainer_for
from pcrl_nnunet.ingest.target import TARGET_KEY
from pcrl_nnunet.loading.cases import Case, fingerprint, unpack
from pcrl_nnunet.loading.loader import Batches, make_loader
from pcrl_nnunet.methods import Levels, PCRLv2, StepOutput
from pcrl_nnunet.named_plans import name_of
from pcrl_nnunet.networks import encoder_of
from pcrl_nnunet.pretraining import distributed
from pcrl_nnunet.pretraining.cases import PretrainingData
from pcrl_nnunet.pretraining.monitor import Monitor, judge
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.report.pictures import pretraining_progress
from pcrl_nnunet.trainers.classify import PCRLClassificationTrainer
from pcrl_nnunet.trainers.finetune import PCRLFinetuneTrainer
from pcrl_nnunet.transfer.foreign import read_encoder
from pcrl_nnunet.transfer.seen import UNKNOWN_CASES
from pcrl_nnunet.transfer.shapes import check_architecture
from pcrl_nnunet.transfer.weights import decoder_levels, load_encoder
from pcrl_nnunet.views import kernels

GRADIENT_CLIP = 12  # nnU-Net's
_TERMS = ("restoration", "comparison_global", "comparison_local")
_WATCHED = ("restoration_ratio", "matched_minus_shuffled", "sd_ratio", "effective_rank")
_PACKAGES = ("pcrl_nnunet", "nnunetv2", "torch", "batchgenerators", "dynamic_network_architectures", "numpy")


class _Terminated(BaseException):
    """SIGTERM came where there is no step to finish."""


class _Sigterm:
    """Within it, SIGTERM does not end the process (in the main thread, which hears it)."""

    def __init__(self, at_once: bool) -> None:
        self.heard = False
        self.at_once = at_once  # raises `_Terminated`; False: whoever looks at `heard` stops in time

    def _hear(self, number: int, frame: Any) -> None:
        self.heard = True
        self.look()

    def look(self) -> None:
        """Raises `_Terminated` if it came and is to be answered at once: the first one, of a scheduler's several."""
        if self.heard and self.at_once:
            self.at_once = False
            raise _Terminated

    def __enter__(self) -> _Sigterm:
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if self.in_main_thread:
            self.before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self.in_main_thread:
            signal.signal(signal.SIGTERM, self.before)


def _command_to_go_on(saved: bool = True) -> str:
    """Write the command that goes on with this training, or starts it again if nothing has been saved."""
    words = [word for word in sys.argv[1:] if word != "--c" and (word != "--overwrite" or not saved)]
    again = command(os.path.basename(sys.argv[0]), *words, *([] if "--overwrite" in words else ["--c"]))
    return f"the same torchrun, with {again}" if "TORCHELASTIC_RUN_ID" in os.environ else again


def _mean(values: list[float]) -> float:
    """Not a number where there are none."""
    return float(np.mean(values)) if values else float("nan")


def _size(path: str) -> int | None:
    """None: it is not there, which is said where it is read."""
    return os.path.getsize(path) if os.path.exists(path) else None


def agreement(
    settings: PretrainSettings, plans: Mapping[str, Any], cases: Sequence[Case], other_plans: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a training state and the training that goes on from it have to agree in."""
    return {
        "settings": without_probe(settings.as_dict()),
        "plans": without_settings(plans),
        "cases": [case.name for case in cases],
        "other_plans": dict(other_plans),
    }


def refuse_another(state: Mapping[str, Any], now: Mapping[str, Any], path: str) -> None:
    """Raises `UserError` where a training state differs from the `agreement` of the training at hand.

    Args:
        path: of the state.
    """
    # settings of the plan that matter here are among the state's own
    of_state = {"settings": without_probe(state["settings"]), "plans": without_settings(state["plans"])}
    for what, value in now.items():
        then = of_state.get(what, state[what])
        if then != value:
            differing = (
                [name for name in value if value[name] != then.get(name)]
                if isinstance(value, dict)
                else sorted(set(value) ^ set(then))[:5]
            )
            raise UserError(
                f"the {what.replace('_', ' ')} {differing} differ from those that {path} was trained with; continue "
                f"with the same ones, or start anew with --overwrite in the place of --c"
            )


class PretrainLogger(LocalLogger):
    """nnU-Net's logger with the pretraining's curves: LocalLogger knows a fixed set of keys and plots just these."""

    def __init__(self, probed: Sequence[str] = ()) -> None:
        super().__init__()
        keys = ("train_losses", *_TERMS, *_WATCHED, *probed, "lrs", "epoch_start_timestamps", "epoch_end_timestamps")
        self.my_fantastic_logging: dict[str, list[float]] = {key: [] for key in keys}

    def load_checkpoint(self, checkpoint: dict[str, list[float]]) -> None:
        """Go on with these curves; of a probe that was not on before, there is none of the epochs so far."""
        none = [float("nan")] * len(checkpoint["train_losses"])
        super().load_checkpoint({key: checkpoint.get(key, list(none)) for key in self.my_fantastic_logging})

    def plot_progress_png(self, output_folder: str) -> None:
        """Write progress.png, whole or not at all."""
        path = os.path.join(output_folder, "progress.png")
        with whole(path) as draft:
            pretraining_progress(self.my_fantastic_logging, draft)


class PCRLPretrainTrainer(nnUNetTrainer):
    """Pretrains the encoder of a plan's network with PCRLv2, without labels; `pcrl_nnunet_pretrain` runs it.

    Replaced of nnUNetTrainer: __init__, initialize, configure_optimizers, get_dataloaders, run_training,
    on_train_start, train_step, on_train_epoch_end, on_epoch_end, on_train_end, save_checkpoint, load_checkpoint,
    perform_actual_validation. There is no validation: the monitor says whether it learns. On SIGTERM, which schedulers
    send before they end a job, it saves after the step at hand and exits with 0.

    Args:
        plans: nnU-Net's plan plus ``continue_training`` (as nnU-Net adds it) and ``pcrl_settings``, a
            `PretrainSettings`; both are taken out, so hand in a copy. ``pcrl_init``, too, if given: the checkpoint
            whose encoder it starts from (see `foreign.read_encoder`); and ``pcrl_data``: the `PretrainingData`,
            found already.
        configuration, fold, dataset_json, device: as in nnUNetTrainer; fold's validation cases are left out.
    """

    was_initialized: bool
    current_epoch: int
    grad_scaler: torch.amp.GradScaler | None

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own default)
    ):
        settings, init = plans.pop("pcrl_settings", None), plans.pop("pcrl_init", None)
        data: PretrainingData | None = plans.pop("pcrl_data", None)
        if settings is None:  # nnUNetv2_train -tr PCRLPretrainTrainer
            own = command("pcrl_nnunet_pretrain", d=plans["dataset_name"], c=configuration, p=plans["plans_name"])
            raise SystemExit(
                f"Error: PCRLPretrainTrainer pretrains without labels and has a command of its own: run {own}"
            )
        data = data or PretrainingData.find(plans, configuration, fold)
        with output_folder.creating(), weights_and_biases.held_back():
            super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:  # nnU-Net's own takes the GPU of the process's number among those of all machines, and no CPU
            self.device = device
            self.grad_scaler = self.grad_scaler if device.type == "cuda" else None
        self.settings: PretrainSettings = settings
        self.cases, self.datasets = data.cases, data.found.datasets
        self.note_on_fold, self.copies_left_out = data.found.note_on_fold(), dict(data.found.copies)
        self.other_plans = dict(data.other_plans)
        self.print_to_log_file(data.found)
        self.num_epochs, self.num_iterations_per_epoch = settings.epochs, settings.iters_per_epoch
        stages = len(self.configuration_manager.network_arch_init_kwargs["strides"])
        self.probe_keys = [*names_of_values(stages), AT_START] if settings.probe_every else []
        self.probe: Probe | None = None
        self.probed: dict[int, dict[str, float]] = {}  # what it found, by epochs done
        self.logger.local_logger = PretrainLogger(self.probe_keys)
        self.monitor = Monitor()
        self.report = Report()
        self.outputs: list[dict[str, float]] = []  # of this epoch's steps so far
        self.last_loss = float("nan")
        self.init_path: str | None = init
        self.init: dict[str, Any] | None = None  # what is known of it, once it has been loaded

    @property
    def step(self) -> int:
        """Steps done."""
        return self.current_epoch * self.num_iterations_per_epoch + len(self.outputs)

    def initialize(self) -> None:
        """The plan's network, and the method around its encoder."""
        if self.was_initialized:
            return
        torch.manual_seed(self.settings.seed)
        if self.device.type == "cuda":  # as nnunetv2.run: of all of a training's few shapes the fastest algorithm
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
        if self.grad_scaler is not None:  # while it looks for its scale, it leaves the first steps out
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
        self.num_input_channels = determine_num_input_channels(
            self.plans_manager, self.configuration_manager, self.dataset_json
        )
        self.plan_network = self.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        )
        self.network = PCRLv2.from_settings(encoder_of(self.plan_network), self.num_input_channels, self.settings)
        self.network.to(self.device)
        if self.is_ddp:
            distributed.synchronise_batch_norms(self.network)
        self.optimizer, self.lr_scheduler = self.configure_optimizers()
        self.was_initialized = True

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """The optimiser, and a cosine decay to 0 over all steps (method.md 2, "Schedule")."""
        s = self.settings
        parameters = self.network.parameters()
        optimizer: torch.optim.Optimizer
        if s.optimizer == "adamw":
            optimizer = torch.optim.AdamW(parameters, s.initial_lr, weight_decay=s.weight_decay)
        else:
            optimizer = torch.optim.SGD(parameters, s.initial_lr, momentum=s.momentum, weight_decay=s.weight_decay)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.epochs * s.iters_per_epoch)

    def get_dataloaders(self) -> Batches:
        """Batches from the step where the training stands; of each, this rank's part."""
        first_sample, number = distributed.part_of(self.settings.batch_size)
        return make_loader(
            self.cases,
            self.settings.views,
            self.settings.augmentation,
            number,
            self.settings.seed,
            first_sample,
            first_step=self.step,
            num_workers=get_allowed_n_proc_DA(),
            pin_memory=self.device.type == "cuda",
        )

    def unpack(self) -> None:
        """Make .npy of an older preprocessing's .npz, as nnU-Net does before it trains: of these, boxes can be read."""
        if any(case.path.endswith(".npz") for case in self.cases):
            self.print_to_log_file(f"Unpacking the .npz files in {self.preprocessed_dataset_folder}")
            if distributed.local_rank() == 0:
                self._unpack()
            distributed.wait_for_all()
            self._unpack()

    def _unpack(self) -> None:
        with ThreadPool(max(1, get_allowed_n_proc_DA())) as pool:
            self.cases = pool.map(partial(unpack, segmentation=self.settings.probe_every > 0), self.cases)

    def run_training(self) -> None:
        """All epochs; the bar is for terminals, the lines are for the log."""
        # of several processes the others would wait for one that ends alone: they all end after the first step
        with _Sigterm(at_once=not self.is_ddp) as sigterm:
            try:
                self.on_train_start()
                sigterm.at_once = False
                self._run_epochs(sigterm)
                sigterm.at_once = True  # all states are saved: the end can be done again
                sigterm.look()
                self.on_train_end()
            except _Terminated:
                self._say_how_to_go_on(f"Stopped by SIGTERM after step {self.step}; nothing is lost")
                raise SystemExit(0) from None

    def _run_epochs(self, sigterm: _Sigterm) -> None:
        total = self.num_epochs * self.num_iterations_per_epoch
        try:
            with tqdm(
                total=total,
                initial=self.step,
                disable=None if self.local_rank == 0 else True,
                unit="step",
                dynamic_ncols=True,
            ) as bar:
                while self.current_epoch < self.num_epochs:
                    if not self.outputs:  # else it goes on within an epoch
                        self.on_epoch_start()
                        self.logger.log("lrs", self.optimizer.param_groups[0]["lr"], self.current_epoch)
                    while len(self.outputs) < self.num_iterations_per_epoch:
                        output = self.train_step(next(self.dataloader_train), self.step)
                        self.outputs.append(output)
                        bar.set_postfix({name: f"{value:.3f}" for name, value in output.items()}, refresh=False)
                        bar.update()
                        # schedulers' signals reach processes between different steps
                        if distributed.on_any_rank(sigterm.heard, self.device):
                            latest = os.path.join(self.output_folder, checkpoint.LATEST)
                            self.save_checkpoint(latest)
                            self._say_how_to_go_on(f"Stopped by SIGTERM after step {self.step}, saved as {latest}")
                            self._write_report()
                            raise SystemExit(0)
                    self.on_train_epoch_end(self.outputs)
                    self.on_epoch_end(bar)
        finally:
            self.dataloader_train.close()

    def _say_how_to_go_on(self, why: str) -> None:
        saved = any(
            os.path.isfile(os.path.join(self.output_folder, n)) for n in (checkpoint.LATEST, checkpoint.PREVIOUS)
        )
        self.print_to_log_file(f"{why}. To go on: {_command_to_go_on(saved)}")

    def _write_report(self, finished: bool = False) -> None:
        """report.html, with the commands that come next; it never costs the training."""
        if self.local_rank == 0:
            following = [] if finished else [f"Go on with: {_command_to_go_on()}"]
            following.append(self._next_command(os.path.join(self.output_folder, checkpoint.FINAL)))
            self.report.write(self, following, finished)

    def on_train_start(self) -> None:
        """Say what is about to happen, start the loader."""
        self.initialize()
        self.print_to_log_file(f"Device: {self.device}, output: {self.output_folder}")
        self.print_to_log_file(f"Settings: {self.settings}")
        by = "numba" if kernels.compiled else "scipy, several times slower than numba, which is not installed"
        self.print_to_log_file(f"Views are computed by {by}")
        if self.init_path and self.current_epoch == 0:  # else its weights are in the training state
            self._load_init(self.init_path)
        if self.is_ddp:
            _, number = distributed.part_of(self.settings.batch_size)
            self.print_to_log_file(
                f"{distributed.world_size()} processes share each batch of {self.settings.batch_size} pairs; the "
                f"monitor watches the {number} of the first one"
            )
            for what, value in (
                ("settings", repr(self.settings)),
                ("plans", checkpoint.plans_hash(self.plans_manager.plans)),
                ("cases", repr([(case.name, _size(case.path)) for case in self.cases])),
                ("versions", repr([version(name) for name in _PACKAGES])),
            ):
                distributed.require_same(what, value)
            distributed.same_weights(self.network)
        self.unpack()
        if self.settings.probe_every and self.local_rank == 0:
            self._start_probe()
        weights_and_biases.begin(self)
        self.dataloader_train = self.get_dataloaders()

    def _start_probe(self) -> None:
        """Find the labels, and what the encoder is worth before the first step."""
        cases, size = labelled(self.cases, self.preprocessed_dataset_folder), self.settings.views.global_input_size
        self.probe = Probe(cases, size, self.settings.seed, self.label_manager.ignore_label)
        self.print_to_log_file(self.probe)
        if self.step == 0:
            self.probed[0] = self.probe(self.plan_network.encoder, self.device)
            values = ", ".join(f"{name} {value:.4f}" for name, value in self.probed[0].items())
            self.print_to_log_file(f"Before the first step: {values}")

    def _probe(self, epochs_done: int) -> dict[str, float]:
        """What to log of the probe after an epoch: nothing, unless it is its turn; after the last one it is."""
        if self.probe is None or (epochs_done % self.settings.probe_every and epochs_done < self.num_epochs):
            return {}
        self.probed[epochs_done] = self.probe(self.plan_network.encoder, self.device)
        return {**self.probed[epochs_done], AT_START: self.probed.get(0, {}).get(ALL_STAGES, float("nan"))}

    def _load_init(self, path: str) -> None:
        """Start from another training's encoder and, where that is of ours, from what fits of decoder and heads."""
        content = read_encoder(path)
        plans = self.plans_manager.plans
        try:
            check_architecture(content, plans, self.configuration_name, self.preprocessed_dataset_folder_base)
            report = load_encoder(self.plan_network, content, allow_partial=True)
        except UserError as error:
            raise UserError(f"-init {path}: {error}") from error
        own, given = self.network.state_dict(), content.get("method_weights", {})
        fitting = {n: t for n, t in given.items() if n in own and t.shape == own[n].shape}
        if decoder_levels(given) != decoder_levels(own):
            fitting = {}  # levels are counted from the coarsest: with other stages their numbers mean others
        self.network.load_state_dict(fitting, strict=False)
        known = ("method", "datasets", "configuration", "fold", "epochs", "cases")
        self.init = {
            "checkpoint": path,
            "encoder_share": report.encoder_share,
            "all_cases_known": content.get("all_cases_known", True),
            **{k: content[k] for k in known},
        }
        origin = ", ".join(f"{key} {content[key]}" for key in known if key != "cases")
        self.print_to_log_file(
            f"Starting from {path}\n  {origin}\n{report.summary()}\n"
            f"{len(fitting)} of {len(given)} tensors of its decoder and heads go on"
        )
        if not self.init["all_cases_known"]:
            self.print_to_log_file(UNKNOWN_CASES)

    def train_step(self, batch: dict[str, Any], step: int, levels: Levels | None = None) -> dict[str, float]:
        """One step, at the drawn levels unless others are given; the losses by name.

        Raises:
            UserError: the loss or the gradient is not finite, before the weights are touched.
        """
        data: dict[str, torch.Tensor] = {
            name: torch.as_tensor(batch[name]).to(self.device, non_blocking=True)
            for name in ("input", "target", "local")
            if name in batch
        }
        levels = levels or self.network.draw_levels(self.settings.seed, step)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            output = self._forward_and_backward(data, levels, batch, step)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU's memory does not suffice for a step of {self.settings.batch_size} pairs "
                f"({str(error).splitlines()[0]}); give a smaller -batch_size, not under 4, or make smaller views under "
                f"pcrl.pretrain.views in the plan"
            ) from error
        self.lr_scheduler.step()
        self.monitor.update(output, data["target"])
        losses = torch.stack([output.loss.detach(), *output.terms.values()]).float()
        values = distributed.total(losses * self._share(batch)).tolist()
        return dict(zip(("loss", *output.terms), values, strict=True))

    def _share(self, batch: dict[str, Any]) -> float:
        """Of all ranks' batch that this one has. Losses are means over a batch: times this, their sum is all's mean."""
        return len(batch["cases"]) / self.settings.batch_size if self.is_ddp else 1.0

    def _forward_and_backward(
        self, data: dict[str, torch.Tensor], levels: Levels, batch: dict[str, Any], step: int
    ) -> StepOutput:
        """One step of the optimiser."""
        # float32 on the CPU: its bfloat16 3D convolutions gave gradients that were not finite
        with autocast("cuda") if self.device.type == "cuda" else nullcontext():
            output: StepOutput = self.network(data, levels, step / (self.num_epochs * self.num_iterations_per_epoch))
        loss = output.loss * self._share(batch)
        self._stop_unless_finite("loss", distributed.total(loss), batch, step)
        if self.grad_scaler is not None:
            self.grad_scaler.scale(loss).backward()
            distributed.sum_gradients(self.network.parameters())
            self.grad_scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP)
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        else:
            loss.backward()
            distributed.sum_gradients(self.network.parameters())
            norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), GRADIENT_CLIP)
            self._stop_unless_finite("gradient", norm, batch, step)  # clipping makes NaN of an infinite one
            self.optimizer.step()
        return output

    @staticmethod
    def _stop_unless_finite(what: str, value: torch.Tensor, batch: dict[str, Any], step: int) -> None:
        if not torch.isfinite(value):  # on all ranks or on none: it is their sum
            cases = sorted({case for of_rank in distributed.of_all_ranks(batch["cases"]) for case in of_rank})
            raise UserError(
                f"the {what} of step {step} is {value.item()}; the weights of the last epoch are kept. Look at the "
                f"images of its cases {', '.join(cases)}, or lower pcrl.pretrain.initial_lr and "
                f"start again"
            )

    def on_train_epoch_end(self, train_outputs: list[dict[str, float]]) -> None:
        """Means of the epoch into the log."""
        epoch = self.current_epoch
        self.last_loss = float(np.mean([o["loss"] for o in train_outputs]))
        self.logger.log("train_losses", self.last_loss, epoch)
        for name in _TERMS:  # of which some settings lack one
            self.logger.log(name, _mean([o[name] for o in train_outputs if name in o]), epoch)
        for name, of_level in self.monitor.summary().items():
            self.logger.log(name, _mean(list(of_level.values())), epoch)
        probed = self._probe(epoch + 1)
        for name in self.probe_keys:
            self.logger.log(name, probed.get(name, float("nan")), epoch)

    def on_epoch_end(self, bar: tqdm | None = None) -> None:
        """One line, the alarms, the training state, progress.png, now and then the report; the next epoch begins."""
        epoch, value = self.current_epoch, self.logger.get_value
        self.logger.log("epoch_end_timestamps", time(), epoch)
        seconds = value("epoch_end_timestamps", epoch) - value("epoch_start_timestamps", epoch)
        left = timedelta(seconds=round(seconds * (self.num_epochs - epoch - 1)))
        values = {name: value(name, epoch) for name in (*_TERMS, *_WATCHED, *self.probe_keys)}
        parts = [f"{name} {number:.4f}" for name, number in values.items() if not np.isnan(number)]
        line = (
            f"epoch {epoch + 1}/{self.num_epochs}: {', '.join(parts)}, {self.num_iterations_per_epoch / seconds:.2f} "
            f"steps/s, {left} left"
        )
        summary = self.monitor.summary()
        verdict = judge(summary, (epoch + 1) * self.num_iterations_per_epoch)
        self.report.add(epoch + 1, summary)
        lines = [line, *(f"ALARM: {alarm}" for alarm in verdict.alarms)]
        if epoch + 1 == self.num_epochs:
            lines.append(f"Is it learning? {verdict.text}")
        on_terminal = bar is not None and not bar.disable
        for line in lines:
            if bar is not None and on_terminal:
                bar.write(line)  # print() would tear the bar
            self.print_to_log_file(line, also_print_to_console=not on_terminal)
        self.monitor.clear()
        self.outputs = []
        self.current_epoch += 1
        self.save_checkpoint(os.path.join(self.output_folder, checkpoint.LATEST))
        if self.local_rank == 0:
            try:
                self.logger.plot_progress_png(self.output_folder)
            except OSError as error:
                self.print_to_log_file(f"WARNING: progress.png could not be written ({error}); the training goes on")
        if self.report.is_due():
            self._write_report()

    def on_train_end(self) -> None:
        """Write what fine-tuning takes, then drop the training states."""
        if self.local_rank != 0:
            return
        final = os.path.join(self.output_folder, checkpoint.FINAL)
        checkpoint.write(final, self.final_content())
        self._write_report(finished=True)
        output_folder.set_overwriting(self.output_folder, False)
        # the oldest first: killed in between, --c goes on from the latest
        for name in (checkpoint.DAMAGED, checkpoint.PREVIOUS, checkpoint.LATEST):
            if os.path.isfile(path := os.path.join(self.output_folder, name)):
                os.remove(path)
        self.print_to_log_file(f"Pretraining done: {final}\n{self._next_command(final)}")

    def _next_command(self, final: str) -> str:
        """A line that says what to do with the pretraining."""
        plans = self.plans_manager.plans
        if TARGET_KEY in plans:
            target, plans_name = (plans[TARGET_KEY][key] for key in ("dataset_name", "plans_name"))
            name = "_".join(part for part in (plans["dataset_name"], name_of(plans)) if part)
            bring = command(
                "pcrl_nnunet_transfer", i=final, d=target, c=self.configuration_name, p=plans_name, name=name
            )
            return f"Bring it into {target} with: {bring}"
        trainer = trainer_for(plans, self.dataset_json)
        if trainer is None:
            bring = command("pcrl_nnunet_transfer", i=final, d="DATASET", name=plans["dataset_name"])
            return (
                f"{plans['dataset_name']} has neither masks nor a table of classes; bring the encoder into a dataset "
                f"that has, with: {bring}"
            )
        fold, others = (0, ", and the other folds alike,") if self.fold == "all" else (self.fold, "")
        train = command(
            *("nnUNetv2_train", plans["dataset_name"], self.configuration_name, fold),
            tr=trainer,
            p=plans["plans_name"],
            device=device_option(self.device.type),
        )
        return f"Fine-tune fold {fold}{others} with: {train}"

    def control_of_next_training(self) -> str:
        """Name the trainer that trains as the next command's does, without the pretrained weights."""
        trainers = (PCRLFinetuneTrainer, PCRLClassificationTrainer)
        controls = {trainer.__name__: trainer.control.__name__ for trainer in trainers}
        return controls[trainer_for(self.plans_manager.plans, self.dataset_json) or PCRLFinetuneTrainer.__name__]

    def final_content(self) -> dict[str, Any]:
        """What ``checkpoint_final.pth`` holds; see `pcrl_nnunet.checkpoint`."""
        network = copy.deepcopy(self.plan_network).cpu()  # aliases stay aliases, and are stored once
        encoder = network.encoder
        pretrained = {t.untyped_storage()._cdata for t in encoder.state_dict().values()}
        storages = {name: t.untyped_storage()._cdata for name, t in network.state_dict().items()}
        random = [name for name, storage in storages.items() if storage not in pretrained]
        method = self.network.state_dict().items()
        own = {name: t.cpu() for name, t in method if not name.startswith("encoder.")}
        plans, this = self.plans_manager.plans, self.configuration_manager.configuration
        with ThreadPool(max(1, get_allowed_n_proc_DA())) as pool:  # reading and hashing do not hold the interpreter
            fingerprints = pool.map(self._fingerprint, self.cases)
        return {
            "format": checkpoint.FORMAT,
            "network_weights": network.state_dict(),
            "random_keys": random,
            "method_weights": own,
            "encoder_hash": checkpoint.encoder_hash(encoder),
            "method": self.network.name,
            "citations": [
                {
                    "type": "Pretraining method",
                    "name": type(self.network).__name__,
                    "apa_citations": list(self.network.citations),
                }
            ],
            "settings": self.settings.as_dict(),
            "plans": plans,
            "plans_hash": checkpoint.plans_hash(plans),
            "configuration": self.configuration_name,
            "architecture_kwargs": this["architecture"]["arch_kwargs"],
            "num_input_channels": self.num_input_channels,
            "nnssl_adaptation_plan": checkpoint.nnssl_adaptation_plan(
                plans,
                self.configuration_name,
                this,
                self.settings.views.global_input_size,
                self.num_input_channels,
                network,
            ),
            "datasets": self.datasets,
            "other_plans": self.other_plans,
            "init": self.init,
            "all_cases_known": self.init is None or self.init["all_cases_known"],
            "cases": [
                *(
                    {
                        "name": case.name.rsplit("/", 1)[-1],
                        "path": self.relative_path(case),
                        "sha256": sha256,
                    }
                    for case, sha256 in zip(self.cases, fingerprints, strict=True)
                ),
                *(self.init["cases"] if self.init else ()),  # the encoder has seen them, too
            ],
            "fold": self.fold,
            "seed": self.settings.seed,
            "epochs": self.num_epochs,
            "steps": self.step,
            "loss": self.last_loss,
            "probe": self.probed,
            "monitor": self.report.epochs[-1]["monitor"] if self.report.epochs else {},  # `monitor.judge` judges it
            "versions": {name: version(name) for name in _PACKAGES},
            "finished": True,
        }

    @staticmethod
    def relative_path(case: Case) -> str:
        """Of a case, within nnUNet_preprocessed."""
        return os.path.relpath(case.path, nnUNet_preprocessed)

    def _fingerprint(self, case: Case) -> str | None:
        """A case that has gone bad since it was seen must not cost the finished training."""
        try:
            return fingerprint(case)
        except UserError as error:
            self.print_to_log_file(f"WARNING: the checkpoint knows a case by its name only: {error}")
            return None

    def save_checkpoint(self, filename: str) -> None:
        """The training state, whole or not at all; the one before is kept as checkpoint_previous.pth."""
        if self.local_rank != 0:
            return
        state = {
            "format": checkpoint.STATE_FORMAT,
            "network": self.network.state_dict(),
            "plan_network": self.plan_network.state_dict(),  # its decoder stays random, but the same after resuming
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "saved_at": time(),
            "current_epoch": self.current_epoch,
            "outputs": self.outputs,
            "monitor": self.monitor.state(),
            "report": self.report.epochs,
            "last_loss": self.last_loss,
            "probed": self.probed,
            "init": self.init,
            "torch_rng": torch.get_rng_state(),
            "settings": self.settings.as_dict(),
            "plans": self.plans_manager.plans,
            "cases": [case.name for case in self.cases],
            "other_plans": self.other_plans,
        }
        checkpoint.write(filename, state, os.path.join(os.path.dirname(filename), checkpoint.PREVIOUS))

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Continue from a training state; what it was started with has to be what it continues with."""
        self.initialize()
        given = filename_or_checkpoint
        state = checkpoint.read(given, checkpoint.STATE_FORMAT) if isinstance(given, str) else given
        path = given if isinstance(given, str) else "the training state"
        now = agreement(self.settings, self.plans_manager.plans, self.cases, self.other_plans)
        refuse_another(state, now, path)
        self.plan_network.load_state_dict(state["plan_network"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.grad_scaler is not None and state["grad_scaler"] is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        if state["outputs"]:  # within an epoch, which has not lasted while nothing was done
            state["logging"]["epoch_start_timestamps"][-1] += time() - state.get("saved_at", time())
        self.logger.load_checkpoint(state["logging"])
        self.current_epoch, self.last_loss = state["current_epoch"], state["last_loss"]
        self.outputs = state["outputs"]
        self.monitor.load_state(state["monitor"])
        self.init = state.get("init")
        self.report.epochs = state.get("report", [])
        self.probed = state.get("probed", {})
        torch.set_rng_state(state["torch_rng"])

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """There is nothing to validate without labels."""
        raise SystemExit("Error: a pretraining has no validation; fine-tune it with -tr PCRLFinetuneTrainer")
