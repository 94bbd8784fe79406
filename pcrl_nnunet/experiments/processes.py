"""Jobs as child processes: several at a time, which end with this process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event
from time import monotonic
from typing import Any

from tqdm import tqdm

from pcrl_nnunet.progress import duration, telling

LAST_BYTES = 20_000  # the end of a log, which names the last epoch


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


class AtWork:
    """The jobs that run at the moment, for the lines of progress.

    Attributes:
        since: time of the start, by the job's name.
    """

    def __init__(self, logs: str, total: int) -> None:
        self.logs, self.total, self.ended = logs, total, 0
        self.since: dict[str, float] = {}

    def begin(self, name: str) -> None:
        self.since[name] = monotonic()

    def end(self, name: str) -> str:
        """Return the duration of the job in words."""
        self.ended += 1
        return duration(monotonic() - self.since.pop(name))

    def __str__(self) -> str:
        running = ", ".join(
            f"{name} ({', '.join([*self._epoch(name), duration(monotonic() - since)])})"
            for name, since in list(self.since.items())
        )
        return f"{self.ended} of {self.total} steps have ended, running: {running or 'none'}"

    def _epoch(self, name: str) -> list[str]:
        """Return the epoch that a training's log names last, if any."""
        try:
            with open(os.path.join(self.logs, f"{name}.log"), "rb") as log:
                log.seek(max(0, os.path.getsize(log.name) - LAST_BYTES))
                found = re.findall(r"\bepoch \d+(?:/\d+)?\b", log.read().decode(errors="replace"), re.IGNORECASE)
        except OSError:  # not begun yet
            return []
        return [found[-1].lower()] if found else []


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
    at_work = AtWork(os.path.join(folder, "logs"), len(waiting))
    with (
        ThreadPoolExecutor(len(environments)) as pool,
        tqdm(total=len(waiting), unit="step", dynamic_ncols=True, disable=None) as bar,
        telling(at_work.__str__, None if bar.disable else bar.set_postfix_str),
        processes.ended_with_us(),
    ):
        while waiting or running:
            for job in [job for job in waiting if done.issuperset(job.after)][: len(environments) - len(running)]:
                waiting.remove(job)
                at_work.begin(job.name)
                bar.write(f"running: {job.name}")
                running[pool.submit(processes.run, job)] = job
            if not running:  # the remaining jobs need a failed job
                failed += [job.name for job in waiting]
                break
            for future in wait(running, return_when=FIRST_COMPLETED)[0]:
                job = running.pop(future)
                (done.add if future.result() else failed.append)(job.name)
                took = at_work.end(job.name)
                bar.update()
                bar.write(f"{'done' if future.result() else 'FAILED'}: {job.name}, {took}")
            after_each()
    return failed
