"""One of two processes that share a batch: writes the gradients of a step, and the state after more, of each method.

python tests/two_ranks.py OUTPUT METHOD ...       with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set
"""

from __future__ import annotations

import sys
import traceback

import numpy as np
import torch
from method_setups import Setup

from pcrl_nnunet import method_names
from pcrl_nnunet.pretraining import distributed
from pcrl_nnunet.pretraining.optimisation import optimiser
from pcrl_nnunet.pretraining.settings import PretrainSettings
from pcrl_nnunet.pretraining.step import Stepper

PAIR = 8  # samples of both ranks
STEPS = 3
QUEUE = "tiny_method:Queue"


def main() -> None:
    """Write, as the first process, the summed gradients by method and parameter."""
    torch.set_num_threads(1)
    method_names.BUILT_IN["queue"] = QUEUE
    found: dict[str, object] = {}
    with distributed.process_group(torch.device("cpu")):
        for name in sys.argv[2:]:
            try:
                found[name] = of_method(name)
            except Exception:  # both ranks fail alike, or one would wait; other methods still run
                found[name] = {"error": traceback.format_exc()}
        torch.save(found, f"{sys.argv[1]}.{distributed.rank()}")


def of_method(name: str) -> dict[str, dict[str, torch.Tensor]]:
    """Return the summed gradients of one step, and the state after several."""
    setup = Setup(name, "3D")
    method = setup.trained()
    distributed.synchronise_batch_norms(method)
    first, number = distributed.part_of(PAIR)
    batch = {key: value[first : first + number] for key, value in setup.batch(PAIR).items()}
    drawn = method.draw(np.random.default_rng(0))
    (method(batch, drawn).loss * number / PAIR).backward()
    distributed.sum_gradients(method.parameters())
    gradients = {key: p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
    return {"gradients": gradients, "state": state_after_steps(setup, first, number)}


def state_after_steps(setup: Setup, first: int = 0, number: int = PAIR) -> dict[str, torch.Tensor]:
    """Train `STEPS` steps on a part of the batch. Returns all parameters and buffers.

    With SGD: AdamW turns the rounding errors in the gradients of biases before a normalisation into whole steps.
    """
    method, own = setup.trained(), setup.method
    distributed.synchronise_batch_norms(method)
    settings = PretrainSettings(own.name, setup.settings, PAIR, epochs=1, iters_per_epoch=10, initial_lr=0.03)
    groups = method.groups()
    stepper = Stepper(method, groups, *optimiser(groups, settings), None, settings, torch.device("cpu"))
    part = {key: value[first : first + number] for key, value in setup.batch(PAIR).items()}
    for step in range(STEPS):
        stepper({**part, "cases": [str(first + n) for n in range(number)]}, step)
    return {key: value.clone() for key, value in method.state_dict().items()}


if __name__ == "__main__":
    main()
