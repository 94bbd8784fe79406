"""The cases of a pretraining, and the cases that a fold leaves out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from types import MappingProxyType
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from pcrl_nnunet.classification.folds import write_split_by_patient
from pcrl_nnunet.classification.label_table import FILES, planned_labels
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest.unlabelled import unlabelled_cases, unlabelled_folder
from pcrl_nnunet.loading.cases import Case, find_cases, unpack
from pcrl_nnunet.loading.copies import find_copies
from pcrl_nnunet.loading.splits import SPLITS, fold_of
from pcrl_nnunet.plans import read_json, resolve
from pcrl_nnunet.pretraining import distributed
from pcrl_nnunet.target_plans import TARGET_KEY, preprocess_command

Place = tuple[str, str]  # nnUNet_preprocessed/DatasetXXX_NAME, and the data identifier in it
Others = Mapping[str, tuple[Place, str]]  # further datasets by name: the cases' place, `checkpoint.plans_hash`


@dataclass(frozen=True)
class PretrainingCases:
    """The cases that a pretraining sees, and the cases that it leaves out.

    Attributes:
        dataset: name of the plan's dataset.
        labelled, unlabelled: cases of that dataset.
        others: cases of further datasets, by the dataset's name.
        fold: number of the fold whose validation cases are left out; ``all`` leaves out none.
        held_out_cases: the fold's validation cases.
        copies: cases that are left out as copies of a validation case: the original's name by the copy's name.
        target: the dataset of the network and of the folds, if it differs from `dataset`.
        other_plans: `checkpoint.plans_hash` of the further datasets' plans, by the dataset's name.
    """

    dataset: str
    labelled: list[Case]
    unlabelled: list[Case]
    others: Mapping[str, list[Case]]
    fold: int | str
    held_out_cases: list[Case]
    copies: Mapping[str, str]
    target: str | None = None
    other_plans: Mapping[str, str] = field(default_factory=dict)

    @property
    def used(self) -> list[Case]:
        """The cases that the pretraining sees, with their weights."""
        own = self.labelled + self.unlabelled
        return of_several({self.dataset: own, **self.others}) if self.others else own

    @property
    def held_out(self) -> list[str]:
        """The names of the fold's validation cases."""
        return [case.name for case in self.held_out_cases]

    @property
    def datasets(self) -> list[str]:
        """The names of all datasets, the plan's first."""
        return [self.dataset, *self.others]

    def __str__(self) -> str:
        own = f"{len(self.labelled)} of the dataset, {len(self.unlabelled)} unlabelled"
        if self.target is not None:
            own = f"{len(self.labelled + self.unlabelled)} of {self.dataset}, prepared for {self.target}"
        lines = [f"Cases: {own}", *(f"  and {len(cases)} of {name}" for name, cases in self.others.items())]
        lines += filter(None, [self.note_on_fold()])
        if self.held_out:
            lines.append(f"  left out: {', '.join(self.held_out)}")
        lines += [f"  left out: {copy}, which has the voxels of {name}" for copy, name in self.copies.items()]
        return "\n".join(lines)

    def note_on_fold(self) -> str:
        """A sentence about the validation cases; empty if no split applies."""
        whose = f" of {self.target}" if self.target else ""
        if self.fold != "all":
            if not self.held_out:
                return f"Fold {self.fold}{whose} has no validation cases: none are left out."
            number = len(self.copies)
            copies = f", and {number} {'copy' if number == 1 else 'copies'} of them" if number else ""
            return f"The validation cases of fold {self.fold}{whose} are left out{copies}."
        if self.target:
            return f"Copies of validation cases{whose} are seen too, if there are any; -f N leaves them out."
        return "Pretraining also sees the images of validation cases; -f N leaves them out." if self.labelled else ""

    @classmethod
    def find(
        cls, plans: Mapping[str, Any], configuration: str, fold: int | str, others: Others = MappingProxyType({})
    ) -> PretrainingCases:
        """Find the preprocessed cases, and leave out the fold's validation cases and all copies of them.

        Unlabelled cases alone are enough. A fold needs labelled cases of this dataset or of the target dataset.

        Args:
            plans: plan of the first dataset. If the dataset has a table of patients, its folds are split by patient,
                as in a classification.
            others: places and plans of the further datasets' cases.

        Raises:
            UserError: there are no cases, the fold does not exist, or it names missing cases.
        """
        place = os.path.join(nnUNet_preprocessed, plans["dataset_name"]), _identifier(plans, configuration)
        target = plans.get(TARGET_KEY)
        if target and not unlabelled_cases(*place):
            raise UserError(
                f"no preprocessed images in {unlabelled_folder(*place)}; run "
                f"{preprocess_command(plans['dataset_name'], **target, configuration=configuration)} first"
            )
        labelled, unlabelled = _cases_in(place)
        further = {name: [case for part in _cases_in(place) for case in part] for name, (place, _) in others.items()}
        held_out: set[Case] = set()
        if fold != "all" and target:
            held_out = _validation_cases_of_target(target, configuration, int(fold))
        elif fold != "all":
            held_out = _validation_cases(plans, place, int(fold), labelled)
        name_of = {case: f"{name}/{case.name}" for name, cases in further.items() for case in cases}
        name_of |= {case: case.name for case in (*labelled, *unlabelled)}
        copies = find_copies([case for case in name_of if case not in held_out], list(held_out))
        left_out = held_out | copies.keys()
        found = cls(
            plans["dataset_name"],
            [case for case in labelled if case not in left_out],
            [case for case in unlabelled if case not in left_out],
            {name: [case for case in cases if case not in left_out] for name, cases in further.items()},
            fold,
            sorted(held_out, key=lambda case: case.name),
            {name_of[case]: original.name for case, original in copies.items()},
            target["dataset_name"] if target else None,
            {name: plans_hash for name, (_, plans_hash) in others.items()},
        )
        if not found.used:
            raise UserError(f"fold {fold} leaves out all cases, and there are no unlabelled ones; give another -f")
        return found


def of_several(datasets: Mapping[str, list[Case]]) -> list[Case]:
    """Return the cases of several datasets, weighted so that a dataset is drawn by the square root of its size.

    In proportion to size, a large dataset would fill nearly all samples. With equal weights, the few cases of a small
    dataset would be seen again and again.

    Args:
        datasets: cases by dataset. Cases of all but the first dataset get the dataset's name as a prefix.
    """
    own = next(iter(datasets))
    return [
        Case(case.name if name == own else f"{name}/{case.name}", case.path, len(cases) ** -0.5)
        for name, cases in datasets.items()
        for case in cases
    ]


def unpacked(cases: Sequence[Case], say: Callable[[str], None]) -> list[Case]:
    """Unpack an older preprocessing's .npz to .npy, as nnU-Net does before training: boxes can be read from .npy."""
    if not any(case.path.endswith(".npz") for case in cases):
        return list(cases)
    say("Unpacking the .npz files of an older preprocessing")
    with ThreadPool(max(1, get_allowed_n_proc_DA())) as pool:
        if distributed.local_rank() == 0:
            pool.map(unpack, cases)
        distributed.wait_for_all()
        return pool.map(unpack, cases)


def _identifier(plans: Mapping[str, Any], configuration: str) -> str:
    return str(resolve(plans, configuration)["data_identifier"])


def _cases_in(place: Place) -> tuple[list[Case], list[Case]]:
    """Find the labelled and the unlabelled cases; one of the two may be missing."""
    unlabelled = unlabelled_cases(*place)
    own = os.path.join(*place)
    return [] if unlabelled and not os.path.isdir(own) else find_cases(own), unlabelled


def _validation_cases(plans: Mapping[str, Any], place: Place, fold: int, labelled: Sequence[Case]) -> set[Case]:
    if not labelled:
        raise UserError(
            f"fold {fold} was asked for, but {unlabelled_folder(*place)} has only unlabelled cases, which belong to no "
            f"fold; leave -f out"
        )
    folder, names = place[0], [case.name for case in labelled]
    _split_by_patient(folder, names, plans)
    validation = set(fold_of(folder, fold, names).val)
    return {case for case in labelled if case.name in validation}


def _validation_cases_of_target(target: Mapping[str, str], configuration: str, fold: int) -> set[Case]:
    """Find the validation cases of the target dataset; another dataset may have copies of them."""
    folder = os.path.join(nnUNet_preprocessed, target["dataset_name"])
    plans = read_json(os.path.join(folder, f"{target['plans_name']}.json"), "plan that dataset again")
    identifier = _identifier(plans, configuration)
    try:
        cases = find_cases(os.path.join(folder, identifier))
    except UserError as error:
        raise UserError(
            f"fold {fold} of {target['dataset_name']} was asked for, but its cases, which are needed to find copies, "
            f"are not in {os.path.join(folder, identifier)}; preprocess them with nnUNetv2_preprocess, or leave -f out"
        ) from error
    return _validation_cases(plans, (folder, identifier), fold, cases)


def _split_by_patient(folder: str, names: list[str], plans: Mapping[str, Any]) -> None:
    """Write the split of a dataset with a classification table of patients, unless the split exists.

    A classification would write the same split. nnU-Net's own split by case puts patients on both sides.
    """
    if os.path.isfile(os.path.join(folder, SPLITS)):  # takes precedence over the table, which a segmentation may ignore
        return
    raw = os.path.join(nnUNet_raw, plans["dataset_name"]) if nnUNet_raw.is_set() else None
    if any(os.path.isfile(os.path.join(place, file)) for place in (folder, raw) if place for file in FILES.values()):
        write_split_by_patient(names, planned_labels(plans, folder, raw), folder)
