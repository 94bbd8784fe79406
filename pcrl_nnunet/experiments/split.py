"""The split of a dataset's cases into training, validation and test, by patient, and draws of labelled cases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.splits import SPLIT_SEED

SHARES = (0.7, 0.1, 0.2)  # training, validation, test, as in PCRLv2's experiments (TPAMI 2023)


@dataclass(frozen=True)
class Split:
    """Names of the cases in each part. All cases of a patient are in the same part."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]


def split_cases(cases: Iterable[str], patients: Mapping[str, str], seed: int = SPLIT_SEED) -> Split:
    """Draw 70 % of the cases for training, 10 % for validation and 20 % for the test, patient by patient.

    Args:
        patients: patient by case. A case without an entry is its own patient.

    Raises:
        UserError: a part would be empty.
    """
    order = draw_by_patient(cases, patients, seed)
    bounds = [round(len(order) * share) for share in np.cumsum(SHARES[::-1])[:2]]
    parts: list[list[str]] = [[], [], []]  # test, validation, training
    part = 0
    for i, case in enumerate(order):
        begins = i == 0 or patients.get(case, case) != patients.get(order[i - 1], order[i - 1])
        if begins and part < 2 and i >= bounds[part]:
            part += 1
        parts[part].append(case)
    if any(len(p) < 1 for p in parts):
        num = len({patients.get(case, case) for case in order})
        raise UserError(
            f"{len(order)} cases of {num} patients are too few for a split into training, validation and test cases; "
            f"add cases, or compare on another dataset"
        )
    test, val, train = (tuple(sorted(p)) for p in parts)
    return Split(train, val, test)


def draw_by_patient(cases: Iterable[str], patients: Mapping[str, str], seed: int) -> list[str]:
    """Return the cases in random order; a patient's cases stay together."""
    rng = np.random.default_rng(seed)
    by_patient: dict[str, list[str]] = {}
    for case in sorted(cases):
        by_patient.setdefault(patients.get(case, case), []).append(case)
    names = sorted(by_patient)
    return [case for i in rng.permutation(len(names)) for case in rng.permutation(by_patient[names[i]]).tolist()]


def check_number_labelled(text: str) -> None:
    """Raise `UserError` for a text that is not like ``10``, ``10%`` or ``all``."""
    if text != "all" and not re.fullmatch(r"\d+|\d+(\.\d+)?%", text):
        raise UserError(f"-labelled has '{text}'; expected numbers of cases, shares such as 10%, or all")


def number_labelled(text: str, available: int) -> int:
    """Return the number of cases that ``10``, ``10%`` or ``all`` stands for.

    Args:
        available: number of training cases.

    Raises:
        UserError: there are fewer cases, or the number is 0.
    """
    check_number_labelled(text)
    number = available
    if text.endswith("%"):
        number = max(1, round(float(text[:-1]) / 100 * available))
    elif text != "all":
        number = int(text)
    if not 1 <= number <= available:
        raise UserError(
            f"-labelled has '{text}', but the comparison's split has {available} training cases; give a number from 1 "
            f"to {available}"
        )
    return number
