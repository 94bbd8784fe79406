import json

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.splits import check_fold, fold_of, refuse_unwritable

CASES = ["case_1", "case_2", "Case_3", "scan_004"]


def write(folder, *folds):
    content = [{"train": train, "val": val} for train, val in folds]
    (folder / "splits_final.json").write_text(json.dumps(content))


def test_a_fold_is_read_as_written(tmp_path):
    write(tmp_path, (CASES[:2], CASES[2:]), (CASES[1:], CASES[:1]))
    fold = fold_of(str(tmp_path), 1, CASES)
    assert (fold.train, fold.val) == (CASES[1:], CASES[:1])


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("case_1.nii.gz", "case_1"),
        ("case_2_0000.nii", "case_2"),
        ("case_2_0000", "case_2"),
        ("imagesTr/case_1_0000.mha", "case_1"),
        ("CASE_2", "case_2"),
        ("case_3", "Case_3"),
        ("case-1", "case_1"),
        ("scan_4", "scan_004"),
        ("case_4", None),  # was removed; case_1 is not a likely name
    ],
)
def test_an_unknown_case_name_is_refused_with_a_suggestion_and_the_file(tmp_path, part, written, meant):
    names = {"train": ["case_2"], "val": ["case_1"], part: [written]}
    write(tmp_path, (names["train"], names["val"]))
    with pytest.raises(UserError) as error:
        fold_of(str(tmp_path), 0, CASES)
    hint = f" (probably '{meant}')" if meant else ""
    assert f"fold 0 in {tmp_path}/splits_final.json names '{written}'{hint}, which is not among" in str(error.value)


def test_no_name_is_suggested_if_it_fits_two_cases(tmp_path):
    write(tmp_path, (["CASE_1"], ["scan"]))
    with pytest.raises(UserError, match=r"names 'CASE_1', which is not among"):
        fold_of(str(tmp_path), 0, ["case_1", "Case_01", "scan"])


def test_only_the_first_few_of_many_wrong_names_are_listed(tmp_path):
    write(tmp_path, ([f"gone_{i}" for i in range(9)], ["case_1"]))
    with pytest.raises(UserError, match=r"'gone_0', .*'gone_4' and 4 more, which are not among the 4 preprocessed"):
        fold_of(str(tmp_path), 0, CASES)


def test_wrong_names_in_other_folds_and_unused_parts_are_ignored(tmp_path):
    write(tmp_path, (["gone"], ["case_1"]), (["gone"], ["gone"]))
    assert fold_of(str(tmp_path), 0, CASES, ("val",)).val == ["case_1"]


def test_a_split_file_of_one_fold_has_no_other(tmp_path):
    write(tmp_path, (["case_1"], ["case_2"]))
    with pytest.raises(UserError, match=r"fold 2 is not among the folds of .*; give one of 0, or all"):
        check_fold(str(tmp_path), 2)


def test_a_fold_without_a_split_file_matches_nnunets_later_split(tmp_path):
    names = [f"case_{i}" for i in range(12)]
    theirs = generate_crossval_split(sorted(names), seed=12345, n_splits=5)
    for fold in range(5):
        ours = fold_of(str(tmp_path), fold, names[::-1])
        assert (ours.train, ours.val) == (list(theirs[fold]["train"]), list(theirs[fold]["val"]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"fold 5 is not among the folds"):
        fold_of(str(tmp_path), 5, names)
    with pytest.raises(UserError, match=r"4 cases are too few for nnU-Net's 5 folds"):
        fold_of(str(tmp_path), 0, CASES)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"0": 1}', "[1]", '[{"train": []}]', '[{"train": "case_1", "val": []}]',
                '[{"train": [1], "val": []}]']
)  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "splits_final.json").write_text(content)
    with pytest.raises(UserError, match=r"splits_final.json (is no list of folds with 'train' and 'val'|has no folds)"):
        fold_of(str(tmp_path), 0, CASES)


def test_a_folder_without_a_split_that_cannot_be_written_is_refused(tmp_path, as_users_do):
    refuse_unwritable(str(tmp_path))
    assert not list(tmp_path.iterdir())
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=r"there is no .*splits_final.json, which the first training of a fold writes"):
        refuse_unwritable(str(tmp_path))
    tmp_path.chmod(0o755)
    write(tmp_path, (["case_1"], ["case_2"]))
    tmp_path.chmod(0o555)
    refuse_unwritable(str(tmp_path))
