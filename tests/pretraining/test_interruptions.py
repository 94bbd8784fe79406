"""A pretraining stopped from outside and continued gives the same result as an uninterrupted one.

Processes are forked from a process that has imported the slow modules (`fork`).
"""

from __future__ import annotations

import os
import random
import signal
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from pcrl_nnunet import checkpoint

EPOCHS, STEPS = 3, 4
COMMAND = ["-d", "999", "-epochs", str(EPOCHS), "-iters_per_epoch", str(STEPS), "-batch_size", "4", "-device", "cpu"]
# Our command in its own process group, as under a scheduler. Each finished step writes its number. After the given
# step, the group or the command alone gets a signal. Then the exit status and surviving processes are reported.
CODE = """
import os, signal, sys, time
sys.path[:0] = {path}
command = os.fork()
if command == 0:
    os.setsid()
    from pcrl_nnunet import registration
    from pcrl_nnunet.cli import pretrain
    from pcrl_nnunet.report import examples, html
    from pcrl_nnunet.report.progress import PretrainLogger
    from pcrl_nnunet.trainers import PCRLPretrainTrainer
    from pcrl_nnunet.views import kernels
    registration.is_registered = lambda: True
    PretrainLogger.plot_progress_png = examples.views_of_a_case = lambda *_: None  # pictures take seconds each
    html.chart_svg, kernels.compiled = lambda *_: "", False  # so does compiling
    train_step = PCRLPretrainTrainer.train_step
    def step(self, batch, number, *rest):
        found = train_step(self, batch, number, *rest)
        with open({steps!r}, "a") as done:
            done.write(f"{{number}}\\n")
        if number == {at}:
            os.killpg(0, signal.SIGTERM) if {sigterm} else os.kill(os.getpid(), signal.SIGKILL)
        return found
    PCRLPretrainTrainer.train_step = step
    {more}
    sys.argv = ["pcrl_nnunet_pretrain", *{arguments}]
    pretrain.main_entry()
    sys.exit()
_, status = os.waitpid(command, 0)
for _ in range(100):
    try:
        os.killpg(command, 0)
    except ProcessLookupError:
        break
    time.sleep(0.1)
else:
    print("something of the group is left")
sys.exit(abs(os.waitstatus_to_exitcode(status)))
"""
# Kills the command within its second save: before the draft is flushed to disk, or after the first save was renamed and
# before the draft was.
KILLED_WITHIN_A_SAVE = """
    where, fsync, replace, saves = {where!r}, os.fsync, os.replace, []
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
"""


class Pretraining:
    """Runs the command."""

    def __init__(self, fork, tiny, tmp_path: Path) -> None:
        self.fork, self.results, self.done = fork, tiny.results, tmp_path / "steps"
        names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        self.variables = {**{name: os.environ[name] for name in names}, "nnUNet_n_proc_DA": "2"}

    def run(self, *flags: str, at: int = -1, sigterm: bool = False, more: str = "", status: int = 0) -> str:
        """Run it, with a signal after a step; return the output."""
        code = CODE.format(
            path=sys.path, steps=str(self.done), at=at, sigterm=sigterm, more=more, arguments=[*COMMAND, *flags]
        )
        found, out = self.fork(code, Path(sysconfig.get_path("purelib")), self.variables)
        assert found == status, out
        assert "something of the group is left" not in out
        return out

    def steps(self) -> list[int]:
        return [int(line) for line in self.done.read_text().split()]

    def result(self) -> dict[str, torch.Tensor]:
        """All weights, including decoder and heads, and the loss."""
        (final,) = self.results.rglob(checkpoint.FINAL)
        assert [path.name for path in final.parent.glob("*.pth")] == [checkpoint.FINAL]
        content = torch.load(final, weights_only=True)
        return content["network_weights"] | content["method_weights"] | {"loss": torch.tensor(content["loss"])}


@pytest.fixture
def pretraining(fork, tiny, tmp_path):
    return Pretraining(fork, tiny, tmp_path)


@pytest.mark.slow
def test_pretraining_interrupted_by_sigterm_and_sigkill_ends_with_identical_weights(pretraining):
    pretraining.run()
    whole, last = pretraining.result(), EPOCHS * STEPS - 1
    assert pretraining.steps() == list(range(last + 1))
    (final,) = pretraining.results.rglob(checkpoint.FINAL)
    final.unlink()
    pretraining.done.unlink()
    seed = random.randrange(1000)
    print(f"seed {seed}")  # noqa: T201  (shown on a failure)
    at_sigterm, at_sigkill = sorted(random.Random(seed).sample(range(last), 2))

    out = pretraining.run(at=at_sigterm, sigterm=True)  # also sent to the workers
    assert f"Stopped by SIGTERM after step {at_sigterm + 1}, saved as" in out
    assert out.rstrip().endswith(f"{' '.join(COMMAND)} --c")
    (report,) = pretraining.results.rglob("report.html")
    assert f"<dd>{at_sigterm + 1} of {EPOCHS * STEPS}</dd>" in report.read_text(encoding="utf-8")

    pretraining.run("--c", at=at_sigkill, status=signal.SIGKILL)  # the workers end with the command

    saved = max(at_sigterm + 1, at_sigkill // STEPS * STEPS)  # the end of the last epoch, or SIGTERM's save if later
    assert f"Continuing after step {saved}" in pretraining.run("--c")
    # SIGTERM repeats no step; SIGKILL repeats the steps after the last save
    assert pretraining.steps() == [*range(at_sigkill + 1), *range(saved, last + 1)]
    assert f"<dd>{EPOCHS * STEPS} of {EPOCHS * STEPS}</dd>" in report.read_text(encoding="utf-8")
    result = pretraining.result()
    assert result.keys() == whole.keys()
    assert all(torch.equal(result[name], whole[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "there"),
    [("draft", checkpoint.LATEST), pytest.param("renamed", checkpoint.PREVIOUS, marks=pytest.mark.long)],
)
def test_pretraining_killed_during_a_save_continues_from_the_previous_save(pretraining, where, there):
    pretraining.run(more=KILLED_WITHIN_A_SAVE.format(where=where), status=signal.SIGKILL)
    (state,) = pretraining.results.rglob(there)
    (draft,) = state.parent.glob(f"draft_*_{checkpoint.LATEST}")
    assert draft.stat().st_size > 1000
    pretraining.done.unlink()

    assert f"Continuing after step {STEPS}\n" in pretraining.run("--c")
    assert pretraining.steps() == list(range(STEPS, EPOCHS * STEPS))
    assert not draft.exists()
    pretraining.result()  # no other file of weights is left
