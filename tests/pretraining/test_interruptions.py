"""A pretraining as a process that is ended from outside, and goes on: the result is that of an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pcrl_nnunet import checkpoint

EPOCHS, STEPS = 3, 6
COMMAND = ["-d", "999", "-epochs", str(EPOCHS), "-iters_per_epoch", str(STEPS), "-batch_size", "4", "-device", "cpu"]
# Our command, of which the given step waits for the signal; a step that is done writes its number.
CODE = """
import os, signal, sys
from pcrl_nnunet import registration
from pcrl_nnunet.cli import pretrain
from pcrl_nnunet.trainers import PCRLPretrainTrainer
registration.is_registered = lambda: True
wait_at, file = int(sys.argv.pop(1)), sys.argv.pop(1)
train_step = PCRLPretrainTrainer.train_step
def step(self, batch, number, *rest):
    found = train_step(self, batch, number, *rest)
    with open(file, "a") as done:
        done.write(f"{number}\\n")
    if number == wait_at:
        signal.pause()
    return found
PCRLPretrainTrainer.train_step = step
pretrain.main_entry()
"""
# Our command, killed within its second save: when the draft is written and not yet flushed to disk, or when the file of
# the first save has its other name and the draft not yet its own.
KILLED_WITHIN_A_SAVE = """
import os, signal, sys
from pcrl_nnunet import registration
from pcrl_nnunet.cli import pretrain
registration.is_registered = lambda: True
where, fsync, replace, saves = sys.argv.pop(1), os.fsync, os.replace, []
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def counted(file):
    saves.append(file)
    if where == "draft" and len(saves) == 3:  # of the second save: each flushes its file, then the folder
        kill()
    fsync(file)
def renamed(source, target):
    replace(source, target)
    if where == "renamed" and target.endswith("checkpoint_previous.pth"):
        kill()
os.fsync, os.replace = counted, renamed
pretrain.main_entry()
"""


class Pretraining:
    """Starts the command in a process group of its own, as a scheduler does."""

    def __init__(self, tiny, tmp_path: Path) -> None:
        self.results, self.folder, self.done = tiny.results, tmp_path, tmp_path / "steps"
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "2"}

    def start(self, *more: str, wait_at: int = -1) -> subprocess.Popen[str]:
        return self.process(CODE, str(wait_at), str(self.done), *COMMAND, *more)

    def process(self, *code_and_arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", *code_and_arguments]
        options = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "start_new_session": True,
            "cwd": self.folder,
        }
        return subprocess.Popen(command, env=self.environment, encoding="utf-8", **options)

    def run(self, *more: str) -> str:
        process = self.start(*more)
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0, out
        return out

    def steps(self) -> list[int]:
        return [int(line) for line in self.done.read_text().split()] if self.done.exists() else []

    def wait_for(self, step: int) -> None:
        for _ in range(2000):
            if step in self.steps():
                return
            time.sleep(0.1)
        raise AssertionError(f"step {step} was not reached: {self.steps()}")

    def result(self) -> dict[str, torch.Tensor]:
        """All weights, the decoder's and the heads' too, and the loss."""
        (final,) = self.results.rglob(checkpoint.FINAL)
        assert [path.name for path in final.parent.glob("*.pth")] == [checkpoint.FINAL]
        content = torch.load(final, weights_only=True)
        return content["network_weights"] | content["method_weights"] | {"loss": torch.tensor(content["loss"])}


@pytest.fixture
def pretraining(tiny, tmp_path):
    return Pretraining(tiny, tmp_path)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
def test_ended_by_sigterm_and_killed_it_goes_on_to_the_same_weights_bit_for_bit(pretraining):
    pretraining.run()
    whole, last = pretraining.result(), EPOCHS * STEPS - 1
    assert pretraining.steps() == list(range(last + 1))
    (final,) = pretraining.results.rglob(checkpoint.FINAL)
    final.unlink()
    pretraining.done.unlink()
    seed = random.randrange(1000)
    print(f"seed {seed}")  # noqa: T201  (shown where it fails)
    at_sigterm, at_sigkill = sorted(random.Random(seed).sample(range(last), 2))

    stopped = pretraining.start(wait_at=at_sigterm)
    pretraining.wait_for(at_sigterm)
    os.killpg(stopped.pid, signal.SIGTERM)  # to its workers, too
    out, _ = stopped.communicate(timeout=200)
    assert stopped.returncode == 0, out
    assert f"Stopped by SIGTERM after step {at_sigterm + 1}, saved as" in out
    assert out.rstrip().endswith(f"{' '.join(COMMAND)} --c")
    (report,) = pretraining.results.rglob("report.html")
    assert f"<dd>{at_sigterm + 1} of {EPOCHS * STEPS}</dd>" in report.read_text(encoding="utf-8")
    assert not alive(stopped.pid)

    killed = pretraining.start("--c", wait_at=at_sigkill)
    pretraining.wait_for(at_sigkill)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=200)
    for _ in range(100):  # its workers end with it
        if not alive(killed.pid):
            break
        time.sleep(0.1)
    assert not alive(killed.pid)

    saved = max(at_sigterm + 1, at_sigkill // STEPS * STEPS)  # the last epoch's end, unless SIGTERM came later
    assert f"Continuing after step {saved}" in pretraining.run("--c")
    # nothing is repeated after SIGTERM, and after SIGKILL what came after the last save
    assert pretraining.steps() == [*range(at_sigkill + 1), *range(saved, last + 1)]
    assert f"<dd>{EPOCHS * STEPS} of {EPOCHS * STEPS}</dd>" in report.read_text(encoding="utf-8")
    result = pretraining.result()
    assert result.keys() == whole.keys()
    assert all(torch.equal(result[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "there"), [("draft", checkpoint.LATEST), ("renamed", checkpoint.PREVIOUS)])
def test_killed_within_a_save_it_goes_on_from_the_save_before_and_clears_up(pretraining, where, there):
    killed = pretraining.process(KILLED_WITHIN_A_SAVE, where, *COMMAND)
    out, _ = killed.communicate(timeout=200)
    assert killed.returncode == -signal.SIGKILL, out
    (state,) = pretraining.results.rglob(there)
    (draft,) = state.parent.glob(f"draft_*_{checkpoint.LATEST}")
    assert draft.stat().st_size > 1000

    assert f"Continuing after step {STEPS}\n" in pretraining.run("--c")
    assert pretraining.steps() == list(range(STEPS, EPOCHS * STEPS))
    assert not draft.exists()
    pretraining.result()  # no other file of weights is left
