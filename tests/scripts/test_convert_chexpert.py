"""scripts/convert_chexpert.py, on small trees in the layout of CheXpert and CheXpert-small."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from chest_xray_trees import CHEXPERT_LABELS, write_chexpert

from pcrl_nnunet.classification.label_table import read_labels
from pcrl_nnunet.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts"
LABELS = {
    "train/patient00001/study1/view1_frontal.jpg": {"No Finding": "1.0", "Support Devices": "1.0"},
    "train/patient00002/study2/view1_frontal.jpg": {"Edema": "-1.0", "Fracture": "1.0", "Pneumonia": "0.0"},
    "train/patient00002/study2/view2_lateral.jpg": {"Edema": "-1.0", "Fracture": "1.0", "Pneumonia": "0.0"},
    "train/patient00003/study1/view1_frontal.jpg": {"Edema": "1.0"},
    "valid/patient64541/study1/view1_frontal.jpg": {**dict.fromkeys(CHEXPERT_LABELS.split(","), "0.0"), "Edema": "1.0"},
}
TEST = {"test/patient64741/study1/view1_frontal.jpg": {"Edema": "1"}}


@pytest.fixture
def chexpert(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with threads instead of its worker processes, which take seconds to start."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(importlib.import_module("chest_xray_images"), "worker_pool", ThreadPoolExecutor)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "argv", sys.argv)  # restored after tests that set it
    return importlib.import_module("convert_chexpert")


class Tree:
    """CHEXPERT_FOLDER and the folder that nnU-Net calls nnUNet_raw."""

    def __init__(self, root: Path) -> None:
        self.chexpert, self.raw = root / "CheXpert", root / "raw"
        self.chexpert.mkdir()
        self.dataset = self.raw / "Dataset062_CheXpert"

    def run(self, script: ModuleType, *options: str) -> None:
        sys.argv = ["convert_chexpert.py", "-i", str(self.chexpert), "-d", "62", "-o", str(self.raw), *options]
        script.main()

    def names(self, group: str) -> list[str]:
        return sorted(path.name for path in (self.dataset / f"images{group}").iterdir())

    def rows(self, name: str) -> dict[str, dict[str, str]]:
        with open(self.dataset / name, newline="") as file:
            return {row["case"]: row for row in csv.DictReader(file)}

    def json(self, name: str) -> Any:
        return json.loads((self.dataset / name).read_text())


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize("top", ["CheXpert-v1.0-small", "CheXpert-v1.0"])
def test_frontal_images_labels_and_the_official_split_are_converted(
    chexpert: ModuleType, tree: Tree, top: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chexpert(tree.chexpert, LABELS, top)
    tree.run(chexpert)
    names = ["patient00001_study1_view1_frontal", "patient00002_study2_view1_frontal"]
    names += ["patient00003_study1_view1_frontal"]
    assert tree.names("Tr") == [f"{name}_0000.png" for name in names]
    assert tree.names("Ts") == ["patient64541_study1_view1_frontal_0000.png"]
    table = read_labels(str(tree.dataset))
    assert (",".join(table.names), table.exclusive) == (CHEXPERT_LABELS, False)
    assert table.patient == {name: name.split("_")[0] for name in names}
    edema, fracture = (table.value[:, table.names.index(name)] for name in ("Edema", "Fracture"))
    np.testing.assert_array_equal(edema, [0, np.nan, 1])  # not mentioned, uncertain, positive
    np.testing.assert_array_equal(fracture, [0, 1, 0])
    assert [row["Edema"] for row in tree.rows("classesTs.csv").values()] == ["1"]
    said = capsys.readouterr().out
    assert "the test images are the images of valid.csv, because there is no test.csv" in said
    assert "1 lateral images of train.csv were left out; -lateral takes them" in said


@pytest.mark.parametrize(("uncertain", "becomes"), [("0", "0"), ("1", "1"), ("ignore", "")])
def test_uncertain_labels_may_change_without_another_conversion(
    chexpert: ModuleType, tree: Tree, uncertain: str, becomes: str
) -> None:
    write_chexpert(tree.chexpert, LABELS)
    tree.run(chexpert)
    image = tree.dataset / "imagesTr" / "patient00002_study2_view1_frontal_0000.png"
    before = image.stat().st_mtime_ns
    tree.run(chexpert, "-uncertain", uncertain)
    assert tree.rows("classes.csv")["patient00002_study2_view1_frontal"]["Edema"] == becomes
    assert image.stat().st_mtime_ns == before


def test_lateral_images_are_taken_on_request_and_not_mixed_in(chexpert: ModuleType, tree: Tree) -> None:
    write_chexpert(tree.chexpert, LABELS)
    tree.run(chexpert, "-lateral")
    assert "patient00002_study2_view2_lateral_0000.png" in tree.names("Tr")
    with pytest.raises(UserError, match=r"were made with lateral True \(now False\) and must not be mixed"):
        tree.run(chexpert)


def test_with_test_csv_the_valid_images_are_the_validation_part(
    chexpert: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chexpert(tree.chexpert, {**LABELS, **TEST})
    tree.run(chexpert)
    assert tree.names("Ts") == ["patient64741_study1_view1_frontal_0000.png"]
    valid = "patient64541_study1_view1_frontal"
    assert f"{valid}_0000.png" in tree.names("Tr")
    folds = tree.json("splits_final.json")
    assert folds[0]["val"] == [valid]
    assert len(folds[0]["train"]) == 3
    assert sorted(name for fold in folds[1:] for name in fold["val"]) == sorted([*folds[0]["train"], valid])
    assert "the test images are the images of test.csv" in capsys.readouterr().out


def test_the_names_of_the_later_release_are_known(
    chexpert: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    write_chexpert(tree.chexpert, LABELS | TEST)
    for name, later in (("valid.csv", "val_labels.csv"), ("test.csv", "test_labels.csv")):
        (path,) = tree.chexpert.rglob(name)
        path.rename(path.with_name(later))
    tree.run(chexpert)
    assert tree.names("Ts") == ["patient64741_study1_view1_frontal_0000.png"]
    assert tree.json("splits_final.json")[0]["val"] == ["patient64541_study1_view1_frontal"]
    assert "the test images are the images of test_labels.csv" in capsys.readouterr().out


def test_folders_of_the_download_in_parts_are_read(chexpert: ModuleType, tree: Tree) -> None:
    write_chexpert(tree.chexpert, LABELS, "CheXpert-v1.0")
    whole = tree.chexpert / "CheXpert-v1.0"
    for i, patient in enumerate(sorted((whole / "train").iterdir())):
        part = tree.chexpert / f"CheXpert-v1.0 batch {2 + i % 2} (train {1 + i % 2})"
        part.mkdir(exist_ok=True)
        shutil.move(patient, part / patient.name)
    whole.rename(tree.chexpert / "CheXpert-v1.0 batch 1 (validate & csv)")
    tree.run(chexpert)
    assert len(tree.names("Tr")) == 3


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda top: (top / "valid.csv").unlink(),
            r"CheXpert has no valid\.csv, nor has a folder below it; it holds CheXpert-v1.0-small: give the folder",
        ),
        (
            lambda top: ((top / "valid.csv").unlink(), (top.parent / "archive.zip").write_bytes(b"")),
            r"has no valid\.csv, nor has a folder below it; it holds .*; unpack archive\.zip first",
        ),
        (
            lambda top: shutil.copytree(top, top.with_name("CheXpert-v1.0")),
            r"has train\.csv more than once, .* and .*; give the folder of one of the two downloads",
        ),
        (
            lambda top: change(top / "train.csv", "train/patient00001/study1/", ""),
            r"train\.csv, line 2, has the path 'CheXpert-v1.0-small/view1_frontal.jpg'; expected the form CheXpert",
        ),
        (
            lambda top: change(top / "train.csv", "-1.0", "-2.0"),
            r"train\.csv, line 3, has the label '-2'; expected 1, 0, -1 or nothing",
        ),
        (
            lambda top: change(top / "train.csv", "Pleural Other", "Pleural other"),
            r"train\.csv has no column Pleural Other; its columns are Path, Sex, .*: download it again",
        ),
        (
            lambda top: change(top / "valid.csv", "valid/patient64541", "valid/patient00001"),
            r"contradicts an earlier line about the image patient00001_study1_view1_frontal",
        ),
        (
            lambda top: change(top / "valid.csv", "valid/patient64541/study1", "valid/patient00001/study9"),
            r"1 patient has images in two parts of the split, patient00001: such as patient00001_study1_view1_frontal "
            r"\(training\) and patient00001_study9_view1_frontal \(test\)",
        ),
        (
            lambda top: shutil.rmtree(top / "train" / "patient00003"),
            r"1 of the 4 images that .*train\.csv lists are not in .*, such as patient00003_study1_view1_frontal; down",
        ),
        (
            lambda top: [shutil.rmtree(top / part) for part in ("train", "valid")],
            r"has none of the 4 images that .*; give the folder of the whole download",
        ),
    ],
)
def test_mistakes_are_refused_in_one_sentence(chexpert: ModuleType, tree: Tree, mistake: Any, message: str) -> None:
    write_chexpert(tree.chexpert, LABELS)
    mistake(tree.chexpert / "CheXpert-v1.0-small")
    with pytest.raises(UserError, match=message) as raised:
        tree.run(chexpert)
    assert "\n" not in str(raised.value)
    assert not tree.dataset.exists()
