"""scripts/convert_lits.py, on small trees in LiTS' own layouts."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from pcrl_nnunet.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "scripts"
SPACING = (0.75, 0.8, 2.5)  # mm, X Y Z
ORIGIN = (-30.0, 12.5, -300.5)
STRAIGHT = (1, 0, 0, 0, 1, 0, 0, 0, 1)
FIRST, SECOND, TEST = "Training Batch 1", "media/nas/LITS/Training Batch 2", "LITS-Challenge-Test-Data"


@pytest.fixture
def lits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with threads instead of its worker processes, which take seconds to start."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(importlib.import_module("convert"), "worker_pool", ThreadPoolExecutor)
    return importlib.import_module("convert_lits")


def write(
    path: Path,
    values: np.ndarray,
    spacing: tuple[float, ...] = SPACING,
    origin: tuple[float, ...] = ORIGIN,
    direction: tuple[int, ...] = STRAIGHT,
) -> Path:
    """Write voxels (Z, Y, X)."""
    image = sitk.GetImageFromArray(values)
    image.SetSpacing(spacing), image.SetOrigin(origin), image.SetDirection(direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return path


def voxels(shape: tuple[int, int, int] = (6, 10, 12)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def truth(shape: tuple[int, int, int] = (6, 10, 12), dtype: str = "uint8") -> np.ndarray:
    """A liver of 3 x 4 x 5 voxels with a tumour of one."""
    labels = np.zeros(shape, dtype)
    labels[2:5, 3:7, 4:9] = 1
    labels[3, 4, 5] = 2
    return labels


class Tree:
    """LITS_FOLDER and the folder that nnU-Net calls nnUNet_raw."""

    def __init__(self, root: Path) -> None:
        self.lits, self.raw = root / "LITS", root / "raw"
        self.lits.mkdir()
        self.dataset = self.raw / "Dataset017_LiTS"

    def pair(self, number: int, folder: str = FIRST, ending: str = ".nii") -> tuple[Path, Path]:
        image = write(self.lits / folder / f"volume-{number}{ending}", voxels())
        return image, write(self.lits / folder / f"segmentation-{number}{ending}", truth())

    def run(self, script: ModuleType, *options: str) -> None:
        sys.argv = ["convert_lits.py", "-i", str(self.lits), "-d", "17", "-o", str(self.raw), "-np", "1", *options]
        script.main()

    def files(self) -> list[str]:
        return sorted(f"{p.parent.name}/{p.name}" for p in self.dataset.glob("*T[rs]/*"))

    def read(self, name: str) -> sitk.Image:
        return sitk.ReadImage(str(self.dataset / name))

    def array(self, name: str) -> np.ndarray:
        return sitk.GetArrayFromImage(self.read(name))

    def json(self, name: str) -> Any:
        return json.loads((self.dataset / name).read_text())


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "argv", sys.argv)  # restored after tests that set it
    return Tree(tmp_path)


@pytest.mark.slow
def test_the_command_writes_a_dataset_that_nnunet_verifies(
    tree: Tree, capfd: pytest.CaptureFixture[str], forked_commands: Path
) -> None:
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    tree.pair(0), tree.pair(10, SECOND, ".nii.gz")
    write(tree.lits / FIRST / "segmentation-0.nii", truth(), (1, 1, 1), (0, 0, 0))
    broken = tree.pair(3)[0]
    broken.write_bytes(broken.read_bytes()[:-100])
    write(tree.lits / TEST / "test-volume-0.nii", voxels())
    environ = {**os.environ, "nnUNet_raw": str(tree.raw)}
    script = [forked_commands / "python", SCRIPTS / "convert_lits.py", "-i", tree.lits, "-d", "17", "-np", "2"]
    done = subprocess.run(script, env=environ, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert f"bad: {broken}: the file ends too early, after 1340 of 1440 bytes of voxels" in done.stdout
    assert "note: LiTS_000: its segmentation has another spacing and origin; the volume's was taken" in done.stdout
    assert "2 training cases and 1 test cases" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("Error: 1 file is bad")
    verify_dataset_integrity(str(tree.dataset), num_processes=1)
    said = capfd.readouterr().out
    assert "verify_dataset_integrity Done" in said
    assert "mismatch" not in said


def test_volumes_find_their_segmentations_in_any_folder(lits: ModuleType, tree: Tree) -> None:
    tree.pair(0), tree.pair(100, SECOND, ".nii.gz")
    write(tree.lits / "volume_pt1" / "volume-7.nii", voxels())
    write(tree.lits / "segmentations" / "segmentation-7.nii", truth())
    write(tree.lits / TEST / "test-volume-0.nii", voxels() + 1)  # another patient than volume-0
    (tree.lits / FIRST / "._volume-1.nii").touch()
    tree.run(lits)
    assert tree.files() == [
        *(f"imagesTr/LiTS_{n}_0000.nii.gz" for n in ("000", "007", "100")),
        "imagesTs/LiTS_test_000_0000.nii.gz",
        *(f"labelsTr/LiTS_{n}.nii.gz" for n in ("000", "007", "100")),
    ]
    np.testing.assert_array_equal(tree.array("imagesTr/LiTS_100_0000.nii.gz"), voxels())
    np.testing.assert_array_equal(tree.array("imagesTs/LiTS_test_000_0000.nii.gz"), voxels() + 1)
    np.testing.assert_array_equal(tree.array("labelsTr/LiTS_007.nii.gz"), truth())
    assert tree.json("dataset.json")["labels"] == {"background": 0, "liver": 1, "tumour": 2}
    assert tree.json("dataset.json")["numTraining"] == 3
    assert tree.json("dataset.json")["channel_names"] == {"0": "CT"}
    assert tree.json("conversion.json")["cases"]["LiTS_007"]["segmentation"].endswith("segmentation-7.nii")


def test_the_label_liver_alone_includes_its_tumours(lits: ModuleType, tree: Tree) -> None:
    tree.pair(0)
    tree.run(lits, "-labels", "liver")
    np.testing.assert_array_equal(tree.array("labelsTr/LiTS_000.nii.gz"), truth() > 0)
    assert tree.json("dataset.json")["labels"] == {"background": 0, "liver": 1}
    with pytest.raises(UserError, match=r"made with labels liver \(now liver_tumour\) and must not be mixed"):
        tree.run(lits)
    with pytest.raises(UserError, match=r"made with crop_to_liver False \(now True\)"):
        tree.run(lits, "-labels", "liver", "-crop_to_liver")


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (voxels().astype(np.float64), sitk.sitkInt16),
        (voxels().astype(np.float32) + np.float32(0.25), sitk.sitkFloat32),
        (voxels().astype(np.int32) + 40000, sitk.sitkFloat32),
    ],
)
def test_hu_become_int16_if_lossless(lits: ModuleType, tree: Tree, values: np.ndarray, kind: int) -> None:
    write(tree.lits / "volume-0.nii", values)
    write(tree.lits / "segmentation-0.nii", truth(dtype="float64"))
    tree.run(lits)
    image = tree.read("imagesTr/LiTS_000_0000.nii.gz")
    assert image.GetPixelID() == kind
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), values)
    assert tree.read("labelsTr/LiTS_000.nii.gz").GetPixelID() == sitk.sitkUInt8


def test_the_volumes_geometry_replaces_a_different_label_geometry_and_is_named(
    lits: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    image, label = tree.pair(0)
    flipped = (-1, 0, 0, 0, -1, 0, 0, 0, 1)
    write(image, voxels(), direction=flipped)
    write(label, truth(), spacing=(1, 1, 1), origin=(0, 0, 0))
    tree.run(lits)
    after = tree.read("labelsTr/LiTS_000.nii.gz")
    assert after.GetSpacing() == pytest.approx(SPACING)
    assert after.GetOrigin() == pytest.approx(ORIGIN)
    assert after.GetDirection() == flipped
    np.testing.assert_array_equal(sitk.GetArrayFromImage(after), truth())
    note = "LiTS_000: its segmentation has another spacing and origin and direction; the volume's was taken"
    assert note in capsys.readouterr().out


def test_bad_files_are_named_and_the_others_converted(
    lits: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.pair(0)
    short, _ = tree.pair(1)
    short.write_bytes(short.read_bytes()[:-7])
    odd = write(tree.pair(2)[1], truth() + 1)
    larger = write(tree.pair(3)[1], truth((7, 10, 12)))
    alone = write(tree.lits / "latest" / "volume-4.nii", voxels())
    widow = write(tree.lits / FIRST / "segmentation-5.nii", truth())
    twice = write(tree.lits / SECOND / "volume-6.nii.gz", voxels())
    first, _ = tree.pair(6)
    nan = write(tree.pair(7)[0], np.where(voxels() > 0, np.nan, 0.5))
    damaged = tree.pair(8, ending=".nii.gz")[1]
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"^8 files are bad.*run the same command"):
        tree.run(lits)
    said = capsys.readouterr().out
    for sentence in (
        f"bad: {short}: the file ends too early, after 1433 of 1440 bytes of voxels",
        f"bad: {odd.parent}/volume-2.nii: its segmentation, {odd}: has the label 3; expected 0 (background), 1 (liver)",
        f"bad: {odd.parent}/volume-3.nii: its size is (12, 10, 6), that of {larger} is (12, 10, 7)",
        f"bad: {alone}: its segmentation, segmentation-4.nii, is missing",
        f"bad: {widow}: its volume, volume-5.nii, is missing",
        f"bad: {first}: is there more than once, also as {twice}",
        f"bad: {nan}: {(voxels() > 0).sum()} voxels are NaN or infinite",
        f"bad: {odd.parent}/volume-8.nii.gz: its segmentation, {damaged}: the compressed data is damaged",
    ):
        assert sentence in said
    assert tree.files() == ["imagesTr/LiTS_000_0000.nii.gz", "labelsTr/LiTS_000.nii.gz"]
    assert tree.json("dataset.json")["numTraining"] == 1


def test_a_second_run_makes_only_missing_files(lits: ModuleType, tree: Tree) -> None:
    tree.pair(0), tree.pair(1), tree.pair(2)
    tree.run(lits)
    files = [tree.dataset / name for name in tree.files()]
    before = [file.stat().st_mtime_ns for file in files]
    (tree.dataset / "imagesTr" / "LiTS_000_0000.nii.gz").unlink()
    (tree.dataset / "labelsTr" / "LiTS_002.nii.gz").unlink()
    tree.run(lits)
    after = [file.stat().st_mtime_ns for file in files]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True, False] * 2


def test_after_a_stop_the_finished_cases_are_kept(
    lits: ModuleType, tree: Tree, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.pair(0), tree.pair(1)
    load = lits.LitsCase.load

    def stopped(case: Any) -> Any:
        if case.name == "LiTS_001":
            raise KeyboardInterrupt
        return load(case)

    monkeypatch.setattr(lits.LitsCase, "load", stopped)
    with pytest.raises(KeyboardInterrupt):
        tree.run(lits)
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not (tree.dataset / "dataset.json").exists()
    first = tree.dataset / "imagesTr" / "LiTS_000_0000.nii.gz"
    made = first.stat().st_mtime_ns
    monkeypatch.setattr(lits.LitsCase, "load", load)
    tree.run(lits)
    assert first.stat().st_mtime_ns == made
    assert tree.json("dataset.json")["numTraining"] == 2


@pytest.mark.parametrize("sagittal", [False, True])
def test_the_crop_keeps_thirty_slices_around_the_liver(
    lits: ModuleType, tree: Tree, sagittal: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    values, labels = voxels((90, 10, 12)), np.zeros((90, 10, 12), np.uint8)
    labels[40:43, 2:5, 2:5], labels[45, 3, 3] = 1, 2
    slices = slice(10, 76)  # 40 - 30 to 45 + 30
    spacing, direction = SPACING, STRAIGHT
    if sagittal:  # the axis from head to feet comes first in the file, downwards
        values, labels = values.transpose(1, 2, 0).copy(), labels.transpose(1, 2, 0).copy()
        spacing, direction = (2.5, 0.75, 0.8), (0, 1, 0, 0, 0, 1, -1, 0, 0)
    write(tree.lits / "volume-0.nii", values, spacing, direction=direction)
    write(tree.lits / "segmentation-0.nii", labels, spacing, direction=direction)
    write(tree.lits / "test-volume-1.nii", values, spacing)
    tree.run(lits, "-crop_to_liver")
    assert "scores on this dataset flatter" in capsys.readouterr().out
    image, label = tree.read("imagesTr/LiTS_000_0000.nii.gz"), tree.read("labelsTr/LiTS_000.nii.gz")
    where = (slice(None), slice(None), slices) if sagittal else (slices,)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), values[where])
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label), labels[where])
    moved = -10 * 2.5 if sagittal else 10 * 2.5  # mm along the patient
    for volume in (image, label):
        assert volume.GetOrigin() == pytest.approx((ORIGIN[0], ORIGIN[1], ORIGIN[2] + moved))
    assert tree.array("imagesTs/LiTS_test_001_0000.nii.gz").shape == values.shape


def test_the_crop_ends_at_the_volume_and_needs_a_liver(
    lits: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.pair(0)
    empty = tree.pair(1)[1]
    write(empty, np.zeros((6, 10, 12), np.uint8))
    with pytest.raises(UserError, match="1 file is bad"):
        tree.run(lits, "-crop_to_liver")
    assert "volume-1.nii: its segmentation has no liver to crop to" in capsys.readouterr().out
    assert tree.array("imagesTr/LiTS_000_0000.nii.gz").shape == (6, 10, 12)


def test_a_labelled_test_volume_stays_out_of_training(lits: ModuleType, tree: Tree) -> None:
    tree.pair(0), tree.pair(5, "own/test")
    tree.run(lits)
    assert tree.files() == [
        "imagesTr/LiTS_000_0000.nii.gz",
        "imagesTs/LiTS_test_005_0000.nii.gz",
        "labelsTr/LiTS_000.nii.gz",
        "labelsTs/LiTS_test_005.nii.gz",
    ]


def test_an_impossible_conversion_ends_with_a_sentence(lits: ModuleType, tree: Tree) -> None:
    with pytest.raises(UserError, match=r"has no volume-N\.nii"):
        tree.run(lits)
    write(tree.lits / TEST / "test-volume-0.nii", voxels())
    with pytest.raises(UserError, match="no scan could be converted to a training case"):
        tree.run(lits)
    tree.pair(0)
    (tree.dataset / "conversion.json").write_text("{")
    with pytest.raises(UserError, match=r"conversion\.json is damaged: delete"):
        tree.run(lits)
    (tree.dataset / "conversion.json").unlink()
    with pytest.raises(UserError, match=r"has images but no conversion\.json"):
        tree.run(lits)
    for wrong, message in (
        (("-np", "0"), "-np is 0"),
        (("-d", "1000"), "-d is 1000"),
        (("-i", "no"), "-i is no, which"),
    ):
        with pytest.raises(UserError, match=message):
            tree.run(lits, *wrong)


def test_a_killed_worker_ends_the_command_with_a_sentence(
    lits: ModuleType, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise BrokenProcessPool

    tree.pair(0)
    monkeypatch.setattr(lits.convert, "convert_case", killed)
    with pytest.raises(UserError, match=r"a worker process was killed.*smaller -np"):
        tree.run(lits)


def test_an_unwritable_folder_is_not_blamed_on_the_scans(lits: ModuleType, tree: Tree) -> None:
    tree.pair(0)
    tree.dataset.mkdir(parents=True)
    (tree.dataset / "imagesTr").touch()
    with pytest.raises(UserError, match=r"imagesTr.*: check permissions and free space"):
        tree.run(lits)
