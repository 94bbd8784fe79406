"""Jobs as child processes: several at a time, which end with this process."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Job:
    """One process.

    Args:
        after: names of the jobs whose results this job needs.
    """

    name: str
    command: tuple[str, ...]
    is_done: Callable[[], bool]
    after: tuple[str, ...] = ()


class Processes:
    """Child processes for jobs: starts them, and ends the children that are left.

    Args:
        folder: working directory of the children, with a folder ``logs`` for their output. (Python looks for modules in
            its working directory: in a clone of this package it would find half of it.)
        environments: environment variables of each slot; there are as many slots as entries.
    """

    def __init__(self, folder: str, environments: Sequence[Mapping[str, str]]) -> None:
        self.folder = folder
        self.slots: SimpleQueue[Mapping[str, str]] = SimpleQueue()
        for environment in environments:
            self.slots.put(environment)
        self.children: set[subprocess.Popen[bytes]] = set()
        self.ended = Event()

    def run(self, job: Job) -> bool:
        """Run a job in a free slot, and tell if it is done."""
        slot = self.slots.get()
        try:
            with open(os.path.join(self.folder, "logs", f"{job.name}.log"), "a", encoding="utf-8") as log:
                child = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=slot,
                    cwd=self.folder,
                )
                self.children.add(child)
                if self.ended.is_set():  # this child started after the others were ended
                    child.terminate()
                return child.wait() == 0 and job.is_done()
        finally:
            self.slots.put(slot)

    @contextmanager
    def ended_with_us(self) -> Iterator[None]:
        """End the children if this process is interrupted or terminated. Later they resume from their checkpoints."""

        def stop(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        except BaseException:
            self.ended.set()
            for child in list(self.children):
                if child.poll() is None:
                    child.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def run_jobs(
    jobs: Sequence[Job], folder: str, environments: Sequence[Mapping[str, str]], after_each: Callable[[], Any]
) -> list[str]:
    """Run each unfinished job as soon as the jobs that it needs are done.

    Args:
        folder: see `Processes`.
        environments: see `Processes`.
        after_each: called whenever jobs have ended.

    Returns:
        the names of the jobs that failed or that need a failed job.
    """
    processes = Processes(folder, environments)
    waiting = [job for job in jobs if not job.is_done()]
    done = {job.name for job in jobs} - {job.name for job in waiting}
    failed: list[str] = []
    running: dict[Future[bool], Job] = {}
    with (
        ThreadPoolExecutor(len(environments)) as pool,
        tqdm(total=len(waiting), unit="step", dynamic_ncols=True) as bar,
        processes.ended_with_us(),
    ):
        while waiting or running:
            for job in [job for job in waiting if done.issuperset(job.after)][: len(environments) - len(running)]:
                waiting.remove(job)
                running[pool.submit(processes.run, job)] = job
            if not running:  # the remaining jobs need a failed job
                failed += [job.name for job in waiting]
                break
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                job = running.pop(future)
                if future.result():
                    done.add(job.name)
                else:
                    failed.append(job.name)
                bar.update()
                bar.write(f"{'done' if future.result() else 'FAILED'}: {job.name}")
            after_each()
    return failed
