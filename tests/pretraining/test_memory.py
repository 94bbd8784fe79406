"""The estimated memory of a step from shapes alone, and the settings of the CPU's allocator."""

from __future__ import annotations

import platform
import resource
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pcrl_nnunet.methods import ArraySpec, Method, StepOutput
from pcrl_nnunet.pretraining.memory import estimated_peak, keep_freed_memory

LARGE = 1 << 26  # bytes; 16,384 pages of 4 kB


def page_faults(keeps: bool) -> int:
    """Count the page faults of ten large arrays, made one after another in this process."""
    if keeps:
        keep_freed_memory()
    np.ones(LARGE, np.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(LARGE, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_memory_that_is_freed_is_used_again_without_page_faults() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        assert pool.submit(page_faults, True).result() < 100


def test_keep_freed_memory_does_nothing_with_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("it was called"))
    keep_freed_memory()


class Squares(Method):
    """Keeps its input for the backward pass; its dearest variant twice as much."""

    name = "squares"

    def __init__(self, asks: bool = False) -> None:
        super().__init__(None, 1, None)
        self.weight = nn.Parameter(torch.ones(1000))
        self.asks = asks

    @classmethod
    def views(cls, *given: Any) -> Any:
        """None are made."""

    def variants(self) -> list[int]:
        return [1, 2]

    def forward(self, batch: Mapping[str, Tensor], drawn: int, progress: float = 0.0) -> StepOutput:
        assert batch["number"].dtype == torch.int64
        loss = self.weight.sum()
        for _ in range(drawn):
            loss = loss + ((batch["input"] + self.weight[0]) ** 2).mean()
        return StepOutput(loss * loss.item() if self.asks else loss)


ARRAYS = {"input": ArraySpec((10, 1000)), "number": ArraySpec((), "int64")}


@pytest.mark.parametrize(("optimizer", "copies"), [("sgd", 3), ("adamw", 4)])
def test_the_estimate_covers_the_largest_variant_and_the_weights(optimizer: str, copies: int) -> None:
    method = Squares()
    found = estimated_peak(method, ARRAYS, 8, optimizer)
    kept, weights = 2 * 8 * 10 * 1000 * 4, copies * 1000 * 4
    assert found == pytest.approx(kept + weights, abs=100)
    assert not method.weight.is_meta


def test_a_step_that_needs_values_has_no_memory_estimate() -> None:
    assert estimated_peak(Squares(asks=True), ARRAYS, 8, "sgd") is None
