"""Lines of progress."""

from __future__ import annotations

import os
import time

import pytest

from pcrl_nnunet import progress
from pcrl_nnunet.progress import counted, doing, duration, telling


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.05)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (45, "45 s"),
        (99, "99 s"),
        (100, "2 min"),
        (3569, "59 min"),
        (3590, "1 h 0 min"),
        (12_000, "3 h 20 min"),
    ],
)
def test_a_duration_is_given_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_are_printed_during_a_slow_task_and_not_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    with doing("Measuring a step"):
        time.sleep(0.3)
    first, *more = capsys.readouterr().out.splitlines()
    assert first == "Measuring a step"
    assert set(more) == {"  Measuring a step: 0 s so far"}
    assert 2 <= len(more) <= 6
    time.sleep(0.15)
    assert capsys.readouterr().out == ""


def test_a_short_task_has_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SILENT_SECONDS", 60)
    with doing("Finding the cases"):
        pass
    assert capsys.readouterr().out == "Finding the cases\n"


def test_an_empty_line_is_not_printed() -> None:
    said: list[str] = []
    texts = iter(["", "second", ""])
    with telling(lambda: next(texts, ""), said.append):
        time.sleep(0.3)
    assert said == ["second"]


def test_the_lines_of_a_long_run_come_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "SILENT_SECONDS", 20)
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    waits: list[float] = []

    class Waiting:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            now[0] += 3600
            return len(waits) > 2

        def set(self) -> None: ...

    monkeypatch.setattr(progress, "Event", Waiting)
    with telling(lambda: "line", lambda _: None):
        time.sleep(0.05)
    assert waits == [20, 36, 72]


def test_a_log_shows_the_number_of_finished_items(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in counted(range(3), 3, "images are done"):
        time.sleep(0.12)
    lines = capsys.readouterr().out.splitlines()
    assert [line for number, line in enumerate(lines) if line not in lines[:number]] == [
        f"{number} of 3 images are done" for number in range(3)
    ]


def test_a_fork_while_lines_are_printed_does_not_hang(capfd: pytest.CaptureFixture[str]) -> None:
    with doing("Starting processes"):
        for _ in range(20):
            child = os.fork()
            if child == 0:
                print("child\n", end="", flush=True)  # noqa: T201  # one write, which no other line can cut
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            time.sleep(0.01)
    assert capfd.readouterr().out.count("child\n") == 20
