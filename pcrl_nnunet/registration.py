"""Registration of our trainers and planners with nnU-Net's commands.

A bridge module goes into the trainer folder and another into the planner folder of the imported nnU-Net. Both are
copies of `ext_trainer/pcrl_nnunet_bridge.py`, which explains how they work.

Nothing else is ever written there, and our wheel writes nothing there. Files under ``nnunetv2/`` in site-packages
without an nnU-Net beside them make ``nnunetv2`` a namespace package that hides an editable nnU-Net. A bridge that stays
after nnU-Net was uninstalled is such a file: an orphan. The search for orphans therefore looks into the site-packages
folders and does not use ``import nnunetv2``.
"""

from __future__ import annotations

import filecmp
import importlib
import importlib.util
import os
import shutil
import site
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from glob import glob
from os.path import abspath, dirname, isdir, isfile, join, realpath
from pathlib import Path

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import whole

EXT_TRAINER_FOLDER = join(dirname(abspath(__file__)), "ext_trainer")
BRIDGE = join(EXT_TRAINER_FOLDER, "pcrl_nnunet_bridge.py")
BRIDGE_FOLDERS = (join("training", "nnUNetTrainer"), join("experiment_planning", "experiment_planners"))


def is_registered() -> bool:
    """Tell if nnU-Net's training command finds our trainers, through bridges or ``nnUNet_extTrainer``."""
    state = _state()
    return state == "registered" or (state == "not registered" and _is_ext_trainer_set())


def register() -> list[str]:
    """Write missing or outdated bridges, and remove orphans.

    Returns:
        A line for the user about each action; empty if there was nothing to do.

    Raises:
        UserError: nnU-Net is not installed, or its folder is not writable.
    """
    removed = _remove(_orphans())
    paths = [path for path in _bridge_paths() if not _is_current(path)]
    try:
        with ExitStack() as drafts:  # all drafts come first: if one folder is not writable, nothing is written
            for path in paths:
                draft = drafts.enter_context(whole(path))
                shutil.copyfile(BRIDGE, draft)
                shutil.copymode(join(_nnunet_folder(), "__init__.py"), draft)  # for everyone who may read nnU-Net
    except OSError as error:
        raise UserError(_read_only_message(error)) from error
    importlib.invalidate_caches()
    return [
        *(f"Removed {path}, a file of an nnU-Net that was uninstalled" for path in removed),
        *(f"Registered with nnU-Net: wrote {path}" for path in paths),
    ]


def undo() -> list[str]:
    """Remove all bridges, and orphans with their emptied folders.

    Returns:
        A line for the user about each removed file; empty if there was nothing to do.

    Raises:
        UserError: a bridge cannot be removed.
    """
    removed = _remove(_orphans())
    with suppress(_NoNnunet):
        removed += _remove(path for path in _bridge_paths() if isfile(path))
    return [f"Removed {path}" for path in removed]


def description() -> str:
    """Return the state of the registration in words."""
    state = _state()
    if state == "orphan":
        orphans = "\n".join(f"  {path}" for path in _orphans())
        return (
            f"Orphan: files of an nnU-Net that was uninstalled hide the installed nnU-Net:\n{orphans}\n"
            f"Run pcrl_nnunet_register --undo to remove it, or pcrl_nnunet_register to remove it and to register."
        )
    if state == "outdated":
        return "Outdated: the bridge in nnU-Net is another version's. Run pcrl_nnunet_register."
    if state == "registered":
        return f"Registered with nnU-Net in {_nnunet_folder()}."
    if _is_ext_trainer_set():
        return "Registered through nnUNet_extTrainer: trainers only, not the planners."
    return f"Not registered with nnU-Net in {_nnunet_folder()}. Run pcrl_nnunet_register."


class _NoNnunet(UserError):
    """An error: there is no nnU-Net to register with."""


def _state() -> str:
    """Return ``registered``, ``not registered``, ``outdated`` or ``orphan``."""
    if _orphans():
        return "orphan"
    paths = _bridge_paths()
    if not all(isfile(path) for path in paths):
        return "not registered"
    return "registered" if all(_is_current(path) for path in paths) else "outdated"


def _nnunet_folder() -> str:
    """Return the folder of this Python's nnU-Net, without importing nnU-Net."""
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None:
        raise _NoNnunet(f"nnU-Net is not installed for {sys.executable}: run pip install nnunetv2")
    if spec.origin is None:
        folders = ", ".join(spec.submodule_search_locations or ())
        raise _NoNnunet(f"{folders} holds the rest of an uninstalled nnU-Net: delete it, then install nnU-Net")
    return dirname(spec.origin)


def _bridge_paths(nnunet_folder: str | None = None) -> list[str]:
    """Return the paths of the bridges."""
    return [join(nnunet_folder or _nnunet_folder(), folder, Path(BRIDGE).name) for folder in BRIDGE_FOLDERS]


def _is_current(path: str) -> bool:
    return isfile(path) and filecmp.cmp(path, BRIDGE, shallow=False)


def _is_ext_trainer_set() -> bool:
    folders = os.environ.get("nnUNet_extTrainer", "").split(os.pathsep)
    return realpath(EXT_TRAINER_FOLDER) in [realpath(folder) for folder in folders if folder.strip()]


def _orphans() -> list[str]:
    """Return bridges in site-packages folders without an nnU-Net around them."""
    candidates = {realpath(folder) for folder in [*site.getsitepackages(), site.getusersitepackages(), *sys.path]}
    folders = [join(folder, "nnunetv2") for folder in sorted(candidates)]
    return [
        path
        for folder in folders
        if isdir(folder) and not isfile(join(folder, "__init__.py"))
        for path in _bridge_paths(folder)
        if isfile(path)
    ]


def _remove(bridges: Iterable[str]) -> list[str]:
    """Remove bridges with their compiled files, and the emptied folders of orphans."""
    removed = []
    try:
        for path in bridges:
            os.remove(path)
            removed.append(path)
            for compiled in glob(join(dirname(path), "__pycache__", f"{Path(path).stem}.*.pyc")):
                os.remove(compiled)
            nnunet = Path(path).parents[2]
            if not (nnunet / "__init__.py").is_file():
                removed += _remove_empty(nnunet)
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be removed ({error.strerror}): run pcrl_nnunet_register --undo as the user who "
            f"installed nnU-Net"
        ) from error
    importlib.invalidate_caches()
    return removed


def _remove_empty(root: Path) -> list[str]:
    """Remove root and the folders in it if they are empty. Caches of removed modules count as empty."""
    removed = []
    for folder, _, _ in os.walk(root, topdown=False):
        if Path(folder).name == "__pycache__":
            shutil.rmtree(folder)
        elif not os.listdir(folder):
            os.rmdir(folder)
            removed.append(folder)
    return removed


def _read_only_message(error: OSError) -> str:
    folders = EXT_TRAINER_FOLDER
    if os.environ.get("nnUNet_extTrainer"):
        folders = f"$nnUNet_extTrainer{os.pathsep}{folders}"
    return (
        f"nnU-Net in {_nnunet_folder()} cannot be written to ({error.strerror}): run pcrl_nnunet_register as the user "
        f"who installed it, or add this line to your shell's start-up file, which is enough for the trainers:\n"
        f'    export nnUNet_extTrainer="{folders}"\n'
        f"The planner is then reached by pcrl_nnunet_preprocess -pl PCRLPlanner."
    )
