"""The folder of a comparison: places and names of its data, plans, folds and results.

The folder looks like nnU-Net's folders: preprocessed data (links to the dataset's), a plan for each run, its own
split, results. Every training in the folder is a training of nnU-Net on a fold of this split.
"""

from __future__ import annotations

import os
from contextlib import suppress
from copy import copy
from dataclasses import replace
from glob import escape as glob_escape
from glob import glob

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.classification.prediction import EVALUATION
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.comparison import Comparison, Run
from pcrl_nnunet.experiments.pseudo_labels import PseudoLabels
from pcrl_nnunet.output_folder import name_of_pretrainer
from pcrl_nnunet.plans import read_json

DESCRIPTION = "comparison.json"
PREPROCESSED, RESULTS = "nnUNet_preprocessed", "nnUNet_results"


class Layout:
    """Names and paths of a comparison's runs in its folder.

    Attributes:
        comparison: the comparison; it includes the arms of earlier calls once the folder is prepared.
        named: the folder that messages name, even while a preview lies elsewhere.
        folds: nnU-Net's folds by name, ordered by number. New folds are appended.
    """

    def __init__(self, comparison: Comparison, folder: str) -> None:
        self.comparison = comparison
        self.named = folder
        self.folds: dict[str, dict[str, list[str]]] = {}
        self.move_to(folder)

    def move_to(self, folder: str) -> None:
        """Move the comparison to another folder."""
        self.folder = folder
        self.preprocessed, self.results = (os.path.join(folder, name) for name in (PREPROCESSED, RESULTS))

    def variables(self) -> dict[str, str]:
        """Return the environment in which nnU-Net sees the comparison's folders as its own."""
        variables = {PREPROCESSED: self.preprocessed, RESULTS: self.results}
        if self.comparison.label_table is not None:
            variables["nnUNet_raw"] = ""  # otherwise a table that is edited there meanwhile would be used
        return variables

    def file(self, name: str) -> str:
        """Return the path of a result. Results on validation cases have their own names."""
        stem, ending = os.path.splitext(name)
        return os.path.join(self.folder, f"{stem}{'_val' * (self.comparison.scored == 'val')}{ending}")

    def has_begun(self) -> bool:
        """Tell if anything was trained in the folder; until then the folder may hold any comparison."""
        return os.path.isfile(os.path.join(self.folder, DESCRIPTION)) and bool(
            glob(os.path.join(glob_escape(self.results), "*", "*", "fold_*"))
        )

    # ------------------------------------------------------------------------------------------------ data and folds

    @property
    def data_folder(self) -> str:
        """The dataset's folder of preprocessed data."""
        return os.path.join(self.preprocessed, self.comparison.dataset)

    def data_identifier(self, run: Run) -> str:
        """Name the folder of preprocessed cases that a run trains on."""
        identifier = str(self.comparison.plan.resolved["data_identifier"])
        if not self.comparison.pseudo_labelled(run):
            return identifier
        return f"{identifier}_pseudo_{run.subset}_{self.comparison.scored}"

    def pseudo_labels(self, run: Run) -> PseudoLabels:
        """Return the data of a run with pseudo-labels: its training cases and the scored cases."""
        cases = self.comparison.cases
        true = [cases.by_name[n] for n in (*self.comparison.labelled_cases(run), *self.comparison.scored_cases)]
        target = os.path.join(self.data_folder, self.data_identifier(run))
        return PseudoLabels(target, true, self.comparison.pseudo_labelled(run))

    def description_of_pseudo_labels(self, run: Run) -> str:
        """Return the path of the file that says which labels are predicted for a run."""
        return os.path.join(self.folder, f"pseudo_labels_{run.subset}_{self.comparison.scored}.json")

    def fold_name(self, run: Run) -> str:
        """Name the fold that a run trains."""
        kind = "pseudo_" if self.comparison.pseudo_labelled(run) else ""
        return f"{kind}{run.subset}_{self.comparison.scored}"

    def pretraining_fold_name(self, run: Run) -> str:
        """Name the fold of a run's pretraining, which leaves out the fold's validation cases."""
        return f"pretrain_{run.subset}" if self.comparison.protocol == "semi" else "pretrain"

    def fold(self, run: Run) -> int:
        """Return the number of the fold that a run trains."""
        return list(self.folds).index(self.fold_name(run))

    def pretraining_fold(self, run: Run) -> int:
        """Return the number of the fold of a run's pretraining, which leaves out the fold's validation cases."""
        return list(self.folds).index(self.pretraining_fold_name(run))

    # ------------------------------------------------------------------------------------------------ plans

    def plans_name(self, run: Run) -> str:
        """Name the plan of a fine-tuning. With pseudo-labels the name includes the scored part, which the data hold."""
        scored = "_val" * (self.comparison.scored == "val" and bool(self.comparison.pseudo_labelled(run)))
        return f"{self.comparison.plan.plans['plans_name']}_{run}{scored}"

    def pretraining_plans_name(self, run: Run) -> str:
        """Name the plan of a run's pretraining."""
        labelled = f"{run.labelled}_" if self.comparison.protocol == "semi" else ""
        arm = self.comparison.pretraining_arm(run)
        return f"{self.comparison.plan.plans['plans_name']}_{arm}_pretrain_{labelled}{run.seed}"

    # ------------------------------------------------------------------------------------------------ results

    def pretrained(self, run: Run) -> str:
        """Return the path of a run's finished pretraining."""
        trainer = name_of_pretrainer(self.comparison.method(self.comparison.pretraining_arm(run)))
        name = f"{trainer}__{self.pretraining_plans_name(run)}__{self.comparison.plan.configuration}"
        fold = f"fold_{self.pretraining_fold(run)}"
        return os.path.join(self.results, self.comparison.dataset, name, fold, checkpoint_file.FINAL)

    def trainer(self, run: Run) -> str:
        """Name the class that trains a run. A shortcut has no class; the folder's name holds the shortcut instead."""
        arm, of_masks = self.comparison.arms[run.arm], self.comparison.label_table is None
        if arm.shortcut is not None:
            return f"Shortcut_{arm.shortcut}"
        if arm.semi is not None:
            return "PCRLSemiSupervisedScratchTrainer" if arm.pretrain is None else "PCRLSemiSupervisedTrainer"
        if arm.pretrain is None:
            return "PCRLScratchTrainer" if of_masks else "PCRLClassificationScratchTrainer"
        return "PCRLFinetuneTrainer" if of_masks else "PCRLClassificationTrainer"

    def model(self, run: Run) -> str:
        """Return the folder of a run's training, which contains the fold."""
        name = f"{self.trainer(run)}__{self.plans_name(run)}__{self.comparison.plan.configuration}"
        return os.path.join(self.results, self.comparison.dataset, name)

    def output(self, run: Run) -> str:
        """Return the folder of a run's fold."""
        return os.path.join(self.model(run), f"fold_{self.fold(run)}")

    def network(self, run: Run) -> str:
        """Return the path of a run's trained network."""
        return os.path.join(self.output(run), "checkpoint_final.pth")

    def evaluation(self, run: Run) -> str:
        """Return the path of the evaluation, by nnU-Net or of a classification. It is written last."""
        name = "summary.json" if self.comparison.label_table is None else EVALUATION
        return os.path.join(self.output(run), "validation", name)

    def is_done(self, run: Run) -> bool:
        """Tell if a run has been trained and scored."""
        return _is_whole_json(self.evaluation(run))

    def trained_before(self, run: Run) -> str | None:
        """Return the path of the same run's network with the other part scored, if this folder has one.

        Both runs have the same labelled cases and settings: `prepare` refuses others. Scored cases play no part in a
        training. (Pseudo-labels are predicted again, into the data that hold the scored cases.)
        """
        other = copy(self)
        other.comparison = replace(self.comparison, scored="val" if self.comparison.scored == "test" else "test")
        if other.fold_name(run) not in self.folds or not other.is_done(run):
            return None
        path = other.network(run)
        return path if os.path.isfile(path) else None


def _is_whole_json(path: str) -> bool:
    """Tell if a file exists and is complete: nnU-Net writes its summary in place."""
    with suppress(UserError):
        read_json(path, "train again")
        return True
    return False
