"""Finding scans in folders and reading them as the plan's own reader would."""

from __future__ import annotations

import copy
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from pcrl_nnunet.ingest.scans import Scan, Target, Unusable, find_scans, make_target, own_scans, read_scan, short_reason
from pcrl_nnunet.plans import PlannedConfiguration

SHAPE = (12, 10, 8)  # (Z, Y, X)
SPACING = (0.9, 1.1, 2.5)  # mm; x, y, z
UID = "1.2.826.0.1.3680043.2.1125"


def phantom(seed: int = 0, orientation: str = "LPS") -> sitk.Image:
    """Noise of many values, so that axes or flips that are mixed up show; stored in the given orientation."""
    voxels = np.random.default_rng(seed).integers(-900, 900, SHAPE).astype(np.int16)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING)
    image.SetOrigin((-30.0, 20.0, 5.0))
    return sitk.DICOMOrient(image, orientation)


def write(image: sitk.Image, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), True)
    return str(path)


def write_dicom(image: sitk.Image, folder: Path, uid: str = UID, skip: tuple[int, ...] = (), ending: str = "") -> None:
    """One file a slice, names in another order than the slices; no ending, as scanners write them."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    d, depth = image.GetDirection(), image.GetDepth()
    for z in set(range(depth)) - set(skip):
        slice_ = image[:, :, z]
        position = image.TransformIndexToPhysicalPoint((0, 0, z))
        tags = {
            "0008|0060": "MR",
            "0020|000d": UID,
            "0020|000e": uid,
            "0020|0013": str(z),
            "0020|0032": "\\".join(map(str, position)),
            "0020|0037": "\\".join(map(str, (d[0], d[3], d[6], d[1], d[4], d[7]))),
        }
        for tag, value in tags.items():
            slice_.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"IM{uid[-1]}{97 * (z + 1) % 1009:04d}{ending}"))
        writer.Execute(slice_)


def target_for(channels: int = 1, reader: str = "SimpleITKIO", ending: str = ".nii.gz", **more: Any) -> Target:
    plans = {"image_reader_writer": reader, "original_median_shape_after_transp": list(SHAPE)}
    names = {str(c): "MRI" for c in range(channels)}
    return Target(plans, {"channel_names": names, "file_ending": ending}, "3d_fullres", **more)


def only_scan(folder: Path, target: Target) -> Scan:
    found = find_scans(str(folder), target)
    assert not found.set_aside
    (scan,) = found.scans
    return scan


def reasons(folder: Path, target: Target) -> list[tuple[str, bool]]:
    return [(s.reason, s.bad) for s in find_scans(str(folder), target).set_aside]


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAS", "PIR"])
@pytest.mark.parametrize("kind", [".mha", ".nrrd", ".mhd", ".nii", "DICOM"])
def test_any_format_gives_the_array_and_spacing_of_the_datasets_nifti(
    tmp_path: Path, kind: str, orientation: str
) -> None:
    nifti = write(phantom(orientation=orientation), tmp_path / "raw" / "a_0000.nii.gz")
    expected, properties = SimpleITKIO().read_images([nifti])
    stored = sitk.DICOMOrient(phantom(), "LPI" if kind == "DICOM" else "SLA")  # DICOM stores slices right-handed
    if kind == "DICOM":
        write_dicom(stored, tmp_path / "in" / "study")
    else:
        write(stored, tmp_path / "in" / f"x{kind}")
    target = target_for(orientation=orientation)
    data, got = read_scan(only_scan(tmp_path / "in", target), target)
    np.testing.assert_array_equal(data, expected)
    np.testing.assert_allclose(got["spacing"], properties["spacing"], rtol=1e-5)
    assert data.dtype == np.float32


def test_dicom_is_turned_as_a_reorienting_reader_turns_nifti(tmp_path: Path) -> None:
    nifti = write(phantom(orientation="PIR"), tmp_path / "raw" / "imagesTr" / "a_0000.nii.gz")
    expected, _ = NibabelIOWithReorient().read_images([nifti])
    write_dicom(phantom(), tmp_path / "in")
    plain = target_for(reader="NibabelIOWithReorient")
    planned = PlannedConfiguration("", plain.plans, "3d_fullres", {}, plain.dataset_json)
    target = make_target(planned, str(tmp_path / "raw"))
    data, _ = read_scan(only_scan(tmp_path / "in", target), target)
    np.testing.assert_array_equal(data, expected)


def test_the_orientation_is_that_of_most_images_of_the_dataset(tmp_path: Path) -> None:
    for k, orientation in enumerate(["RAS", "LPS", "RAS"]):
        write(phantom(orientation=orientation), tmp_path / "imagesTr" / f"case_{k}_0000.nii.gz")
    plain = target_for()
    target = make_target(PlannedConfiguration("", plain.plans, "3d_fullres", {}, plain.dataset_json), str(tmp_path))
    assert target.orientation == "RAS"
    assert sorted(target.own_images.values()) == ["case_0", "case_1", "case_2"]


def test_own_scans_are_those_that_nnunet_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b_0000", "b_0001", "a_0001", "a_0000", "no_channel", "c_0000.nii"):
        write(phantom(), tmp_path / "imagesTr" / f"{name}.nii.gz")
    monkeypatch.setenv("ELSEWHERE", str(tmp_path / "elsewhere"))
    listed = {"z": {"images": ["$ELSEWHERE/t2.nii.gz", "imagesTr/t1.nii.gz"], "label": "z.nii.gz"}}
    folder = {"file_ending": ".nii.gz"}
    for dataset_json in (folder, {**folder, "dataset": listed}):
        theirs = get_filenames_of_train_images_and_targets(str(tmp_path), copy.deepcopy(dataset_json))
        ours = {scan.name: list(scan.files) for scan in own_scans(str(tmp_path), dataset_json)}
        assert ours == {case: entry["images"] for case, entry in theirs.items() if entry["images"]}
    assert own_scans(str(tmp_path / "nowhere"), folder) == []


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_files_of_the_datasets_own_type_are_read_as_nnunet_reads_them(tmp_path: Path, reader: str) -> None:
    path = write(phantom(orientation="PIR"), tmp_path / "any name.nii.gz")
    target = target_for(reader=reader, orientation="RAS")
    data, _ = read_scan(only_scan(tmp_path, target), target)
    np.testing.assert_array_equal(data, target.reader().read_images([path])[0])


def test_channels_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for ending in (".nii.gz", ".mha"):
        for channel in (2, 0, 1):
            write(phantom(channel), tmp_path / f"case{ending[1]}_{channel:04d}{ending}")
    target = target_for(channels=3)
    for scan in find_scans(str(tmp_path), target).scans:
        data, _ = read_scan(scan, target)
        for channel in range(3):
            np.testing.assert_array_equal(data[channel], sitk.GetArrayFromImage(phantom(channel)))


def test_a_fourth_axis_of_one_is_dropped(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.random.rand(*SHAPE, 1).astype(np.float32), np.eye(4)), tmp_path / "a.nii")
    target = target_for()
    data, _ = read_scan(only_scan(tmp_path, target), target)
    assert data.shape == (1, *SHAPE[::-1])


def _half(path: Path) -> None:
    write(phantom(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zipped_half(path: Path) -> None:  # a valid archive of an incomplete file
    write(phantom(), path)
    inside = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(inside[: len(inside) // 2]))


def _flipped(path: Path) -> None:
    write(phantom(), path)
    content = bytearray(path.read_bytes())
    content[-20] ^= 0xFF
    path.write_bytes(bytes(content))


def _values(change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    def write_changed(path: Path) -> None:
        voxels = sitk.GetArrayFromImage(phantom()).astype(np.float32)
        change(voxels)
        write(sitk.GetImageFromArray(voxels), path)

    return write_changed


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("name", "make", "reason", "bad"),
    [
        ("a.nii.gz", _half, "the compressed data is damaged or ends too early", True),
        ("a.nii.gz", _zipped_half, "ends too early", True),
        ("a.nii", _half, "ends too early", True),
        ("a.nii.gz", _flipped, "the compressed data is damaged", True),
        ("a.mha", _half, "damaged or ends too early", True),
        ("a.nrrd", _half, "damaged or ends too early", True),
        ("a.nii.gz", lambda path: path.write_bytes(b""), "not a NIfTI file", True),
        ("a.nii.gz", lambda path: path.write_text("Not found"), "not a NIfTI file", True),
        ("a.nii.gz", _values(lambda v: v.__setitem__((1, 2, 3), np.nan)), "1 voxels are NaN", True),
        ("a.mha", _values(lambda v: v.__setitem__((1, 2, 3), np.inf)), "1 voxels are NaN", True),
        ("a.mha", _values(lambda v: v.fill(0)), "all voxels are 0", True),
        ("a.mha", _values(lambda v: v.fill(-1024)), "all voxels are -1024", True),
        ("a.mha", _values(lambda v: np.clip(np.round(v / 300), 0, 3, out=v)), "a segmentation?", False),
        ("a.mha", lambda path: write(phantom()[:, :, :2], path), "only 2 slices", False),
        ("a.mha", lambda path: write(phantom()[:, :, 1], path), "only 1 slices", False),
        ("a.mha", lambda path: write(sitk.Compose([phantom()] * 3), path), "colour", False),
        ("a.mha", lambda path: write(sitk.JoinSeries([phantom(0), phantom(1)]), path), "2 volumes", False),
    ],
)
def test_a_file_that_nothing_can_be_learned_from_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None], reason: str, bad: bool
) -> None:
    make(tmp_path / name)
    target = target_for()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - a damaged file raises what its reader likes
        read_scan(only_scan(tmp_path, target), target)
    assert reason in short_reason(caught.value)
    assert "\n" not in short_reason(caught.value)
    assert getattr(caught.value, "bad", True) == bad


def test_a_named_image_of_few_values_is_believed(tmp_path: Path) -> None:
    _values(lambda v: np.clip(np.round(v / 300), 0, 3, out=v))(tmp_path / "a_0000.nii.gz")
    target = target_for()
    assert read_scan(only_scan(tmp_path, target), target)[0].max() == 3


def test_channels_of_different_size_are_refused(tmp_path: Path) -> None:
    write(phantom(), tmp_path / "a_0000.mha")
    write(phantom()[1:], tmp_path / "a_0001.mha")
    target = target_for(channels=2)
    with pytest.raises(Unusable, match="differ in size"):
        read_scan(only_scan(tmp_path, target), target)


# ------------------------------------------------------------------------------------------------------------ finding


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


def test_endings_in_capitals_and_links_in_a_circle_are_no_trouble(tmp_path: Path) -> None:
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
    assert found.namesakes == [str(tmp_path / "case_0000.nii.gz")]


def test_numbered_files_of_a_dataset_with_one_channel_are_scans_of_their_own(tmp_path: Path) -> None:
    for number in range(3):
        write(phantom(number), tmp_path / f"scan_{number:04d}.nii.gz")
    found = find_scans(str(tmp_path), target_for())
    assert len(found.scans) == 3
    assert len(found.numbered) == 2  # for the user to judge


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
    assert found.ignored == {".gz": 1}
    read = 0
    for scan in found.scans:
        if "colour" in scan.files[0]:
            with pytest.raises(Unusable, match="3 channels, the dataset has 1"):
                read_scan(scan, target)
        else:
            np.testing.assert_array_equal(read_scan(scan, target)[0], gray[None, None])
            read += 1
    assert read == 3


def test_colours_are_the_channels_of_a_2d_dataset_that_has_three(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    for name in ("case_0000.png", "any name.png"):
        write(sitk.GetImageFromArray(colours, isVector=True), tmp_path / name)
    target = target_for(channels=3, reader="NaturalImage2DIO", ending=".png")
    target.plans["original_median_shape_after_transp"] = [1, 9, 7]
    for scan in find_scans(str(tmp_path), target).scans:
        np.testing.assert_array_equal(read_scan(scan, target)[0], colours.transpose(2, 0, 1)[:, None])


# -------------------------------------------------------------------------------------------------------------- DICOM


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
    seen = {read_scan(scan, target)[0].tobytes() for scan in scans}
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


def test_dicom_that_is_no_image_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "report").write_bytes(bytes(128) + b"DICM" + b"1.2.840.10008.5.1.4.1.1.88.11\x00\x02\x00")
    assert reasons(tmp_path, target_for()) == [("DICOM, but not an image (a report, for instance)", False)]
