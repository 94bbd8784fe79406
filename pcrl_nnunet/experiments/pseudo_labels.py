"""One round of pseudo-labelling: a trained network's predictions become the labels of cases without labels.

A separate folder of preprocessed data holds links to the images and true labels, and the predicted labels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import write_pickle
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from tqdm import tqdm

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.files import write_text
from pcrl_nnunet.loading.cases import Case, CaseVolume
from pcrl_nnunet.plans import read_json
from pcrl_nnunet.semi_supervised.loader import inside_mask


@dataclass(frozen=True)
class PseudoLabels:
    """A folder of preprocessed cases, some with predicted labels.

    Args:
        folder: path of the folder.
        true: cases with true labels; `CASE_seg.b2nd` and `CASE.pkl` lie beside the image.
        predicted: cases whose labels are predicted, by their name in the folder.
    """

    folder: str
    true: Sequence[Case]
    predicted: Mapping[str, Case]

    @property
    def finished(self) -> str:
        """Path of the file that names the cases, written last. nnU-Net accepts no other files in the folder."""
        return f"{self.folder}.txt"

    @classmethod
    def load(cls, path: str) -> PseudoLabels:
        """Read a file that `describe` wrote."""
        given = read_json(path, "run the same command again")
        true = [Case(**case) for case in given["true"]]
        return cls(given["folder"], true, {name: Case(**case) for name, case in given["predicted"].items()})

    def describe(self, path: str) -> None:
        """Write the JSON file that another process loads."""
        write_text(path, json.dumps(asdict(self), indent=1))

    def write(self, model: str, fold: int, device: torch.device) -> None:
        """Predict the labels, and resume where an earlier call stopped.

        Args:
            model: folder of a finished training, the parent of fold_X.

        Raises:
            UserError: an older nnU-Net preprocessed a case, or a case cannot be read.
        """
        for case in (*self.true, *self.predicted.values()):
            if not case.path.endswith(".b2nd"):
                raise UserError(
                    f"case {case.name} lies in {case.path}; pseudo-labelling needs data as nnU-Net 2.8 preprocesses "
                    f"them (.b2nd): preprocess the dataset again, or leave this method out"
                )
        os.makedirs(self.folder, exist_ok=True)
        for case in self.true:
            for ending in (".b2nd", "_seg.b2nd", ".pkl"):
                self._link(case.path.removesuffix(".b2nd") + ending, case.name + ending)
        predictor = nnUNetPredictor(device=device, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(model, (fold,))
        for name, case in tqdm(self.predicted.items(), desc="pseudo-labels", unit="case", disable=None):
            if os.path.isfile(self._path(f"{name}.pkl")):  # written last
                continue
            seg = _predicted(predictor, case)
            draft = self._path(f"draft_of_{name}")
            nnUNetDatasetBlosc2.save_seg(seg, draft)
            os.replace(f"{draft}.b2nd", self._path(f"{name}_seg.b2nd"))
            self._link(case.path, f"{name}.b2nd")
            write_pickle({"class_locations": class_locations(seg, predictor.label_manager)}, f"{draft}.pkl")
            os.replace(f"{draft}.pkl", self._path(f"{name}.pkl"))
        write_text(self.finished, "".join(f"{name}\n" for name in self.predicted))

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _link(self, source: str, name: str) -> None:
        if not os.path.lexists(self._path(name)):
            os.symlink(os.path.realpath(source), self._path(name))


def _predicted(predictor: nnUNetPredictor, case: Case) -> np.ndarray:
    """Return labels (1, *spatial) on the image's grid: int8 as nnU-Net stores them, int16 for more than 127 labels."""
    volume = CaseVolume(case)
    image = torch.from_numpy(volume[tuple(slice(0, n) for n in volume.shape)])
    logits = predictor.predict_logits_from_preprocessed_data(image)
    labels = np.asarray(predictor.label_manager.convert_logits_to_segmentation(logits))[None]
    masked = predictor.configuration_manager.use_mask_for_norm
    if any(masked):
        # nnU-Net's training keeps voxels outside the mask at zero, and finds them by -1 in the segmentation
        labels = np.where((labels == 0) & ~inside_mask(image.numpy(), masked), -1, labels)
    return labels.astype(np.int16 if labels.max() > 127 else np.int8)


def class_locations(seg: np.ndarray, label_manager: Any) -> dict[Any, Any]:
    """Return the labels' locations as nnU-Net's preprocessing records them for sampling foreground.

    Args:
        seg: (1, *spatial).
    """
    wanted = list(label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels)
    if label_manager.has_ignore_label:
        wanted.append([-1, *label_manager.all_labels])
    return DefaultPreprocessor._sample_foreground_locations(seg, wanted)
