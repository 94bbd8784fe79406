"""The speed of a training and its time left."""

from __future__ import annotations

import pytest

from pcrl_nnunet.pretraining import pace
from pcrl_nnunet.pretraining.pace import Pace, line_of_epoch


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


def test_the_line_of_an_epoch_has_the_same_speed_and_time_left(clock: list[float]) -> None:
    found = Pace(total=1000, done=0)
    for seconds in [1.0] * 100 + [2.0] * 101:  # the second epoch is slower
        found.step()
        clock[0] += seconds
    values = {"restoration": 0.25, "margin": float("nan")}
    assert str(found) == "step 201 of 1000: 1.50 s a step, 20 min left"
    assert line_of_epoch(2, 10, values, found) == "epoch 2/10: restoration 0.2500, 1.50 s a step, 20 min left"


def test_the_line_of_an_epoch_of_one_step_has_no_speed() -> None:
    found = Pace(total=2, done=0)
    found.step()
    assert line_of_epoch(1, 2, {"restoration": 0.25}, found) == "epoch 1/2: restoration 0.2500"


def test_before_the_first_step_the_line_says_how_long_it_has_taken(clock: list[float]) -> None:
    found = Pace(total=10, done=0)
    clock[0] += 40
    assert str(found) == "step 0 of 10; the next one began 40 s ago"
