"""A training shared by processes equals a single process with the same batch, and only one process writes files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nnunetv2.run.run_training import find_free_network_port
from tiny_pretraining import folder_of
from torch import nn

from pcrl_nnunet import checkpoint
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.pretraining import distributed, processes

STEPS = 3
COMMAND = ["-d", "999", "-device", "cpu", "-epochs", "2", "-iters_per_epoch", "2", "-batch_size", "5"]
# Our command. Each finished step writes its number, and the given step waits for a signal. The processes that the
# command starts import this file.
SCRIPT = """
import os, signal, sys
from pcrl_nnunet import registration
from pcrl_nnunet.cli import pretrain
from pcrl_nnunet.trainers import PCRLPretrainTrainer
registration.is_registered = lambda: True
train_step = PCRLPretrainTrainer.train_step
def step(self, batch, number, *rest):
    found = train_step(self, batch, number, *rest)
    with open(os.environ["STEPS"], "a") as done:
        done.write(f"{number}\\n")
    if number == int(os.environ["WAIT_AT"]):
        signal.pause()
    return found
PCRLPretrainTrainer.train_step = step
if __name__ == "__main__":
    pretrain.main_entry()
"""


@pytest.fixture(scope="module")
def ranks(fork, tmp_path_factory) -> SimpleNamespace:
    """Results of one process (``alone``) and of two processes that share its batches (``first``, ``second``)."""
    from tiny_dataset import write_preprocessed

    folder = tmp_path_factory.mktemp("ranks")
    preprocessed = write_preprocessed(folder / "preprocessed").parent
    code = (
        f"import sys; sys.path[:0] = {sys.path}; from pathlib import Path; from steps import pretrain_on_ranks; "
        f"pretrain_on_ranks(Path({str(folder)!r}), {STEPS})"
    )
    variables = {"nnUNet_preprocessed": str(preprocessed), "nnUNet_n_proc_DA": "0"}
    status, output = fork(code, Path(sysconfig.get_path("purelib")), variables)
    assert status == 0, output
    found = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("0-of-1", "0-of-2", "1-of-2")}
    return SimpleNamespace(**dict(zip(("alone", "first", "second"), found.values(), strict=True)), folder=folder)


def test_two_ranks_have_the_gradients_of_one_process_with_the_same_batch(ranks) -> None:
    for step, (one, shared) in enumerate(zip(ranks.alone["gradients"], ranks.first["gradients"], strict=True)):
        assert one.keys() == shared.keys()
        size = torch.cat([gradient.flatten() for gradient in one.values()]).norm()
        apart = torch.cat([(one[name] - shared[name]).flatten() for name in one]).norm()
        assert size > 0.01
        assert apart < 1e-3 * size, step  # from the second step on, weights differ by rounding errors
    assert {len(gradients) for gradients in ranks.alone["gradients"]} != {len(ranks.alone["weights"][0])}
    for one, shared in zip(ranks.alone["losses"], ranks.first["losses"], strict=True):
        assert shared == pytest.approx(one, abs=1e-4)


def test_all_ranks_have_the_weights_of_a_single_process(ranks) -> None:
    for one, first, second in zip(ranks.alone["weights"], ranks.first["weights"], ranks.second["weights"], strict=True):
        assert any("running_var" in name for name in one)
        for name in one:
            assert torch.equal(first[name], second[name])
            torch.testing.assert_close(first[name], one[name], rtol=1e-3, atol=1e-3)


def test_ranks_together_draw_the_views_of_a_single_process(ranks) -> None:
    assert [len(cases) for cases in ranks.first["cases"]] == [2] * (STEPS + 1)  # 2 of 5 samples
    for whole, *parts in zip(ranks.alone["cases"], ranks.first["cases"], ranks.second["cases"], strict=True):
        assert whole == [case for part in parts for case in part]


def test_a_non_finite_loss_on_one_rank_stops_all_before_the_update(ranks) -> None:
    cases = ", ".join(sorted(set(ranks.alone["cases"][-1])))
    for found in (ranks.alone, ranks.first, ranks.second):
        assert f"the loss of step {STEPS} is nan" in found["error"]
        assert f"its cases {cases}," in found["error"]
        assert all(torch.equal(found["weights"][-1][name], p) for name, p in found["parameters"].items())


def test_the_first_rank_alone_writes(ranks) -> None:
    assert list((ranks.folder / "0-of-2").rglob("training_log_*.txt"))
    assert not [path for path in (ranks.folder / "1-of-2").rglob("*") if path.is_file()]


def test_a_batch_norm_with_two_names_stays_one_module() -> None:
    norm = nn.BatchNorm3d(2)
    network = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm), "c": nn.InstanceNorm3d(2)})
    distributed.synchronise_batch_norms(network)
    assert network["a"] is network["b"][0]
    assert isinstance(network["a"], distributed.SyncedBatchNorm)
    assert type(network["c"]) is nn.InstanceNorm3d


def run(python: Path, script: Path, results: Path, *command: str, wait_at: int = -1) -> subprocess.Popen[str]:
    environ = {"nnUNet_results": str(results), "STEPS": str(results) + ".steps", "WAIT_AT": str(wait_at)}
    return subprocess.Popen(
        [python, *command],
        env={**os.environ, **environ, "OMP_NUM_THREADS": "1"},
        cwd=script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )


@pytest.mark.long
@pytest.mark.slow
def test_spawned_processes_and_torchrun_processes_give_the_same_result(
    tiny, tmp_path: Path, forked_commands: Path
) -> None:
    python, script = forked_commands / "python", tmp_path / "script.py"
    script.write_text(SCRIPT)
    first, second = tmp_path / "first", tmp_path / "second"

    stopped = run(python, script, first, str(script), *COMMAND, "-num_gpus", "2", wait_at=0)
    for _ in range(1200):
        if (tmp_path / "first.steps").exists() and (tmp_path / "first.steps").read_text() == "0\n0\n":
            break
        time.sleep(0.1)
    os.kill(stopped.pid, signal.SIGTERM)
    output, _ = stopped.communicate(timeout=100)
    assert stopped.returncode == 0, output
    assert "2 processes share each batch of 5 samples" in output
    assert output.count("Stopped by SIGTERM after step 1") == 1
    assert f"To go on: script.py {' '.join(COMMAND)} -num_gpus 2 --c" in output

    # torchrun sees two machines. Their results are in different folders, and the second has no state.
    port = str(find_free_network_port())
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    torchrun += ["--master_addr", "127.0.0.1", "--master_port", port]
    machines = [
        run(python, script, results, *torchrun, "--node_rank", rank, str(script), *COMMAND, "--c")
        for rank, results in (("0", first), ("1", second))
    ]
    outputs = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "".join(outputs)
    assert "Continuing after step 1" in outputs[0]
    assert "Continuing" not in outputs[1]
    assert (tmp_path / "second.steps").read_text() == "1\n2\n3\n"
    assert not [path for path in second.rglob("*") if path.is_file()]

    assert final(first)["steps"] == 4


def final(results: Path) -> dict[str, Any]:
    (path,) = results.rglob(checkpoint.FINAL)
    assert [other.name for other in path.parent.glob("*.pth")] == [checkpoint.FINAL]
    return checkpoint.read(str(path))


# Runs the command in forked processes: spawned ones would import everything again.
FORKED = """
import sys
sys.path[:0] = {path}
import torch.multiprocessing as mp
from pcrl_nnunet import registration
from pcrl_nnunet.cli import pretrain
from pcrl_nnunet.pretraining import processes
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.report.progress import PretrainLogger
from pcrl_nnunet.views import kernels
mp.spawn = lambda fn, args, nprocs, join: mp.start_processes(fn, args, nprocs, join, start_method="fork")
Report.write = PretrainLogger.plot_progress_png = lambda *_: None  # pictures take seconds each
kernels.compiled = False  # to compile takes seconds
registration.is_registered = lambda: True
processes.GRACE = 0.5
sys.argv = ["pcrl_nnunet_pretrain", *{arguments}]
{more}
pretrain.main_entry()
"""
KILLED = """
import os, signal
from pcrl_nnunet.trainers import PCRLPretrainTrainer
train_step = PCRLPretrainTrainer.train_step
def step(self, batch, number, *rest):
    if number == 3 and self.local_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(self, batch, number, *rest)
PCRLPretrainTrainer.train_step = step
"""

FAILS = """
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.trainers import PCRLPretrainTrainer
train_step = PCRLPretrainTrainer.train_step
def step(self, batch, number, *rest):
    if number == 1 and self.local_rank == 1:
        raise UserError("a case of the second one is damaged")
    return train_step(self, batch, number, *rest)
PCRLPretrainTrainer.train_step = step
"""
BUILT = """
import os
from pcrl_nnunet.trainers import PCRLPretrainTrainer
def init(*_, **__):
    os.write(1, b"built")
PCRLPretrainTrainer.__init__ = init
"""
OTHERS = """
from pcrl_nnunet.trainers import PCRLPretrainTrainer
on_train_start = PCRLPretrainTrainer.on_train_start
def with_fewer(self):
    if self.local_rank == 1:
        self.cases = self.cases[1:]
    on_train_start(self)
PCRLPretrainTrainer.on_train_start = with_fewer
"""


# Sends SIGTERM after the first step, to the process that started the others.
STOPPED = """
import os, signal, time
from pcrl_nnunet.trainers import PCRLPretrainTrainer
train_step = PCRLPretrainTrainer.train_step
def step(self, batch, number, *rest):
    found = train_step(self, batch, number, *rest)
    if number == 0 and self.local_rank == 0:
        os.kill(os.getppid(), signal.SIGTERM)
    while number == 0 and not signal.getsignal(signal.SIGTERM).__self__.heard:  # it may have come before
        time.sleep(0.01)
    return found
PCRLPretrainTrainer.train_step = step
"""
# Starts the processes of two machines as torchrun does. The second machine has another folder of results.
TWO_MACHINES = """
import os
def machine(rank, port, results):
    os.environ |= {{"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}}
    os.environ |= {{"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x", "nnUNet_results": results[rank]}}
    try:
        pretrain.main_entry()
    except SystemExit as end:
        assert not end.code, end.code
mp.start_processes(machine, ({port!r}, {results!r}), 2, start_method="fork")
sys.exit()
"""


@pytest.fixture
def forked(fork, tiny):
    """Runs the command in a forked process; returns its exit status and all output."""

    def run(*arguments: str, more: str = "") -> tuple[int, str]:
        names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "nnUNet_n_proc_DA")
        code = FORKED.format(path=sys.path, arguments=list(arguments), more=more)
        return fork(code, Path(sysconfig.get_path("purelib")), {name: os.environ[name] for name in names})

    return run


def test_an_error_of_all_processes_is_printed_once_without_a_traceback(forked, tiny) -> None:
    status, output = forked(*COMMAND[:-2], "-batch_size", "4", "-num_gpus", "3")
    assert status == 1, output
    assert output.count("3 processes share a batch of 4 samples, and each needs 2: give -batch_size 6 or more") == 1
    assert "Traceback" not in output
    assert not tiny.results.exists()


def test_no_process_builds_a_trainer_if_the_first_one_refuses(forked, tiny) -> None:
    folder = folder_of(tiny)
    (folder / "wandb").mkdir(parents=True)
    (folder / checkpoint.LATEST).write_text("days of work")
    (folder / "wandb" / "curves").write_text("curves")
    status, output = forked(*COMMAND, "-num_gpus", "2", more=BUILT)
    assert status == 1, output
    assert output.count("is the state of an unfinished pretraining: go on with it by --c") == 1
    assert "built" not in output
    assert "Traceback" not in output
    assert {path.name for path in folder.rglob("*")} == {checkpoint.LATEST, "wandb", "curves"}


def test_an_error_of_one_process_is_printed_without_the_errors_that_follow(forked, tiny) -> None:
    status, output = forked(*COMMAND, "-num_gpus", "2", more=FAILS)
    assert status == 1, output
    assert output.count("Error: a case of the second one is damaged") == 1
    assert "Traceback" not in output


def test_processes_with_other_cases_are_refused_before_the_first_step(forked, tiny) -> None:
    status, output = forked(*COMMAND, "-num_gpus", "2", more=OTHERS)
    assert status == 1, output
    assert output.count("rank 0 and rank 1 have different cases") == 1
    assert not list(tiny.results.rglob("*.pth"))


def test_after_a_process_is_killed_the_others_end_and_c_continues(forked, tiny) -> None:
    status, output = forked(*COMMAND, "-num_gpus", "2", more=KILLED)
    assert status == 1, output
    assert output.count("process 1 terminated with signal SIGKILL") == 1
    assert "its state of the last epoch is kept: continue with --c" in output
    status, output = forked(*COMMAND, "-num_gpus", "2", "--c")
    assert status == 0, output
    assert "Continuing after step 2" in output
    assert final(tiny.results)["steps"] == 4


@pytest.mark.slow
def test_a_shared_training_continued_on_two_machines_equals_a_single_process(
    forked, tiny, tmp_path: Path, monkeypatch
) -> None:
    status, output = forked(*COMMAND, "-num_gpus", "2", more=STOPPED)
    assert status == 0, output
    assert "2 processes share each batch of 5 samples" in output
    assert output.count("Stopped by SIGTERM after step 1") == 1
    assert f"To go on: pcrl_nnunet_pretrain {' '.join(COMMAND)} -num_gpus 2 --c" in output

    second = tmp_path / "second"  # a folder without a state
    machines = [str(tiny.results.parent), str(second)]
    more = TWO_MACHINES.format(port=str(find_free_network_port()), results=machines)
    status, output = forked(*COMMAND, "--c", more=more)
    assert status == 0, output
    assert output.count("Continuing after step 1") == 1
    assert not [path for path in second.rglob("*") if path.is_file()]
    shared = final(tiny.results)

    shutil.rmtree(tiny.results)
    status, output = forked(*COMMAND)
    assert status == 0, output
    alone = final(tiny.results)
    for name in ("network_weights", "method_weights"):
        assert alone[name].keys() == shared[name].keys()
        for key, tensor in alone[name].items():
            torch.testing.assert_close(shared[name][key], tensor, rtol=1e-2, atol=1e-2)
    assert shared["loss"] == pytest.approx(alone["loss"], abs=1e-3)
    assert shared["cases"] == alone["cases"]


TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "host", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}


@pytest.mark.parametrize(
    ("number", "device", "variables", "message"),
    [
        (0, "cpu", {}, "-num_gpus is 0; expected 1 or more"),
        (2, "mps", {}, "-num_gpus is 2, and -device mps has one"),
        (3, "cuda", {}, "-num_gpus is 3, and torch finds 2"),
        (2, "cpu", TORCHRUN, "a process of torchrun"),
    ],
)
def test_an_impossible_number_of_processes_is_refused(monkeypatch, number, device, variables, message) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        processes.to_start(number, torch.device(device))
    monkeypatch.delenv("RANK", raising=False)
    assert processes.to_start(2, torch.device("cuda"))
    assert not processes.to_start(1, torch.device("cuda"))


def test_ranks_that_have_other_cases_are_named(monkeypatch) -> None:
    monkeypatch.setattr(distributed, "of_all_ranks", lambda value: [value, "other", value])
    with pytest.raises(UserError, match="rank 0 and rank 1 have different cases: every machine needs the same plans"):
        distributed.require_same("cases", "own")
