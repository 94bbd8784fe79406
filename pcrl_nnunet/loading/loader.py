"""The loader of samples: processes that make views of cases, in order and with exact replay.

B samples of a batch.
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
BACKGROUND_SAMPLES = 48  # samples that the share of background is said of


class ViewLoader(SlimDataLoaderBase):
    """Batches of samples, each a function of (seed, step, sample) alone, whoever makes it.

    A batch has the arrays that its views name, with B before their shapes, and ``cases``, B names.

    Args:
        cases: to draw from, by their weights.
        views: what makes a sample from a case.
        batch_size: B.
        seed: of the training.
        first_sample: number of the batch's first sample; processes that train together each make a part of a batch.
        first_step: number of the first batch.
        num_workers: processes that share the steps, each with its copy of this loader; 0 for none.
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
        """Make the batch of this worker's next step, in arrays of the views' shapes where they are given."""
        step = self.first_step + self.thread_id + self.batches_done * self.number_of_threads_in_multithreaded
        self.batches_done += 1
        # One thread: batchgenerators' workers would each use all cores, and results must not depend on the number.
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
        """Return how much background the views of a training show, as half a sentence; empty where it is not known."""
        found: dict[str, list[Sequence[float]]] = {}
        for index in range(BACKGROUND_SAMPLES):
            case, rng = self._draw(0, index)
            for kind, shares in self.views.background(case, CaseVolume(case), rng).items():
                found.setdefault(kind, []).append(shares)
        known = {kind: np.array(shares) for kind, shares in found.items() if np.size(shares)}
        if not known:
            return ""
        means = ", ".join(f"{kind} views {shares.mean():.0%}" for kind, shares in known.items())
        empty = " and ".join(f"{(shares > MAX_BACKGROUND).mean():.0%}" for shares in known.values())
        line = f"{means} (means of {BACKGROUND_SAMPLES} samples; over {MAX_BACKGROUND:.0%} in {empty} of the views)"
        return line.replace("%", " %")

    def examples(self, number: int) -> Iterator[tuple[Case, np.random.Generator]]:
        """Yield a few cases, evenly from first to last, each with the generator of a sample; always the same."""
        cases: list[Case] = self._data
        for i in sorted({round(k * (len(cases) - 1) / max(1, number - 1)) for k in range(number)}):
            yield cases[i], np.random.default_rng((self.seed, i))

    def _draw(self, step: int, index: int) -> tuple[Case, np.random.Generator]:
        """Draw the case of a sample; the generator goes on to draw the sample."""
        # not (seed, step, ...), which is the generator of the step's random choices
        rng = np.random.default_rng((self.seed, 0, step, index))
        if self._up_to is None:
            return self._data[rng.integers(len(self._data))], rng
        return self._data[int(np.searchsorted(self._up_to, rng.random(), side="right"))], rng


def shared_memory(size: int) -> heap.Arena:
    """Bytes, its `buffer`, of this process and of those that it starts.

    multiprocessing takes them where they seem to be free; if others have the same thought, or the temporary folder has
    no room either, writing to them ends the process with a bus error. So they are reserved here.

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
    """A `ViewLoader` in another process, which writes its batches into memory of both, a slot each, one after another.

    Through batchgenerators' queue goes the slot's number. A batch of the paper's sizes has 17 MB: they would be copied
    four times on their way, most of it into memory that the system has to find first. And a `UserError` goes through
    it: batchgenerators would only say that a worker is gone.

    A slot is written again when its batch has been released. There are as many as batchgenerators holds at a time, so
    that nobody waits for one.
    """

    def __init__(self, loader: ViewLoader, num_workers: int) -> None:
        super().__init__(None, loader.batch_size, num_workers)
        self.loader = loader
        in_hand = max(3, CACHED * num_workers // 2) + 2  # in batchgenerators' last queue, and before and after it
        self.slots = CACHED + 1 + math.ceil(in_hand / num_workers)
        self._arrays = {
            name: ((num_workers, self.slots, loader.batch_size, *spec.shape), np.dtype(spec.dtype))
            for name, spec in loader.views.arrays.items()
        }
        self._shared = {
            name: shared_memory(max(1, dtype.itemsize * math.prod(shape)))
            for name, (shape, dtype) in self._arrays.items()
        }
        self._released = multiprocessing.RawValue("q", 0)  # batches, which are delivered in order

    def set_thread_id(self, thread_id: int) -> None:
        """The first thing that batchgenerators does in the worker's process."""
        super().set_thread_id(thread_id)
        self.loader.set_thread_id(thread_id)
        if multiprocessing.parent_process() is not None:
            # schedulers send it to all processes of a job: the training answers, and ends its workers when it is done
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if sys.platform == "linux":  # a training that is killed cannot end them
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def generate_train_batch(self) -> dict[str, Any]:
        """Return ``slot``, its number, and ``cases``; or ``error``, or ``traceback``."""
        number = self.loader.batches_done
        last = self.thread_id + (number - self.slots) * self.number_of_threads_in_multithreaded
        while self._released.value <= last:
            sleep(0.001)
        slot = self.thread_id, number % self.slots
        try:
            return {"slot": slot, "cases": self.loader.generate_train_batch(self.memory(slot))["cases"]}
        except UserError as error:
            return {"error": str(error)}
        except Exception:  # of a method's views: batchgenerators would only say that a worker is gone
            return {"traceback": traceback.format_exc()}

    def memory(self, slot: tuple[int, int]) -> dict[str, np.ndarray]:
        """A slot's arrays."""
        return {
            name: np.frombuffer(self._shared[name].buffer, dtype, math.prod(shape)).reshape(shape)[slot]
            for name, (shape, dtype) in self._arrays.items()
        }

    def release(self, batches: int) -> None:
        """The next ones after those released before are not looked at any more."""
        self._released.value += batches


class Batches:
    """Iterator over a loader's batches in order, from this process or from workers. `close` ends the workers.

    Workers write into memory that is used again: a batch is valid until the next one is asked for.
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
            # given seeds make batchgenerators deliver in order; nothing draws from them
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
                "a process that loads data has ended unexpectedly, most often for want of memory: "
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
        """End the workers, if there are any, and give no more batches."""
        if self._worker and isinstance(self._source, MultiThreadedAugmenter):
            self._worker.release(2**32)  # one that waits for a slot would not hear that it is over
            with suppress(AssertionError):  # a worker that could not start; its own error has been raised
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
    """Return batches of a `ViewLoader`, which has the arguments; the same bit for bit for any number of workers.

    Args:
        pin_memory: give pinned tensors instead of arrays, where there is CUDA.
    """
    loader = ViewLoader(cases, views, batch_size, seed, first_sample, first_step, num_workers)
    return Batches(loader, num_workers, pin_memory)
