"""The commands of forked_commands.py behave like commands of an interpreter."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

POOL = """
import multiprocessing, os, sys
def environment(name):
    return os.environ.get(name), os.getpid(), "nnunetv2" in sys.modules
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(*pool.apply(environment, ["X"]), os.getpid())
    sys.exit("the last line")
"""


def run(command: Path, *words: str, given: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    options = {"input": given, "env": {**os.environ, **environ}, "timeout": 100, "check": False}
    return subprocess.run([command, *words], capture_output=True, encoding="utf-8", **options)


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('what to do')", 1, "what to do\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.abort()", -signal.SIGABRT, ""),
    ],
)
def test_a_command_ends_with_the_status_of_its_process(
    forked_commands: Path, code: str, status: int, error: str
) -> None:
    done = run(forked_commands / "python", "-c", code)
    assert done.returncode == status
    assert done.stderr.endswith(error)


def test_nnunet_and_our_package_are_not_imported_in_advance(forked_commands: Path) -> None:
    code = "import sys; print([name for name in sys.modules if name.split('.')[0] in ('nnunetv2', 'pcrl_nnunet')])"
    assert run(forked_commands / "python", "-c", code).stdout == "[]\n"


def test_a_forked_command_gets_its_words_variables_input_and_folder(forked_commands: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(sys.argv, os.environ['X'], sys.stdin.read(), sys.path[0])")
    done = run(forked_commands / "python", str(script), "a b", given="input", X="variable")
    assert done.stdout == f"{[str(script), 'a b']} variable input {tmp_path}\n"
    assert run(forked_commands / "python", "-", "a", given="import sys; print(sys.argv)").stdout == "['-', 'a']\n"


def test_spawned_processes_are_forked_with_the_variables_of_their_parent(forked_commands: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(POOL)
    done = run(forked_commands / "python", os.path.relpath(script), X="variable")
    assert (done.returncode, done.stderr) == (1, "the last line\n")
    variable, worker, imported, parent = done.stdout.split()
    assert (variable, imported) == ("variable", "False")
    assert worker != parent


def test_the_installed_console_scripts_are_run(forked_commands: Path) -> None:
    done = run(forked_commands / "nnUNetv2_train", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: nnUNetv2_train")
    assert run(forked_commands / "pcrl_nnunet_pretrain").stderr.startswith("usage: pcrl_nnunet_pretrain")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_process(forked_commands: Path, number: signal.Signals) -> None:
    code = "import time; print('begun', flush=True); time.sleep(100)"
    with subprocess.Popen([forked_commands / "python", "-c", code], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == b"begun\n"
        client.send_signal(number)
        assert client.wait(10) == -number
        assert client.stdout.read() == b""  # at its end: no process is left that could write


@pytest.mark.parametrize("sent", [b"", b"!", b'!{"argv": [', b"!\xff\n"])
def test_a_client_that_is_killed_while_it_asks_does_not_end_the_server(forked_commands: Path, sent: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(forked_commands.parent / "server"))
        client.sendall(sent)
    assert run(forked_commands / "python", "-c", "print('alive')").stdout == "alive\n"


def test_a_client_that_is_killed_before_its_answer_does_not_end_the_server(forked_commands: Path) -> None:
    job = {"argv": ["python", "-c", "pass"], "environ": dict(os.environ), "cwd": os.getcwd(), "files": [0]}
    for _ in range(20):
        with socket.socket(socket.AF_UNIX) as client, open(os.devnull) as file:
            client.connect(str(forked_commands.parent / "server"))
            socket.send_fds(client, [b"!"], [file.fileno()])
            client.sendall(json.dumps(job).encode() + b"\n")
    assert run(forked_commands / "python", "-c", "print('alive')").stdout == "alive\n"
