"""Commands that start without importing torch again, which takes seconds, for tests that run dozens of commands.

`serving` makes a folder of commands for the front of PATH: nnU-Net's, ours, and ``python``. Each is a client. It passes
its words, variables, folder and open files to a server, which forks a process, and it ends as that process ends. The
process runs the installed file of the console script, or what ``python`` was given, as ``__main__``. Its own child
processes (spawned by multiprocessing, or started by ``sys.executable``) go the same way.

The server has imported only packages of others. Every process imports the installed nnU-Net and this package itself,
with the variables that its client sent.

Three things differ from a user's command: the interpreter's start and end; variables that torch and numba read when
they are imported; and the processes share functions that numba has compiled. Three tests run commands as users do:
tests/scripts/test_convert_luna16.py plans, tests/test_after_training.py predicts, and tests/cli/test_compare.py runs a
step of a comparison.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SCRIPTS = Path(sys.executable).parent
NAMES = ("nnUNetv2_", "pcrl_nnunet_", "python")
SLOW_IMPORTS = (
    *("torch", "torch._dynamo", "torch.optim", "torch.nn.parallel", "torch.utils.tensorboard", "torchvision", "timm"),
    *("seaborn", "pandas", "matplotlib.pyplot", "numba", "scipy.ndimage", "scipy.stats", "skimage.morphology"),
    *("skimage.io", "skimage.transform", "sklearn", "SimpleITK", "nibabel", "pydicom", "blosc2", "imagecodecs"),
    *("tifffile", "requests", "batchgeneratorsv2", "acvl_utils", "dynamic_network_architectures.architectures.unet"),
    *("dynamic_network_architectures.architectures.primus", "tqdm", "yacs", "numpy.random"),
    "batchgenerators.dataloading.multi_threaded_augmenter",
)
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
files = []
for file in map(int, os.listdir("/proc/self/fd")):
    try:
        os.fstat(file)
    except OSError:  # of the folder itself
        continue
    if file != server.fileno():
        files.append(file)
job = dict(argv=sys.argv, environ=dict(os.environ), cwd=os.getcwd(), files=files)
socket.send_fds(server, [b"!"], files)
server.sendall(json.dumps(job).encode() + b"\\n")
answers = server.makefile()
child = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(child, number))
for file in files:  # a reader of these files waits until the child closes them
    os.close(file)
status = int(answers.readline() or -signal.SIGKILL)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextmanager
def serving(folder: Path) -> Iterator[Path]:
    """Serve as long as the context lasts, and yield the folder of commands."""
    commands, address = folder / "bin", folder / "server"
    commands.mkdir()
    client = CLIENT.format(python=sys.executable, address=str(address))
    for script in SCRIPTS.iterdir():
        if script.name.startswith(NAMES):
            (commands / script.name).write_text(client)
            (commands / script.name).chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("nnUNet", "PYTHON"))}
    # A process that has threads cannot fork.
    threads = [*(f"{of}_NUM_THREADS" for of in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")), "NUMEXPR_MAX_THREADS"]
    environ |= {"MPLBACKEND": "Agg", "NUMBA_CACHE_DIR": str(folder / "numba"), **dict.fromkeys(threads, "1")}
    command = [sys.executable, "-W", "ignore", __file__, str(address), str(commands)]
    errors = folder / "server.log"
    with (
        errors.open("w") as log,
        subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stderr=log) as server,
    ):
        try:
            for _ in range(1200):
                if address.exists() or server.poll() is not None:
                    break
                time.sleep(0.1)
            assert address.exists(), f"the server of forked commands has not started: {errors.read_text()}"
            yield commands
            ended = server.poll()
            assert ended is None, f"the server of forked commands ended with {ended}: {errors.read_text()}"
        finally:
            server.terminate()


class Server:
    """Forks a process for every client; ends it where the client is gone."""

    def __init__(self, address: str) -> None:
        self.selector = selectors.DefaultSelector()
        self.clients: dict[int, socket.socket] = {}
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(address + ".new")
        self.listener.listen(64)
        os.rename(address + ".new", address)  # the address exists only once the server listens
        self.woken, self.waker = os.pipe()
        os.set_blocking(self.waker, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(self.woken, selectors.EVENT_READ)

    def next_job(self) -> dict:
        """Return, in a process that was forked for it, a job; the server itself never comes back."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    job = self._accept()
                    if job is not None:
                        return job
                elif key.fileobj == self.woken:
                    os.read(self.woken, 1000)
                    self._report()
                else:
                    self._client_gone(key.fileobj)

    def _accept(self) -> dict | None:
        client, _ = self.listener.accept()
        files: list[int] = []
        job = None
        # A client may be killed at any moment: for example, a pool ends its idle workers.
        with suppress(OSError, ValueError), client.makefile() as lines:
            _, files, _, _ = socket.recv_fds(client, 1, 250)
            job = json.loads(lines.readline())
        if job is None:
            for file in (*files, client.detach()):
                os.close(file)
            return None
        child = os.fork()
        if child == 0:
            self._leave(client)
            _take(job["files"], files)
            return job
        for file in files:
            os.close(file)
        self.clients[child] = client
        self.selector.register(client, selectors.EVENT_READ)
        with suppress(OSError):  # the client is gone; the selector will report it
            client.sendall(f"{child}\n".encode())
        return None

    def _leave(self, client: socket.socket) -> None:
        """Close the server's files in a child."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        os.close(self.woken), os.close(self.waker)
        for its in (self.listener, client, *self.clients.values()):
            its.close()

    def _report(self) -> None:
        while self.clients:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            client = self.clients.pop(child)
            with suppress(KeyError):
                self.selector.unregister(client)
            with suppress(OSError), client:
                client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())

    def _client_gone(self, client: object) -> None:
        for child, its in self.clients.items():
            if its is client:
                self.selector.unregister(its)
                os.kill(child, signal.SIGKILL)


def _take(numbers: list[int], files: list[int]) -> None:
    """Give open files the numbers that they had in the client."""
    free = max(*numbers, *files) + 1
    moved = [os.dup2(file, free + i) for i, file in enumerate(files)]
    for file in files:
        os.close(file)
    for number, file in zip(numbers, moved, strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)


def run(job: dict, commands: str) -> None:
    """Run as the client's process."""
    import multiprocessing

    import numpy as np

    kept = os.environ["NUMBA_CACHE_DIR"]
    os.environ.clear()
    os.environ.update(job["environ"], NUMBA_CACHE_DIR=kept)
    os.chdir(job["cwd"])
    sys.path[:0] = [path for path in job["environ"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.executable = os.path.join(commands, "python")
    multiprocessing.set_executable(sys.executable)
    multiprocessing.process.ORIGINAL_DIR = job["cwd"]  # type: ignore[attr-defined]  # where spawned processes look for a script
    importlib.invalidate_caches()
    random.seed()
    np.random.seed()
    name, words = os.path.basename(job["argv"][0]), job["argv"][1:]
    if not name.startswith("python"):
        script = str(SCRIPTS / name)
        sys.argv = [script, *words]
        runpy.run_path(script, run_name="__main__")
        return
    safe = False  # -P: without the script's folder
    while words and words[0][0] == "-" and words[0] not in ("-", "-c", "-m"):  # the interpreter's options
        safe = safe or words[0] in ("-P", "-I")
        words = words[2:] if words[0] in ("-W", "-X") else words[1:]
    how, rest = words[0], words[1:]
    folder = {"-m": os.getcwd(), "-c": "", "-": ""}.get(how, os.path.dirname(os.path.abspath(how)))
    sys.path[:0] = [] if safe else [folder]
    if how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how in ("-c", "-"):
        code, sys.argv = (rest[0], ["-c", *rest[1:]]) if how == "-c" else (sys.stdin.read(), ["-", *rest])
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        runpy.run_path(os.path.abspath(how), run_name="__main__")


def _compile_once() -> None:
    """Let numba keep on disk what a process has compiled, for the others: seconds each time."""
    with suppress(ImportError):
        import numba

        numba.njit = functools.partial(numba.njit, cache=True)


def _end(status: object) -> None:
    """End like the interpreter, but keep imported modules: freeing them after a fork would copy them first."""
    if status is not None and not isinstance(status, int):
        sys.stderr.write(f"{status}\n")
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:  # multiprocessing's resource tracker closes the streams
            stream.flush()
    os._exit(status & 255 if isinstance(status, int) else int(status is not None))


def main(address: str, commands: str) -> None:
    """Serve, and in the processes that are forked, run."""
    sys.path.remove(str(Path(__file__).parent))
    _compile_once()
    for name in SLOW_IMPORTS:
        with suppress(ImportError):
            importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a process that has several cannot fork"
    gc.collect()
    gc.freeze()  # otherwise garbage collection in each child would copy the shared memory
    job = Server(address).next_job()
    status: object = 0
    try:
        run(job, commands)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    _end(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
