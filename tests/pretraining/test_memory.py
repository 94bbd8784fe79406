"""What is set of the CPU's allocator."""

from __future__ import annotations

import platform
import resource
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from pcrl_nnunet.pretraining.memory import keep_freed_memory

LARGE = 1 << 26  # bytes; 16,384 pages of 4 kB


def page_faults(keeps: bool) -> int:
    """Of ten large arrays, one after another, in this process."""
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


def test_it_does_nothing_where_there_is_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr("ctypes.CDLL", lambda name: pytest.fail("it was called"))
    keep_freed_memory()
