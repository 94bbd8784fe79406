"""The momentum copy of a network, and the queue of its keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pcrl_nnunet.networks import KeyQueue, MomentumCopy


def test_the_copy_follows_as_a_moving_average_without_gradient() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    copy = MomentumCopy(network, 0.9)
    before = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 1
        network[1].running_mean += 5
    copy.follow(network)
    torch.testing.assert_close(copy.network[0].weight, before + 0.1)
    assert torch.equal(copy.network[1].running_mean, network[1].running_mean)
    assert not copy(torch.randn(3, 2)).requires_grad
    copy.follow(network, momentum=0)
    assert torch.equal(copy.network[0].weight, network[0].weight)


def test_the_queue_holds_the_newest_keys_and_offers_those_of_other_cases() -> None:
    queue = KeyQueue(5, 3)
    assert queue.others(torch.tensor([0, 1])).all()  # random keys are of no case
    for case in range(4):  # two keys of each case
        queue.push(torch.full((2, 3), case + 1.0), torch.tensor([case, case]))
    assert queue.cases.tolist() == [3, 3, 2, 2, 1]
    assert queue.others(torch.tensor([3, 0])).tolist() == [[False, False, True, True, True], [True] * 5]
    assert queue.keys.norm(dim=1).tolist() == pytest.approx([1.0] * 5)


def test_a_push_of_more_keys_than_places_keeps_the_first() -> None:
    queue = KeyQueue(2, 1)
    queue.push(torch.tensor([[1.0], [-1.0], [1.0]]), torch.tensor([7, 8, 9]))
    assert queue.cases.tolist() == [7, 8]
