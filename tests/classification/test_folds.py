import pytest

from pcrl_nnunet.classification.folds import split_by_patient
from pcrl_nnunet.classification.label_table import read_labels
from pcrl_nnunet.errors import UserError


def of_patients(tmp_path, lines):
    (tmp_path / "classes.csv").write_text("case,kind,patient\n" + "".join(lines))
    table = read_labels(str(tmp_path))
    return split_by_patient([line.split(",")[0] for line in lines], table)


def test_classes_of_fewer_cases_than_folds_are_split_by_patient_too(tmp_path):
    folds = of_patients(tmp_path, [f"c{i},{'abc'[i % 3]},p{i // 2}\n" for i in range(12)])
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(f"c{i}" for i in range(12))
    for fold in folds:
        patients = [{int(name[1:]) // 2 for name in fold[part]} for part in ("train", "val")]
        assert not patients[0] & patients[1]


def test_fewer_patients_than_folds_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"are of 4 patients, too few for nnU-Net's 5 folds; write a splits_final.json"):
        of_patients(tmp_path, [f"c{i},{i % 2},p{i % 4}\n" for i in range(24)])
