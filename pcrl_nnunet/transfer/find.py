"""The search for finished pretrainings that a fine-tuning may use.

nnU-Net names a results folder by trainer, plan and configuration. A pretraining's trainer has the method in its name:
``nnUNet_results/DATASET/PCRLPretrainTrainer_METHOD__PLANS__CONFIGURATION/fold_F/checkpoint_final.pth``. Version 0.1.0
wrote into a folder without the method. So does pcrl_nnunet_transfer, because its plan has only one checkpoint. The file
in such a folder names its method.
"""

from __future__ import annotations

import os
import re

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.output_folder import METHOD, PRETRAINER, name_of_pretrainer


def place(results_folder: str, plans_name: str, configuration: str, fold: int | str, method: str | None = None) -> str:
    """Return the path of a pretraining's final checkpoint.

    Args:
        results_folder: ``nnUNet_results/DatasetXXX_NAME``.
        method: name of the method; None: the folder without a method.
    """
    trainer = PRETRAINER if method is None else name_of_pretrainer(method)
    folder = f"{trainer}__{plans_name}__{configuration}"
    return os.path.join(results_folder, folder, f"fold_{fold}", checkpoint_file.FINAL)


def candidates(
    results_folder: str, plans_name: str, configuration: str, fold: int | str, method: str | None = None
) -> list[str]:
    """Return possible paths of a pretraining, best first: its own fold, then `all`, never another fold."""
    return [
        place(results_folder, plans_name, configuration, name, method) for name in dict.fromkeys((str(fold), "all"))
    ]


def pretrained(
    results_folder: str, plans_name: str, configuration: str, fold: int | str, method: str | None = None
) -> dict[str, str]:
    """Return the finished pretrainings that a fold may start from, as paths by method.

    Args:
        results_folder: ``nnUNet_results/DatasetXXX_NAME``.
        method: look only for this method.

    Raises:
        UserError: a file in a folder without a method's name cannot be read.
    """
    names = methods_in(results_folder, plans_name, configuration) if method is None else [method]
    found: dict[str, str] = {}
    for of_fold in dict.fromkeys((str(fold), "all")):  # a method's own fold comes before `all` in both folders
        for name in names:
            path = place(results_folder, plans_name, configuration, of_fold, name)
            if os.path.isfile(path):
                found.setdefault(name, path)
        unnamed = place(results_folder, plans_name, configuration, of_fold)
        if os.path.isfile(unnamed) and method not in found:  # read only if it may count
            name = str(checkpoint_file.read(unnamed)["method"])
            if method in (None, name):
                found.setdefault(name, unnamed)
    return found


def unfinished(
    results_folder: str, plans_name: str, configuration: str, fold: int | str, method: str | None = None
) -> list[str]:
    """Return the states of unfinished pretrainings that a fold could start from after they finish."""
    methods = [None, *methods_in(results_folder, plans_name, configuration)] if method is None else [None, method]
    paths = [p for name in methods for p in candidates(results_folder, plans_name, configuration, fold, name)]
    states = [os.path.join(os.path.dirname(path), checkpoint_file.LATEST) for path in paths]
    return [state for state in states if os.path.isfile(state)]


def methods_in(results_folder: str, plans_name: str, configuration: str) -> list[str]:
    """Return the methods that have a folder in a results folder, sorted."""
    if not os.path.isdir(results_folder):
        return []
    name = re.compile(rf"{PRETRAINER}_({METHOD})__{re.escape(plans_name)}__{re.escape(configuration)}")
    return sorted(match[1] for entry in os.listdir(results_folder) if (match := name.fullmatch(entry)))
