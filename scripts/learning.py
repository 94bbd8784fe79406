"""Measure what methods of pretraining learn in a few hundred steps, on unseen cases.

    python scripts/learning.py -d 4 -c 2d -p nnUNetPlans -methods mae models_genesis simsiam -steps 300

Each method is trained without the validation cases of a fold. On these cases two things are measured:

- restoration: the error over the variance of the target within each view. The mean of each view reaches 1. No single
  constant for all views reaches 1, because views differ in their means: ``constant`` is the error of the best one. The
  control is the same training with an encoder that stays random.
- right: for methods that answer a question (which turn, which place): the share of right answers over chance.
- partners: two views of each of 32 crops. A view's partner is the view with the most similar encoder features (mean
  and maximum of the bottleneck's channels, standardised, cosine). Chance is 1/32. The control is a random encoder.
"""

from __future__ import annotations

import options  # isort: skip  # first: it answers --help without torch

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, nn
from torch.nn import functional as F

from pcrl_nnunet.errors import exit_on_user_error
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.loader import Batches, make_loader
from pcrl_nnunet.loading.samples import Views
from pcrl_nnunet.methods import Method, PlanFacts, Preparation, method_class, names
from pcrl_nnunet.methods.quantities import RESTORATION, RIGHT, variance_within
from pcrl_nnunet.methods.restoration import RestorationMethod
from pcrl_nnunet.methods.simsiam import SimSiam
from pcrl_nnunet.networks import encoder_of, mean_and_maximum
from pcrl_nnunet.networks.of_plan import network_of_plan
from pcrl_nnunet.plans import PlannedConfiguration, load_plan
from pcrl_nnunet.pretraining.optimisation import optimiser
from pcrl_nnunet.pretraining.preparation import make_anew, prepares
from pcrl_nnunet.pretraining.request import Request
from pcrl_nnunet.pretraining.step import Stepper

CPU = torch.device("cpu")
PAIRS = 32
REPEATS = 8  # batches in the mean of a measurement
MEASURED = 16  # samples of a batch in which the restoration is measured
UNSEEN_SEED = 1000  # for the views of held-out cases
REPORTED = 50  # steps between two lines


class Learning:
    """A method on a plan."""

    def __init__(self, method: str, plan: PlannedConfiguration, fold: int, steps: int, **settings: Any) -> None:
        self.request = Request.of_plan(plan, fold, method=method, epochs=1, iters_per_epoch=steps, **settings)
        self.plan, self.settings = plan, self.request.settings
        self.facts = PlanFacts.of(plan.configuration, plan.resolved)
        self.method_class = method_class(method)
        self.prepared: dict[str, Any] | None = None

    def network(self) -> tuple[nn.Module, Method, int]:
        """Return the plan's network, the method around it, and the number of channels, always with the same weights."""
        torch.manual_seed(self.settings.seed)
        network, channels = network_of_plan(self.plan.plans, self.plan.configuration, self.plan.dataset_json)
        return network, self.method_class(network, channels, self.settings.own), channels

    def trained(self, device: torch.device, frozen: bool = False) -> tuple[nn.Module, Method]:
        """Train with an encoder that learns, or with a frozen random encoder."""
        network, method, channels = self.network()
        method.to(device)
        groups, encoder = method.groups(), {id(p) for p in encoder_of(network).parameters()}
        if frozen:
            groups = [replace(g, parameters=[p for p in g.parameters if id(p) not in encoder]) for g in groups]
            encoder_of(network).requires_grad_(False)
        optimisation = optimiser(groups, self.settings)
        scaler = torch.amp.GradScaler("cuda") if device.type == "cuda" else None
        stepper = Stepper(method, groups, *optimisation, scaler, self.settings, device)
        batches = self.batches(self.request.cases.used, self.views(channels), self.settings.batch_size, 0)
        for step in range(self.settings.steps):
            _, losses = stepper(next(batches), step)
            if (step + 1) % REPORTED == 0:
                print(f"  step {step + 1}: {', '.join(f'{k} {v:.3f}' for k, v in losses.items())}", flush=True)
        batches.close()
        return network, method

    def views(self, channels: int) -> Views:
        """Return the method's views. A method that prepares does so once, on the cases of the training."""
        if self.prepared is None:
            given = Preparation(
                self.request.cases.used, self.network()[0], channels, self.settings.own, self.settings.seed, CPU
            )
            self.prepared = make_anew(self.method_class, given) if prepares(self.method_class) else {}
        return self.method_class.views(self.settings.own, self.facts, channels, self.prepared)

    def batches(self, cases: Sequence[Case], views: Views, number: int, seed: int) -> Batches:
        """Return batches of samples of some cases."""
        return make_loader(cases, views, number, seed, num_workers=get_allowed_n_proc_DA())

    def held_out(self, method: Method, channels: int, device: torch.device) -> dict[str, float]:
        """Return restoration error and right answers on held-out cases, with their standard errors over batches.

        The result has only what the method restores or answers.
        """
        watched = [quantity for quantity in (RESTORATION, RIGHT) if quantity in method.quantities]
        if not watched:
            return {}
        batches = self.batches(self.request.cases.held_out_cases, self.views(channels), MEASURED, UNSEEN_SEED)
        found: dict[str, list[Tensor]] = {quantity.name: [] for quantity in watched}
        constant = []
        with torch.no_grad():
            method.eval()
            for _ in range(REPEATS):
                batch = _on(next(batches), device)
                values = method(batch, method.variants()[-1]).values
                for name in found.keys() & values.keys():  # a restoration may be switched off
                    found[name].append(next(iter(values[name].values())))
                if isinstance(method, RestorationMethod):
                    constant.append(_error_of_best_constant(batch["target"], batch.get("masked")))
        batches.close()
        result: dict[str, float] = {}
        for name, of_batches in found.items():
            if not of_batches:
                continue
            errors = torch.stack(of_batches)
            result |= {name: float(errors.mean()), f"{name}_standard_error": float(errors.std() / REPEATS**0.5)}
        return {**result, "constant": float(torch.stack(constant).mean())} if constant else result

    def partners(self, network: nn.Module, channels: int, device: torch.device) -> float:
        """Return the share of views of held-out cases whose partner is found among 32."""
        settings, _ = SimSiam.configure(self.facts, {})
        views = SimSiam.views(settings, self.facts, channels, {})
        batches = self.batches(self.request.cases.held_out_cases, views, PAIRS, UNSEEN_SEED)
        encoder, right = encoder_of(network).eval(), []
        with torch.no_grad():
            for _ in range(REPEATS):
                one, two = (
                    mean_and_maximum(encoder(_on(next_views, device))[-1])
                    for next_views in torch.as_tensor(next(batches)["input"]).unbind(1)
                )
                both = torch.cat((one, two))
                one, two = (F.normalize((x - both.mean(0)) / (both.std(0) + 1e-6), dim=1) for x in (one, two))
                right.append(((one @ two.T).argmax(1) == torch.arange(PAIRS, device=device)).float().mean())
        batches.close()
        return float(torch.stack(right).mean())


def _error_of_best_constant(target: Tensor, masked: Tensor | None) -> Tensor:
    """Return the error of the best constant of each channel, over the variance within each view."""
    where = torch.ones_like(target, dtype=torch.bool) if masked is None else masked.expand_as(target)
    by_channel = zip(target.unbind(1), where.unbind(1), strict=True)
    total = torch.stack([channel[there].var(correction=0) for channel, there in by_channel])
    return total.mean() / variance_within(target, masked)


def _on(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    return {name: torch.as_tensor(value).to(device) for name, value in batch.items() if name != "cases"}


def main() -> None:
    """Measure, print a table, and write it to the file of ``--json``."""
    args = options.learning().parse_args()
    device, found = torch.device(args.device), {}
    with exit_on_user_error():
        plan = load_plan(args.d, args.p, args.c)
        dim = len(plan.resolved["patch_size"])
        for name in args.methods or [name for name in names() if dim in method_class(name).dimensions]:
            print(name, flush=True)
            given = {"batch_size": args.batch_size, "optimizer": args.optimizer, "initial_lr": args.initial_lr}
            learning = Learning(name, plan, args.f, args.steps, **given)
            random, _, channels = learning.network()
            of_random = learning.partners(random.to(device), channels, device)
            network, method = learning.trained(device)
            numbers = {
                "batch_size": learning.settings.batch_size,
                "steps": args.steps,
                **learning.held_out(method, channels, device),
                "partners": learning.partners(network, channels, device),
                "partners_random": of_random,
            }
            measured = [key for key in numbers if key.startswith((RESTORATION.name, RIGHT.name))]
            if measured:
                print("  with a random encoder that is frozen:", flush=True)
                control = learning.held_out(learning.trained(device, frozen=True)[1], channels, device)
                numbers |= {f"{key}_frozen": control[key] for key in measured}
            found[name] = numbers
            print(f"{name}: {json.dumps(numbers)}", flush=True)
            if args.json:
                with open(args.json, "w", encoding="utf-8") as file:
                    json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
