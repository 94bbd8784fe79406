"""Finding scans in folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scan_files import SHAPE, UID, only_scan, phantom, reasons, target_for, write, write_dicom

from pcrl_nnunet.ingest.find import find_scans, left_over, misnumbered
from pcrl_nnunet.ingest.read import read_scan
from pcrl_nnunet.ingest.scans import Scan, Unusable


def test_scans_are_found_at_any_depth_and_other_files_are_counted(tmp_path: Path) -> None:
    write(phantom(), tmp_path / "case_0000.nii.gz")
    write(phantom(), tmp_path / "Site B (2)" / "pat 1" / "T1 mprage.NII.GZ".lower())
    write(phantom(), tmp_path / "Site B (2)" / "pat 2" / "T1 mprage.nrrd")
    write_dicom(phantom(), tmp_path / "Site B (2)" / "pat 2" / "dicom")
    write_dicom(phantom(), tmp_path / "Site B (2)" / "pat 2" / "dicom", uid=UID + ".2", ending=".dcm")
    write(phantom(), tmp_path / "labelsTr" / "case.nii.gz")
    write(phantom(), tmp_path / ".trash" / "old.nii.gz")
    for hidden in ("._case_0000.nii.gz", "notes.txt", "more.txt", "README"):
        (tmp_path / hidden).write_text("not a scan")
    found = find_scans(str(tmp_path), target_for())
    assert sorted(scan.how for scan in found.scans) == ["dicom", "dicom", "itk", "plan", "plan"]
    assert [len(scan.files) for scan in found.scans if scan.how == "dicom"] == [SHAPE[0]] * 2
    assert found.ignored == {".txt": 2, "no ending": 1}
    assert [(s.reason, s.bad) for s in found.set_aside] == [("a folder of labels", False)]


def test_capital_endings_and_circular_links_are_handled(tmp_path: Path) -> None:
    Path(write(phantom(), tmp_path / "data" / "a.nii.gz")).rename(tmp_path / "data" / "A.NII.GZ")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "back").symlink_to(tmp_path / "in")
    assert only_scan(tmp_path / "in", target_for()).files[0].endswith("A.NII.GZ")


def test_names_are_safe_unique_and_the_same_wherever_the_folder_lies(tmp_path: Path) -> None:
    relative = ["case_0000.nii.gz", "b/case_0000.nii.gz", "b__case.nii.gz", "a b.nii.gz", "a_b.nii.gz", "a_b.mha",
                "x_seg_0000.nii.gz", "ümlaut/ü.nii.gz", f"{'long' * 40}.nii.gz", "scan_0001.nii.gz"]  # fmt: skip
    names = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        for path in relative:
            write(phantom(), folder / path)
        write_dicom(phantom(), folder)
        names.append([scan.name for scan in find_scans(str(folder), target_for()).scans])
    assert names[0] == names[1]
    assert "case" in names[0]
    assert len({name.lower() for name in names[0]}) == len(relative) + 1
    for name in names[0]:
        assert name.isascii()
        assert not set(name) & set(" /.()")
        assert len(name) < 100
        assert not name.endswith("_seg")


def test_a_name_of_a_labelled_case_is_changed_and_noted(tmp_path: Path) -> None:
    write(phantom(), tmp_path / "case_0000.nii.gz")
    found = find_scans(str(tmp_path), target_for(own_images={"/raw/imagesTr/case_0000.nii.gz": "case"}))
    assert [scan.name == "case" for scan in found.scans] == [False]
    (note,) = found.notes
    assert note.startswith(f"{tmp_path / 'case_0000.nii.gz'} is named like labelled cases of the dataset")


def test_numbered_files_of_a_dataset_with_one_channel_are_scans_of_their_own(tmp_path: Path) -> None:
    for number in range(3):
        write(phantom(number), tmp_path / f"scan_{number:04d}.nii.gz")
    found = find_scans(str(tmp_path), target_for())
    assert len(found.scans) == 3
    (note,) = found.notes  # the user decides
    assert "scan_0001.nii.gz and 1 more files are numbered like further channels" in note


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["a_0000.nii.gz", "a_0002.nii.gz"], "channel 0001 is missing"),
        (["a_0000.nii.gz", "a_0001.nii.gz", "a_0002.nii.gz", "a_0003.nii.gz"], "channel 0003 is one too many"),
        (["anything.nii.gz"], "name the files CASE_0000 to CASE_0002.nii.gz"),
    ],
)
def test_several_channels_need_all_their_files(tmp_path: Path, files: list[str], reason: str) -> None:
    for file in files:
        write(phantom(), tmp_path / file)
    ((got, bad),) = reasons(tmp_path, target_for(channels=3))
    assert reason in got
    assert bad


def test_2d_datasets_take_the_image_types_of_their_reader(tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 255, (9, 7), dtype=np.uint8)
    for name in ("case_0000.png", "any name.png", "other.bmp"):
        write(sitk.GetImageFromArray(gray), tmp_path / name)
    write(sitk.Compose([sitk.GetImageFromArray(gray)] * 3), tmp_path / "colour.png")
    write(phantom(), tmp_path / "volume.nii.gz")
    target = target_for(reader="NaturalImage2DIO", ending=".png")
    target.plans["original_median_shape_after_transp"] = [1, 9, 7]
    found = find_scans(str(tmp_path), target)
    assert found.ignored == {".nii.gz": 1}
    (note,) = found.notes
    assert "volume.nii.gz, are left out: the dataset takes 2D images (.png, .bmp, .tif)" in note
    read = 0
    for scan in found.scans:
        if "colour" in scan.files[0]:
            with pytest.raises(Unusable, match="3 channels, the dataset has 1"):
                read_scan(scan, target.images)
        else:
            np.testing.assert_array_equal(read_scan(scan, target.images).data, gray[None, None])
            read += 1
    assert read == 3


def test_colours_are_the_channels_of_a_2d_dataset_that_has_three(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    for name in ("case_0000.png", "any name.png"):
        write(sitk.GetImageFromArray(colours, isVector=True), tmp_path / name)
    target = target_for(channels=3, reader="NaturalImage2DIO", ending=".png")
    target.plans["original_median_shape_after_transp"] = [1, 9, 7]
    for scan in find_scans(str(tmp_path), target).scans:
        np.testing.assert_array_equal(read_scan(scan, target.images).data, colours.transpose(2, 0, 1)[:, None])


@pytest.mark.parametrize(
    ("reader", "ending", "given", "takes"),
    [
        ("SimpleITKIO", ".nii.gz", ["a.png", "b.tif", "c.jpg"], "the dataset takes volumes (.nii.gz, "),
        ("NaturalImage2DIO", ".png", ["a.dcm", "b.jpg", "c.nii"], "the dataset takes 2D images (.png, .bmp, .tif)"),
    ],
)
def test_unsuitable_images_are_listed_with_the_expected_type(
    tmp_path: Path, reader: str, ending: str, given: list[str], takes: str
) -> None:
    for name in given:
        (tmp_path / name).write_bytes(b"an image")
    found = find_scans(str(tmp_path), target_for(reader=reader, ending=ending))
    assert len(found.notes) == 3
    for name, note in zip(sorted(given), sorted(found.notes, key=lambda note: note.split("such as ")[1]), strict=True):
        assert f"such as {tmp_path / name}, are left out: {takes}" in note


def test_images_that_nnunet_would_not_see_are_named(tmp_path: Path) -> None:
    for name in ("a_0000.nii.gz", "b.nii.gz", "c_0000.nii", "d_0000.dcm", "notes.txt", ".hidden.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    found = {Path(s.where).name: s.reason for s in left_over(str(tmp_path), ".nii.gz")}
    assert set(found) == {"b.nii.gz", "c_0000.nii", "d_0000.dcm"}
    assert "expected b_0000.nii.gz" in found["b.nii.gz"]
    assert "another ending than the dataset's .nii.gz" in found["c_0000.nii"]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [(["0000", "0001"], ""), (["0000"], ""), (["0000", "0002"], "channels 0000, 0002; expected 0000, 0001")],
)
def test_channels_with_other_numbers_are_named(numbers: list[str], said: str) -> None:
    files = tuple(f"/raw/a_{number}.nii.gz" for number in numbers)
    assert misnumbered(Scan("a", files, "plan", own=True), target_for(channels=2).images) == said


def test_only_folders_of_labels_are_left_out(tmp_path: Path) -> None:
    for folder in ("labelsTr", "labelsTs", "unlabelled", "labelled"):
        write(phantom(), tmp_path / folder / "a.nii.gz")
    found = find_scans(str(tmp_path), target_for())
    assert {Path(scan.files[0]).parent.name for scan in found.scans} == {"unlabelled", "labelled"}
    assert {Path(s.where).name for s in found.set_aside} == {"labelsTr", "labelsTs"}
