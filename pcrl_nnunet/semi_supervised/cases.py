"""The cases of a semi-supervised training: labelled cases, and cases that are used without labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest.scans import Target
from pcrl_nnunet.ingest.unlabelled import refuse_other_settings, unlabelled_cases, unlabelled_folder
from pcrl_nnunet.loading.cases import Case, CaseVolume, UnreadableCase, find_cases
from pcrl_nnunet.loading.copies import find_copies
from pcrl_nnunet.loading.splits import fold_of, listed
from pcrl_nnunet.plans import channel_names, resolve
from pcrl_nnunet.semi_supervised.settings import WHERE

PREFIX = "unlabelled/"  # prefix of the names of cases from pcrl_nnunet_preprocess -i


@dataclass(frozen=True)
class SemiCases:
    """The cases of a fold.

    Attributes:
        labelled: the fold's training cases, whose labels are used.
        unlabelled: cases that are used without labels, by their names in log and checkpoint.
        copies: names of cases that are left out, with the name of the held-out case that has the same voxels.
        unreadable: sentences about cases that are set aside because they cannot be opened.
    """

    labelled: Sequence[Case]
    unlabelled: Mapping[str, Case]
    copies: Mapping[str, str]
    unreadable: Sequence[str]

    @classmethod
    def find(
        cls,
        plans: Mapping[str, Any],
        configuration: str,
        dataset_json: Mapping[str, Any],
        fold: int | str,
        leave_out: Sequence[str],
        supervised: str = "PCRLScratchTrainer",
    ) -> SemiCases:
        """Find the cases of a fold.

        Unlabelled cases are the scans of ``pcrl_nnunet_preprocess -i``, and the dataset's cases in no part of the fold.
        They never include validation cases, the cases of `leave_out`, or copies of these.

        Args:
            plans: plan of the dataset.
            leave_out: names of further held-out cases, as listed in the log.
            supervised: name of the trainer that errors advise: the same training without unlabelled cases.

        Raises:
            UserError: the fold does not exist, or has no training case or no unlabelled case; `leave_out` names an
                unknown case or a training case; or another plan preprocessed the scans.
        """
        folder = os.path.join(nnUNet_preprocessed, plans["dataset_name"])
        identifier = str(resolve(plans, configuration)["data_identifier"])
        own = {case.name: case for case in find_cases(os.path.join(folder, identifier))}
        scans = {f"{PREFIX}{case.name}": case for case in unlabelled_cases(folder, identifier)}
        if scans:
            target = Target(dict(plans), dict(dataset_json), configuration)
            refuse_other_settings(unlabelled_folder(folder, identifier), target)
        known = {**own, **scans}
        train, validation = [*own], []
        if fold != "all":
            this = fold_of(folder, int(fold), own)
            train, validation = this.train, this.val
        if not train:
            raise UserError(f"fold {fold} has no training case; put one or more into splits_final.json")
        _check_leave_out(leave_out, known, train, fold, plans["plans_name"])
        used = {*train, *validation, *leave_out}
        candidates = {name: case for name, case in known.items() if name not in used}
        held_out = {name: known[name] for name in dict.fromkeys((*validation, *leave_out)) if name not in train}
        candidates, unreadable = _readable(candidates, len(channel_names(dataset_json)))
        candidates, copies, not_finite = _without_copies(candidates, held_out)
        unreadable += not_finite
        unlabelled = {name: case for name, case in candidates.items() if name not in copies}
        if not unlabelled:
            raise UserError(
                f"fold {fold} of {plans['dataset_name']} has no unlabelled case: no scan of pcrl_nnunet_preprocess -i, "
                f"and no case that the fold neither trains nor validates on{_but(copies, unreadable)}; add scans with "
                f"pcrl_nnunet_preprocess -d {plans['dataset_name']} -i FOLDER, or train without: -tr {supervised}"
            )
        return cls([own[name] for name in dict.fromkeys(train)], unlabelled, copies, unreadable)

    def mixed_steps(self, steps: int, ratio: float) -> int:
        """Return how many of an epoch's steps may mix patches: at least one.

        Where unlabelled cases are few beside the labelled ones, mixing cost more than they gave (docs, "Many labelled
        cases").

        Args:
            ratio: with this many unlabelled cases for each labelled case, all steps may mix; with fewer, proportionally
                fewer steps may. With 0, all may.
        """
        wanted = ratio * len(self.labelled)
        return max(1, round(steps * min(1.0, len(self.unlabelled) / wanted))) if wanted else steps

    def __str__(self) -> str:
        lines = [
            f"Labelled cases: {', '.join(case.name for case in self.labelled)}",
            f"Unlabelled cases (their labels are never read): {', '.join(self.unlabelled)}",
            *(f"  left out: {copy}, which has the voxels of {name}" for copy, name in self.copies.items()),
            *(f"  WARNING: set aside: {sentence}" for sentence in self.unreadable),
        ]
        return "\n".join(lines)


def _check_leave_out(
    leave_out: Sequence[str], known: Mapping[str, Case], train: Sequence[str], fold: int | str, plans_name: str
) -> None:
    """Raise `UserError` if the setting names an unknown case or a training case."""
    if unknown := [name for name in leave_out if name not in known]:
        raise UserError(
            f"{WHERE}.leave_out names {listed(unknown[:1], known)}, which is not among the {len(known)} preprocessed "
            f"cases; correct the name in {plans_name}.json"
        )
    if trained := [name for name in leave_out if name in train]:
        raise UserError(
            f"{WHERE}.leave_out names '{trained[0]}', which is a training case of fold {fold}; remove it from "
            f"leave_out, or give a fold that does not train on it"
        )


def _readable(cases: Mapping[str, Case], channels: int) -> tuple[dict[str, Case], list[str]]:
    """Open every case. Return the readable cases, and a sentence about each other case."""
    readable, sentences = {}, []
    for name, case in cases.items():
        try:
            shape = CaseVolume(case).shape
        except UserError as error:
            sentences.append(str(error))
            continue
        if len(shape) == 4 and shape[0] == channels:
            readable[name] = case
        else:
            sentences.append(
                f"case {case.name} has shape {shape} in {case.path}; expected ({channels}, z, y, x), with as many "
                f"channels as the dataset: preprocess the image again"
            )
    return readable, sentences


def _without_copies(
    cases: Mapping[str, Case], held_out: Mapping[str, Case]
) -> tuple[dict[str, Case], dict[str, str], list[str]]:
    """Separate copies of held-out cases, by their voxels.

    Returns:
        The other cases; names of copies, with the name of the held-out case; and sentences about cases whose voxels
        cannot be read.
    """
    name_of = {case: name for name, case in cases.items()}
    held_out_name = {case: name for name, case in held_out.items()}
    sentences: list[str] = []
    while True:
        try:
            found = find_copies([*name_of], [*held_out_name])
        except UnreadableCase as error:
            if error.case not in name_of:  # the training needs a held-out case
                raise
            del name_of[error.case]
            sentences.append(str(error))
        else:
            copies = {name_of[copy]: held_out_name[original] for copy, original in found.items()}
            return {name: case for case, name in name_of.items()}, copies, sentences


def _but(copies: Mapping[str, str], unreadable: Sequence[str]) -> str:
    left_out = [f"{len(copies)} copies of validation cases were left out"] if copies else []
    set_aside = [f"{len(unreadable)} cases cannot be read"] if unreadable else []
    return f" ({', '.join([*left_out, *set_aside])})" if left_out or set_aside else ""
