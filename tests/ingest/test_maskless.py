import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest import maskless
from pcrl_nnunet.ingest.maskless import _is_newer, foreground, is_without_masks, write_mask
from pcrl_nnunet.ingest.scans import ImageFormat, Scan, Unusable


def body(lungs=True):
    """A bright ellipsoid on a dark background, with two dark holes like lungs."""
    z, y, x = np.ogrid[:20, :40, :40]
    inside = ((y - 20) / 16) ** 2 + ((x - 20) / 18) ** 2 + 0 * z < 1
    image = np.where(inside, 40.0, -1000.0)
    if lungs:
        for centre in (12, 28):
            image[((y - 20) / 8) ** 2 + ((x - centre) / 5) ** 2 + 0 * z < 1] = -850.0
    return image[None] + np.random.default_rng(0).normal(scale=10, size=(1, 20, 40, 40)), inside


def test_the_foreground_is_the_body_with_its_holes_filled():
    image, inside = body()
    assert (foreground(image.astype(np.float32)) != inside).mean() < 1e-3  # one or two voxels of noise


def test_any_channel_makes_foreground():
    image, inside = body(lungs=False)
    dark = np.zeros_like(image)
    found = foreground(np.concatenate([dark, image]).astype(np.float32))
    assert (found != inside).mean() < 1e-3  # one or two voxels of noise


def test_an_image_without_contrast_has_none():
    with pytest.raises(Unusable, match="the same"):
        foreground(np.full((1, 4, 5, 6), 3.0, np.float32))


def nan_in_floats(path):
    image = np.random.default_rng(0).normal(size=(8, 9, 10)).astype(np.float32)
    image[1, 2, 3] = np.nan
    nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), path)


def half(path):
    sitk.WriteImage(sitk.GetImageFromArray(body()[0][0].astype(np.float32)), path)
    whole = gzip.decompress(Path(path).read_bytes())
    Path(path).write_bytes(gzip.compress(whole[: len(whole) // 2]))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: Path(path).write_bytes(b"no image"), "not a NIfTI file"),
        (nan_in_floats, "1 voxels are NaN or infinite"),  # SimpleITK alone reads it as 0
        (half, "ends too early"),  # SimpleITK alone fills it with zeros
        (lambda path: sitk.WriteImage(sitk.Image([9, 9, 9], sitk.sitkInt16), path), "all voxels are 0"),
        (lambda path: sitk.WriteImage(sitk.JoinSeries([sitk.Image(9, 9, 9, 3)] * 2), path), "2 channels, the dataset"),
    ],
)
def test_a_bad_image_is_set_aside_and_leaves_no_mask(tmp_path, make, reason):
    image = str(tmp_path / "x_0000.nii.gz")
    make(image)
    found = write_mask(Scan("x", (image,), "plan"), ImageFormat(SimpleITKIO, ".nii.gz", 1), str(tmp_path / "x.nii.gz"))
    assert reason in found.reason
    assert found.where == image
    assert os.listdir(tmp_path) == ["x_0000.nii.gz"]


def test_a_tiff_and_its_mask_have_the_same_spacing(tmp_path):
    """nnU-Net's writer puts the spacing of a mask into a second file."""
    image = body()[0][0].astype(np.float32)
    tifffile.imwrite(tmp_path / "x_0000.tif", image)
    (tmp_path / "x.json").write_text('{"spacing": [3, 0.5, 0.7]}')
    (tmp_path / "masks").mkdir()
    mask = str(tmp_path / "masks" / "x.tif")
    images = ImageFormat(Tiff3DIO, ".tif", 1)
    assert write_mask(Scan("x", (str(tmp_path / "x_0000.tif"),), "plan"), images, mask) == []
    assert sorted(os.listdir(tmp_path / "masks")) == ["x.json", "x.tif"]
    seg, properties = Tiff3DIO().read_seg(mask)
    assert properties["spacing"] == [3, 0.5, 0.7]
    assert seg.shape == (1, *image.shape)


def test_a_mask_is_kept_unless_its_image_is_newer(tmp_path):
    image, mask = tmp_path / "x_0000.nii.gz", tmp_path / "x.nii.gz"
    image.write_bytes(b"")
    assert not _is_newer(str(mask), [str(image)])
    mask.write_bytes(b"")
    os.utime(image, (1000, 1000))
    os.utime(mask, (2000, 2000))
    assert _is_newer(str(mask), [str(image)])
    os.utime(image, (3000, 3000))  # replaced later
    assert not _is_newer(str(mask), [str(image)])
    image.unlink()  # the reader reports missing files
    assert not _is_newer(str(mask), [str(image)])


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plans a raw dataset with the given number of images, some of them bad; nnU-Net's part only records its input."""
    raw, given = tmp_path / "raw" / "Dataset005_Bodies", []

    def plan(images, bad=0, fails=False):
        (raw / "imagesTr").mkdir(parents=True, exist_ok=True)
        for i in range(images):
            path = str(raw / "imagesTr" / f"case_{i:02}_0000.nii.gz")
            sitk.WriteImage(sitk.GetImageFromArray(body()[0][0, :4].astype(np.float32)), path)
            if i < bad:
                Path(path).write_bytes(b"no image")
        (raw / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}))

        def run_nnunet(name, root, *_):
            folder = Path(root) / name
            names = {part: sorted(p.name for p in (folder / part).iterdir()) for part in ("imagesTr", "labelsTr")}
            splits = folder / "splits_final.json"
            folds = json.loads(splits.read_text()) if splits.is_file() else None
            given.append({**names, **json.loads((folder / "dataset.json").read_text()), "folds": folds})
            if fails:
                raise UserError("nnUNetv2_plan_and_preprocess ended with status 1")

        monkeypatch.setattr(maskless, "_run_nnunet", run_nnunet)
        with ThreadPoolExecutor(1) as pool:
            arguments = (str(raw), str(tmp_path / "preprocessed"), None, [], 1, pool, print)
            return maskless.plan_and_preprocess(*arguments), given

    plan.masks, plan.images = tmp_path / "preprocessed" / "pcrl_masks", raw / "imagesTr"
    return plan


def test_bad_images_are_not_passed_to_nnunet(planned):
    bad, (given,) = planned(11, bad=1)
    assert [os.path.basename(found.where) for found in bad] == ["case_00_0000.nii.gz"]
    assert given["imagesTr"] == [f"case_{i:02}_0000.nii.gz" for i in range(1, 11)]
    assert given["labelsTr"] == [f"case_{i:02}.nii.gz" for i in range(1, 11)]
    assert (given["numTraining"], given["labels"]) == (10, {"background": 0, "foreground": 1})
    assert is_without_masks("Dataset005_Bodies", given)  # nnU-Net copies it to the preprocessed dataset
    assert not planned.masks.exists()


def test_the_datasets_own_folds_are_passed_on_without_bad_images(planned, tmp_path):
    folds = [{"train": ["case_00", "case_01"], "val": ["case_02", "not_there"]}]
    planned.images.mkdir(parents=True)
    (planned.images.parent / "splits_final.json").write_text(json.dumps(folds))
    _, (given,) = planned(11, bad=1)
    assert given["folds"] == [{"train": ["case_01"], "val": ["case_02", "not_there"]}]
    used = tmp_path / "preprocessed" / "Dataset005_Bodies"
    used.mkdir()
    (used / "splits_final.json").write_text("[]")  # the user's folds stay
    _, (_, given) = planned(11)
    assert given["folds"] is None


def test_images_that_nnunet_would_not_see_or_with_an_absurd_spacing_are_named(planned):
    planned(20)
    images = planned.images
    (images / "other.nii.gz").write_bytes(b"")
    image = sitk.ReadImage(str(images / "case_05_0000.nii.gz"))
    image.SetSpacing((0.06, 0.06, 0.06))
    sitk.WriteImage(image, str(images / "case_05_0000.nii.gz"))
    bad, given = planned(0)
    reasons = {os.path.basename(found.where): found.reason for found in bad}
    assert set(reasons) == {"other.nii.gz", "case_05_0000.nii.gz"}
    assert "expected other_0000.nii.gz" in reasons["other.nii.gz"]
    assert "voxels of 0.06 x 0.06 x 0.06 mm are implausible beside the 1 x 1 x 1 mm of most images" in str(reasons)
    assert "case_05_0000.nii.gz" not in given[-1]["imagesTr"]


def test_too_many_bad_images_stop_planning_and_keep_good_masks(planned):
    with pytest.raises(UserError, match=r"2 of 11 images are bad, over 10%: mend or remove them.*case_0"):
        planned(11, bad=2)
    assert len(list(planned.masks.rglob("labelsTr/*.nii.gz"))) == 9


def test_unreadable_images_alone_end_with_a_sentence(planned, capsys):
    with pytest.raises(UserError, match=r"none of the 3 images can be read, the first is .*case_00_0000.nii.gz"):
        planned(3, bad=3)
    assert "Traceback" not in capsys.readouterr().err


def test_masks_are_kept_and_reused_after_nnunet_fails(planned):
    with pytest.raises(UserError, match="ended with status 1"):
        planned(3, fails=True)
    masks = {path: path.stat().st_mtime_ns for path in planned.masks.rglob("labelsTr/*.nii.gz")}
    assert len(masks) == 3
    for path in masks:  # newer than the images that `planned` writes again
        os.utime(path, ns=(2 * 10**18, 2 * 10**18))
    with pytest.raises(UserError, match="ended with status 1"):
        planned(3, fails=True)
    assert {path.stat().st_mtime_ns for path in masks} == {2 * 10**18}
