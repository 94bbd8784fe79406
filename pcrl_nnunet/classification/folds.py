"""nnU-Net's folds, split by patient."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import save_json
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from pcrl_nnunet.classification.label_table import LabelTable
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import whole
from pcrl_nnunet.loading.splits import NUM_FOLDS, SPLIT_SEED, SPLITS, writing_split


def write_split_by_patient(names: Sequence[str], table: LabelTable, folder: str) -> str | None:
    """Write nnU-Net's splits_final.json, split by patient, unless the file exists.

    Args:
        names: names of the dataset's cases.
        table: the label table; without patients, nnU-Net's own split is enough.
        folder: nnUNet_preprocessed/DatasetXXX_NAME.

    Returns:
        The path if the file was written.

    Raises:
        UserError: the file cannot be written, or there are fewer patients than folds.
    """
    file = os.path.join(folder, SPLITS)
    if not table.patient or os.path.isfile(file):
        return None
    folds = split_by_patient(names, table)
    with writing_split(file), whole(file) as draft:
        save_json(folds, draft, sort_keys=False)
    return file


def split_by_patient(names: Sequence[str], table: LabelTable) -> list[dict[str, list[str]]]:
    """Return nnU-Net's five folds. A patient's cases stay in one fold, and positives spread over the folds.

    Positives are the cases of the last class that any case has, or the cases with the rarest label.

    Raises:
        UserError: there are fewer patients than folds.
    """
    of_names = {name: 0 for name in names}
    value = np.nan_to_num(table.value)
    kind = value.argmax(1) if table.exclusive else value[:, value.sum(0).argmin()].astype(int)
    for name, of_sample in zip(table.case, kind, strict=True):
        if name in of_names:
            of_names[str(name)] = max(of_names[str(name)], int(of_sample))
    groups = [table.patient.get(name, name) for name in names]
    if len(set(groups)) < NUM_FOLDS:
        raise UserError(
            f"the cases are of {len(set(groups))} patients, too few for nnU-Net's {NUM_FOLDS} folds; write a {SPLITS} "
            f"with fewer into the dataset's folder in nnUNet_preprocessed"
        )
    folds = StratifiedGroupKFold(NUM_FOLDS, shuffle=True, random_state=SPLIT_SEED)
    if max(Counter(of_names.values()).values()) < NUM_FOLDS:  # no class has a case for every fold
        folds = GroupKFold(NUM_FOLDS)
    return [
        {"train": [names[i] for i in train], "val": [names[i] for i in held_out]}
        for train, held_out in folds.split(names, list(of_names.values()), groups)
    ]
