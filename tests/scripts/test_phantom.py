"""The phantoms of scripts/phantom.py."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import binary_dilation

SCRIPT = Path(__file__).parents[2] / "scripts" / "phantom.py"


@pytest.fixture(scope="module")
def phantom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("phantom", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["phantom"] = module  # dataclasses and worker processes look it up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        spec.loader.exec_module(module)
    return module


def test_the_command_writes_a_dataset_that_nnunet_accepts(tmp_path: Path) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    command = [sys.executable, str(SCRIPT), "-o", str(tmp_path), "-d", "7", "-cases", "3", "-test", "1"]
    done = subprocess.run([*command, "-unlabelled", "2"], capture_output=True, encoding="utf-8", check=True)
    folder = tmp_path / "Dataset007_PhantomOrgan"
    assert done.stdout.strip() == str(folder)
    verify_dataset_integrity(str(folder), num_processes=1)
    assert sorted(p.name for p in (folder / "imagesUn").iterdir()) == [
        "scan_un_000_0000.nii.gz",
        "scan_un_001_0000.nii.gz",
    ]
    assert (folder / "labelsTs" / "case_ts_000.nii.gz").is_file()


def test_a_seed_gives_the_same_case_and_another_seed_another(phantom: ModuleType) -> None:
    kind = phantom.KINDS["organ"]
    images, labels, spacing = phantom.make_case(kind, (1, 0, 3))
    again_images, again_labels, again_spacing = phantom.make_case(kind, (1, 0, 3))
    np.testing.assert_array_equal(images[0], again_images[0])
    np.testing.assert_array_equal(labels, again_labels)
    assert spacing == again_spacing
    assert phantom.make_case(kind, (2, 0, 3))[2] != spacing


def test_more_cases_leave_the_earlier_ones_as_they_were(phantom: ModuleType, tmp_path: Path) -> None:
    few = phantom.write_dataset(tmp_path / "few", 1, cases=1, unlabelled=1, processes=1)
    many = phantom.write_dataset(tmp_path / "many", 1, cases=2, unlabelled=1, processes=1)
    for name in ("imagesTr/case_tr_000_0000.nii.gz", "imagesUn/scan_un_000_0000.nii.gz"):
        np.testing.assert_array_equal(
            sitk.GetArrayFromImage(sitk.ReadImage(str(few / name))),
            sitk.GetArrayFromImage(sitk.ReadImage(str(many / name))),
        )


@pytest.mark.parametrize(
    ("kind_name", "inner", "outer"), [("organ", 2, (1, 2)), ("simple", 2, (1, 2)), ("brats", 2, (1, 2, 3))]
)
def test_the_inner_structure_lies_inside_the_outer(
    phantom: ModuleType, kind_name: str, inner: int, outer: tuple[int, ...]
) -> None:
    for number in range(3):
        labels = phantom.make_case(phantom.KINDS[kind_name], (0, 0, number))[1]
        core = labels == inner
        assert core.any()
        beside = binary_dilation(core) & ~core
        assert np.isin(labels[beside], outer).mean() > 0.95


def test_brats_has_four_channels_regions_and_exact_zeros_around_the_brain(phantom: ModuleType, tmp_path: Path) -> None:
    folder = phantom.write_dataset(tmp_path, 2, "brats", cases=1, size=(36, 44, 32), processes=1)
    description = json.loads((folder / "dataset.json").read_text())
    assert description["labels"] == {
        "background": 0,
        "whole_tumor": [1, 2, 3],
        "tumor_core": [2, 3],
        "enhancing_tumor": [3],
    }
    assert description["regions_class_order"] == [1, 2, 3]
    images = [sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in sorted((folder / "imagesTr").iterdir())]
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / "case_tr_000.nii.gz")))
    assert len(images) == 4
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    zero = np.all([image == 0 for image in images], axis=0)
    assert 0.2 < zero.mean() < 0.8
    assert not labels[zero].any()


def test_ct_is_in_hounsfield_units(phantom: ModuleType) -> None:
    kind = replace(phantom.KINDS["lits"], size=(64, 64, 75), spacing=(5.6, 5.6, 8.0))
    images, labels, _ = phantom.make_case(kind, (0, 0, 0), vary_size=False)
    assert images[0].shape == (75, 64, 64)
    assert images[0][0, 0].mean() == pytest.approx(-1000, abs=10)
    assert 80 < images[0][labels == 1].mean() < 130
    assert images[0][labels == 2].mean() < images[0][labels == 1].mean() - 20


def test_a_size_of_one_slice_works(phantom: ModuleType) -> None:
    kind = replace(phantom.KINDS["organ"], size=(48, 48, 1))
    images, labels, _ = phantom.make_case(kind, (0, 0, 1), vary_size=False)
    assert images[0].shape == labels.shape == (1, 48, 48)
    assert (labels == 1).any()


def test_a_given_size_keeps_the_field_of_view(phantom: ModuleType, tmp_path: Path) -> None:
    folder = phantom.write_dataset(tmp_path, 3, cases=1, size=(20, 22, 18), processes=1)
    image = sitk.ReadImage(str(folder / "imagesTr" / "case_tr_000_0000.nii.gz"))
    assert image.GetSize() == (20, 22, 18)
    assert np.array(image.GetSpacing()) * image.GetSize() == pytest.approx(np.array([40, 44, 43.2]), rel=0.06)
