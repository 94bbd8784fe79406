"""DICOM files become volumes according to their headers, or are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from scan_files import (
    ENHANCED_MR,
    MR,
    dicom_file,
    dicom_series,
    item,
    multi_frame,
    only_scan,
    phantom,
    reasons,
    target_for,
    volume,
    write_dicom,
)

from pcrl_nnunet.ingest.dicom import read_volume
from pcrl_nnunet.ingest.find import find_scans
from pcrl_nnunet.ingest.read import read_scan
from pcrl_nnunet.ingest.scans import Unusable, Voxels


def test_a_dicom_series_without_a_slice_is_bad(tmp_path: Path) -> None:
    write_dicom(phantom(), tmp_path, skip=(5,))
    ((reason, bad),) = reasons(tmp_path, target_for())
    assert "2.5 to 5 mm: is a slice missing?" in reason
    assert bad


@pytest.mark.parametrize("slices", [1, 2])
def test_a_localiser_is_skipped(tmp_path: Path, slices: int) -> None:
    write_dicom(phantom()[:, :, :slices], tmp_path)
    assert reasons(tmp_path, target_for()) == [("fewer than 3 slices (a localiser?)", False)]


def test_several_images_at_one_position_are_skipped(tmp_path: Path) -> None:
    write_dicom(phantom(0), tmp_path)
    write_dicom(phantom(1), tmp_path, ending=".dcm")  # same series, same positions
    ((reason, bad),) = reasons(tmp_path, target_for())
    assert "time series" in reason
    assert not bad


def test_directions_of_one_series_are_kept_apart(tmp_path: Path) -> None:
    for k, orientation in enumerate(["LPI", "PIR", "RSP"]):
        write_dicom(phantom(k, orientation), tmp_path, ending=f".{k}")
    target = target_for(orientation="LPS")
    scans = find_scans(str(tmp_path), target).scans
    assert len(scans) == 3
    seen = {read_scan(scan, target.images).data.tobytes() for scan in scans}
    assert seen == {sitk.GetArrayFromImage(phantom(k)).astype(np.float32).tobytes() for k in range(3)}


def test_a_damaged_slice_is_named_and_leaves_a_gap(tmp_path: Path) -> None:
    write_dicom(phantom(), tmp_path)
    victim = sorted(tmp_path.iterdir())[3]
    header = victim.read_bytes()[:600]
    sop_class = header.index(b"1.2.840.10008.5.1.4.1.1.")
    assert sop_class < 600
    victim.write_bytes(header)
    found = find_scans(str(tmp_path), target_for())
    assert not found.scans
    assert str(victim) in {s.where for s in found.set_aside}


def read_only(folder: Path) -> Voxels:
    """Read the only scan of a folder, as stored."""
    target = target_for(orientation="LPS")
    return read_scan(only_scan(folder, target), target.images)


@pytest.mark.parametrize("order", [range(12), [*range(0, 12, 3), *range(1, 12, 3), *range(2, 12, 3)]])
def test_frames_of_one_file_are_sorted_and_spaced_by_their_positions(tmp_path: Path, order: Sequence[int]) -> None:
    multi_frame(tmp_path / "a.dcm", volume(), order)
    voxels = read_only(tmp_path)
    np.testing.assert_array_equal(voxels.data[0], volume())
    assert voxels.properties["spacing"] == pytest.approx([2.5, 1.5, 1.25])


def test_every_frame_has_its_own_slope(tmp_path: Path) -> None:
    def slope(k: int) -> dict[str, Any]:
        return {"PixelValueTransformationSequence": [item(RescaleSlope=str(1 + k / 4), RescaleIntercept=str(-k))]}

    multi_frame(tmp_path / "a.dcm", volume(), range(12), slope)
    k = np.arange(12)[:, None, None]
    np.testing.assert_allclose(read_only(tmp_path).data[0], volume() * (1 + k / 4) - k)


def test_every_slice_has_its_own_slope(tmp_path: Path) -> None:
    for k, pixels in enumerate(volume()):
        dicom_file(
            tmp_path / f"{k}", pixels, ImagePositionPatient=[0, 0, 2.5 * k],
            RescaleSlope=str(1 + k / 4), RescaleIntercept="-1024",
        )  # fmt: skip
    k = np.arange(12)[:, None, None]
    np.testing.assert_allclose(read_only(tmp_path).data[0], volume() * (1 + k / 4) - 1024)


def test_a_compressed_file_is_read_like_the_uncompressed_file(tmp_path: Path) -> None:
    path = multi_frame(tmp_path / "a.dcm", volume(), range(12))
    compressed = pydicom.dcmread(path)
    compressed.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    compressed.save_as(path)
    np.testing.assert_array_equal(read_only(tmp_path).data[0], volume())


@pytest.mark.parametrize("multi", [False, True])
def test_monochrome1_of_mr_is_inverted(tmp_path: Path, multi: bool) -> None:
    header = {"PhotometricInterpretation": "MONOCHROME1", "SOPClassUID": ENHANCED_MR if multi else MR, "Modality": "MR"}
    if multi:
        multi_frame(tmp_path / "a.dcm", volume(), range(12), **header)
    else:
        dicom_series(tmp_path, volume(), **header)
    np.testing.assert_array_equal(read_only(tmp_path).data[0], 65535.0 - volume())


def test_monochrome1_ct_is_refused(tmp_path: Path) -> None:
    dicom_series(tmp_path, volume(), PhotometricInterpretation="MONOCHROME1")
    assert reasons(tmp_path, target_for()) == [
        ("MONOCHROME1 in CT: whether its values are inverted cannot be told", True)
    ]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: multi_frame(p, volume(), [*range(5), *range(6, 12)]), "is a slice missing?"),
        (lambda p: multi_frame(p, volume(), [*range(12), 3]), "several images at one slice position"),
        (lambda p: multi_frame(p, volume(), range(12), lambda k: {"FrameContentSequence": [item(StackID=str(k // 6))]}),
         "several stacks, time points or echoes"),
        (lambda p: multi_frame(p, volume(), range(12), lambda k: {"MREchoSequence": [item(EffectiveEchoTime=k % 2)]}),
         "several stacks, time points or echoes"),
        (lambda p: multi_frame(p, volume(), range(12), SharedFunctionalGroupsSequence=[]), "no pixel size"),
        (lambda p: dicom_file(p, volume(), SOPClassUID=MR, Modality="MR"), "no slice positions"),
        (lambda p: multi_frame(p, volume(), range(12), PixelRepresentation=0, NumberOfFrames=13), "describes 12"),
        (lambda p: multi_frame(p, volume()[:2], range(2)), "fewer than 3 slices"),
    ],
)  # fmt: skip
def test_frames_of_one_file_are_refused_like_single_files(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / "a.dcm")
    found = find_scans(str(tmp_path), target_for())
    assert not found.scans
    assert [reason in s.reason for s in found.set_aside] == [True]
    assert found.set_aside[0].where == str(tmp_path / "a.dcm")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.12.1", "Modality": "XA"}, "X-Ray Angiographic Image, modality XA"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.12.2", "Modality": "RF"}, "modality RF"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.3.1", "Modality": "US"}, "Ultrasound Multi-frame Image"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.481.2", "Modality": "RTDOSE"}, "RT Dose"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4", "Modality": "SEG"}, "Segmentation"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "Modality": "CT"}, "Secondary Capture Image, modality CT"),
        ({"Modality": "SEG"}, "CT Image, modality SEG"),
        ({"SOPClassUID": "1.2.840.113619.4.27", "Modality": None}, "modality not stated"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localiser (its ImageType says LOCALIZER)"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "a colour image"),
    ],
)
def test_non_volumes_beside_a_ct_are_left_out_by_name(tmp_path: Path, header: dict[str, Any], said: str) -> None:
    dicom_series(tmp_path, volume())
    frames = {"ImagePositionPatient": [0, 0, 0], "SeriesInstanceUID": "1.2.3.5"}
    dicom_file(tmp_path / "other.dcm", volume(), **{**frames, **header})
    found = find_scans(str(tmp_path), target_for())
    assert [len(scan.files) for scan in found.scans] == [12]
    ((where, reason, bad),) = [(s.where, s.reason, s.bad) for s in found.set_aside]
    assert where == str(tmp_path / "other.dcm")
    assert said in reason
    assert not bad


def test_non_image_dicom_is_skipped_and_its_kind_is_named(tmp_path: Path) -> None:
    dicom_file(tmp_path / "a", volume(), SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Rows=None, Columns=None)
    assert reasons(tmp_path, target_for()) == [("DICOM, but not an image (Basic Text SR)", False)]


def test_a_tilted_gantry_is_sheared_back_to_where_the_slices_lie(tmp_path: Path) -> None:
    """Slices of a phantom that is cut obliquely: each voxel has the phantom's value at its place in the patient."""
    degrees, rows, columns, spacing, step = 20.0, 40, 24, 1.0, 3.0

    def phantom_at(y: np.ndarray, z: np.ndarray) -> np.ndarray:
        return np.asarray(600 + 20 * y - 15 * z)

    tilt = np.deg2rad(degrees)
    down = np.array([np.cos(tilt), -np.sin(tilt)])  # a row further: mm in y and z
    row = np.arange(rows)[:, None] * spacing + np.zeros(columns)
    slices = [phantom_at(row * down[0], step * k + row * down[1]) for k in range(12)]
    dicom_series(
        tmp_path, np.round(np.array(slices)), step=(0, 0, step), PixelSpacing=[spacing, spacing],
        ImageOrientationPatient=[1, 0, 0, 0, float(down[0]), float(down[1])], GantryDetectorTilt=degrees,
    )  # fmt: skip
    image, notes = read_volume([str(path) for path in sorted(tmp_path.iterdir())], 3)
    assert "drift sideways by 11.3 mm" in notes[0]  # 33 mm sin 20 degrees
    direction = np.reshape(image.GetDirection(), (3, 3))
    np.testing.assert_allclose(direction.T @ direction, np.eye(3), atol=1e-6)
    assert image.GetSpacing()[2] == pytest.approx(step * np.cos(tilt), rel=1e-4)
    voxels = sitk.GetArrayFromImage(image)
    seen = 0
    for index in np.ndindex(*voxels.shape):
        _, y, z = image.TransformIndexToPhysicalPoint([int(i) for i in index[::-1]])
        if voxels[index] > voxels.min() and 12 < index[1] < voxels.shape[1] - 13:  # away from where slices end
            assert voxels[index] == pytest.approx(phantom_at(np.array(y + 16), np.array(z)), abs=2)
            seen += 1
    assert seen > 1000


def test_sideways_drift_without_a_tilt_is_shifted_back_too(tmp_path: Path) -> None:
    """Each slice lies two pixels further to the right, and shows what is there."""
    wide = volume(columns=40)
    shifted = np.stack([wide[k, :, 2 * k : 2 * k + 14] for k in range(12)])
    dicom_series(tmp_path, shifted, step=(2.5, 0, 2.5))
    data = read_only(tmp_path).data[0]
    assert data.shape == (12, 16, 36)
    for k in range(12):
        np.testing.assert_allclose(data[k, :, 2 * k : 2 * k + 14], shifted[k], atol=1e-3)


def test_rounded_positions_do_not_count_as_drift(tmp_path: Path) -> None:
    dicom_series(tmp_path, volume(), step=(0.002, -0.003, 2.5))
    voxels = read_only(tmp_path)
    assert voxels.notes == []
    np.testing.assert_array_equal(voxels.data[0], volume())


def test_a_tilt_that_the_positions_do_not_have_is_refused(tmp_path: Path) -> None:
    dicom_series(tmp_path, volume(), GantryDetectorTilt=15.0)
    ((reason, bad),) = reasons(tmp_path, target_for())
    assert "a gantry tilt of 15 degrees, and positions without a tilt" in reason
    assert bad


def test_a_duplicate_slice_counts_once_with_a_note(tmp_path: Path) -> None:
    paths = dicom_series(tmp_path, volume())
    shutil.copy(paths[7], tmp_path / "IM0007 (1).dcm")
    found = find_scans(str(tmp_path), target_for())
    assert [len(scan.files) for scan in found.scans] == [12]
    (note,) = found.notes
    assert "IM0007" in note
    assert "there twice (the same SOP instance): counted once" in note


def test_one_sop_instance_with_two_contents_is_refused(tmp_path: Path) -> None:
    paths = dicom_series(tmp_path, volume())
    other = pydicom.dcmread(paths[7])
    other.PixelData = (volume()[7] + 1).tobytes()
    other.save_as(tmp_path / "other.dcm")
    ((reason, _),) = reasons(tmp_path, target_for())
    assert "several images at one slice position" in reason


@pytest.mark.parametrize("multi", [False, True])
def test_a_copy_of_a_whole_scan_in_another_folder_counts_once(tmp_path: Path, multi: bool) -> None:
    if multi:
        multi_frame(tmp_path / "first" / "a.dcm", volume(), range(12))
    else:
        dicom_series(tmp_path / "first", volume())
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    found = find_scans(str(tmp_path), target_for())
    assert len(found.scans) == 1
    assert "second" in found.notes[0]
    assert "counted once" in found.notes[0]


def test_slices_that_were_given_one_uid_are_still_a_volume(tmp_path: Path) -> None:
    dicom_series(tmp_path, volume(), SOPInstanceUID="1.2.3.4.5")
    np.testing.assert_array_equal(read_only(tmp_path).data[0], volume())


def test_a_series_that_is_spread_over_folders_is_one_scan(tmp_path: Path) -> None:
    for k, path in enumerate(dicom_series(tmp_path, volume())):
        (tmp_path / f"DIR{k // 5}").mkdir(exist_ok=True)
        path.rename(tmp_path / f"DIR{k // 5}" / path.name)
    np.testing.assert_array_equal(read_only(tmp_path).data[0], volume())


def test_a_series_without_its_middle_folder_is_refused_rather_than_halved(tmp_path: Path) -> None:
    for k, path in enumerate(dicom_series(tmp_path, volume())):
        (tmp_path / f"DIR{k // 4}").mkdir(exist_ok=True)
        path.rename(tmp_path / f"DIR{k // 4}" / path.name)
    shutil.rmtree(tmp_path / "DIR1")
    ((reason, _),) = reasons(tmp_path, target_for())
    assert "is a slice missing?" in reason


def test_patients_who_were_given_one_series_uid_are_kept_apart(tmp_path: Path) -> None:
    for number in range(2):
        dicom_series(tmp_path / f"patient{number}", volume() + number)
    assert len(find_scans(str(tmp_path), target_for()).scans) == 2


@pytest.mark.parametrize("multi", [False, True])
def test_voxels_that_end_too_early_are_refused(tmp_path: Path, multi: bool) -> None:
    paths = [multi_frame(tmp_path / "a.dcm", volume(), range(12))] if multi else dicom_series(tmp_path, volume())
    paths[-1].write_bytes(paths[-1].read_bytes()[:-50])
    target = target_for()
    with pytest.raises(Unusable, match=r"the voxels of \w+\.dcm end too early, after \d+ of \d+ bytes"):
        read_scan(only_scan(tmp_path, target), target.images)


def test_intensities_by_a_look_up_table_are_refused(tmp_path: Path) -> None:
    dicom_series(tmp_path, volume(), ModalityLUTSequence=[item(ModalityLUTType="HU")])
    assert {"look-up table" in reason for reason, _ in reasons(tmp_path, target_for())} == {True}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"BitsStored": 12, "HighBit": 15}, "12 bits up to bit 15"),
        ({"PixelRepresentation": None}, "no PixelRepresentation in its DICOM header"),
        ({"ImageOrientationPatient": [1, 0, 0, 0.5, 0.866, 0]}, "two unit vectors at right angles"),
        ({"ImageOrientationPatient": [0] * 6}, "two unit vectors at right angles"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "TOPOGRAM"]}, "a localiser"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value")
def test_a_header_that_cannot_be_right_is_refused_once_per_series(
    tmp_path: Path, header: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.IGNORE)
    dicom_series(tmp_path, volume(), **header)
    ((got, _),) = reasons(tmp_path, target_for())
    assert reason in got


@pytest.mark.parametrize(("name", "value"), [("RescaleIntercept", "-1024.5"), ("GantryDetectorTilt", "10.5")])
def test_a_number_with_a_comma_is_refused(tmp_path: Path, name: str, value: str) -> None:
    for path in dicom_series(tmp_path, volume(), **{name: value}):
        path.write_bytes(path.read_bytes().replace(value.encode(), value.replace(".", ",").encode()))
    ((reason, _),) = reasons(tmp_path, target_for())
    assert f"{name} in its DICOM header is no number" in reason


def test_one_slice_far_beside_the_others_is_refused(tmp_path: Path) -> None:
    for k, path in enumerate(dicom_series(tmp_path, volume())):
        if k == 5:
            dicom_file(path, volume()[k], ImagePositionPatient=[3000, -16, 2.5 * k])
    ((reason, _),) = reasons(tmp_path, target_for())
    assert "and not on a line with it" in reason


def test_a_series_that_is_inverted_in_part_is_refused(tmp_path: Path) -> None:
    for k, path in enumerate(dicom_series(tmp_path, volume(), SOPClassUID=MR, Modality="MR")):
        if k == 5:
            dicom_file(
                path, volume()[k], ImagePositionPatient=[-14, -16, 2.5 * k], SOPClassUID=MR, Modality="MR",
                PhotometricInterpretation="MONOCHROME1",
            )  # fmt: skip
    ((reason, _),) = reasons(tmp_path, target_for())
    assert "MONOCHROME1 in some of its images and MONOCHROME2 in others" in reason


def test_directions_that_differ_by_rounding_are_one_stack(tmp_path: Path) -> None:
    """Rounding to two digits changes at 0.005."""
    for k, pixels in enumerate(volume()):
        orientation = [1, 0.005 + (-1) ** k * 1e-5, 0, -0.005, 1, 0]
        dicom_file(tmp_path / f"{k}.dcm", pixels, ImagePositionPatient=[0, 0, k], ImageOrientationPatient=orientation)
    assert [len(scan.files) for scan in find_scans(str(tmp_path), target_for()).scans] == [12]


def test_two_patients_in_one_folder_are_two_scans_of_different_names(tmp_path: Path) -> None:
    for patient in "ab":
        for path in dicom_series(tmp_path / "new", volume(), PatientID=patient, SeriesInstanceUID=None):
            path.rename(tmp_path / f"{patient}{path.name}")
    names = {scan.name for scan in find_scans(str(tmp_path), target_for()).scans}
    assert len(names) == 2


def test_a_compressed_copy_of_a_slice_is_the_same_slice(tmp_path: Path) -> None:
    path = dicom_series(tmp_path, volume())[7]
    copy = pydicom.dcmread(path)
    copy.compress(pydicom.uid.RLELossless, generate_instance_uid=False)
    copy.save_as(tmp_path / "copy.dcm")
    found = find_scans(str(tmp_path), target_for())
    assert [len(scan.files) for scan in found.scans] == [12]
    assert "counted once" in found.notes[0]


def test_a_scan_beside_a_damaged_file_has_a_note(tmp_path: Path) -> None:
    paths = dicom_series(tmp_path, volume())
    paths[-1].write_bytes(paths[-1].read_bytes()[:300])
    found = find_scans(str(tmp_path), target_for())
    assert [len(scan.files) for scan in found.scans] == [11]
    assert f"{paths[-1]} may be a part of the scan" in found.notes[0]
