import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest import maskless
from pcrl_nnunet.ingest.maskless import _is_newer, foreground, write_mask
from pcrl_nnunet.ingest.scans import Scan


def body(lungs=True):
    """A bright ellipsoid in the dark, with two dark holes in it as lungs are."""
    z, y, x = np.ogrid[:20, :40, :40]
    inside = ((y - 20) / 16) ** 2 + ((x - 20) / 18) ** 2 + 0 * z < 1
    image = np.where(inside, 40.0, -1000.0)
    if lungs:
        for centre in (12, 28):
            image[((y - 20) / 8) ** 2 + ((x - centre) / 5) ** 2 + 0 * z < 1] = -850.0
    return image[None] + np.random.default_rng(0).normal(scale=10, size=(1, 20, 40, 40)), inside


def test_the_foreground_is_the_body_with_what_it_surrounds():
    image, inside = body()
    assert (foreground(image.astype(np.float32)) != inside).mean() < 1e-3  # of the noise a voxel or two


def test_any_channel_makes_foreground():
    image, inside = body(lungs=False)
    dark = np.zeros_like(image)
    found = foreground(np.concatenate([dark, image]).astype(np.float32))
    assert (found != inside).mean() < 1e-3  # of the noise a voxel or two


@pytest.mark.parametrize(("value", "message"), [(3.0, "the same"), (np.nan, "not finite"), (np.inf, "not finite")])
def test_an_image_without_contrast_or_with_nan_has_none(value, message):
    with pytest.raises(ValueError, match=message):
        foreground(np.full((1, 4, 5, 6), value, np.float32))


def test_a_bad_image_is_set_aside_and_leaves_no_mask(tmp_path):
    (tmp_path / "x_0000.nii.gz").write_bytes(b"no image")
    found = write_mask(Scan("x", (str(tmp_path / "x_0000.nii.gz"),), "plan"), SimpleITKIO, str(tmp_path / "x.nii.gz"))
    assert found is not None
    assert os.listdir(tmp_path) == ["x_0000.nii.gz"]


def test_a_mask_is_kept_unless_its_image_is_newer(tmp_path):
    image, mask = tmp_path / "x_0000.nii.gz", tmp_path / "x.nii.gz"
    image.write_bytes(b"")
    assert not _is_newer(str(mask), [str(image)])
    mask.write_bytes(b"")
    os.utime(image, (1000, 1000))
    os.utime(mask, (2000, 2000))
    assert _is_newer(str(mask), [str(image)])
    os.utime(image, (3000, 3000))  # replaced since
    assert not _is_newer(str(mask), [str(image)])
    image.unlink()  # which is said where it is read
    assert not _is_newer(str(mask), [str(image)])


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plans a raw dataset of as many images, some of them bad; nnU-Net's part only notes what it is given."""
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
            given.append({**names, **json.loads((folder / "dataset.json").read_text())})
            if fails:
                raise UserError("nnUNetv2_plan_and_preprocess ended with status 1")

        monkeypatch.setattr(maskless, "_run_nnunet", run_nnunet)
        with ThreadPoolExecutor(1) as pool:
            arguments = (str(raw), str(tmp_path / "preprocessed"), None, [], 1, pool, print, False)
            return maskless.plan_and_preprocess(*arguments), given

    plan.masks = tmp_path / "preprocessed" / "pcrl_masks"
    return plan


def test_bad_images_are_left_out_of_what_nnunet_is_given(planned):
    bad, (given,) = planned(11, bad=1)
    assert [os.path.basename(found.where) for found in bad] == ["case_00_0000.nii.gz"]
    assert given["imagesTr"] == [f"case_{i:02}_0000.nii.gz" for i in range(1, 11)]
    assert given["labelsTr"] == [f"case_{i:02}.nii.gz" for i in range(1, 11)]
    assert (given["numTraining"], given["labels"]) == (10, {"background": 0, "foreground": 1})
    assert not planned.masks.exists()


def test_where_many_images_are_bad_nothing_is_planned_and_the_good_masks_are_kept(planned):
    with pytest.raises(UserError, match=r"2 of 11 images are bad, over 10%: mend or remove them.*case_0"):
        planned(11, bad=2)
    assert len(list(planned.masks.rglob("labelsTr/*.nii.gz"))) == 9


def test_where_no_image_can_be_read_that_is_said(planned, capsys):
    with pytest.raises(UserError, match=r"none of the 3 images can be read, the first is .*case_00_0000.nii.gz"):
        planned(3, bad=3)
    assert "Traceback" not in capsys.readouterr().err


def test_where_nnunet_fails_the_masks_are_kept_and_not_made_again(planned):
    with pytest.raises(UserError, match="ended with status 1"):
        planned(3, fails=True)
    masks = {path: path.stat().st_mtime_ns for path in planned.masks.rglob("labelsTr/*.nii.gz")}
    assert len(masks) == 3
    for path in masks:  # newer than the images, which `planned` writes again
        os.utime(path, ns=(2 * 10**18, 2 * 10**18))
    with pytest.raises(UserError, match="ended with status 1"):
        planned(3, fails=True)
    assert {path.stat().st_mtime_ns for path in masks} == {2 * 10**18}
