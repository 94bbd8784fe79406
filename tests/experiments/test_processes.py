"""The processes of a comparison: their share of the cores, and their end with the command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from pcrl_nnunet import progress
from pcrl_nnunet.experiments import processes, shares


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no cores are allotted here")
def test_processes_share_the_cores_that_were_allotted(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for given, expected in (("", "3"), ("1", "1"), ("48", "3")):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert [child["OMP_NUM_THREADS"] for child in shares.environments({}, 2)] == [expected] * 2


PARENT = '''
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from pcrl_nnunet.experiments import processes
popen = processes.subprocess.Popen
def begun(*args, **options):
    child = popen(*args, **options)
    time.sleep(float(sys.argv[2]))  # the child may be far before it is known here
    return child
processes.subprocess.Popen = begun
code = """
from pcrl_nnunet.experiments.steps import end_with_parent
end_with_parent()
import multiprocessing, os, time
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
worker.start()
print(os.getpid(), worker.pid, flush=True)
time.sleep(600)
"""
job = processes.Job("child", (sys.executable, "-c", code), lambda: False)
processes.run_jobs([job], sys.argv[1], [{}], lambda: None)
'''


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a kill cannot be noticed")
@pytest.mark.parametrize("seconds", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_training_outlives_the_command(tmp_path, number, seconds):
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "child.log"
    command = [sys.executable, "-c", PARENT, str(tmp_path), str(seconds)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
        wait_until(lambda: log.exists() and log.read_text().endswith("\n"))
        children = [int(child) for child in log.read_text().split()]  # later the log may also say how they ended
        parent.send_signal(number)
        try:
            wait_until(lambda: not any(is_running(child) for child in children))
        finally:
            for child in filter(is_running, children):
                os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="there a process ends at once")
def test_a_step_ends_even_if_a_fork_loses_its_sigterm():
    code = """
import os, time
from pcrl_nnunet.experiments.steps import end_with_parent
end_with_parent()
def before():
    print("forks", flush=True)
    time.sleep(600)
os.register_at_fork(before=before)
if not os.fork():
    os._exit(0)
print("goes on", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "forks\n"
            child.terminate()
            out, error = child.communicate(timeout=30)
        finally:
            child.kill()
    assert out == "goes on\n"
    assert "Exception ignored in" in error  # Python dropped the first SIGTERM
    assert child.returncode == 128 + signal.SIGTERM


@pytest.mark.skipif(sys.platform == "win32", reason="there a process ends at once")
def test_a_loading_process_that_lost_its_sigterm_ends_with_its_step():
    code = """
import multiprocessing, signal, time
from pcrl_nnunet.experiments.steps import end_with_parent
end_with_parent()
def work(pipe):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    pipe.send("ready")
    time.sleep(600)
ours, theirs = multiprocessing.get_context("fork").Pipe()
worker = multiprocessing.get_context("fork").Process(target=work, args=(theirs,), daemon=True)
worker.start()
ours.recv()
print(worker.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, text=True) as child:
        worker = int(child.stdout.readline())
        child.terminate()
        try:
            wait_until(lambda: not is_running(worker) and child.poll() is not None)
        finally:
            child.kill()
            if is_running(worker):
                os.kill(worker, signal.SIGKILL)


def test_running_steps_are_named_with_their_epochs_and_their_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(processes, "monotonic", lambda: now[0])
    at_work = processes.AtWork(str(tmp_path), 5)
    assert str(at_work) == "0 of 5 steps have ended, running: none"
    for name in ("scratch_10_0", "mae_10_0", "labels"):
        at_work.begin(name)
    (tmp_path / "scratch_10_0.log").write_text("iters_per_epoch 30\n2026-01-01: Epoch 7\nEpoch time: 3 s\n")
    (tmp_path / "mae_10_0.log").write_text("epoch 1/240: loss 1\nepoch 2/240: loss 1\n")
    now[0] = 61.0
    assert at_work.end("labels") == "61 s"
    expected = "1 of 5 steps have ended, running: scratch_10_0 (epoch 7, 61 s), mae_10_0 (epoch 2/240, 61 s)"
    assert str(at_work) == expected


def test_steps_are_named_when_they_begin_and_end_and_meanwhile(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SILENT_SECONDS", 0.1)
    (tmp_path / "logs").mkdir()
    code = "import sys, time; time.sleep(0.5); open('made', 'w').close() if sys.argv[1:] else sys.exit(1)"
    command = (sys.executable, "-S", "-c", code)
    jobs = [processes.Job("good", (*command, "makes"), (tmp_path / "made").exists), processes.Job("bad", command, bool)]
    assert processes.run_jobs(jobs, str(tmp_path), [{}, {}], lambda: None) == ["bad"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["running: good", "running: bad"]
    assert "0 of 2 steps have ended, running: good (0 s), bad (0 s)" in lines
    assert sorted(line.split(",")[0] for line in lines if line[0] in "dF") == ["FAILED: bad", "done: good"]


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_until(there, seconds=30):
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)
