"""Fixtures for several tests: a tiny preprocessed dataset, real data, and environments that hold other packages."""

import copy
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from forked_commands import serving
from nnunetv2.training.logging import nnunet_logger
from tiny_dataset import DATASET, DATASET_JSON, SPLITS, write_preprocessed

OURS = ("nnunetv2", "pcrl_nnunet", "__editable__", "distutils-precedence.pth", "_virtualenv")
# Runs code in forked processes. Their parent has imported the slow packages, but nothing of nnU-Net or of ours. Each
# process adds an environment's site-packages folder like a starting interpreter, .pth files included.
FORK_SERVER = """
import importlib, json, os, signal, site, sys, traceback
sys.path.append(sys.argv[1])
for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        signal.alarm(job["timeout"])
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(output, 1), os.dup2(output, 2)
        os.environ.update(job["environ"])
        status = 0
        try:
            site.addsitedir(job["site_packages"])
            exec(job["code"], {"__name__": "__main__"})
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        os.killpg(child, signal.SIGKILL)  # workers that were left behind
    except ProcessLookupError:
        pass
    print(status, flush=True)
"""
SLOW_IMPORTS = (
    *("torch", "torch._dynamo", "torchvision", "timm", "seaborn", "pandas", "scipy.ndimage", "skimage.morphology"),
    *("sklearn", "SimpleITK", "nibabel", "blosc2", "imagecodecs", "tifffile", "requests", "batchgeneratorsv2"),
    *("dynamic_network_architectures.architectures.unet", "dynamic_network_architectures.architectures.primus"),
    *("acvl_utils", "batchgenerators.dataloading.multi_threaded_augmenter", "torch.nn.parallel", "torch.optim"),
)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """nnU-Net's folders with a preprocessed dataset of four cases; data are loaded in this process.

    Its attributes: ``folder`` (preprocessed), ``data``, ``results``, ``dataset_json`` and ``splits``.
    """
    folder = write_preprocessed(tmp_path / "preprocessed")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return SimpleNamespace(
        folder=folder,
        data=folder / "nnUNetPlans_3d_fullres",
        results=tmp_path / "results" / DATASET,
        dataset_json=copy.deepcopy(DATASET_JSON),
        splits=copy.deepcopy(SPLITS),
    )


@pytest.fixture
def as_users_do():
    """File permissions apply to this thread even as root: it drops CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.geteuid() != 0:
        yield
        return
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3; effective first, of two
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or libc.capget(header, sets) != 0:
        pytest.skip("the tests run as root, whom no permission binds")
    effective = sets[0]
    sets[0] = effective & ~0b110
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = effective
    assert libc.capset(header, sets) == 0


@pytest.fixture
def wandb(monkeypatch):
    """The runs of Weights & Biases that were begun: nnU-Net's switch is on, and a package of that name notes them."""
    runs = []

    def init(**given):
        os.makedirs(os.path.join(given["dir"], "wandb"), exist_ok=True)
        run = SimpleNamespace(given=given, config={}, logged={}, summary={}, step=0)
        run.log = lambda values, step: run.logged.update({(name, step): value for name, value in values.items()})
        runs.append(run)
        return run

    monkeypatch.setattr(nnunet_logger, "wandb", SimpleNamespace(init=init))
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    return runs


@pytest.fixture
def real_data():
    """The folder of raw datasets that the variable PCRL_TEST_DATA names; tests on real images need it."""
    folder = os.environ.get("PCRL_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PCRL_TEST_DATA names no folder of raw nnU-Net datasets")
    return Path(folder)


@pytest.fixture(scope="session")
def forked_commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with nnU-Net's commands, ours and python: forked, so that they start in a second or two."""
    with serving(tmp_path_factory.mktemp("forked")) as folder:
        yield folder


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to all packages of the running environment except nnU-Net and ours."""
    folder = tmp_path_factory.mktemp("dependencies")
    site_packages = (Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages"))
    for entry in (entry for path in site_packages if path.is_dir() for entry in path.iterdir()):
        link = folder / entry.name
        if not entry.name.startswith(OURS) and entry.suffix != ".pth" and not link.exists():
            link.symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def fork(
    dependencies: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str, Path, Mapping[str, str]], tuple[int, str]]]:
    """Runs code in its own process, with `dependencies`, a site-packages folder and environment variables.

    The function returns the exit status and all that was printed.
    """
    environ = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet")}
    output = tmp_path_factory.mktemp("output") / "output"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-W", "ignore", "-c", FORK_SERVER, str(dependencies), *SLOW_IMPORTS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env=environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # no threads: it forks
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        to_server, from_server = server.stdin, server.stdout

        def run(code: str, site_packages: Path, environ: Mapping[str, str], timeout: int = 300) -> tuple[int, str]:
            job = {"code": code, "environ": dict(environ), "timeout": timeout}
            paths = {"site_packages": str(site_packages), "output": str(output)}
            print(json.dumps(job | paths), file=to_server, flush=True)
            return int(from_server.readline()), output.read_text(encoding="utf-8")

        yield run
        to_server.close()
