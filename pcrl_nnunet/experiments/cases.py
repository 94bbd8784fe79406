"""The cases of a comparison: the dataset's cases, their split, and scans without labels."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from pcrl_nnunet.classification.label_table import FILES, LabelTable
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.split import Split, draw_by_patient, split_cases
from pcrl_nnunet.ingest.unlabelled import unlabelled_cases
from pcrl_nnunet.loading.cases import Case, find_cases
from pcrl_nnunet.loading.copies import find_copies
from pcrl_nnunet.plans import PlannedConfiguration
from pcrl_nnunet.semi_supervised.cases import PREFIX
from pcrl_nnunet.semi_supervised.settings import WHERE


@dataclass(frozen=True)
class Cases:
    """The cases of a comparison by their role.

    Attributes:
        by_name: all cases of the dataset.
        patients: patient by case. A case without an entry is its own patient.
        split: the cases whose labels are known.
        unlabelled: scans without labels that may be trained on.
        left_out: the other scans without labels, with the reason.
        never_trained_on: further cases of the dataset that no training may see. They are in no part of the split.
    """

    by_name: Mapping[str, Case]
    patients: Mapping[str, str]
    split: Split
    unlabelled: Sequence[Case]
    left_out: Mapping[str, str]
    never_trained_on: Sequence[str] = ()

    @classmethod
    def find(
        cls,
        plan: PlannedConfiguration,
        patients: Mapping[str, str],
        label_table: LabelTable | None,
        leave_out: Sequence[str] = (),
    ) -> Cases:
        """Find and split the preprocessed cases of a plan.

        Args:
            patients: the content of the file of ``-patients``; empty without it.
            label_table: labels of a classification, with patients or without; None: a segmentation.
            leave_out: ``pcrl.semi.leave_out``, names of cases that no arm trains on.

        Raises:
            UserError: the patients, the table or `leave_out` name other cases, or the cases are too few.
        """
        identifier = plan.resolved["data_identifier"]
        by_name = {case.name: case for case in find_cases(os.path.join(plan.folder, identifier))}
        scans = unlabelled_cases(plan.folder, identifier)
        if patients:
            _check_patients(patients, by_name, scans)
        elif label_table is not None:
            patients = dict(label_table.patient)
        known = (
            list(by_name) if label_table is None else _cases_of_table(by_name, label_table, plan.plans["dataset_name"])
        )
        split = split_cases(known, patients)
        named = _named({**by_name, **{f"{PREFIX}{case.name}": case for case in scans}}, leave_out)
        left_out = _left_out(scans, {name: by_name[name] for name in (*split.val, *split.test)}, patients, named)
        never = [name for name in named if name in by_name and name not in (*split.val, *split.test)]
        # the draw of the split does not depend on the cases to leave out
        split = replace(split, train=tuple(name for name in split.train if name not in never))
        return cls(by_name, patients, split, [case for case in scans if case.name not in left_out], left_out, never)

    @property
    def held_out(self) -> list[str]:
        """Names of the cases that no training may see."""
        return [*self.split.val, *self.split.test, *self.never_trained_on]

    def labelled(self, number: int, seed: int) -> list[str]:
        """Draw the cases whose labels are used, by the seed. A larger number contains the cases of a smaller one."""
        return sorted(draw_by_patient(self.split.train, self.patients, seed)[:number])

    def pretraining_fold(self, labelled: Collection[str] = ()) -> dict[str, list[str]]:
        """Return nnU-Net's fold for a pretraining, which leaves out the cases under ``val``.

        Args:
            labelled: training cases to leave out, too.
        """
        held_out = self.held_out
        patients = {self.patients.get(name, name) for name in held_out}
        # a classification has cases without a label
        others = sorted(self.by_name.keys() - {*self.split.train, *held_out})
        without = [name for name in others if self.patients.get(name, name) not in patients]
        held_out += [name for name in others if name not in without]
        return {
            "train": [name for name in self.split.train if name not in labelled] + without,
            "val": sorted({*held_out, *labelled}) if labelled else held_out,
        }


def read_patients(path: str | None) -> dict[str, str]:
    """Read the file of ``-patients`` and return the patient by case; empty without a path."""
    if path is None:
        return {}
    try:
        content = pd.read_csv(path, dtype=str)[["case", "patient"]]
        if content.isna().any(axis=None):
            raise ValueError(f"line {2 + int(content.isna().any(axis=1).idxmax())} has an empty cell")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} cannot be used ({error}); expected a CSV file with the columns case and patient"
        ) from error
    return dict(zip(content["case"], content["patient"], strict=True))


def _check_patients(patients: Mapping[str, str], cases: Mapping[str, Case], scans: Sequence[Case]) -> None:
    """Raise `UserError` if the names in the file of ``-patients`` are not the names of the cases."""
    missing = sorted(cases.keys() - patients.keys())
    unknown = sorted(patients.keys() - cases.keys() - {case.name for case in scans})
    for what, names in (("lacks the cases", missing), ("has cases that the dataset lacks,", unknown)):
        if names:
            raise UserError(
                f"the file of -patients {what} {', '.join(names[:3])}{' ...' * (len(names) > 3)}; expected one "
                f"line for each case, by the name of its image without ending and channel"
            )


def _cases_of_table(cases: Mapping[str, Case], label_table: LabelTable, dataset: str) -> list[str]:
    """Return the names of the cases that have a label in the table of a classification."""
    known = set(label_table.case[label_table.of_cases(list(cases))])
    if not known:
        raise UserError(
            f"{FILES[label_table.kind]} has no label for the {len(cases)} cases of {dataset}; compare its names of "
            f"cases, such as {next(iter(label_table.case))}, with the dataset's, such as {next(iter(cases))}"
        )
    return [name for name in cases if name in known]


def _named(known: Mapping[str, Case], leave_out: Sequence[str]) -> dict[str, Case]:
    """Return the cases of ``pcrl.semi.leave_out`` by their names, or raise `UserError` for an unknown name."""
    if unknown := [name for name in leave_out if name not in known]:
        raise UserError(
            f"{WHERE}.leave_out names '{unknown[0]}', which is not among the {len(known)} preprocessed cases; correct "
            f"the name in the plan or in the file of -settings"
        )
    return {name: known[name] for name in leave_out}


def _left_out(
    scans: Sequence[Case], held_out: Mapping[str, Case], patients: Mapping[str, str], named: Mapping[str, Case]
) -> dict[str, str]:
    """Return the reason to leave out a scan without labels, by the scan's name.

    Args:
        held_out: validation and test cases.
        named: cases of ``pcrl.semi.leave_out``.
    """
    of_settings = set(named.values())
    others = [scan for scan in scans if scan not in of_settings]
    copies = find_copies(others, list({*held_out.values(), *of_settings}))
    of_patients = {patients[name]: name for name in held_out if name in patients}
    left_out = {}
    for scan in scans:
        if scan in of_settings:
            left_out[scan.name] = f"{WHERE}.leave_out names it"
        elif scan in copies:
            left_out[scan.name] = f"it is {copies[scan].name} under another name, which is held out"
        elif (other := of_patients.get(patients.get(scan.name, ""))) is not None:
            left_out[scan.name] = f"it is of the patient of {other}, which is held out"
    return left_out
