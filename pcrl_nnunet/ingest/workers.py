"""Worker processes that read and preprocess images."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager

import SimpleITK as sitk
import torch


@contextmanager
def worker_pool(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """Provide processes that stop with their parent, leave Ctrl-C to it and do not write on its terminal."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start_worker)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the processes started here
    try:
        for _ in range(num_processes):
            pool.submit(os.getpid)
    finally:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield pool
    except BaseException:
        stop(pool)
        raise
    pool.shutdown()


def _start_worker() -> None:
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    silence = os.open(os.devnull, os.O_WRONLY)  # image libraries write warnings past Python; reasons arrive as results
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    parent = multiprocessing.parent_process()
    if parent is not None:  # a parent that was killed cannot end its processes
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def stop(pool: Executor) -> None:
    """End the processes at once."""
    pool.shutdown(wait=False, cancel_futures=True)
    for process in multiprocessing.active_children():
        process.terminate()
        process.join()
