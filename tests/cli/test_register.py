"""Registration against real installs of nnU-Net, each in a fresh virtual environment.

An environment gets nnU-Net and our wheel from pip. All else that they need is linked from the environment that runs the
tests, so that no torch is downloaded. Without a network these tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pcrl_nnunet import registration

REPOSITORY = Path(__file__).parents[2]
FIND_TRAINER = "import sys; from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find; "
NAME_TRAINER = FIND_TRAINER + "t = find({!r}); print(t.__module__, t.__qualname__)"
NAME_PLANNER = (
    "import nnunetv2; from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find; "
    "t = find(nnunetv2.__path__[0] + '/experiment_planning', {!r}, 'nnunetv2.experiment_planning'); "
    "print(t and t.__module__, t and t.__qualname__)"
)
# Lists every class that nnU-Net finds in its trainer and planner folders, with its module.
ALL_STOCK_CLASSES = """
import ast, os, sys, nnunetv2
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find
root = nnunetv2.__path__[0]
for part in (("training", "nnUNetTrainer"), ("experiment_planning",)):
    names = set()
    for folder, _, files in os.walk(os.path.join(root, *part)):
        for file in (f for f in files if f.endswith(".py")):
            tree = ast.parse(open(os.path.join(folder, file), encoding="utf-8").read())
            names |= {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for name in sorted(names):
        found = find(os.path.join(root, *part), name, ".".join(("nnunetv2", *part)), root)
        print(name, found.__module__, found.__qualname__)
"""


def run(*command: str | Path, check: bool = True, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Run a command without nnU-Net's variables and ours; a failure shows its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("nnUNet", "PYTHON"))}
    environment |= {"OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **kwargs.pop("env", {})}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, encoding="utf-8", env=environment, timeout=300, **kwargs
    )
    assert not check or done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def unavailable(reason: str) -> NoReturn:
    """Skip the test; in continuous integration, fail, so that a missing test is seen."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def pip(*arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "pip", *arguments, **kwargs)


@dataclass(frozen=True)
class Environment:
    """A virtual environment and the user who works in it."""

    folder: Path
    fork: Callable[..., tuple[int, str]]
    as_user: tuple[str, ...] = ()

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    @property
    def bridges(self) -> list[Path]:
        return sorted(self.folder.rglob("pcrl_nnunet_bridge.py"))

    def pip(self, *arguments: str | Path) -> None:
        pip("--python", self.python, *arguments)

    def register(self, *flags: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
        script = self.folder / "bin" / "pcrl_nnunet_register"
        return run(*self.as_user, script, *flags, check=False, cwd=self.folder, **kwargs)

    def execute(self, code: str, **environ: str) -> str:
        """Run the code in its own process; return the output."""
        return self.fork(code, self.site_packages, environ)[1]

    def trainer(self, name: str, **environ: str) -> str:
        """Module and name of the trainer that nnU-Net finds, or the last line of its error."""
        return self.execute(NAME_TRAINER.format(name), **environ).strip().splitlines()[-1]

    def planner(self, name: str) -> str:
        """Module and name of the planner that nnU-Net finds, or None twice."""
        return self.execute(NAME_PLANNER.format(name)).strip().splitlines()[-1]


@dataclass(frozen=True)
class Packages:
    """The packages that the environments install."""

    ours: Path
    nnunet_wheel: Path
    nnunet_sdist: Path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Our wheel, built from a copy of the repository, and the installed version of nnU-Net in both of its forms."""
    folder = tmp_path_factory.mktemp("packages")
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "tests", "__pycache__")
    shutil.copytree(REPOSITORY, folder / "ours", ignore=ignored)
    nnunet = f"nnunetv2=={version('nnunetv2')}"
    # pip asks the build backend for the package's name. The installed setuptools answers seconds faster.
    isolation = ("--no-build-isolation",) if find_spec("setuptools") else ()
    for arguments in (
        ("download", "--no-deps", "--only-binary", ":all:", nnunet, "-d", folder),
        ("download", "--no-deps", "--no-binary", ":all:", *isolation, nnunet, "-d", folder),
    ):
        done = pip(*arguments, check=False)
        if done.returncode:
            unavailable(f"pip cannot download {nnunet}: {done.stderr.strip().splitlines()[-1]}")
    pip("wheel", "--no-deps", folder / "ours", "-w", folder)
    (wheel,), (sdist,) = folder.glob("nnunetv2-*.whl"), folder.glob("nnunetv2-*.tar.gz")
    shutil.unpack_archive(sdist, folder / "sdist")
    (source,) = (folder / "sdist").iterdir()
    (ours,) = folder.glob("pcrl_nnunet-*.whl")
    return Packages(ours, wheel, source)


@pytest.fixture
def environment(dependencies: Path, fork: Callable[..., tuple[int, str]]) -> Iterator[Callable[..., Environment]]:
    """Makes virtual environments with the packages given; any user may read them, unlike pytest's folders."""
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)

        def make(*installed: Path) -> Environment:
            folder = Path(parent) / f"environment_{len(os.listdir(parent))}"
            venv.create(folder, symlinks=True)
            made = Environment(folder, fork)
            (made.site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
            made.pip("install", "--no-deps", "--no-compile", *installed)
            return made

        yield make


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files below the folder except compiled ones."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_released_nnunet_finds_our_classes_from_registering_to_undoing(
    environment: Callable[..., Environment], packages: Packages
) -> None:
    made = environment(packages.nnunet_wheel, packages.ours)
    files = snapshot(made.site_packages / "nnunetv2")
    stock = made.execute(ALL_STOCK_CLASSES)
    assert "nnUNetTrainer_5epochs nnunetv2.training.nnUNetTrainer." in stock
    checked = made.register("--check")
    assert (checked.returncode, checked.stdout.split(" with")[0]) == (1, "Not registered")
    assert made.trainer("PCRLFinetuneTrainer").startswith("RuntimeError: Could not find requested nnunet trainer")

    registered = made.register()
    assert registered.returncode == 0, registered.stderr
    assert len(made.bridges) == 3, "the source of the bridges and its two copies"
    for bridge in made.bridges:
        assert bridge.stat().st_mode == (made.site_packages / "nnunetv2" / "__init__.py").stat().st_mode
    assert made.register().stdout == "Registered already; nothing to do.\n"
    assert made.register("--check").returncode == 0
    assert made.trainer("PCRLFinetuneTrainer") == "pcrl_nnunet.trainers.finetune PCRLFinetuneTrainer"
    assert made.trainer("PCRLFinetuneTrainer_mae") == "pcrl_nnunet.trainers PCRLFinetuneTrainer_mae"
    assert made.planner("PCRLPlanner") == "pcrl_nnunet.planners.pcrl PCRLPlanner"
    by_interpreter = run(made.python, "-I", "-W", "ignore", "-c", NAME_TRAINER.format("PCRLScratchTrainer")).stdout
    assert by_interpreter == "pcrl_nnunet.trainers.scratch PCRLScratchTrainer\n"
    assert made.trainer("PCRLNoSuchTrainer").startswith("RuntimeError: Could not find requested nnunet trainer")
    assert made.execute(ALL_STOCK_CLASSES) == stock

    made.bridges[-1].write_text("# another version\n")
    checked = made.register("--check")
    assert (checked.returncode, checked.stdout.split(":")[0]) == (1, "Outdated")
    assert made.register().returncode == 0
    assert made.register("--check").returncode == 0

    assert made.register("--undo").returncode == 0
    assert snapshot(made.site_packages / "nnunetv2") == files
    assert not list((made.site_packages / "nnunetv2").rglob("*pcrl*"))
    assert made.register("--undo").stdout == "Nothing to undo: not registered.\n"


def test_a_broken_package_raises_and_an_uninstalled_one_leaves_stock_nnunet(
    environment: Callable[..., Environment], packages: Packages
) -> None:
    made = environment(packages.nnunet_wheel, packages.ours)
    stock = made.execute(ALL_STOCK_CLASSES)
    assert made.register().returncode == 0
    (made.site_packages / "pcrl_nnunet" / "trainers" / "finetune.py").write_text("import no_such_module\n")
    assert made.trainer("PCRLFinetuneTrainer") == "ModuleNotFoundError: No module named 'no_such_module'"
    assert made.trainer("nnUNetTrainer_5epochs").endswith("nnUNetTrainer_5epochs")

    made.pip("uninstall", "-y", "pcrl_nnunet")
    # A checkout in a folder on Python's path may have our package's name without being our package.
    (made.folder / "pcrl_nnunet" / "trainers").mkdir(parents=True)
    (made.site_packages / "checkout.pth").write_text(f"{made.folder}\n")
    without_ours = made.trainer("PCRLFinetuneTrainer")
    assert without_ours.startswith("RuntimeError: Could not find requested nnunet trainer PCRLFinetuneTrainer")
    assert made.planner("PCRLPlanner") == "None None"
    assert made.execute(ALL_STOCK_CLASSES) == stock


def test_stock_look_ups_import_none_of_our_modules(environment: Callable[..., Environment], packages: Packages) -> None:
    made = environment(packages.nnunet_wheel, packages.ours)
    assert made.register().returncode == 0
    code = (
        FIND_TRAINER + "find('nnUNetTrainer_5epochs'); print([m for m in sys.modules if m.startswith('pcrl_nnunet')])"
    )
    assert made.execute(code).strip() == "[]"
    code = "from pcrl_nnunet.registration import *; print(is_registered(), {'torch', 'nnunetv2'} & set(sys.modules))"
    assert run(made.python, "-I", "-c", code).stdout.strip() == "True set()"


def test_editable_nnunet_finds_our_classes_and_orphaned_bridges_are_repaired(
    environment: Callable[..., Environment], packages: Packages
) -> None:
    made = environment(packages.nnunet_wheel, packages.ours)
    assert made.register().returncode == 0
    made.pip("uninstall", "-y", "nnunetv2")
    made.pip("install", "--no-deps", "-e", packages.nnunet_sdist)
    orphans = [path for path in made.bridges if "nnunetv2" in path.parts]
    assert len(orphans) == 2
    assert "nnUNetTrainer_5epochs" not in made.trainer("nnUNetTrainer_5epochs"), "the danger that this test is about"

    checked = made.register("--check")
    assert (checked.returncode, checked.stdout.split(":")[0]) == (1, "Orphan")
    assert all(str(path) in checked.stdout for path in orphans)
    assert made.register("--undo").returncode == 0
    assert not (made.site_packages / "nnunetv2").exists()
    stock = made.execute(ALL_STOCK_CLASSES)
    assert "nnUNetTrainer_5epochs nnunetv2.training.nnUNetTrainer." in stock

    assert made.register().returncode == 0
    try:
        assert sorted(packages.nnunet_sdist.rglob("pcrl_nnunet_bridge.py"))
        assert made.register("--check").returncode == 0
        assert made.trainer("PCRLFinetuneTrainer") == "pcrl_nnunet.trainers.finetune PCRLFinetuneTrainer"
        assert made.planner("PCRLPlanner") == "pcrl_nnunet.planners.pcrl PCRLPlanner"
        assert made.execute(ALL_STOCK_CLASSES) == stock
    finally:
        assert made.register("--undo").returncode == 0
    assert not list(packages.nnunet_sdist.rglob("*pcrl*"))


def test_registering_repairs_an_orphan_and_keeps_foreign_files(
    environment: Callable[..., Environment], packages: Packages
) -> None:
    made = environment(packages.ours)
    nnunet = made.site_packages / "nnunetv2"
    orphans = [nnunet / folder / "pcrl_nnunet_bridge.py" for folder in registration.BRIDGE_FOLDERS]
    for path in orphans:
        path.parent.mkdir(parents=True)
        shutil.copy(registration.BRIDGE, path)
    custom = orphans[0].with_name("my_trainer.py")
    custom.touch()
    done = made.register()
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {made.site_packages / 'nnunetv2'} holds the rest of an uninstalled nnU-Net")
    assert [path.exists() for path in orphans] == [False, False]
    assert [path.exists() for path in (custom, orphans[1].parent)] == [True, False]

    custom.unlink()
    shutil.rmtree(made.site_packages / "nnunetv2")
    done = made.register()
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert done.stderr.startswith("Error: nnU-Net is not installed for ")


def other_user(environment: Environment) -> tuple[str, ...]:
    """The command prefix that runs the environment as an unprivileged user; empty unless we are root."""
    if os.getuid() != 0:
        return ()
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    # If the interpreter lies in root's home, the user gets the right to read everything, but not to write.
    for command in (nobody, (*nobody, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")):
        if shutil.which("setpriv") and not run(*command, environment.python, "-c", "", check=False).returncode:
            return command
    unavailable("root cannot run the environment as another user here")


def test_read_only_nnunet_is_used_through_the_line_that_the_error_gives(
    environment: Callable[..., Environment], packages: Packages
) -> None:
    made = environment(packages.nnunet_wheel, packages.ours)
    folders = [path for path in made.site_packages.rglob("*") if path.is_dir()]
    made = replace(made, as_user=other_user(made))
    for folder in folders:
        folder.chmod(0o555)
    try:
        done = made.register()
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith(f"Error: nnU-Net in {made.site_packages / 'nnunetv2'} cannot be written to")
        (line,) = (line for line in done.stderr.splitlines() if "export" in line)
        name, folder_given = line.replace("export", "").replace('"', "").strip().split("=")
        assert made.register("--check").returncode == 1
        through = {name: folder_given}
        assert made.trainer("PCRLFinetuneTrainer", **through) == ("pcrl_nnunet.trainers.finetune PCRLFinetuneTrainer")
        code = (
            FIND_TRAINER + "import pickle; a, b = (find('PCRLFinetuneTrainer') for _ in 'ab'); from pcrl_nnunet "
            "import trainers; print(a is b is trainers.PCRLFinetuneTrainer is pickle.loads(pickle.dumps(a)))"
        )
        assert made.execute(code, **through).splitlines()[-1] == "True"
        assert made.trainer("nnUNetTrainer_5epochs", **through).endswith("nnUNetTrainer_5epochs")
        assert made.register("--check", env=through).returncode == 0
    finally:
        for folder in folders:
            folder.chmod(0o755)
