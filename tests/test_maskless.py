import os

import numpy as np
import pytest
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from pcrl_nnunet.maskless import _is_newer, foreground, has_masks, write_mask
from pcrl_nnunet.scans import Scan


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


def test_masks_are_looked_for_where_nnunet_does(tmp_path):
    assert not has_masks(str(tmp_path), {})
    (tmp_path / "labelsTr").mkdir()
    assert has_masks(str(tmp_path), {})
    assert not has_masks(str(tmp_path), {"dataset": {"a": {"images": []}}})


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
