"""The loader of samples: processes that make views of cases, in order and with exact replay.

B: samples of a batch.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import heap, util
from tempfile import TemporaryFile
from time import sleep
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case, CaseVolume
from pcrl_nnunet.loading.samples import Views
from pcrl_nnunet.views import kernels
from pcrl_nnunet.views.sub_crop import MAX_BACKGROUND

CACHED = 2  # batches that wait in each worker's queue
BACKGROUND_SAMPLES = 48  # samples that measure the share of background


class ViewLoader(SlimDataLoaderBase):
    """Batches of samples. Each sample depends only on (seed, step, sample), not on the process that makes it.

    A batch has the arrays of its views, with B before their shapes, and ``cases``, B names.

    Args:
        cases: cases to draw from, by weight.
        views: maker of a sample from a case.
        batch_size: B.
        seed: seed of the training.
        first_sample: number of the batch's first sample; each of several training processes makes a part of a batch.
        first_step: number of the first batch.
        num_workers: number of processes that share the steps, each with a copy of this loader; 0: none.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        views: Views,
        batch_size: int,
        seed: int,
        first_sample: int = 0,
        first_step: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(list(cases), batch_size, max(1, num_workers))
        self.seed = seed
        self.first_sample = first_sample
        self.first_step = first_step
        self.batches_done = 0
        self.views = views
        weights = np.array([case.weight for case in cases])
        up_to = np.cumsum(weights)
        self._up_to = None if len(set(weights)) <= 1 else up_to / up_to[-1]

    def generate_train_batch(self, memory: Mapping[str, np.ndarray] | None = None) -> dict[str, Any]:
        """Make the batch of this worker's next step, in the given memory if any."""
        step = self.first_step + self.thread_id + self.batches_done * self.number_of_threads_in_multithreaded
        self.batches_done += 1
        # One thread: otherwise each worker would use all cores, and results must not depend on the number.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            first = self.first_sample
            samples = [self.sample(step, first + index) for index in range(self.batch_size)]
        finally:
            torch.set_num_threads(threads)
        batch: dict[str, Any] = {
            name: np.stack([sample[name] for _, sample in samples], out=memory[name] if memory else None)
            for name in self.views.arrays
        }
        batch["cases"] = [case.name for case, _ in samples]
        return batch

    def sample(self, step: int, index: int) -> tuple[Case, dict[str, np.ndarray]]:
        """Make sample `index` of batch `step`, and return it with its case."""
        case, rng = self._draw(step, index)
        sample = self.views(case, CaseVolume(case), rng)
        for name, spec in self.views.arrays.items():
            array = sample.get(name)
            if array is None or array.shape != tuple(spec.shape) or array.dtype != np.dtype(spec.dtype):
                came = "no such array" if array is None else f"{array.shape} of {array.dtype}"
                raise ValueError(
                    f"{type(self.views).__name__} made {came} for '{name}'; its `arrays` promises {tuple(spec.shape)} "
                    f"of {spec.dtype}"
                )
        return case, sample

    def background_line(self) -> str:
        """Return a phrase about the views' share of background; empty if it is unknown."""
        found: dict[str, list[Sequence[float]]] = {}
        for index in range(BACKGROUND_SAMPLES):
            case, rng = self._draw(0, index)
            for kind, shares in self.views.background(case, CaseVolume(case), rng).items():
                found.setdefault(kind, []).append(shares)
        known = {kind: np.array(shares) for kind, shares in found.items() if np.size(shares)}
        if not known:
            return ""
        parts = ", ".join(
            f"{shares.mean():.0%} of {kind} views (more than {MAX_BACKGROUND:.0%} in "
            f"{(shares > MAX_BACKGROUND).mean():.0%})"
            for kind, shares in known.items()
        )
        return f"{parts}; {BACKGROUND_SAMPLES} samples".replace("%", " %")

    def examples(self, number: int) -> Iterator[tuple[Case, np.random.Generator]]:
        """Yield a few cases, evenly from first to last, each with a sample's generator. They are always the same."""
        cases: list[Case] = self._data
        for i in sorted({round(k * (len(cases) - 1) / max(1, number - 1)) for k in range(number)}):
            yield cases[i], np.random.default_rng((self.seed, i))

    def _draw(self, step: int, index: int) -> tuple[Case, np.random.Generator]:
        """Draw the case of a sample, and return the generator that then draws the sample."""
        # not (seed, step, ...), which seeds the step's random choices
        rng = np.random.default_rng((self.seed, 0, step, index))
        if self._up_to is None:
            return self._data[rng.integers(len(self._data))], rng
        return self._data[int(np.searchsorted(self._up_to, rng.random(), side="right"))], rng


def shared_memory(size: int) -> heap.Arena:
    """Reserve memory, its `buffer`, that this process shares with its children.

    multiprocessing takes memory that looks free. If other processes take it, too, or the temporary folder is full,
    writing ends the process with a bus error. Reserving the memory prevents this.

    Raises:
        UserError: neither /dev/shm nor the temporary folder has room.
    """
    if not hasattr(os, "posix_fallocate"):  # Windows and macOS
        return heap.Arena(size)
    reasons = []
    for folder in ("/dev/shm", util.get_temp_dir()):
        try:
            with TemporaryFile(dir=folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                descriptor = os.dup(file.fileno())
            arena = heap.Arena(size, descriptor)
            util.Finalize(arena, os.close, (descriptor,))
            return arena
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
    raise UserError(
        f"there is no room for {size / 2**20:.0f} MB that are shared with the loading processes "
        f"({'; '.join(reasons)}); make room there, or set nnUNet_n_proc_DA to a smaller number"
    )


class _Worker(SlimDataLoaderBase):
    """A `ViewLoader` in another process, which writes its batches into slots of shared memory, one after another.

    Only the slot's number goes through batchgenerators' queue. A batch of the paper's sizes has 17 MB, and the queue
    would copy it four times, mostly into newly allocated memory. A `UserError` goes through the queue, too: otherwise
    batchgenerators would only say that a worker is gone.

    A slot is reused after its batch has been released. There are as many slots as batchgenerators holds at a time, so
    that no worker waits for a slot.
    """

    def __init__(self, loader: ViewLoader, num_workers: int) -> None:
        super().__init__(None, loader.batch_size, num_workers)
        self.loader = loader
        in_hand = max(3, CACHED * num_workers // 2) + 2  # in batchgenerators' last queue, before it and after it
        self.slots = CACHED + 1 + math.ceil(in_hand / num_workers)
        self._arrays = {
            name: ((num_workers, self.slots, loader.batch_size, *spec.shape), np.dtype(spec.dtype))
            for name, spec in loader.views.arrays.items()
        }
        self._shared = {
            name: shared_memory(max(1, dtype.itemsize * math.prod(shape)))
            for name, (shape, dtype) in self._arrays.items()
        }
        self._released = multiprocessing.RawValue("q", 0)  # number of released batches; they are delivered in order

    def set_thread_id(self, thread_id: int) -> None:
        """Set up the worker's process: batchgenerators calls this first."""
        super().set_thread_id(thread_id)
        self.loader.set_thread_id(thread_id)
        if multiprocessing.parent_process() is not None:
            # schedulers send SIGTERM to all processes of a job: the training handles it and ends its workers at the end
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if sys.platform == "linux":  # a killed training cannot end its workers
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def generate_train_batch(self) -> dict[str, Any]:
        """Return the slot's number ``slot`` and ``cases``; or ``error``; or ``traceback``."""
        number = self.loader.batches_done
        last = self.thread_id + (number - self.slots) * self.number_of_threads_in_multithreaded
        while self._released.value <= last:
            sleep(0.001)
        slot = self.thread_id, number % self.slots
        try:
            return {"slot": slot, "cases": self.loader.generate_train_batch(self.memory(slot))["cases"]}
        except UserError as error:
            return {"error": str(error)}
        except Exception:  # a bug in a method's views: batchgenerators would only say that a worker is gone
            return {"traceback": traceback.format_exc()}

    def memory(self, slot: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return a slot's arrays."""
        return {
            name: np.frombuffer(self._shared[name].buffer, dtype, math.prod(shape)).reshape(shape)[slot]
            for name, (shape, dtype) in self._arrays.items()
        }

    def release(self, batches: int) -> None:
        """Release the batches that follow the released ones."""
        self._released.value += batches


class Batches:
    """An iterator over a loader's batches in order, from this process or from workers. `close` ends the workers.

    Workers reuse memory: a batch is valid until the next batch is requested.
    """

    def __init__(self, loader: ViewLoader, num_workers: int, pin_memory: bool) -> None:
        self._worker: _Worker | None = None
        self._given = False
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._source: Iterator[dict[str, Any]]
        if num_workers == 0:
            self._source = SingleThreadedAugmenter(loader, None)
        else:
            kernels.compile_all()  # once, before the processes are forked
            self._worker = _Worker(loader, num_workers)
            # with seeds batchgenerators delivers in order; nothing draws from the seeds
            self._source = MultiThreadedAugmenter(
                self._worker, None, num_workers, CACHED, seeds=list(range(num_workers))
            )

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._worker and self._given:
            self._worker.release(1)
        self._given = False
        try:
            batch = next(self._source)
        except RuntimeError as error:
            if isinstance(self._source, SingleThreadedAugmenter):
                raise
            raise UserError(
                "a process that loads data has ended unexpectedly, most often because memory ran out: "
                "set nnUNet_n_proc_DA to a smaller number"
            ) from error
        if "error" in batch:
            self.close()
            raise UserError(batch["error"])
        if "traceback" in batch:
            self.close()
            raise RuntimeError(f"a loading process failed:\n{batch['traceback']}")
        if self._worker:
            batch = {**self._worker.memory(batch["slot"]), "cases": batch["cases"]}
        self._given = True
        if self._pin_memory:
            return {
                key: torch.from_numpy(value).pin_memory() if isinstance(value, np.ndarray) else value
                for key, value in batch.items()
            }
        return batch

    def close(self) -> None:
        """End the workers, if any, and the iteration."""
        if self._worker and isinstance(self._source, MultiThreadedAugmenter):
            self._worker.release(2**32)  # a worker that waits for a slot would not notice the end
            with suppress(AssertionError):  # a worker failed to start; its own error has been raised
                self._source._finish()
        self._source = iter(())


def make_loader(
    cases: Sequence[Case],
    views: Views,
    batch_size: int,
    seed: int,
    first_sample: int = 0,
    first_step: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Batches:
    """Return batches of a `ViewLoader` with these arguments, bit for bit the same for any number of workers.

    Args:
        pin_memory: yield pinned tensors instead of arrays if CUDA is available.
    """
    loader = ViewLoader(cases, views, batch_size, seed, first_sample, first_step, num_workers)
    return Batches(loader, num_workers, pin_memory)
