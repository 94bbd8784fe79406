"""The speed of a training and its time left."""

from __future__ import annotations

from time import monotonic

from pcrl_nnunet.progress import duration

FIRST_SAID = 20  # steps after the first, which also waits for the first batch, until the speed is known


class Pace:
    """The speed of a training since its first step in this process, epochs' ends included.

    Args:
        total: number of steps of the training.
        done: number of steps that earlier processes have done.
    """

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done = total, done
        self.steps, self.start = 0, monotonic()

    def step(self) -> bool:
        """Count a finished step. Return whether the speed is known from now on."""
        if self.steps == 0:
            self.start = monotonic()
        self.steps += 1
        self.now = monotonic()
        return self.steps == FIRST_SAID + 1

    def __str__(self) -> str:
        at = f"step {self.done + self.steps} of {self.total}"
        if self.steps < 2:
            return f"{at}; the next one began {duration(monotonic() - self.start)} ago"
        a_step = (self.now - self.start) / (self.steps - 1)
        return f"{at}: {a_step:.2f} s a step, {duration(a_step * (self.total - self.done - self.steps))} left"
