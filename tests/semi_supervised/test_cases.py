"""The labelled and unlabelled cases of a semi-supervised training."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blosc2
import numpy as np
import pytest
from tiny_dataset import DATASET_JSON
from unlabelled_scans import make_full_plan, write_scans

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.semi_supervised.cases import SemiCases

SPLIT = [{"train": ["case_1", "case_0"], "val": ["case_3"]}]


@pytest.fixture(autouse=True)
def split(tiny: SimpleNamespace) -> None:
    """A split in which case 2 is in no part of the fold."""
    write_split(tiny, SPLIT)


def write_split(tiny: SimpleNamespace, split: list[dict[str, list[str]]]) -> None:
    (tiny.folder / "splits_final.json").write_text(json.dumps(split))


def find(fold: int | str = 0, leave_out: tuple[str, ...] = (), plan: dict[str, Any] | None = None) -> SemiCases:
    return SemiCases.find(plan or make_full_plan(), "3d_fullres", DATASET_JSON, fold, leave_out)


def rewrite(source: Path, target: Path, change: float = 0.0) -> None:
    """Write an image's voxels into another file with other blocks, so that its bytes differ."""
    voxels = blosc2.open(str(source))[:]
    voxels[0, 0, 0, 0] += change
    blosc2.asarray(voxels, urlpath=str(target), mode="w", chunks=(1, 7, 14, 14))


def test_the_rest_of_the_split_is_used_without_labels() -> None:
    cases = find()
    assert [case.name for case in cases.labelled] == ["case_1", "case_0"]
    assert list(cases.unlabelled) == ["case_2"]
    assert cases.unlabelled["case_2"].path.endswith("case_2.b2nd")
    assert not cases.copies
    assert not cases.unreadable
    text = str(cases)
    assert "Labelled cases: case_1, case_0\nUnlabelled cases (their labels are never read): case_2" in text


@pytest.mark.parametrize(
    ("labelled", "unlabelled", "ratio", "mixed"),
    [
        (2, 136, 8, 250),
        (10, 80, 8, 250),
        (10, 40, 8, 125),
        (70, 70, 8, 31),
        (70, 70, 0, 250),
        (70, 70, 1, 250),
        (1000, 1, 8, 1),
    ],
)
def test_with_many_labels_few_steps_mix_patches(labelled: int, unlabelled: int, ratio: float, mixed: int) -> None:
    case = find().labelled[0]
    cases = SemiCases([case] * labelled, dict.fromkeys(map(str, range(unlabelled)), case), {}, [])
    assert cases.mixed_steps(250, ratio) == mixed


def test_scans_are_used_beside_the_rest_by_a_name_of_their_own(tiny: SimpleNamespace) -> None:
    write_scans(tiny.folder, make_full_plan(), {"case_2": 2, "scan": 3})
    cases = find()
    assert list(cases.unlabelled) == ["case_2", "unlabelled/case_2", "unlabelled/scan"]
    assert len({case.path for case in cases.unlabelled.values()}) == 3
    everything = find("all")
    assert [case.name for case in everything.labelled] == [f"case_{i}" for i in range(4)]
    assert list(everything.unlabelled) == ["unlabelled/case_2", "unlabelled/scan"]


def test_a_case_that_the_split_names_twice_is_labelled_once(tiny: SimpleNamespace) -> None:
    write_split(tiny, [{"train": ["case_0", "case_0"], "val": ["case_0"]}])
    cases = find()
    assert [case.name for case in cases.labelled] == ["case_0"]
    assert list(cases.unlabelled) == ["case_1", "case_2", "case_3"]


def test_copies_of_held_out_cases_are_left_out_by_their_voxels(tiny: SimpleNamespace) -> None:
    scans = write_scans(tiny.folder, make_full_plan(), {"scan": 0})
    write_split(tiny, [{"train": ["case_0"], "val": ["case_3"]}])
    rewrite(tiny.data / "case_3.b2nd", scans / "of_validation.b2nd")
    rewrite(tiny.data / "case_1.b2nd", scans / "of_test.b2nd")
    rewrite(tiny.data / "case_3.b2nd", scans / "other_corner.b2nd", change=0.5)
    rewrite(tiny.data / "case_0.b2nd", scans / "of_training.b2nd")
    (tiny.data / "case_2.b2nd").unlink()
    rewrite(tiny.data / "case_3.b2nd", tiny.data / "case_2.b2nd")
    assert (scans / "of_validation.b2nd").read_bytes() != (tiny.data / "case_3.b2nd").read_bytes()
    cases = find(leave_out=("case_1",))
    others = ["unlabelled/of_training", "unlabelled/other_corner", "unlabelled/scan"]
    assert list(cases.unlabelled) == others
    assert cases.copies == {
        "case_2": "case_3",
        "unlabelled/of_validation": "case_3",
        "unlabelled/of_test": "case_1",
    }
    assert "  left out: unlabelled/of_test, which has the voxels of case_1" in str(cases)
    assert list(find().unlabelled) == ["case_1", "unlabelled/of_test", *others]


def test_cases_that_cannot_be_opened_are_named_and_set_aside(tiny: SimpleNamespace) -> None:
    scans = write_scans(tiny.folder, make_full_plan(), {"good": 0, "empty": 1, "short": 2})
    (scans / "empty.b2nd").write_bytes(b"")
    (scans / "short.b2nd").write_bytes((scans / "good.b2nd").read_bytes()[:400])
    cases = find()
    assert list(cases.unlabelled) == ["case_2", "unlabelled/good"]
    for sentence, name in zip(cases.unreadable, ("empty", "short"), strict=True):
        assert sentence.startswith(f"case {name} cannot be read from {scans / name}.b2nd (")
        assert f"WARNING: set aside: {sentence}" in str(cases)


def test_unlabelled_cases_with_nan_are_named_and_set_aside(tiny: SimpleNamespace) -> None:
    scans = write_scans(tiny.folder, make_full_plan(), {"good": 0})
    for name in ("one", "other"):
        rewrite(tiny.data / "case_0.b2nd", scans / f"{name}.b2nd", change=np.nan)  # of a held-out case's shape
    cases = find()
    assert list(cases.unlabelled) == ["case_2", "unlabelled/good"]
    assert len(cases.unreadable) == 2
    assert all("has voxels that are not finite numbers" in sentence for sentence in cases.unreadable)


def test_a_held_out_case_that_cannot_be_compared_ends_the_search(tiny: SimpleNamespace) -> None:
    (tiny.data / "case_3.b2nd").write_bytes(b"")
    with pytest.raises(UserError, match=r"^case case_3 cannot be read from "):
        find()


WITHOUT = (
    r"has no unlabelled case: no scan of pcrl_nnunet_preprocess -i, "
    r"and no case that the fold neither trains nor validates on"
)
REMEDY = r"; add scans with pcrl_nnunet_preprocess -d Dataset999_Tiny -i FOLDER, or train without: -tr PCRL"


def test_a_missing_unlabelled_case_ends_with_one_sentence(tiny: SimpleNamespace) -> None:
    with pytest.raises(UserError, match=rf"^fold all of Dataset999_Tiny {WITHOUT}{REMEDY}ScratchTrainer$"):
        find("all")
    write_split(tiny, tiny.splits)
    with pytest.raises(UserError, match=rf"^fold 1 of Dataset999_Tiny {WITHOUT}{REMEDY}"):
        find(1, leave_out=("case_0",))
    (tiny.folder / "nnUNetPlans_3d_fullres_unlabelled").mkdir()
    with pytest.raises(UserError, match=WITHOUT):
        find("all")


def test_an_error_without_unlabelled_cases_counts_the_excluded_ones(tiny: SimpleNamespace) -> None:
    scans = write_scans(tiny.folder, make_full_plan(), {"broken": 0})
    (scans / "broken.b2nd").write_bytes(b"")
    rewrite(tiny.data / "case_3.b2nd", tiny.data / "case_2.b2nd")
    reasons = r" \(1 copies of validation cases were left out, 1 cases cannot be read\)"
    with pytest.raises(UserError, match=WITHOUT + reasons + REMEDY):
        find()


def test_a_fold_without_training_cases_ends_with_one_sentence(tiny: SimpleNamespace) -> None:
    write_split(tiny, [{"train": [], "val": ["case_3"]}])
    with pytest.raises(UserError, match=r"^fold 0 has no training case; put one or more into splits_final.json$"):
        find()


def test_an_unknown_name_to_leave_out_ends_with_one_sentence() -> None:
    sentence = (
        r"^pcrl.semi.leave_out names 'case_9', which is not among the 4 preprocessed cases; "
        r"correct the name in nnUNetPlans.json$"
    )
    with pytest.raises(UserError, match=sentence):
        find(leave_out=("case_2", "case_9"))


@pytest.mark.parametrize("name", ["scan", "scan_0000.nii.gz", "unlabelled/scan.nii.gz"])
def test_a_nearly_right_name_to_leave_out_is_answered_with_the_right_one(tiny: SimpleNamespace, name: str) -> None:
    write_scans(tiny.folder, make_full_plan(), {"scan": 0})
    with pytest.raises(UserError, match=rf"names '{name}' \(probably 'unlabelled/scan'\), which is not among"):
        find(leave_out=(name,))


def test_a_copy_of_a_left_out_scan_is_listed_with_the_scans_full_name(tiny: SimpleNamespace) -> None:
    scans = write_scans(tiny.folder, make_full_plan(), {"scan": 0})
    rewrite(scans / "scan.b2nd", scans / "again.b2nd")
    assert find(leave_out=("unlabelled/scan",)).copies == {"unlabelled/again": "unlabelled/scan"}


def test_a_training_case_cannot_be_left_out() -> None:
    with pytest.raises(UserError, match=r"^pcrl.semi.leave_out names 'case_1', which is a training case of fold all; "):
        find("all", leave_out=("case_1",))


def test_scans_of_another_plans_settings_are_refused(tiny: SimpleNamespace) -> None:
    write_scans(tiny.folder, make_full_plan(), {"scan": 0})
    other = make_full_plan()
    other["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    with pytest.raises(UserError, match=r"made with another spacing than the plan nnUNetPlans has now, and must not"):
        find(plan=other)


def test_scans_of_unknown_origin_are_refused(tiny: SimpleNamespace) -> None:
    scans = write_scans(tiny.folder, make_full_plan(), {"scan": 0})
    os.remove(scans / "cases.json")
    with pytest.raises(UserError, match=r"has cases but no cases.json that says how they were made"):
        find()


def test_npz_cases_of_older_preprocessing_are_used_without_their_labels(tiny: SimpleNamespace) -> None:
    for i in range(4):
        image = blosc2.open(str(tiny.data / f"case_{i}.b2nd"))[:]
        np.savez(tiny.data / f"case_{i}.npz", data=image, seg=np.zeros((1, 14, 14, 14), np.int8))
        for ending in (".b2nd", "_seg.b2nd"):
            os.remove(tiny.data / f"case_{i}{ending}")
    shutil.copy(tiny.data / "case_3.npz", tiny.data / "case_4.npz")
    cases = find()
    assert list(cases.unlabelled) == ["case_2"]
    assert cases.copies == {"case_4": "case_3"}


@pytest.mark.parametrize("shape", [(2, 14, 28, 28), (14, 28, 28)])
def test_a_scan_of_another_shape_is_named_and_set_aside(tiny: SimpleNamespace, shape: tuple[int, ...]) -> None:
    scans = write_scans(tiny.folder, make_full_plan(), {"scan": 3})
    blosc2.asarray(np.zeros(shape, np.float32), urlpath=str(scans / "other.b2nd"), mode="w")
    cases = find()
    assert "unlabelled/other" not in cases.unlabelled
    (sentence,) = cases.unreadable
    assert sentence.startswith(f"case other has shape {shape} in ")
    assert "expected (1, z, y, x)" in sentence


def test_a_dataset_json_of_nnunet_v1_names_the_channels(tiny: SimpleNamespace) -> None:
    old = {**DATASET_JSON, "modality": DATASET_JSON["channel_names"]}
    del old["channel_names"]
    assert list(SemiCases.find(make_full_plan(), "3d_fullres", old, 0, ()).unlabelled) == ["case_2"]
