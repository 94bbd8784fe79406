import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from skimage.transform import resize

from pcrl_nnunet.classification.world import outside, to_voxels


@pytest.mark.parametrize("direction", [np.eye(3), np.diag([-1.0, -1, 1]), [[0, 1, 0], [1, 0, 0], [0, 0, -1]]])
@pytest.mark.parametrize("transpose", [[0, 1, 2], [2, 0, 1]])
def test_a_point_of_the_world_is_found_in_the_preprocessed_image(tmp_path, direction, transpose):
    """A bright blob at a known place of the world, through nnU-Net's reader, axes, crop and resampling."""
    image = sitk.Image([24, 20, 16], sitk.sitkFloat32)
    image.SetSpacing([0.9, 1.4, 2.5])
    image.SetOrigin([-30.0, 12.0, 100.0])
    image.SetDirection(np.ravel(direction).astype(float).tolist())
    world = image.TransformContinuousIndexToPhysicalPoint([13.0, 8.0, 9.0])
    image[13, 8, 9] = 1.0
    image = sitk.SmoothingRecursiveGaussian(image, 2.0)
    sitk.WriteImage(image, str(tmp_path / "x.nii.gz"))

    data, properties = SimpleITKIO().read_images([str(tmp_path / "x.nii.gz")])
    data = data[0].transpose(transpose)
    box = [[2, data.shape[0] - 1], [1, data.shape[1]], [3, data.shape[2] - 2]]
    data = data[tuple(slice(*part) for part in box)]
    spacing = [properties["spacing"][axis] for axis in transpose]
    shape = compute_new_shape(data.shape, spacing, [1.0, 1.0, 1.0])
    properties |= {"bbox_used_for_cropping": box, "shape_after_cropping_and_before_resampling": data.shape}
    resampled = resize(data, shape, order=1)
    weight = np.clip(resampled - 0.3 * resampled.max(), 0, None)
    centre = [np.average(grid, weights=weight) for grid in np.indices(weight.shape)]
    (found,) = to_voxels(np.array([world]), properties, shape, transpose)
    np.testing.assert_allclose(found, centre, atol=0.25)


def preprocessed(properties, shape):
    """The properties that nnU-Net's preprocessing writes without transposing, cropping or resampling."""
    whole = [[0, n] for n in shape]
    return {**properties, "bbox_used_for_cropping": whole, "shape_after_cropping_and_before_resampling": shape}


def test_a_point_in_2d_images_is_found_from_two_coordinates(tmp_path):
    image = sitk.Image([24, 20], sitk.sitkFloat32)
    image.SetSpacing([0.9, 1.4])
    image.SetOrigin([-30.0, 12.0])
    world = image.TransformContinuousIndexToPhysicalPoint([13.0, 8.0])
    sitk.WriteImage(image, str(tmp_path / "x.mha"))
    data, properties = SimpleITKIO().read_images([str(tmp_path / "x.mha")])
    shape = data.shape[1:]
    for z in (0.0, 57.0):
        (found,) = to_voxels(np.array([[*world, z]]), preprocessed(properties, shape), shape, [0, 1, 2])
        np.testing.assert_allclose(found, [0, 8, 13], atol=1e-6)


def test_pixels_of_natural_images_are_counted_from_the_first(tmp_path):
    sitk.WriteImage(sitk.Image([24, 20], sitk.sitkUInt8), str(tmp_path / "x.png"))
    data, properties = NaturalImage2DIO().read_images([str(tmp_path / "x.png")])
    shape = data.shape[1:]
    (found,) = to_voxels(np.array([[13.0, 8.0, 0.0]]), preprocessed(properties, shape), shape, [0, 1, 2])
    np.testing.assert_allclose(found, [0, 8, 13])


@pytest.mark.parametrize("reader", [NibabelIO, NibabelIOWithReorient])
def test_a_point_is_found_in_images_that_nibabel_reads(tmp_path, reader):
    image = sitk.Image([24, 20, 16], sitk.sitkFloat32)
    image.SetSpacing([0.9, 1.4, 2.5])
    image.SetOrigin([-30.0, 12.0, 100.0])
    image.SetDirection([-1.0, 0, 0, 0, -1.0, 0, 0, 0, 1.0])
    world = image.TransformContinuousIndexToPhysicalPoint([13.0, 8.0, 9.0])
    image[13, 8, 9] = 1.0
    sitk.WriteImage(image, str(tmp_path / "x.nii.gz"))
    data, properties = reader().read_images([str(tmp_path / "x.nii.gz")])
    shape = data.shape[1:]
    (found,) = to_voxels(np.array([world]), preprocessed(properties, shape), shape, [0, 1, 2])
    np.testing.assert_allclose(found, np.argwhere(data[0] == 1)[0], atol=1e-4)


def test_a_point_more_than_a_voxel_beyond_the_image_is_outside():
    points = np.array([[0, 0, 0], [-1, 2, 2], [-1.1, 2, 2], [3, 4, 5.0], [3, 4, 6.1]])
    assert list(outside(points, (4, 5, 6))) == [False, False, True, False, True]
