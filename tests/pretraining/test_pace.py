"""The speed of a training and its time left."""

from __future__ import annotations

import pytest

from pcrl_nnunet.pretraining import pace
from pcrl_nnunet.pretraining.pace import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(pace, "monotonic", lambda: now[0])
    return now


def test_the_speed_counts_from_the_first_step_which_waits_for_a_batch(clock: list[float]) -> None:
    found = Pace(total=1000, done=0)
    clock[0] += 300  # the loading processes start
    known = []
    for _ in range(25):
        known.append(found.step())
        clock[0] += 2
    assert [number for number, now in enumerate(known, start=1) if now] == [21]
    assert str(found) == "step 25 of 1000: 2.00 s a step, 32 min left"


def test_a_continued_training_counts_all_steps_and_measures_its_own(clock: list[float]) -> None:
    found = Pace(total=1000, done=900)
    for _ in range(11):
        found.step()
        clock[0] += 0.5
    assert str(found) == "step 911 of 1000: 0.50 s a step, 44 s left"


def test_before_the_first_step_the_line_says_how_long_it_has_taken(clock: list[float]) -> None:
    found = Pace(total=10, done=0)
    clock[0] += 40
    assert str(found) == "step 0 of 10; the next one began 40 s ago"
