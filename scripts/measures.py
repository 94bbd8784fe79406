"""Time and memory of a process or a GPU, as the benchmarks read them. Linux."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter, process_time

import torch


def seconds() -> float:
    """Of the clock that steps are measured by. A step ends with its loss on the CPU: nothing is left to wait for."""
    return perf_counter() if torch.cuda.is_available() else process_time()


def resident(which: str) -> int:
    """Bytes that are held (VmRSS), or were at most (VmHWM). `ru_maxrss` would begin at what the parent process held."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() if which == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def forget_peak() -> None:
    """Let the peak begin anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def shared_once(pid: int) -> int:
    """Bytes of a process in memory, of what n processes share the n-th part (PSS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
