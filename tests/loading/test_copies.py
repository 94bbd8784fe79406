import json
import sys
from contextlib import nullcontext

import blosc2
import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from in_this_process import InThisProcess
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import DATASET_JSON, write_target

from pcrl_nnunet.cli import preprocess
from pcrl_nnunet.ingest import workers
from pcrl_nnunet.loading import copies
from pcrl_nnunet.loading.cases import Case, fingerprint
from pcrl_nnunet.loading.copies import find_copies, with_known_voxels
from pcrl_nnunet.pretraining.cases import PretrainingCases


@pytest.fixture
def make(tmp_path):
    """Writes a case of noise to its own file."""

    def make(name, seed, shape=(1, 6, 7, 8), ending=".b2nd"):
        voxels, path = np.random.default_rng(seed).normal(size=shape).astype(np.float32), str(tmp_path / name) + ending
        if ending == ".b2nd":
            blosc2.asarray(voxels, urlpath=path)
        else:
            np.save(path, voxels) if ending == ".npy" else np.savez(path, data=voxels)
        return Case(name, path)

    return make


def test_copies_are_found_whatever_the_form_of_the_preprocessed_file(make):
    originals = [make(f"case_{seed}", seed) for seed in range(3)]
    others = [make("other", 9), make("same_voxels_in_another_shape", 0, (1, 8, 7, 6))]
    found = [make("a", 0), make("b", 1, ending=".npy"), make("c", 2, ending=".npz"), make("d", 0)]
    expected = dict(zip(found, [*originals, originals[0]], strict=True))
    assert find_copies([*others, *found], originals) == expected
    assert find_copies([], originals) == find_copies(found, []) == {}


def test_images_that_differ_outside_their_centre_do_not_count_as_copies(tmp_path):
    """A fingerprint covers the central 64 voxels of each axis. They may be constant in saturated or masked images."""
    cases = []
    for seed in range(2):
        voxels = np.random.default_rng(seed).normal(size=(1, 1, 200, 200)).astype(np.float32)
        voxels[:, :, 60:140, 60:140] = 0
        blosc2.asarray(voxels, urlpath=str(tmp_path / f"{seed}.b2nd"))
        cases.append(Case(str(seed), str(tmp_path / f"{seed}.b2nd")))
    assert fingerprint(cases[0]) == fingerprint(cases[1])
    assert find_copies(cases[:1], cases[1:]) == {}


def test_a_different_number_of_channels_is_not_a_copy(make):
    assert not find_copies([make("two", 0, (2, 6, 7, 8))], [make("one", 0)])


def test_cases_of_other_shapes_are_compared_without_reading_voxels(make, monkeypatch):
    read = []
    monkeypatch.setattr(copies, "fingerprint", lambda case: read.append(case.name) or fingerprint(case))
    originals = [make("case_0", 0), make("case_1", 1, (1, 9, 9, 9))]
    cases = [make(f"scan_{n}", n, (1, 5, 5, n)) for n in range(5, 25)]
    assert find_copies(cases, originals) == {}
    assert read == []
    assert find_copies([*cases, make("copy", 0)], originals) != {}
    assert sorted(read) == ["case_0", "copy"]


def test_a_case_is_known_by_its_voxels(make):
    cases = [make("a", 0), make("b", 1)]
    assert with_known_voxels(cases, {fingerprint(cases[1]): "seen"}) == {cases[1]: "seen"}
    assert with_known_voxels(cases, {}) == {}


FORMATS = {  # file -> how it is written of the dataset's image, a NIfTI of int16
    "float64.nii.gz": lambda image, path: sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat64), path),
    "int32.nii.gz": lambda image, path: sitk.WriteImage(sitk.Cast(image, sitk.sitkInt32), path),
    "uncompressed.nii": sitk.WriteImage,
    "meta.mha": sitk.WriteImage,
    "compressed.mha": lambda image, path: sitk.WriteImage(image, path, useCompression=True),
    "header_and_data.mhd": sitk.WriteImage,
    "nearly.nrrd": sitk.WriteImage,
    "by_nibabel.nii.gz": lambda image, path: nibabel.save(
        nibabel.Nifti1Image(
            sitk.GetArrayFromImage(image).transpose().astype(np.float32),
            np.diag([-1, -1, 1, 1]) @ affine_of(image),
        ),
        path,
    ),
}


def affine_of(image):
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return affine


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO", "NibabelIOWithReorient"])
@pytest.mark.parametrize(("scheme", "mask"), [("ZScoreNormalization", True), ("CTNormalization", False)])
def test_a_validation_cases_image_in_any_format_and_number_type_is_left_out(
    tmp_path, monkeypatch, capsys, reader, scheme, mask
):
    """From files to cases: nnU-Net preprocesses the dataset's image, our command preprocesses the copies."""
    for folder in ("raw", "preprocessed"):
        monkeypatch.setenv(f"nnUNet_{folder}", str(tmp_path / folder))
    monkeypatch.setattr(workers, "worker_pool", lambda num: nullcontext(InThisProcess()))
    statistics = {"mean": 300.0, "std": 150.0, "percentile_00_5": 10.0, "percentile_99_5": 700.0}
    name, spacing = "Dataset042_Liver", [2.0, 1.0, 1.1]
    plan = write_target(tmp_path, name, scheme, statistics, use_mask_for_norm=[mask], spacing=spacing)
    plan |= {"image_reader_writer": reader, "original_median_shape_after_transp": [12, 16, 14]}
    folder, images = tmp_path / "preprocessed" / name, tmp_path / "raw" / name / "imagesTr"
    (folder / "nnUNetPlans.json").write_text(json.dumps(plan))
    voxels = np.zeros((12, 16, 14), np.int16)
    voxels[2:-1, 1:-3, 2:-2] = np.random.default_rng(0).normal(300, 90, (9, 12, 10)).clip(1)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 1.2, 2.5))
    image.SetOrigin((-12.3, 45.6, 7.8))
    image.SetDirection(np.array([[0.98, -0.199, 0], [0.199, 0.98, 0], [0, 0, 1]]).ravel().tolist())
    images.mkdir(parents=True)
    (images.parent / "labelsTr").mkdir()
    own = str(images / "case_0_0000.nii.gz")
    sitk.WriteImage(image, own)
    manager = PlansManager(plan)
    data, *_ = DefaultPreprocessor(verbose=False).run_case(
        [own], None, manager, manager.get_configuration("3d_fullres"), DATASET_JSON
    )
    (folder / "nnUNetPlans_3d_fullres").mkdir()
    blosc2.asarray(data, urlpath=str(folder / "nnUNetPlans_3d_fullres" / "case_0.b2nd"))
    (folder / "splits_final.json").write_text('[{"train": [], "val": ["case_0"]}]')

    scans = tmp_path / "scans"
    scans.mkdir()
    for file, write in FORMATS.items():
        write(sitk.ReadImage(own), str(scans / file))
    image[7, 8, 6] = 301  # another image, by one voxel
    sitk.WriteImage(image, str(scans / "another.nii.gz"))
    monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_preprocess", "-d", "42", "-i", str(scans)])
    preprocess.main()
    found = PretrainingCases.find(plan, "3d_fullres", 0)
    assert len(found.copies) == len(FORMATS)
    (left,) = found.used
    assert left.name.startswith("another")
