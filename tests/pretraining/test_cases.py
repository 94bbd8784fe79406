import json
import shutil
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
from tiny_dataset import DATASET, make_plan

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.pretraining.cases import PretrainingCases

IDENTIFIER = "nnUNetPlans_3d_fullres"
TARGET, SOURCE = "Dataset042_Target", "Dataset016_Source"


@pytest.fixture
def unlabelled(tiny):
    """Makes unlabelled cases: copies of the tiny dataset's cases under new names, and one new image."""

    def make(dataset=DATASET, identifier=IDENTIFIER, **copies):
        folder = tiny.folder.parent / dataset / f"{identifier}_unlabelled"
        folder.mkdir(parents=True)
        for name, case in copies.items():
            voxels = blosc2.open(str(tiny.data / f"{case}.b2nd"))[:]
            blosc2.asarray(voxels, urlpath=str(folder / f"{name}.b2nd"), chunks=(1, 7, 7, 7), cparams={"clevel": 9})
        image = np.random.default_rng(99).normal(size=(1, 14, 14, 14)).astype(np.float32)
        blosc2.asarray(image, urlpath=str(folder / "scan.b2nd"))
        return str(folder.parent), identifier

    return make


def find(fold="all", plan=None, **others):
    places = {name: (place, "hash of its plan") for name, place in others.items()}
    return PretrainingCases.find(plan or make_plan(), "3d_fullres", fold, places)


def names(cases):
    return [case.name for case in cases.used]


def test_a_fold_leaves_out_its_validation_cases_and_their_copies_by_name(unlabelled):
    unlabelled(copy="case_3", twin="case_3", trained="case_0")
    found = find(0)
    assert names(found) == ["case_0", "case_1", "case_2", "scan", "trained"]
    assert (found.held_out, found.copies) == (["case_3"], {"copy": "case_3", "twin": "case_3"})
    assert str(found).splitlines() == [
        "Cases: 3 of the dataset, 2 unlabelled",
        "The validation cases of fold 0 are left out, and 2 copies of them.",
        "  left out: case_3",
        "  left out: copy, which has the voxels of case_3",
        "  left out: twin, which has the voxels of case_3",
    ]


def test_without_a_fold_nothing_is_left_out_and_no_case_is_opened(unlabelled):
    folder, _ = unlabelled(copy="case_3")
    for path in (f"{folder}/{IDENTIFIER}/case_3.b2nd", f"{folder}/{IDENTIFIER}_unlabelled/copy.b2nd"):
        with open(path, "wb"):
            pass  # damaged
    found = find()
    assert len(found.used) == 6
    assert str(found).splitlines() == [
        "Cases: 4 of the dataset, 2 unlabelled",
        "Pretraining also sees the images of validation cases; -f N leaves them out.",
    ]


def test_a_labelled_copy_of_a_validation_case_is_left_out(tiny):
    shutil.copy(tiny.data / "case_3.b2nd", tiny.data / "case_2.b2nd")
    found = find(0)
    assert names(found) == ["case_0", "case_1"]
    assert found.copies == {"case_2": "case_3"}


def test_copies_among_other_datasets_are_left_out(tiny, unlabelled):
    place = unlabelled("Dataset016_Others", copy="case_3", other="case_1")
    found = find(0, Dataset016_Others=place)
    assert names(found) == ["case_0", "case_1", "case_2", "Dataset016_Others/other", "Dataset016_Others/scan"]
    assert found.copies == {"Dataset016_Others/copy": "case_3"}
    assert "  left out: Dataset016_Others/copy, which has the voxels of case_3" in str(found)
    weights = [case.weight for case in found.used]
    assert weights == pytest.approx([3**-0.5] * 3 + [2**-0.5] * 2)  # for the cases that are left
    assert len(find(Dataset016_Others=place).used) == 7


@pytest.fixture
def for_target(tiny, unlabelled):
    """A plan to pretrain on a dataset's images for the tiny dataset; some images are copies of its cases."""
    plan = make_plan()
    plan |= {"dataset_name": SOURCE, "pcrl_target": {"dataset_name": DATASET, "plans_name": "nnUNetPlans"}}
    plan["configurations"]["3d_fullres"]["data_identifier"] = "for_target"
    unlabelled(SOURCE, "for_target", copy="case_3", other="case_1")
    return SimpleNamespace(plan=plan, tiny=tiny)


def test_the_targets_fold_leaves_out_copies_of_its_validation_cases(for_target):
    found = find(0, for_target.plan)
    assert names(found) == ["other", "scan"]
    assert str(found).splitlines() == [
        f"Cases: 2 of {SOURCE}, prepared for {DATASET}",
        f"The validation cases of fold 0 of {DATASET} are left out, and 1 copy of them.",
        "  left out: case_3",
        "  left out: copy, which has the voxels of case_3",
    ]
    assert str(find(plan=for_target.plan)).splitlines() == [
        f"Cases: 3 of {SOURCE}, prepared for {DATASET}",
        f"Copies of validation cases of {DATASET} are seen too, if there are any; -f N leaves them out.",
    ]


def test_a_fold_of_a_target_without_its_cases_is_refused(for_target):
    shutil.rmtree(for_target.tiny.data)
    with pytest.raises(UserError, match=rf"fold 0 of {DATASET} was asked for, but its cases.* or leave -f out"):
        find(0, for_target.plan)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_split_with_an_unknown_case_is_refused(tiny, part):
    tiny.splits[0][part].append("case_2.nii.gz")
    (tiny.folder / "splits_final.json").write_text(json.dumps(tiny.splits))
    with pytest.raises(UserError, match=r"names 'case_2.nii.gz' \(probably 'case_2'\), which is not among the 4"):
        find(0)


def test_a_fold_that_leaves_out_everything_is_refused(tiny):
    (tiny.folder / "splits_final.json").write_text(json.dumps([{"train": [], "val": [f"case_{i}" for i in range(4)]}]))
    with pytest.raises(UserError, match=r"fold 0 leaves out all cases"):
        find(0)


def test_a_validation_case_that_is_a_training_case_too_is_left_out(tiny):
    (tiny.folder / "splits_final.json").write_text(json.dumps([{"train": ["case_0", "case_1"], "val": ["case_1"]}]))
    assert names(find(0)) == ["case_0", "case_2", "case_3"]
