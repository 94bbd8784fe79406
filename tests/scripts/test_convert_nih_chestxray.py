"""scripts/convert_nih_chestxray.py, on small trees in the layout of NIH ChestX-ray14."""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from chest_xray_trees import NIH_HEADERS, write_nih, write_xray
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from PIL import Image

from pcrl_nnunet.classification.label_table import read_labels
from pcrl_nnunet.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts"
FINDINGS = {
    "00000001_000": "Cardiomegaly",
    "00000001_001": "Cardiomegaly|Emphysema",
    "00000002_000": "No Finding",
    "00000003_000": "Hernia|Pleural_Thickening",
    "00000003_001": "No Finding",
    "00000013_000": "Mass",
}


@pytest.fixture
def nih(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with threads instead of its worker processes, which take seconds to start."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(importlib.import_module("chest_xray_images"), "worker_pool", ThreadPoolExecutor)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "argv", sys.argv)  # restored after tests that set it
    return importlib.import_module("convert_nih_chestxray")


class Tree:
    """NIH_FOLDER and the folder that nnU-Net calls nnUNet_raw."""

    def __init__(self, root: Path) -> None:
        self.nih, self.raw = root / "NIH", root / "raw"
        self.nih.mkdir()
        self.dataset = self.raw / "Dataset061_NIHChestXray"

    def run(self, script: ModuleType, *options: str) -> None:
        sys.argv = ["convert_nih_chestxray.py", "-i", str(self.nih), "-d", "61", "-o", str(self.raw), *options]
        script.main()

    def names(self, group: str) -> list[str]:
        return sorted(path.name for path in (self.dataset / f"images{group}").iterdir())

    def rows(self, name: str) -> dict[str, dict[str, str]]:
        with open(self.dataset / name, newline="") as file:
            return {row["case"]: row for row in csv.DictReader(file)}

    def json(self, name: str) -> Any:
        return json.loads((self.dataset / name).read_text())

    def image(self, name: str, group: str = "Tr") -> Image.Image:
        with Image.open(self.dataset / f"images{group}" / f"{name}_0000.png") as image:
            image.load()
        return image


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@pytest.mark.parametrize("folders", [12, 0])
@pytest.mark.parametrize("table", NIH_HEADERS)
def test_images_labels_patients_and_the_official_split_are_converted(
    nih: ModuleType, tree: Tree, table: str, folders: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nih(tree.nih, FINDINGS, test=["00000003"], table=table, folders=folders)
    tree.run(nih)
    assert tree.names("Tr") == [f"{n}_0000.png" for n in FINDINGS if not n.startswith("00000003")]
    assert tree.names("Ts") == ["00000003_000_0000.png", "00000003_001_0000.png"]
    training, test = tree.rows("classes.csv"), tree.rows("classesTs.csv")
    assert list(training["00000001_000"]) == ["case", *nih.LABELS, "patient"]
    for rows in (training, test):
        for name, row in rows.items():
            found = "|".join(sorted(label for label in nih.LABELS if row[label] == "1")) or "No Finding"
            assert found == FINDINGS[name]
            assert row["patient"] == str(int(name.split("_")[0]))
            assert {row[label] for label in nih.LABELS} <= {"0", "1"}
    described = tree.json("dataset.json")
    assert described["channel_names"] == {"0": "zscore"}
    assert (described["numTraining"], described["file_ending"]) == (4, ".png")
    said = capsys.readouterr().out
    assert "4 images for training and validation and 2 test images" in said
    assert "4 training cases and 2 test cases" in said
    assert not (tree.dataset / "unfinished").exists()


def test_the_classification_reads_the_tables(nih: ModuleType, tree: Tree) -> None:
    findings = {f"{i:08d}_000": label for i, label in enumerate(nih.LABELS, 1)}
    write_nih(tree.nih, findings, test=["00000014"])
    tree.run(nih)
    table = read_labels(str(tree.dataset))
    assert (table.names, table.exclusive) == (nih.LABELS, False)
    assert table.patient["00000003_000"] == "3"
    np.testing.assert_array_equal(table.value, np.eye(14)[:13])


def test_folds_are_by_patient_and_keep_patients_when_images_are_missing(nih: ModuleType, tree: Tree) -> None:
    findings = {f"{patient:08d}_{i:03d}": "No Finding" for patient in range(1, 41) for i in range(2)}
    images = write_nih(tree.nih, findings, test=["00000040"])
    tree.run(nih, "-np", "1")
    folds = tree.json("splits_final.json")
    assert len(folds) == 8
    everyone = sorted(name for name in findings if not name.startswith("00000040"))
    for fold in folds:
        assert sorted(fold["train"] + fold["val"]) == everyone
        assert not {name[:8] for name in fold["train"]} & {name[:8] for name in fold["val"]}
    assert sorted(name for fold in folds for name in fold["val"]) == everyone
    for name in list(findings)[:20]:
        images[name].unlink()
    tree.raw = tree.raw.with_name("part")
    tree.dataset = tree.raw / tree.dataset.name
    tree.run(nih, "-partial", "-np", "1")
    of_part = [set(fold["val"]) for fold in tree.json("splits_final.json")]
    assert all(any(of_fold <= set(fold["val"]) for fold in folds) for of_fold in of_part)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "I;16", "1"])
def test_every_mode_becomes_grey(nih: ModuleType, tree: Tree, mode: str) -> None:
    images = write_nih(tree.nih, FINDINGS)
    values = write_xray(images["00000001_000"], mode)
    tree.run(nih, "-size", "48")
    file = tree.dataset / "imagesTr" / "00000001_000_0000.png"
    read = NaturalImage2DIO().read_images([str(file)])[0]
    assert read.shape == (1, 1, 48, 64)
    found = read[0, 0] / (257 if mode == "I;16" else 1)
    if mode == "1":
        assert set(np.unique(found)) == {0, 255}
    else:
        np.testing.assert_allclose(found, values, atol=3 if mode == "P" else 0)
    assert tree.image("00000001_000").mode == ("I;16" if mode == "I;16" else "L")


def test_the_short_side_is_resized_as_pil_does_and_small_images_stay(nih: ModuleType, tree: Tree) -> None:
    images = write_nih(tree.nih, FINDINGS)
    write_xray(images["00000001_000"], size=(300, 200))
    write_xray(images["00000001_001"], "I;16", size=(200, 300))
    tree.run(nih, "-size", "100")
    with Image.open(images["00000001_000"]) as before:
        expected = before.resize((150, 100), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(tree.image("00000001_000")), np.asarray(expected))
    with Image.open(images["00000001_001"]) as before:
        eight = Image.fromarray((np.asarray(before) // 257).astype(np.uint8)).resize(
            (100, 150), Image.Resampling.BICUBIC
        )
    np.testing.assert_allclose(
        np.asarray(tree.image("00000001_001")) / 257, np.asarray(eight), atol=1
    )  # PIL rounds 8 bits twice
    assert tree.image("00000002_000").size == (64, 48)


def test_a_second_run_converts_only_what_is_missing(nih: ModuleType, tree: Tree) -> None:
    images = write_nih(tree.nih, FINDINGS, test=["00000003"])
    tree.run(nih)
    files = [path for group in ("Tr", "Ts") for path in sorted((tree.dataset / f"images{group}").iterdir())]
    before = [file.stat().st_mtime_ns for file in files]
    files[1].write_bytes(b"")  # as after a power cut
    (tree.dataset / "unfinished").mkdir()
    (tree.dataset / "unfinished" / files[0].name).write_bytes(b"half")
    images["00000001_000"].unlink()  # originals of finished images may go
    tree.run(nih)
    assert [a == b.stat().st_mtime_ns for a, b in zip(before, files, strict=True)] == [True, False, *[True] * 4]
    assert files[1].stat().st_size
    assert not (tree.dataset / "unfinished").exists()


def test_other_settings_are_not_mixed(nih: ModuleType, tree: Tree) -> None:
    write_nih(tree.nih, FINDINGS)
    tree.run(nih)
    with pytest.raises(UserError, match=r"were made with size 256 \(now 128\) and must not be mixed"):
        tree.run(nih, "-size", "128")


def test_damaged_images_are_named_and_have_no_row(
    nih: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_nih(tree.nih, FINDINGS)
    whole = images["00000001_000"].read_bytes()
    images["00000001_000"].write_bytes(whole[: len(whole) // 2])
    images["00000001_001"].write_text("<html>not found</html>")
    images["00000002_000"].write_bytes(b"")
    Image.new("L", (64, 64), 7).save(images["00000003_000"])
    Image.new("L", (20, 64), 7).save(images["00000003_001"])
    with pytest.raises(UserError, match=r"^5 files are bad.*run the same command"):
        tree.run(nih)
    assert tree.names("Tr") == ["00000013_000_0000.png"]
    assert list(tree.rows("classes.csv")) == ["00000013_000"]
    listed = (tree.dataset / "bad_cases.txt").read_text()
    said = capsys.readouterr()
    for name in list(FINDINGS)[:5]:
        assert str(images[name]) in listed
        assert f"bad: {images[name]}" in said.out
    assert "all of its pixels are the same" in listed
    assert "has 20 x 64 pixels; expected at least 32 a side" in listed
    images["00000001_000"].write_bytes(whole)
    with pytest.raises(UserError, match=r"^4 files are bad"):
        tree.run(nih)
    assert list(tree.rows("classes.csv")) == ["00000001_000", "00000013_000"]


def test_missing_images_are_counted_and_a_part_is_converted_on_request(
    nih: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_nih(tree.nih, FINDINGS)
    images["00000003_000"].unlink()
    wanted = r"1 of the 6 images .*Data_Entry_2017.csv lists are not in .*NIH, such as 00000003_000 \(no images in "
    with pytest.raises(UserError, match=wanted + r"images_004, .*\); download them, or give -partial to convert the 5"):
        tree.run(nih)
    assert not tree.dataset.exists()
    tree.run(nih, "-partial")
    assert "1 of 6 images are missing" in capsys.readouterr().out
    assert (tree.dataset / "missing_images.txt").read_text() == "00000003_000\n"
    assert len(tree.rows("classes.csv")) == 5
    write_xray(images["00000003_000"])
    tree.run(nih)
    assert len(tree.rows("classes.csv")) == 6
    assert (tree.dataset / "missing_images.txt").read_text() == ""


def test_images_without_a_row_and_images_twice_are_said(
    nih: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nih(tree.nih, FINDINGS)
    write_xray(tree.nih / "images" / "00009999_000.png")
    (first,) = tree.nih.rglob("00000001_000.png")
    copy = tree.nih / "images" / "00000001_000.png"
    shutil.copy(first, copy)
    tree.run(nih)
    said = capsys.readouterr().out
    assert f"1 images are in no table and were left out, such as {tree.nih / 'images' / '00009999_000.png'}" in said
    assert "1 images are there twice, with the same content" in said
    assert "00009999_000_0000.png" not in tree.names("Tr")
    Image.new("L", (256, 256)).save(copy)  # a mask
    with pytest.raises(UserError, match=r"00000001_000.png have the same name and other content; give the folder"):
        tree.run(nih)


def test_images_that_the_lists_no_longer_have_leave_their_folder(
    nih: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nih(tree.nih, FINDINGS)
    tree.run(nih)
    before = set(tree.names("Tr")) | set(tree.names("Ts"))
    write_nih(tree.nih, FINDINGS, test=["00000003"])
    tree.run(nih)
    assert "00000003_000_0000.png" in tree.names("Ts")
    assert "00000003_000_0000.png" not in tree.names("Tr")
    assert set(tree.names("Tr")) | set(tree.names("Ts")) == before
    moved = tree.dataset / "unlisted_images"
    assert (moved / "imagesTr" / "00000003_000_0000.png").is_file()
    assert f"images that the tables do not list there, such as imagesTr/00000003_000, went to {moved}" in (
        capsys.readouterr().out
    )


def test_two_lists_that_differ_are_refused(nih: ModuleType, tree: Tree) -> None:
    write_nih(tree.nih, FINDINGS)
    old = tree.nih / "old"
    old.mkdir()
    shutil.copy(tree.nih / "test_list.txt", old)
    tree.run(nih)
    (old / "test_list.txt").write_text("00000001_000.png\n")
    with pytest.raises(UserError, match=r"test_list.txt and .*test_list.txt differ; keep the list of the official"):
        tree.run(nih)


def test_the_later_table_is_taken_wherever_it_lies_and_the_other_is_named(
    nih: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nih(tree.nih, FINDINGS)
    (tree.nih / "z").mkdir()
    first = (tree.nih / "Data_Entry_2017.csv").rename(tree.nih / "z" / "Data_Entry_2017.csv")
    later = tree.nih / "Data_Entry_2017_v2020.csv"
    later.write_text(first.read_text())
    tree.run(nih)
    assert f"labels from {later}, not from {first}" in capsys.readouterr().out


def test_a_wrong_checksum_and_a_hole_are_damages(nih: ModuleType, tmp_path: Path) -> None:
    module = importlib.import_module("chest_xray_images")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300), np.uint8))
    for ending, start in (("png", 40_000), ("jpg", 10_000)):
        path = tmp_path / f"x.{ending}"
        noise.save(path)
        assert module.resized(path, 256).size == (256, 256)
        content = bytearray(path.read_bytes())
        content[start : start + 4096] = bytes(4096)
        path.write_bytes(content)
        with pytest.raises(Exception, match=r"broken PNG|bad header checksum|zeros or more among its pixels"):
            module.resized(path, 256)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_renamed_table_is_found_by_its_columns(nih: ModuleType, tree: Tree) -> None:
    write_nih(tree.nih, FINDINGS)
    (tree.nih / "Data_Entry_2017.csv").rename(tree.nih / "labels.csv")
    (tree.nih / "BBox_List_2017.csv").write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n")
    tree.run(nih)
    assert len(tree.rows("classes.csv")) == 6
    (tree.nih / "other.csv").write_text((tree.nih / "labels.csv").read_text())
    with pytest.raises(
        UserError, match=r"has 2 tables of findings, .*\.csv and .*\.csv, and none is called Data_Entry"
    ):
        tree.run(nih)


def test_a_line_that_is_there_twice_counts_once(
    nih: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nih(tree.nih, FINDINGS)
    table = tree.nih / "Data_Entry_2017.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([*lines, lines[1]]))
    tree.run(nih)
    assert "1 lines of Data_Entry_2017.csv are there twice" in capsys.readouterr().out
    assert len(tree.rows("classes.csv")) == 6
    table.write_text("\n".join([*lines, lines[1].replace("Cardiomegaly", "Mass")]))
    with pytest.raises(UserError, match=r"line 8, contradicts an earlier line about the image 00000001_000"):
        tree.run(nih)


def test_lines_in_neither_list_are_left_out_and_said(
    nih: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nih(tree.nih, FINDINGS)
    change(tree.nih / "train_val_list.txt", "00000013_000.png", "00000014_000.png")
    tree.run(nih)
    said = capsys.readouterr().out
    assert "1 images of Data_Entry_2017.csv are in neither list and were left out: 00000013_000" in said
    assert "2 images of the lists are not in Data_Entry_2017.csv and were left out: 00000014_000" in said


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda nih: (nih / "test_list.txt").unlink(), r"has no test_list\.txt, nor has a folder below it; downl"),
        (
            lambda nih: (nih / "test_list.txt").write_text("00000001_001.png\n"),
            r"00000001_001\.png is in both train_val_list\.txt and test_list\.txt",
        ),
        (
            lambda nih: (
                change(nih / "train_val_list.txt", "00000001_001.png", ""),
                (nih / "test_list.txt").write_text("00000001_001.png"),
            ),
            r"1 patient has images in two parts of the split, 1: such as 00000001_000 \(training\) and 00000001_001",
        ),
        (
            lambda nih: change(nih / "Data_Entry_2017.csv", "Emphysema", "Emphysem"),
            r"line 3, has the finding 'Emphysem'; expected No Finding or some of Atelectasis, ",
        ),
        (
            lambda nih: change(nih / "Data_Entry_2017.csv", ",0,2,58,M,PA,2682,2749,0.143,0.143,\n", "\n"),
            r"line 4, is shorter than the first line: download it again",
        ),
        (
            lambda nih: change(nih / "Data_Entry_2017.csv", "Finding Labels", "Labels"),
            r"has no table with the columns Image Index, Finding Labels, Patient ID, which is Data_Entry_2017_v2020.cs"
            r"v; it holds Data_Entry_2017.csv, images_001, .*: give the folder of the whole download",
        ),
        (
            lambda nih: (nih / "test_list.txt").write_text("<html>\n"),
            r"test_list.txt has other lines than names of images such as 00000001_000.png",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_one_sentence(nih: ModuleType, tree: Tree, mistake: Any, message: str) -> None:
    write_nih(tree.nih, FINDINGS)
    mistake(tree.nih)
    with pytest.raises(UserError, match=message) as raised:
        tree.run(nih)
    assert "\n" not in str(raised.value)
    assert not tree.dataset.exists()


def test_archives_that_were_not_unpacked_are_named(nih: ModuleType, tree: Tree) -> None:
    images = write_nih(tree.nih, FINDINGS)
    for path in images.values():
        path.unlink()
    (tree.nih / "images_001.tar.gz").write_bytes(b"packed")
    with pytest.raises(UserError, match=r"has none of the 6 images .*; unpack images_001\.tar\.gz first"):
        tree.run(nih)


@pytest.mark.slow
def test_the_command_runs_with_processes(nih: ModuleType, tree: Tree, forked_commands: Path) -> None:
    write_nih(tree.nih, {f"{i:08d}_000": "Mass" for i in range(1, 40)}, test=["00000002"])
    command = [forked_commands / "python", SCRIPTS / "convert_nih_chestxray.py", "-i", tree.nih, "-d", "61", "-np", "2"]
    done = subprocess.run(
        [*map(str, command), "-o", str(tree.raw)],
        env=dict(os.environ),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(tree.names("Tr")) == 38
    assert "39/39" in done.stderr
