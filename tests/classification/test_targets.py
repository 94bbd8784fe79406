from collections import Counter

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from skimage.transform import resize

from pcrl_nnunet.classification.targets import Drawing, outside, read_targets, split_by_patient, to_voxels
from pcrl_nnunet.errors import UserError


def write(folder, name, text):
    (folder / f"{name}.csv").write_text(text)
    return str(folder)


def test_labels_of_cases_may_be_unknown_and_occur_together(tmp_path):
    folder = write(tmp_path, "classes", "case,patient,effusion,mass\na,1,0,1\nb,1,,0\nc,2,1,\n")
    targets = read_targets(folder)
    assert (targets.kind, targets.names, targets.exclusive) == ("classes", ("effusion", "mass"), False)
    np.testing.assert_array_equal(targets.value, [[0, 1], [np.nan, 0], [1, np.nan]])
    assert targets.patient == {"a": "1", "b": "1", "c": "2"}
    assert targets.point is None
    assert list(targets.of_cases(["a", "c", "elsewhere"])) == [0, 2]


@pytest.mark.parametrize("values", ["0\n1\n2\n", "benign\nmalignant\nbenign\n", "3\n10\n3\n"])
def test_one_column_of_other_values_has_classes_that_exclude_each_other(tmp_path, values):
    lines = [f"{case},{value}" for case, value in zip("abc", values.split(), strict=True)]
    targets = read_targets(write(tmp_path, "classes", "\n".join(["case,kind", *lines, "d,"])))
    assert targets.exclusive
    assert targets.names == tuple(sorted(set(values.split()), key=lambda v: (len(v), v)))
    assert {type(name) for name in targets.names} == {str}  # numpy's could not be loaded from a checkpoint
    assert [targets.names[i] for i in targets.value[:3].argmax(1)] == values.split()
    assert np.isnan(targets.value[3]).all()
    assert list(targets.of_cases(list("abcd"))) == [0, 1, 2]  # of d nothing is known


def test_a_number_is_the_same_class_however_it_is_written(tmp_path):
    targets = read_targets(write(tmp_path, "classes", "case,kind\na,1\nb,1.0\nc,2\nd,\n"))
    assert targets.names == ("1", "2")
    np.testing.assert_array_equal(targets.value[:3], [[1, 0], [1, 0], [0, 1]])


def test_a_comma_at_the_end_of_every_line_is_no_column(tmp_path):
    targets = read_targets(write(tmp_path, "classes", "case,a,\nx,1,\ny,0,\n"))
    assert targets.names == ("a",)
    assert targets.value.tolist() == [[1], [0]]


def test_points_are_read_as_luna_writes_them(tmp_path):
    text = "seriesuid,coordX,coordY,coordZ,class\n1.3.6,-56.08,-67.85,-311.92,0\n1.3.6,53.21,-244.41,-245.17,1\n"
    targets = read_targets(write(tmp_path, "candidates", text))
    assert (targets.kind, targets.names, targets.exclusive) == ("candidates", ("class",), False)
    np.testing.assert_array_equal(targets.point, [[-56.08, -67.85, -311.92], [53.21, -244.41, -245.17]])
    assert list(targets.case) == ["1.3.6", "1.3.6"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes", "name,a\nx,1\n", "no column case; it has name, a"),
        ("classes", "case\nx\n", "no column of a label"),
        ("classes", "case,a\n", "has no line"),
        ("classes", "case,a\nx,1\nx,0\n", "more than one line for case x"),
        ("classes", "case,a,b\nx,1,high\n", "high in column b; of several labels each is 0, 1 or empty"),
        ("classes", "case,a\nx,only\n", "1 different values in column a"),
        ("candidates", "seriesuid,coordX,coordY,coordZ,class\nx,1,2,3,0\nx,1,two,3,1\n", "no numbers in line 3"),
        (
            "candidates",
            "seriesuid,coordX,coordY,coordZ,class,patient\nx,1,2,3,0,p\nx,1,2,3,1,q\n",
            "one patient for case x",
        ),
        ("candidates", "", "cannot be read"),
        ("classes", "case,a\nx,1\ny,?\n", "'\\?' in column a; leave a cell empty"),
        ("classes", "case,a,a\nx,1,0\ny,0,0\n", "two columns are called 'a'"),
        ("classes", "case,a\nx,1,\ny,0,\n", "cannot be read .*Length of header"),
        ("classes", "case,a,\nx,1,\ny,0,1\n", "a column without a name"),
        ("classes", "case,a,b\nx,1,\ny,0,\n", "no value in column b"),
        ("classes", "case,a,Patient\nx,1,0\ny,0,1\n", "a column 'Patient'; call it patient if"),
        (
            "candidates",
            "seriesuid,coordX,coordY,coordZ,class,patient_id\nx,1,2,3,0,p\nx,1,2,3,1,p\n",
            "a column 'patient_id'; call it patient if",
        ),
        ("classes", "case,group\nx,case\ny,control\n", "class 'case', which is the name of another column"),
        ("classes", "case,a,p_a\nx,1,0\ny,0,1\n", "class 'p_a', which is the name of another column"),
        ("classes", "case,a\nx,1\ny,NA\n", "'NA' in column a; leave a cell empty where a value is unknown"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path, name, text, message):
    with pytest.raises(UserError, match=message):
        read_targets(write(tmp_path, name, text))


def test_no_table_and_two_tables_are_said(tmp_path):
    with pytest.raises(UserError, match=r"no classes.csv or candidates.csv in .*nnUNet_raw"):
        read_targets(str(tmp_path))
    write(tmp_path, "classes", "case,a\nx,1\ny,0\n")
    write(tmp_path, "candidates", "seriesuid,coordX,coordY,coordZ,class\nx,1,2,3,0\n")
    with pytest.raises(UserError, match=r"has both .* pcrl.classify.target"):
        read_targets(str(tmp_path))
    assert read_targets(str(tmp_path), "candidates").kind == "candidates"


def table_of(tmp_path, values):
    lines = "".join(f"c{i},{value}\n" for i, value in enumerate(values))
    return read_targets(write(tmp_path, "classes", f"case,a\n{lines}"))


def test_balanced_drawing_shows_the_rare_class_as_often_as_the_others(tmp_path):
    rng = np.random.default_rng(0)
    for values in ([1, *[0] * 199], [2, *[0] * 100, *[1] * 99]):
        targets = table_of(tmp_path, values)
        samples = np.arange(200)
        drawn = Counter(values[i] for i in Drawing(targets, samples, balanced=True)(rng, 6000))
        expected = 6000 / len(set(values))
        assert all(abs(number - expected) < 5 * np.sqrt(expected) for number in drawn.values())
        natural = Counter(values[i] for i in Drawing(targets, samples, balanced=False)(rng, 6000))
        assert natural[values[0]] < 100


def test_class_weights_give_positives_and_negatives_the_same_sum(tmp_path):
    targets = table_of(tmp_path, [1, 0, 0, 0, ""])
    np.testing.assert_allclose(targets.class_weights(np.arange(5)), [3])  # 1 positive x 3 = 3 negatives
    classes = table_of(tmp_path, [0, 1, 2, 2, 2, 2])
    np.testing.assert_allclose(classes.class_weights(np.arange(6)) * [1, 1, 4], [2, 2, 2])
    with pytest.raises(UserError, match="of a all 3 training samples have the same value"):
        targets.class_weights(np.array([1, 2, 3]))


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
    """As nnU-Net's preprocessing leaves them without transposing, cropping or resampling."""
    whole = [[0, n] for n in shape]
    return {**properties, "bbox_used_for_cropping": whole, "shape_after_cropping_and_before_resampling": shape}


def test_a_point_is_found_in_2d_images_and_the_third_coordinate_is_not_looked_at(tmp_path):
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


def of_patients(tmp_path, lines):
    targets = read_targets(write(tmp_path, "classes", "case,kind,patient\n" + "".join(lines)))
    return split_by_patient([line.split(",")[0] for line in lines], targets)


def test_classes_of_fewer_cases_than_folds_are_split_by_patient_too(tmp_path):
    folds = of_patients(tmp_path, [f"c{i},{'abc'[i % 3]},p{i // 2}\n" for i in range(12)])
    assert sorted(name for fold in folds for name in fold["val"]) == sorted(f"c{i}" for i in range(12))
    for fold in folds:
        patients = [{int(name[1:]) // 2 for name in fold[part]} for part in ("train", "val")]
        assert not patients[0] & patients[1]


def test_fewer_patients_than_folds_are_said(tmp_path):
    with pytest.raises(UserError, match=r"are of 4 patients, too few for nnU-Net's 5 folds; write a splits_final.json"):
        of_patients(tmp_path, [f"c{i},{i % 2},p{i % 4}\n" for i in range(24)])
