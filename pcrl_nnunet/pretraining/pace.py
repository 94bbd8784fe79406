"""The speed of a training and its time left."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
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
        return f"{at}: {self.speed}"

    @property
    def speed(self) -> str:
        """The mean time of a step and the time left; empty before the second step, when both are unknown."""
        if self.steps < 2:
            return ""
        a_step = (self.now - self.start) / (self.steps - 1)
        return f"{a_step:.2f} s a step, {duration(a_step * (self.total - self.done - self.steps))} left"


def line_of_epoch(epoch: int, epochs: int, values: Mapping[str, float], pace: Pace) -> str:
    """Return the line of a finished epoch.

    Args:
        epoch: number of the epoch, from 1.
        values: losses and quantities by name. NaN: the epoch lacks the value.
        pace: the speed, which is the same as in the lines between the epochs.
    """
    said = [f"{name} {value:.4f}" for name, value in values.items() if not isnan(value)]
    return f"epoch {epoch}/{epochs}: {', '.join(filter(None, [*said, pace.speed]))}"
