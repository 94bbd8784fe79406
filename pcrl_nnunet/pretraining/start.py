"""The start of a pretraining: from nothing, from a state, in place of an earlier one, or a refusal.

All checks run before a trainer is built, because nnU-Net's trainers create and delete files at once. The folder is
locked first. A refusal leaves the folder unchanged.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from glob import escape, glob
from itertools import count
from typing import Any

from pcrl_nnunet import checkpoint, output_folder, weights_and_biases
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import remove_drafts
from pcrl_nnunet.lock import LOCK, locked
from pcrl_nnunet.named_plans import write_copy
from pcrl_nnunet.pretraining.preparation import PREPARED
from pcrl_nnunet.pretraining.request import Request
from pcrl_nnunet.pretraining.result import relative_path
from pcrl_nnunet.pretraining.settings import in_present_form
from pcrl_nnunet.pretraining.state import agreement, refuse_another
from pcrl_nnunet.settings import differences, without_settings

OF_A_TRAINING = (  # in the output folder, besides the logs and the result
    *(checkpoint.PREVIOUS, checkpoint.LATEST, checkpoint.DAMAGED),
    *(PREPARED, "report.html", "progress.png", "metrics.csv", weights_and_biases.FOLDER),
)


@dataclass
class Start:
    """The start of a pretraining. Without `finished` and `state` it starts from nothing."""

    finished: str | None = None  # path of the result, if the training is finished
    state: dict[str, Any] | None = None  # to resume from
    state_path: str = ""
    lines: list[str] = field(default_factory=list)  # for the log
    log: str | None = None  # path, once there is a trainer


@contextmanager
def starting(request: Request) -> Iterator[Start]:
    """Lock the output folder, and refuse or yield the start. A `UserError` within removes an unused folder again.

    Raises:
        UserError: another pretraining works in the folder or has left files there; the folder or the copy of the plan
            cannot be written; ``--c`` would continue something else.
    """
    folder, lock = request.folder, os.path.join(request.folder, LOCK)
    folder_was_there, lock_was_there = os.path.isdir(folder), os.path.exists(lock)
    with output_folder.creating():
        os.makedirs(folder, exist_ok=True)
    try:
        with locked(folder, "pcrl_nnunet_pretrain"):
            try:
                yield from _locked_start(request)
            except UserError:
                if not lock_was_there:
                    with suppress(OSError):  # the folder is gone or has become read-only
                        os.remove(lock)
                raise
    except UserError:
        if not folder_was_there:
            output_folder.remove_if_empty(folder)
        raise


def _locked_start(request: Request) -> Iterator[Start]:
    start, copy = Start(), None
    try:
        start = _how(request)
        if start.finished is None:
            remove_drafts(request.folder)
            copy = write_copy(request.plan)
        with _put_aside(request.folder, start) if request.overwrite else nullcontext():
            yield start
        if start.finished is not None:  # maybe in the folder of an older version
            output_folder.remove_unused(request.folder)
    except UserError:
        if not _has_files(request.folder):
            output_folder.remove_unused(request.folder, start.log)
        if copy is not None and not os.path.isdir(request.folder):
            os.remove(copy)
        raise


def _how(request: Request) -> Start:
    latest, previous = (os.path.join(request.folder, name) for name in (checkpoint.LATEST, checkpoint.PREVIOUS))
    states = [path for path in (latest, previous) if os.path.isfile(path)]
    _refuse_fitted(request.unnamed_final, request.plan.plans["plans_name"])
    if request.overwrite:
        return Start()
    if not request.continues:
        _refuse_earlier_state(request)
        _refuse_to_start_over(request.folder, states, request.finals)
        return Start()
    if states:
        return _from_state(request, latest, previous)
    _refuse_earlier_state(request)
    finished = next(filter(os.path.isfile, request.finals), None)
    if finished is not None and not output_folder.is_overwriting(request.folder):
        _check_finished(checkpoint.read(finished), request, finished)
        return Start(finished=finished)
    return Start(lines=[_from_nothing(request)])


def _refuse_fitted(final: str, plans_name: str) -> None:
    """Raise `UserError` if the folder holds files of `pcrl_nnunet_transfer`."""
    try:
        fitted = os.path.isfile(final) and checkpoint.read(final).get("adapted")
    except UserError as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        return  # a damaged file, or a file of another version, is no reason to refuse
    if fitted:
        raise UserError(
            f"{final} was fitted by pcrl_nnunet_transfer, and {plans_name} is the plan to fine-tune it with; to "
            f"pretrain, give the plan that it was made from with -p, and -init {final} to start from it"
        )


def _refuse_earlier_state(request: Request) -> None:
    """Raise `UserError` for an unfinished pretraining of version 0.1.0, which only that version can continue."""
    if request.unnamed_final not in request.finals:
        return
    state = os.path.join(os.path.dirname(request.unnamed_final), checkpoint.LATEST)
    if os.path.isfile(state):
        raise UserError(
            f"{state} is the unfinished pretraining of an older version; finish it with that version, or start anew "
            f"with --overwrite in the place of --c"
        )


def _refuse_to_start_over(folder: str, states: list[str], finals: list[str]) -> None:
    """Raise `UserError` if a pretraining has left a state or a result. The message names the ways to continue."""
    others = (
        f"pretrain beside it with -name NAME, or in its place with --overwrite, which keeps its files in "
        f"{_free_folder(folder)}"
    )
    if states:
        raise UserError(f"{states[0]} is the state of an unfinished pretraining: go on with it by --c, {others}")
    final = next(filter(os.path.isfile, finals), None)
    if final is None:
        return
    try:
        epochs = checkpoint.read(final).get("epochs")
    except UserError as error:
        raise UserError(f"{error}: {others}") from error
    raise UserError(
        f"{final} is a finished pretraining of {epochs} epochs: fine-tune it (--c has nothing left to do), {others}"
    )


def _from_nothing(request: Request) -> str:
    s, line = request.settings, "#" * 80
    return (
        f"\n{line}\n--c found nothing to continue in {request.folder}.\n"
        f"This pretraining STARTS FROM {request.init or 'NOTHING'}: {s.epochs} epochs of {s.iters_per_epoch} steps, "
        f"{s.epochs * s.iters_per_epoch:,} steps in all.\n"
        f"The line after each epoch says how long is left; --dry_run measures it beforehand.\n{line}"
    )


def _from_state(request: Request, latest: str, previous: str) -> Start:
    """Return the latest training state, or the state before if it is damaged. Raise `UserError` if both are."""
    start = Start(state_path=latest)
    try:
        start.state = checkpoint.read(latest, checkpoint.STATE_FORMAT)
    except UserError as error:
        if not os.path.isfile(previous) or isinstance(error.__cause__, PermissionError):
            raise
        start.state_path, start.state = previous, checkpoint.read(previous, checkpoint.STATE_FORMAT)
        start.lines.append(f"WARNING: {error}. Going on from the state before, {previous}, instead")
    refuse_another(start.state, agreement(request), start.state_path)
    if start.lines and os.path.isfile(latest):  # else the next save would replace the good state by it
        os.replace(latest, os.path.join(request.folder, checkpoint.DAMAGED))
    return start


def _check_finished(content: Mapping[str, Any], request: Request, path: str) -> None:
    """Raise `UserError` if a finished pretraining differs from the requested one."""
    then, now = in_present_form(content["settings"]), request.settings.as_dict()
    differing = [
        f"{name} {before}, now {after}"
        for name, (before, after) in differences(then, now).items()
        if before is not None  # an older version lacks some settings
    ]
    _refuse_finished(path, "settings", "; ".join(differing))
    plans = [without_settings(plans) for plans in (content["plans"], request.plan.plans)]
    names = (name for name in sorted({*plans[0], *plans[1]}) if plans[0].get(name) != plans[1].get(name))
    _refuse_finished(path, "plans", ", ".join(names))
    others = content.get("other_plans", {})  # an older file has none
    names = (name for name, plan in request.cases.other_plans.items() if others.get(name, plan) != plan)
    _refuse_finished(path, "plans of other datasets", ", ".join(names))
    num_own = len(content["cases"]) - len((content.get("init") or {"cases": ()})["cases"])
    seen = {os.path.splitext(case["path"])[0] for case in content["cases"][:num_own]}
    there = {os.path.splitext(relative_path(case))[0] for case in request.cases.used}
    _refuse_finished(path, "cases", ", ".join(sorted(seen ^ there)[:5]))


def _refuse_finished(path: str, what: str, differing: str) -> None:
    if differing:
        raise UserError(
            f"{path} is finished, with other {what} ({differing}): leave --c out and pretrain with the present ones "
            f"beside it with -name NAME, or in its place with --overwrite"
        )


@contextmanager
def _put_aside(folder: str, start: Start) -> Iterator[None]:
    """Move an earlier training's files into their own folder. A copy of its result stays until there is a new result.

    An error or a signal within restores the files, unless the new training has written more than its log.
    """
    logs = glob(os.path.join(escape(folder), output_folder.LOGS))
    names = [name for name in (*OF_A_TRAINING, *map(os.path.basename, logs)) if os.path.exists(f"{folder}/{name}")]
    final, aside = os.path.join(folder, checkpoint.FINAL), _free_folder(folder)
    kept = os.path.join(aside, checkpoint.FINAL)
    if not names and not os.path.isfile(final):
        yield
        return
    with output_folder.creating():
        os.mkdir(aside)
        if os.path.isfile(final) and not _is_kept(final):
            shutil.copy2(final, kept)
        for name in names:
            os.replace(os.path.join(folder, name), os.path.join(aside, name))
        if os.path.isfile(final):
            output_folder.set_overwriting(folder, True)
    start.lines.append(
        f"--overwrite: the files of the pretraining that was here are kept in {aside}"
        + f"; its {checkpoint.FINAL} also stays here until this one is finished" * os.path.isfile(final)
    )
    try:
        yield
    except BaseException:
        if not _has_files(folder):
            output_folder.set_overwriting(folder, False)
            for path in (kept, start.log):  # an earlier log may have the same name, a time in seconds
                if path and os.path.isfile(path):
                    os.remove(path)
            for name in names:
                os.replace(os.path.join(aside, name), os.path.join(folder, name))
            with suppress(OSError):
                os.rmdir(aside)
        raise


def _has_files(folder: str) -> bool:
    """Tell if a training has written more than its log there."""
    return any(os.path.exists(os.path.join(folder, name)) for name in OF_A_TRAINING)


def _free_folder(folder: str) -> str:
    paths = (os.path.join(folder, f"old_{number}") for number in count(1))
    return next(path for path in paths if not os.path.exists(path))


def _is_kept(final: str) -> bool:
    """Tell if an earlier --overwrite has kept a copy of this result."""
    kept = glob(os.path.join(escape(os.path.dirname(final)), "old_*", checkpoint.FINAL))
    return any(filecmp.cmp(final, path) for path in kept)
