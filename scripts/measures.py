"""Time and memory of a process or a GPU, for the benchmarks. Linux."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter, process_time

import torch


def seconds() -> float:
    """Read the clock for steps. A step ends with its loss on the CPU, so no work is left to wait for."""
    return perf_counter() if torch.cuda.is_available() else process_time()


def resident(which: str) -> int:
    """Return the bytes held now (VmRSS) or at the peak (VmHWM). `ru_maxrss` would include the parent's memory."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if which == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def forget_peak() -> None:
    """Reset the peak."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def shared_once(pid: int) -> int:
    """Return a process's bytes in memory; memory that n processes share counts 1/n (PSS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
