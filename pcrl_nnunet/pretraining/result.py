"""The content of ``checkpoint_final.pth``; see `pcrl_nnunet.checkpoint` for its form."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor, nn

from pcrl_nnunet import checkpoint
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case, fingerprint
from pcrl_nnunet.methods.base import Method
from pcrl_nnunet.pretraining.facts import Facts
from pcrl_nnunet.pretraining.monitor import Summary, judge

INPUT = "input"  # the array of a sample that the network gets
PACKAGES = ("pcrl_nnunet", "nnunetv2", "torch", "batchgenerators", "dynamic_network_architectures", "numpy")


def weights(plan_network: nn.Module, method: Method) -> dict[str, Any]:
    """Return the plan's network with the weights that the method trained, and the method's own weights.

    A parameter of the plan's network is pretrained if the method trains it, and a buffer if the method holds it. All
    others are random.
    """
    held = {_storage(buffer) for buffer in method.buffers()}
    trained = held | {_storage(p) for group in method.groups() for p in group.parameters}
    whole = plan_network.state_dict()
    random = [name for name, tensor in whole.items() if _storage(tensor) not in trained]
    of_plan = {_storage(tensor) for tensor in whole.values()}
    network: Any = copy.deepcopy(plan_network).cpu()  # aliases stay aliases, and are stored once
    return {
        "network_weights": network.state_dict(),
        "random_keys": random,
        "method_weights": {
            name: tensor.detach().cpu()
            for name, tensor in method.state_dict().items()
            if _storage(tensor) not in of_plan
        },
        "encoder_hash": checkpoint.encoder_hash(network.encoder),
    }


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def content(facts: Facts, summary: Summary) -> dict[str, Any]:
    """Return the whole content of the file.

    Args:
        summary: the monitor's summary of the last epoch.
    """
    plan, network, settings = facts.request.plan, facts.network, facts.request.settings
    input_size = facts.loader.views.arrays[INPUT].shape[-len(plan.resolved["patch_size"]) :]
    verdict = judge(summary, facts.steps, network.quantities)
    return {
        "format": checkpoint.FORMAT,
        **weights(facts.plan_network, network),
        "method": network.name,
        "citations": [
            {"type": "Pretraining method", "name": network.title, "apa_citations": list(network.citations)},
        ],
        "settings": settings.as_dict(),
        "plans": plan.plans,
        "plans_hash": checkpoint.plans_hash(plan.plans),
        "configuration": plan.configuration,
        "architecture_kwargs": plan.resolved["architecture"]["arch_kwargs"],
        "num_input_channels": facts.channels,
        "nnssl_adaptation_plan": checkpoint.nnssl_adaptation_plan(plan, input_size, facts.channels, facts.plan_network),
        "datasets": facts.request.cases.datasets,
        "other_plans": dict(facts.request.cases.other_plans),
        "init": facts.init,
        "all_cases_known": facts.init is None or facts.init["all_cases_known"],
        "cases": cases_seen(facts.cases, facts.init, facts.say),
        "fold": facts.request.fold,
        "seed": settings.seed,
        "epochs": settings.epochs,
        "steps": facts.steps,
        "loss": facts.log["train_losses"][-1] if facts.log["train_losses"] else float("nan"),
        "monitor": summary,
        "verdict": {"state": verdict.state, "text": verdict.text, "alarms": list(verdict.alarms)},
        "versions": versions(),
        "finished": True,
    }


def cases_seen(
    cases: Sequence[Case], init: Mapping[str, Any] | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return name, path within nnUNet_preprocessed and fingerprint of the cases, and the cases that ``-init`` had seen.

    A case that was damaged after training must not cost the finished training: its fingerprint is None.
    """

    def of_case(case: Case) -> str | None:
        try:
            return fingerprint(case)
        except UserError as error:
            say(f"WARNING: the checkpoint knows a case by its name only: {error}")
            return None

    with ThreadPool(max(1, get_allowed_n_proc_DA())) as pool:  # reading and hashing release the GIL
        fingerprints = pool.map(of_case, cases)
    own = [
        {"name": case.name.rsplit("/", 1)[-1], "path": relative_path(case), "sha256": sha256}
        for case, sha256 in zip(cases, fingerprints, strict=True)
    ]
    return [*own, *(init["cases"] if init else ())]


def relative_path(case: Case) -> str:
    """Return the path of a case within nnUNet_preprocessed."""
    return os.path.relpath(case.path, nnUNet_preprocessed)


def versions() -> dict[str, str]:
    """Return the versions of the packages that a training depends on."""
    return {name: version(name) for name in PACKAGES}
