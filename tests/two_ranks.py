"""One of two processes that share a batch: writes the gradients of a step of each method.

python tests/two_ranks.py OUTPUT METHOD ...       with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from method_setups import Setup

from pcrl_nnunet.pretraining import distributed

PAIR = 8  # samples of both


def main() -> None:
    """Write, as the first process, the summed gradients by method and parameter."""
    torch.set_num_threads(1)
    found = {}
    with distributed.process_group(torch.device("cpu")):
        for name in sys.argv[2:]:
            setup = Setup(name, "3D")
            method = setup.trained()
            distributed.synchronise_batch_norms(method)
            first, number = distributed.part_of(PAIR)
            batch = {key: value[first : first + number] for key, value in setup.batch(PAIR).items()}
            drawn = method.draw(np.random.default_rng(0))
            (method(batch, drawn).loss * number / PAIR).backward()
            distributed.sum_gradients(method.parameters())
            found[name] = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
        if distributed.rank() == 0:
            torch.save(found, sys.argv[1])


if __name__ == "__main__":
    main()
