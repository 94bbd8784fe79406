"""Pretraining as an nnUNetTrainer: folders, logs, progress.png and resuming work as in nnU-Net."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Sequence
from time import time
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from tqdm import tqdm

from pcrl_nnunet import checkpoint, output_folder, weights_and_biases
from pcrl_nnunet.commands import command
from pcrl_nnunet.device import named_once
from pcrl_nnunet.loading.loader import Batches, ViewLoader, make_loader
from pcrl_nnunet.loading.samples import Views
from pcrl_nnunet.methods.base import Method, Preparation
from pcrl_nnunet.methods.registry import method_class
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.pretraining import distributed, result
from pcrl_nnunet.pretraining.cases import unpacked
from pcrl_nnunet.pretraining.facts import Facts
from pcrl_nnunet.pretraining.following import next_command
from pcrl_nnunet.pretraining.initial import load_initial
from pcrl_nnunet.pretraining.interruption import Sigterm, Terminated, command_to_go_on
from pcrl_nnunet.pretraining.monitor import Monitor, judge
from pcrl_nnunet.pretraining.optimisation import optimiser
from pcrl_nnunet.pretraining.pace import Pace, line_of_epoch
from pcrl_nnunet.pretraining.preparation import PREPARED, fingerprint_of, prepared, refuse_another_preparation
from pcrl_nnunet.pretraining.request import Request
from pcrl_nnunet.pretraining.settings import described
from pcrl_nnunet.pretraining.state import agree_with_other_ranks, agreement, refuse_another
from pcrl_nnunet.pretraining.step import Stepper
from pcrl_nnunet.progress import telling
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.report.progress import PretrainLogger
from pcrl_nnunet.views import kernels


def _mean(values: Sequence[float]) -> float:
    """Return the mean; NaN without values."""
    return float(np.mean(values)) if values else float("nan")


class PCRLPretrainTrainer(nnUNetTrainer):
    """The pretraining of a plan's network without labels, by any method; `pcrl_nnunet_pretrain` runs it.

    A training is an instance of a class that `of` makes, because nnU-Net fixes the arguments of a trainer. The class
    has the method in its name, so that nnU-Net gives each method its own results folder.

    Overrides: __init__, initialize, get_dataloaders, run_training,
    on_train_start, train_step, on_train_epoch_end, on_epoch_end, on_train_end, save_checkpoint, load_checkpoint,
    perform_actual_validation. There is no validation: the monitor says whether the training learns. On SIGTERM, which
    schedulers send before they end a job, the training saves after the current step and exits with 0.
    """

    request: Request

    was_initialized: bool
    current_epoch: int
    grad_scaler: torch.amp.GradScaler | None

    @classmethod
    def of(cls, request: Request) -> type[PCRLPretrainTrainer]:
        """Return the trainer class of one pretraining."""
        return type(output_folder.name_of_pretrainer(request.settings.method), (cls,), {"request": request})

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008  (nnU-Net's own default)
    ) -> None:
        if not hasattr(self, "request"):  # nnUNetv2_train -tr PCRLPretrainTrainer
            own = command("pcrl_nnunet_pretrain", d=plans["dataset_name"], c=configuration, p=plans["plans_name"])
            raise SystemExit(
                f"Error: PCRLPretrainTrainer pretrains without labels and has a command of its own: run {own}"
            )
        with output_folder.creating(), weights_and_biases.held_back(), named_once():
            super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:  # nnU-Net would use the process's number across all machines as the GPU's, and supports no CPU
            self.device = device
            self.grad_scaler = self.grad_scaler if device.type == "cuda" else None
        self.settings, self.cases = self.request.settings, self.request.cases.used
        self.logger.update_config({"pretrain": self.settings.as_dict()})
        self.print_to_log_file(self.request.cases)
        self.num_epochs, self.num_iterations_per_epoch = self.settings.epochs, self.settings.iters_per_epoch
        self.method: type[Method] = method_class(self.settings.method)
        self.plan_facts = PlanFacts.of(configuration, self.configuration_manager.configuration)
        self.logger.local_logger = PretrainLogger(self.method, self.request.title)
        self.monitor = Monitor(self.method.quantities)
        self.report = Report()
        self.pace = Pace(self.settings.steps, 0)
        self._phase: Pace | str = "still preparing the training"  # for the lines of progress
        self.outputs: list[dict[str, float]] = []  # outputs of this epoch's steps so far
        self.init: dict[str, Any] | None = None  # facts about the checkpoint, once it is loaded
        self.prepared: dict[str, Any] = {}  # the method's preparation, before the first step
        self.prepared_before: str | None = None  # fingerprint in a state, which the preparation has to match

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.current_epoch * self.num_iterations_per_epoch + len(self.outputs)

    def initialize(self) -> None:
        """Build the plan's network and the method around it."""
        if self.was_initialized:
            return
        torch.manual_seed(self.settings.seed)
        if self.device.type == "cuda":  # nnU-Net's choice: the fastest algorithm for each of the few shapes
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
        if self.grad_scaler is not None:  # the scaler skips the first steps while it searches its scale
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
        self.network = self.method(self.plan_network, self.num_input_channels, self.settings.own)
        self.network.to(self.device)
        if self.is_ddp:
            distributed.synchronise_batch_norms(self.network)
        self.groups = self.network.groups()
        self.optimizer, self.lr_scheduler = optimiser(self.groups, self.settings)
        optimisation = self.optimizer, self.lr_scheduler, self.grad_scaler
        self.stepper = Stepper(self.network, self.groups, *optimisation, self.settings, self.device)
        self.was_initialized = True

    def views(self) -> Views:
        """Return the maker of samples."""
        made = self.method.views(self.settings.own, self.plan_facts, self.num_input_channels, self.prepared)
        if result.INPUT not in made.arrays:
            raise TypeError(f"the views of {self.method.name} lack the array '{result.INPUT}', which the network gets")
        return made

    def loader(self) -> ViewLoader:
        """Return a loader of whole batches in this process, from the first step."""
        return ViewLoader(self.cases, self.views(), self.settings.batch_size, self.settings.seed)

    def get_dataloaders(self) -> Batches:
        """Return this rank's part of the batches, from the current step."""
        first_sample, number = distributed.part_of(self.settings.batch_size, self.method.min_samples_of_rank)
        return make_loader(
            self.cases,
            self.views(),
            number,
            self.settings.seed,
            first_sample,
            first_step=self.step,
            num_workers=get_allowed_n_proc_DA(),
            pin_memory=self.device.type == "cuda",
        )

    def run_training(self) -> None:
        """Run all epochs, with a bar for terminals and lines for the log."""
        # other processes would wait for one that ends alone: they all end after the same step
        with Sigterm(at_once=not self.is_ddp) as sigterm, telling(lambda: str(self._phase)):
            try:
                self.on_train_start()
                sigterm.at_once = False
                self._run_epochs(sigterm)
                sigterm.at_once = True  # all states are saved: the end can be repeated
                sigterm.look()
                self._phase = "still writing the checkpoint and the report"
                self.on_train_end()
            except Terminated:
                self._say_how_to_go_on(f"Stopped by SIGTERM after step {self.step}; nothing is lost")
                raise SystemExit(0) from None

    def _run_epochs(self, sigterm: Sigterm) -> None:
        self.pace = pace = Pace(self.settings.steps, self.step)
        disable = None if self.local_rank == 0 else True  # None: unless there is a terminal
        try:
            with tqdm(total=pace.total, initial=self.step, disable=disable, unit="step", dynamic_ncols=True) as bar:
                self._phase = pace if bar.disable else ""
                while self.current_epoch < self.num_epochs:
                    if not self.outputs:  # otherwise the training resumes within an epoch
                        self.on_epoch_start()
                        self.logger.log("lrs", self.optimizer.param_groups[0]["lr"], self.current_epoch)
                    while len(self.outputs) < self.num_iterations_per_epoch:
                        output = self.train_step(next(self.dataloader_train), self.step)
                        self.outputs.append(output)
                        bar.set_postfix({name: f"{value:.3f}" for name, value in output.items()}, refresh=False)
                        bar.update()
                        if pace.step():
                            self._say(str(pace), bar)
                        # a scheduler's signal reaches the processes at different steps
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
        self.print_to_log_file(f"{why}. To go on: {command_to_go_on(saved)}")

    def _write_report(self, finished: bool = False) -> None:
        """Write report.html with the commands that come next. A failure never ends the training."""
        if self.local_rank == 0:
            following = [] if finished else [f"Go on with: {command_to_go_on()}"]
            following.append(self._next_command(os.path.join(self.output_folder, checkpoint.FINAL)))
            self.report.write(self.facts(), following, finished)

    def facts(self) -> Facts:
        """Return the training's current facts, for checkpoint and report."""
        return Facts(
            request=self.request,
            folder=self.output_folder,
            cases=self.cases,
            plan_network=self.plan_network,
            network=self.network,
            channels=self.num_input_channels,
            loader=self.loader(),
            init=self.init,
            device=self.device,
            steps=self.step,
            log=self.logger.local_logger.my_fantastic_logging,
            say=self.print_to_log_file,
        )

    def on_train_start(self) -> None:
        """Log the setup and start the loader."""
        self.initialize()
        self.print_to_log_file(f"Device: {self.device}", also_print_to_console=False)
        self.print_to_log_file(f"Output: {self.output_folder}")
        self.print_to_log_file(described(self.settings, self.request.plan))
        if not kernels.compiled:
            self.print_to_log_file("Views are computed by scipy, several times slower than numba: install numba")
        if self.request.init and self.step == 0:  # otherwise the training state has the weights
            self.init, lines = load_initial(self.request.init, self.plan_network, self.network, self.request.plan)
            for line in lines:
                self.print_to_log_file(line)
        if self.is_ddp:
            number = distributed.part_of(self.settings.batch_size, self.method.min_samples_of_rank)[1]
            self.print_to_log_file(
                f"{distributed.world_size()} processes share each batch of {self.settings.batch_size} samples; the "
                f"monitor watches the {number} of the first one"
            )
            agree_with_other_ranks(self.request, self.cases)
            distributed.same_weights(self.network)
        self.cases = unpacked(self.cases, self.print_to_log_file)
        folder, say = self.output_folder, self.print_to_log_file
        self.prepared = prepared(self.method, self.preparation(), agreement(self.request), folder, say)
        refuse_another_preparation(self.prepared, self.prepared_before, folder)
        weights_and_biases.begin(self)
        self.dataloader_train = self.get_dataloaders()

    def preparation(self) -> Preparation:
        """Return the material of the method's stage before the training."""
        own, seed = self.settings.own, self.settings.seed
        network = copy.deepcopy(self.plan_network)
        return Preparation(self.cases, network, self.num_input_channels, own, seed, self.device)

    def train_step(self, batch: dict[str, Any], step: int, drawn: Any = None) -> dict[str, float]:
        """Do one step, with the step's own random choices unless given as `drawn`. Return the losses by name."""
        output, losses = self.stepper(batch, step, drawn)
        self.monitor.update(output)
        return losses

    def on_train_epoch_end(self, train_outputs: list[dict[str, float]]) -> None:
        """Log the means of the epoch."""
        epoch = self.current_epoch
        self.logger.log("train_losses", float(np.mean([o["loss"] for o in train_outputs])), epoch)
        for name in self.method.terms:  # some settings lack a term
            self.logger.log(name, _mean([o[name] for o in train_outputs if name in o]), epoch)
        for name, of_group in self.monitor.summary().items():
            self.logger.log(name, _mean(list(of_group.values())), epoch)

    def on_epoch_end(self, bar: tqdm | None = None) -> None:
        """Write a line, alarms, training state, progress.png and sometimes the report, and begin the next epoch."""
        epoch, value = self.current_epoch, self.logger.get_value
        self.logger.log("epoch_end_timestamps", time(), epoch)
        names = (*self.method.terms, *(quantity.name for quantity in self.method.quantities))
        values = {name: value(name, epoch) for name in names}
        line = line_of_epoch(epoch + 1, self.num_epochs, values, self.pace)
        summary = self.monitor.summary()
        verdict = judge(summary, (epoch + 1) * self.num_iterations_per_epoch, self.method.quantities)
        self.report.add(epoch + 1, summary)
        lines = [line, *(f"ALARM: {alarm}" for alarm in verdict.alarms)]
        if epoch + 1 == self.num_epochs:
            lines.append(f"Is it learning? {verdict.text}")
        for line in lines:
            self._say(line, bar)
        self.monitor.clear()
        self.outputs = []
        self.current_epoch += 1
        self.save_checkpoint(os.path.join(self.output_folder, checkpoint.LATEST))
        if self.local_rank == 0:
            steps, folder = self.num_iterations_per_epoch, self.output_folder
            self.logger.local_logger.write_curves(steps, folder, self.print_to_log_file)
        if self.report.is_due():
            self._write_report()

    def _say(self, line: str, bar: tqdm | None) -> None:
        """Write a line to the log and the console."""
        on_terminal = bar is not None and not bar.disable
        if bar is not None and on_terminal:
            bar.write(line)  # print() would tear the bar
        self.print_to_log_file(line, also_print_to_console=not on_terminal)

    def on_train_end(self) -> None:
        """Write the final checkpoint, then remove the training states."""
        if self.local_rank != 0:
            return
        final = os.path.join(self.output_folder, checkpoint.FINAL)
        checkpoint.write(final, self.final_content())
        self._write_report(finished=True)
        output_folder.set_overwriting(self.output_folder, False)
        # the oldest first: if killed in between, --c resumes from the latest
        for name in (checkpoint.DAMAGED, checkpoint.PREVIOUS, checkpoint.LATEST, PREPARED):
            if os.path.isfile(path := os.path.join(self.output_folder, name)):
                os.remove(path)
        self.print_to_log_file(f"Pretraining done: {final}\n{self._next_command(final)}")

    def _next_command(self, final: str) -> str:
        return next_command(self.request, final, self.device.type)

    def final_content(self) -> dict[str, Any]:
        """Return the content of ``checkpoint_final.pth``; see `pcrl_nnunet.checkpoint`."""
        return result.content(self.facts(), self.report.epochs[-1]["monitor"] if self.report.epochs else {})

    def save_checkpoint(self, filename: str) -> None:
        """Write the training state, completely or not at all. The state before becomes checkpoint_previous.pth."""
        if self.local_rank != 0:
            return
        state = {
            "format": checkpoint.STATE_FORMAT,
            "network": self.network.state_dict(),
            "plan_network": self.plan_network.state_dict(),  # untrained weights stay random, but the same
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "logging": self.logger.get_checkpoint(),
            "saved_at": time(),
            "current_epoch": self.current_epoch,
            "outputs": self.outputs,
            "monitor": self.monitor.collected,
            "report": self.report.epochs,
            "init": self.init,
            **checkpoint.random_states(self.device),
            **agreement(self.request),
            "prepared": fingerprint_of(self.prepared),
            "plans": self.request.plan.plans,
        }
        checkpoint.write(filename, state, os.path.join(os.path.dirname(filename), checkpoint.PREVIOUS))

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Continue from a training state, which has to agree with this training."""
        self.initialize()
        given = filename_or_checkpoint
        state = checkpoint.read(given, checkpoint.STATE_FORMAT) if isinstance(given, str) else given
        path = given if isinstance(given, str) else "the training state"
        refuse_another(state, agreement(self.request), path)
        self.prepared_before = state["prepared"]
        self.plan_network.load_state_dict(state["plan_network"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.grad_scaler is not None and state["grad_scaler"] is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        if state["outputs"]:  # within an epoch: do not count the pause
            state["logging"]["epoch_start_timestamps"][-1] += time() - state["saved_at"]
        self.logger.load_checkpoint(state["logging"])
        self.current_epoch, self.outputs = state["current_epoch"], state["outputs"]
        self.init, self.report.epochs = state["init"], state["report"]
        self.monitor.collected = state["monitor"]
        checkpoint.restore_random_states(state, self.device)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Refuse: without labels there is nothing to validate."""
        raise SystemExit("Error: a pretraining has no validation; fine-tune it with -tr PCRLFinetuneTrainer")


def pretrain_trainer(request: Request, device: torch.device) -> PCRLPretrainTrainer:
    """Build the trainer of a requested pretraining. This creates the output folder."""
    plan = request.plan
    plans = {**copy.deepcopy(plan.plans), "continue_training": request.continues}  # nnU-Net passes it in the plans
    return PCRLPretrainTrainer.of(request)(plans, plan.configuration, request.fold, plan.dataset_json, device)
