"""Scans are read like by the plan's own reader, or refused."""

from __future__ import annotations

import copy
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from PIL import Image
from scan_files import SHAPE, only_scan, phantom, target_for, write, write_dicom

from pcrl_nnunet.ingest.checks import short_reason
from pcrl_nnunet.ingest.find import find_scans, make_target, own_scans
from pcrl_nnunet.ingest.read import read_scan
from pcrl_nnunet.ingest.scans import Unusable
from pcrl_nnunet.plans import PlannedConfiguration


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
    voxels = read_scan(only_scan(tmp_path / "in", target), target.images)
    data, got = voxels.data, voxels.properties
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
    data = read_scan(only_scan(tmp_path / "in", target), target.images).data
    np.testing.assert_array_equal(data, expected)


def test_the_orientation_follows_most_images_of_the_dataset(tmp_path: Path) -> None:
    for k, orientation in enumerate(["RAS", "LPS", "RAS"]):
        write(phantom(orientation=orientation), tmp_path / "imagesTr" / f"case_{k}_0000.nii.gz")
    plain = target_for()
    target = make_target(PlannedConfiguration("", plain.plans, "3d_fullres", {}, plain.dataset_json), str(tmp_path))
    assert target.orientation == "RAS"
    assert sorted(target.own_images.values()) == ["case_0", "case_1", "case_2"]


def test_own_scans_match_nnunets_training_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    data = read_scan(only_scan(tmp_path, target), target.images).data
    np.testing.assert_array_equal(data, target.images.reader().read_images([path])[0])


def test_channels_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for ending in (".nii.gz", ".mha"):
        for channel in (2, 0, 1):
            write(phantom(channel), tmp_path / f"case{ending[1]}_{channel:04d}{ending}")
    target = target_for(channels=3)
    for scan in find_scans(str(tmp_path), target).scans:
        data = read_scan(scan, target.images).data
        for channel in range(3):
            np.testing.assert_array_equal(data[channel], sitk.GetArrayFromImage(phantom(channel)))


def test_a_fourth_axis_of_one_is_dropped(tmp_path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(np.random.rand(*SHAPE, 1).astype(np.float32), np.eye(4)), tmp_path / "a.nii")
    target = target_for()
    data = read_scan(only_scan(tmp_path, target), target.images).data
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
        ("a.mha", _half, "end too early", True),
        ("a.nrrd", _half, "damaged or ends too early", True),
        ("a.nii.gz", lambda path: path.write_bytes(b""), "but an empty file", True),
        ("a.nii.gz", lambda path: path.write_text("Not found"), "not a NIfTI file", True),
        ("a.nii.gz", _values(lambda v: v.__setitem__((1, 2, 3), np.nan)), "1 voxels are NaN", True),
        ("a.mha", _values(lambda v: v.__setitem__((1, 2, 3), np.inf)), "1 voxels are NaN", True),
        ("a.mha", _values(lambda v: v.fill(0)), "all voxels are 0", True),
        ("a.mha", _values(lambda v: v.fill(-1024)), "all voxels are -1024", True),
        ("a.mha", lambda path: write(phantom()[:, :, :2], path), "only 2 slices", False),
        ("a.mha", lambda path: write(phantom()[:, :, 1], path), "only 1 slices", False),
        ("a.mha", lambda path: write(sitk.Compose([phantom()] * 3), path), "colour", False),
        ("a.mha", lambda path: write(sitk.JoinSeries([phantom(0), phantom(1)]), path), "2 volumes", False),
    ],
)
def test_a_useless_file_is_refused(
    tmp_path: Path, name: str, make: Callable[[Path], None], reason: str, bad: bool
) -> None:
    make(tmp_path / name)
    target = target_for()
    with pytest.raises(Exception) as caught:  # noqa: PT011 - a damaged file raises what its reader likes
        read_scan(only_scan(tmp_path, target), target.images)
    assert reason in short_reason(caught.value)
    assert "\n" not in short_reason(caught.value)
    assert getattr(caught.value, "bad", True) == bad


def _nifti(voxels: np.ndarray, **header: Any) -> Callable[[Path], None]:
    """Write a NIfTI file, then header values that no library would write."""

    def write_file(path: Path) -> None:
        nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
        content = bytearray(path.read_bytes())
        for offset, value in header.items():
            place = {"pixdim": 80, "slope": 112, "intercept": 116}[offset]
            content[place : place + 4] = np.float32(value).tobytes()
        path.write_bytes(bytes(content))

    return write_file


def _truncated_gipl(path: Path) -> None:
    write(phantom(), path)
    path.write_bytes(path.read_bytes()[:-200])


def _renamed(path: Path) -> None:
    Path(write(phantom(), path.with_suffix(".mha"))).rename(path)


def _skewed(path: Path) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.3
    image = nibabel.Nifti1Image(NOISE, affine)
    image.header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)
    image.set_qform(None, 0)
    nibabel.save(image, path)


NOISE = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
RGB = np.zeros(SHAPE, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("a_0000.gipl", _truncated_gipl, "ends too early, after 1720 of 1920 bytes of voxels"),
        ("a_0000.nii", _nifti(NOISE.astype(np.complex64)), "complex numbers"),
        ("a_0000.nii", _nifti(RGB), "a colour image (RGB in each voxel)"),
        ("a_0000.nii", _nifti(NOISE, pixdim=0), "a voxel size of 0 x 1 x 1"),
        ("a_0000.nii", _nifti(NOISE, pixdim=-1), "a voxel size of -1 x 1 x 1"),
        ("a_0000.nii", _nifti(NOISE, pixdim=5), "two voxel sizes, 5 x 1 x 1 mm (pixdim) and 1 x 1 x 1 mm (sform)"),
        ("a_0000.nii", _nifti(NOISE, slope=np.inf), "intensities are inf x"),
        ("a_0000.nii", _nifti(NOISE.astype(np.int16), slope=2, intercept=np.nan), "intensities are 2 x + nan"),
        ("a_0000.nii", _renamed, "but a MetaImage"),
        ("a_0000.nii", _skewed, "orthonormal"),
        ("a_0000.mha", lambda path: path.write_bytes(b"\x89PNG\r\n"), "a PNG image, or a MetaImage header"),
        ("a_0000.nrrd", lambda path: path.write_bytes(b"<html>404"), "a web page that ITK cannot read"),
        ("a_0000.nrrd", lambda path: write(sitk.Compose([phantom()] * 2), path), "2 values a voxel"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["plan", "itk"])
def test_voxels_filled_cut_or_replaced_by_readers_are_refused_for_every_reader(
    tmp_path: Path, name: str, make: Callable[[Path], None], reason: str, how: str
) -> None:
    make(tmp_path / name)
    target = target_for(ending="." + name.split(".", 1)[1] if how == "plan" else ".nii.gz")
    scan = only_scan(tmp_path, target)
    assert scan.how == how
    with pytest.raises(Unusable, match=re.escape(reason)):
        read_scan(scan, target.images)


def test_a_packed_image_beside_an_unpacked_one_is_read_from_its_own_file(tmp_path: Path) -> None:
    """If a.nii lies beside a.nii.gz, ITK itself reads a.nii instead of a.nii.gz."""
    write(phantom(1), tmp_path / "a.nii")
    write(phantom(2), tmp_path / "a.nii.gz")
    alone = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")))
    np.testing.assert_array_equal(alone, sitk.GetArrayFromImage(phantom(1)))
    target = target_for()
    for scan in find_scans(str(tmp_path), target).scans:
        seed = 2 if scan.files[0].endswith(".gz") else 1
        np.testing.assert_array_equal(read_scan(scan, target.images).data[0], sitk.GetArrayFromImage(phantom(seed)))


@pytest.mark.parametrize(
    ("reader", "ending"), [("SimpleITKIO", ".nii.gz"), ("NibabelIO", ".nii.gz"), ("SimpleITKIO", ".mha")]
)
@pytest.mark.parametrize("kind", ["turned", "shifted"])
def test_channels_on_different_grids_are_refused(tmp_path: Path, reader: str, ending: str, kind: str) -> None:
    cube = phantom()[:, :, :8][:, :8]  # the same shape in every orientation
    other = sitk.DICOMOrient(cube, "RAS") if kind == "turned" else cube[:]
    if kind == "shifted":
        other.SetOrigin((-28.0, 20.0, 5.0))  # 2 mm, over two voxels of 0.9 mm
    for channel, image in enumerate((cube, cube, other)):
        write(image, tmp_path / f"a_{channel:04d}{ending}")
    target = target_for(channels=3, reader=reader)
    with pytest.raises(
        Unusable, match=r"channel 0002 is on another grid than channel 0000: (stored as|shifted or turned)"
    ):
        read_scan(only_scan(tmp_path, target), target.images)


def test_channels_that_a_reader_turns_to_the_same_grid_are_read(tmp_path: Path) -> None:
    for channel, orientation in enumerate(("LPS", "RAS")):
        write(phantom(channel, orientation), tmp_path / f"a_{channel:04d}.mha")
    target = target_for(channels=2, orientation="LPS")
    data = read_scan(only_scan(tmp_path, target), target.images).data
    for channel in range(2):
        np.testing.assert_array_equal(data[channel], sitk.GetArrayFromImage(phantom(channel)))


def test_a_warning_of_nnunets_reader_becomes_a_note(tmp_path: Path) -> None:
    near = phantom(1)
    near.SetOrigin((-30.1, 20.0, 5.0))  # a tenth of a voxel: nnU-Net's reader warns, and the channels still match
    write(phantom(0), tmp_path / "a_0000.nii.gz")
    write(near, tmp_path / "a_0001.nii.gz")
    target = target_for(channels=2)
    (note,) = read_scan(only_scan(tmp_path, target), target.images).notes
    assert "Not all input images have the same origin" in note


@pytest.mark.parametrize("json_name", ["scan.json", "any name 0001.json"])
def test_the_spacing_of_a_tiff_is_found_beside_it_under_any_name(tmp_path: Path, json_name: str) -> None:
    name = json_name.replace("scan", "scan_0000").replace(".json", ".tif")
    tifffile.imwrite(tmp_path / name, sitk.GetArrayFromImage(phantom()))
    target = target_for(reader="Tiff3DIO", ending=".tif")
    (scan,) = find_scans(str(tmp_path), target).scans
    with pytest.raises(Unusable, match="no file with its spacing"):
        read_scan(scan, target.images)
    (tmp_path / json_name).write_text(json.dumps({"spacing": [2.5, 1.1, 0.9]}))
    voxels = read_scan(scan, target.images)
    assert list(voxels.properties["spacing"]) == [2.5, 1.1, 0.9]
    np.testing.assert_array_equal(voxels.data[0], sitk.GetArrayFromImage(phantom()))
    (tmp_path / json_name).write_text(json.dumps({"spacing": [2.5, 0, 0.9]}))
    with pytest.raises(Unusable, match="expected three distances in mm"):
        read_scan(scan, target.images)


@pytest.mark.parametrize(
    ("pages", "reason"),
    [
        ([NOISE.astype(np.complex64)], "a TIFF of complex64; expected real numbers"),
        ([NOISE, NOISE[:, :5]], "a TIFF of different pages"),
        ([NOISE, NOISE.astype(np.float64)], "a TIFF of different pages"),
    ],
)
def test_a_tiff_of_complex_or_different_pages_is_refused(tmp_path: Path, pages: list[np.ndarray], reason: str) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for part in pages:
            for page in part:
                file.write(page, metadata=None, contiguous=False)
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [1, 1, 1]}))
    target = target_for(reader="Tiff3DIO", ending=".tif")
    with pytest.raises(Unusable, match=reason):
        read_scan(only_scan(tmp_path, target), target.images)


def test_a_png_with_transparency_is_named(tmp_path: Path) -> None:
    Image.fromarray(np.arange(63, dtype=np.uint8).reshape(9, 7)).convert("LA").save(tmp_path / "a.png")
    target = target_for(reader="NaturalImage2DIO", ending=".png")
    target.plans["original_median_shape_after_transp"] = [1, 9, 7]
    with pytest.raises(Unusable, match=r"grey with transparency \(mode LA\); expected grey values alone"):
        read_scan(only_scan(tmp_path, target), target.images)


def test_channels_of_slightly_different_spacing_are_named(tmp_path: Path) -> None:
    other = phantom(1)
    other.SetSpacing((0.9, 1.1, 2.51))
    for channel, image in enumerate((phantom(), other)):
        write(image, tmp_path / f"a_{channel:04d}.nii.gz")
    target = target_for(channels=2)
    with pytest.raises(Unusable, match=r"voxels of 0.9 x 1.1 x 2.51 mm instead of 0.9 x 1.1 x 2.5 mm"):
        read_scan(only_scan(tmp_path, target), target.images)


def test_a_tiff_that_lost_pages_is_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in sitk.GetArrayFromImage(phantom()):
            file.write(page, metadata=None, contiguous=False)
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [1, 1, 1]}))
    target = target_for(reader="Tiff3DIO", ending=".tif")
    scan = only_scan(tmp_path, target)
    assert read_scan(scan, target.images).data.shape == (1, *SHAPE)
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(Unusable, match="damaged or ends too early"):
        read_scan(scan, target.images)


def test_channels_of_different_size_are_refused(tmp_path: Path) -> None:
    write(phantom(), tmp_path / "a_0000.mha")
    write(phantom()[1:], tmp_path / "a_0001.mha")
    target = target_for(channels=2)
    with pytest.raises(
        Unusable, match="channel 0001 is on another grid than channel 0000: 7x10x12 voxels instead of 8x10x12"
    ):
        read_scan(only_scan(tmp_path, target), target.images)
