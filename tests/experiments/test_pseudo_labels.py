from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import make_plan

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments import pseudo_labels
from pcrl_nnunet.experiments.pseudo_labels import PseudoLabels, class_locations
from pcrl_nnunet.loading.cases import Case, find_cases

LABELS = {"background": 0, "a": 1, "b": 2}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}


def label_manager(**dataset_json):
    given = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", "labels": LABELS, **dataset_json}
    return PlansManager(make_plan()).get_label_manager(given)


class Predictor:
    """Predicts a for voxels above 0, and b above 1."""

    calls = 0

    masked = False

    def __init__(self, **_):
        self.label_manager = label_manager()
        self.configuration_manager = SimpleNamespace(use_mask_for_norm=[self.masked])

    def initialize_from_trained_model_folder(self, model, folds):
        assert (model, folds) == ("MODEL", (3,))

    def predict_logits_from_preprocessed_data(self, image):
        Predictor.calls += 1
        return torch.cat([torch.zeros_like(image), image, 2 * image - 1])


@pytest.fixture
def work(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_labels, "nnUNetPredictor", Predictor)
    cases = find_cases(str(tiny.data))
    predicted = {"case_2": cases[2], "unlabelled_x": cases[3]}
    return SimpleNamespace(cases=cases, labels=PseudoLabels(str(tmp_path / "target"), cases[:2], predicted))


def write(labels):
    labels.write("MODEL", 3, torch.device("cpu"))


def test_nnunet_reads_the_folder_as_its_own_with_true_and_predicted_labels(work):
    write(work.labels)
    dataset = nnUNetDatasetBlosc2(work.labels.folder)
    assert sorted(dataset.identifiers) == ["case_0", "case_1", "case_2", "unlabelled_x"]
    image, seg, _, properties = dataset.load_case("unlabelled_x")
    original = nnUNetDatasetBlosc2(str(work.cases[3].path).rsplit("/", 1)[0]).load_case("case_3")[0]
    np.testing.assert_array_equal(image[:], original[:])
    np.testing.assert_array_equal(seg[:], (image[:] > 0).astype(int) + (image[:] > 1))
    for label in (1, 2):
        where = properties["class_locations"][label]
        assert len(where)
        assert (seg[:][tuple(where.T)] == label).all()
    true = nnUNetDatasetBlosc2(str(work.cases[0].path).rsplit("/", 1)[0]).load_case("case_0")[1]
    np.testing.assert_array_equal(dataset.load_case("case_0")[1][:], true[:])


def test_voxels_outside_the_mask_of_normalisation_are_marked_as_by_nnunet(work, monkeypatch):
    monkeypatch.setattr(Predictor, "masked", True)
    image = np.full((1, 8, 8, 8), -0.5, np.float32)
    image[:, :3] = 0  # outside
    image[:, 5, 4, 4] = 0  # a hole
    image[:, 6, 5, 5] = 2
    path = f"{work.labels.folder}.b2nd"
    blosc2.asarray(image, urlpath=path)
    seg = pseudo_labels._predicted(Predictor(), Case("masked", path))
    expected = np.zeros((1, 8, 8, 8), int)
    expected[:, :3] = -1
    expected[:, 6, 5, 5] = 2
    np.testing.assert_array_equal(seg, expected)


def test_prediction_resumes_after_a_stop(work, monkeypatch):
    Predictor.calls = 0
    with monkeypatch.context() as patch:
        patch.setattr(pseudo_labels, "write_pickle", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(work.labels)
    write(work.labels)
    write(work.labels)
    assert Predictor.calls == 3  # the first case again, whose properties were not written, then the second
    with open(work.labels.finished, encoding="utf-8") as file:
        assert file.read().split() == ["case_2", "unlabelled_x"]


def test_a_description_can_be_read_back(work, tmp_path):
    work.labels.describe(str(tmp_path / "description.json"))
    assert PseudoLabels.load(str(tmp_path / "description.json")) == work.labels


def test_for_a_training_on_regions_locations_are_stored_by_region(tiny):
    seg = np.asarray(blosc2.open(str(tiny.data / "case_0_seg.b2nd"))[:])
    locations = class_locations(seg, label_manager(**REGIONS))
    assert set(locations) == {(1, 2), 2} or set(locations) == {(1, 2), (2,)}
    assert set(np.unique(seg[tuple(locations[(1, 2)].T)])) == {1, 2}
    with_ignored = class_locations(seg, label_manager(labels={**LABELS, "ignore": 3}))
    assert (-1, 0, 1, 2) in with_ignored


def test_data_of_an_older_preprocessing_are_refused(work, tmp_path):
    old = PseudoLabels(work.labels.folder, [Case("old", str(tmp_path / "old.npz"))], {})
    with pytest.raises(UserError, match=r"case old lies in .*npz; .* preprocess the dataset again"):
        write(old)
