"""Gathering the parts of several processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from pcrl_nnunet.networks import gathered, of_next_sample

PARTS = (3, 2)


def of_rank(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    part = (torch.arange(2.0 * PARTS[rank]).reshape(-1, 2) + 10 * rank).requires_grad_()
    whole = gathered(part)
    (whole.square().sum() * (1 + rank)).backward()
    torch.save((part.detach(), whole.detach(), part.grad, of_next_sample(part)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_parts_of_unequal_size_are_gathered_in_order_with_their_gradients_and_next_samples(tmp_path: Path) -> None:
    torch.set_num_threads(1)  # a process that has threads may not fork
    torch.multiprocessing.start_processes(of_rank, (tmp_path,), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    parts = [part for part, *_ in found]
    for part, whole, gradient, _ in found:
        assert torch.equal(whole, torch.cat(parts))
        assert torch.equal(gradient, 3 * 2 * part)  # both ranks' losses count
    following = torch.cat([following for *_, following in found])
    assert torch.equal(following, torch.cat(parts).roll(-1, 0))


def test_one_process_has_its_own_part() -> None:
    part = torch.ones(2, 3)
    assert gathered(part) is part


def test_the_next_sample_of_the_last_is_the_first() -> None:
    part = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    following = of_next_sample(part)
    assert following.flatten().tolist() == [2, 3, 1]
    assert not following.requires_grad
    assert of_next_sample(part[:1]).tolist() == [[1]]
