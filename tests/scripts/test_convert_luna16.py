"""scripts/convert_luna16.py, on small trees in LUNA16's own layout."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest.checks import check_file
from pcrl_nnunet.ingest.scans import Unusable

SCRIPTS = Path(__file__).parents[2] / "scripts"
UID = "1.3.6.1.4.1.14519.5.2.1.6279.6001.{}"
A, B, C, D = (UID.format(n) for n in (100225287222365663678666836860, 2, 3, 4))
SPACING = (0.7, 0.8, 2.5)  # mm, X Y Z
ORIGIN = (-30.0, 12.5, -300.5)
FLIPPED = (-1, 0, 0, 0, -1, 0, 0, 0, 1)


@pytest.fixture
def luna16(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with threads instead of its worker processes, which take seconds to start."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setattr(importlib.import_module("convert"), "worker_pool", ThreadPoolExecutor)
    return importlib.import_module("convert_luna16")


class Tree:
    """LUNA_FOLDER and the folder that nnU-Net calls nnUNet_raw."""

    def __init__(self, root: Path) -> None:
        self.luna, self.raw = root / "LUNA16", root / "raw"
        self.luna.mkdir()
        self.dataset = self.raw / "Dataset016_LUNA16"
        self.nodules([])
        self.candidates([])

    def nodules(self, rows: list[tuple[Any, ...]], name: str = "annotations.csv") -> None:
        self._table(name, "seriesuid,coordX,coordY,coordZ,diameter_mm", rows)

    def candidates(self, rows: list[tuple[Any, ...]]) -> None:
        self._table("CSVFILES/candidates_V2.csv", "seriesuid,coordX,coordY,coordZ,class", rows)

    def _table(self, name: str, head: str, rows: list[tuple[Any, ...]]) -> None:
        path = self.luna / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n")

    def scan(
        self,
        uid: str,
        subset: int = 0,
        size: tuple[int, int, int] = (12, 10, 6),
        direction: tuple[int, ...] = (1, 0, 0, 0, 1, 0, 0, 0, 1),
        packed: bool = False,
    ) -> Path:
        """Write a scan of random HU; size in voxels X Y Z."""
        values = np.random.default_rng(len(uid)).integers(-1000, 1000, size[::-1]).astype(np.int16)
        image = sitk.GetImageFromArray(values)
        image.SetSpacing(SPACING), image.SetOrigin(ORIGIN), image.SetDirection(direction)
        path = self.luna / f"subset{subset}" / f"{uid}.mhd"
        path.parent.mkdir(exist_ok=True)
        sitk.WriteImage(image, str(path), packed)
        return path

    def run(self, script: ModuleType, *options: str) -> None:
        sys.argv = ["convert_luna16.py", "-i", str(self.luna), "-d", "16", "-o", str(self.raw), "-np", "1", *options]
        script.main()

    def read(self, uid: str) -> tuple[sitk.Image, sitk.Image]:
        image = self.dataset / "imagesTr" / f"{uid}_0000.nii.gz"
        return sitk.ReadImage(str(image)), sitk.ReadImage(str(self.dataset / "labelsTr" / f"{uid}.nii.gz"))

    def mask(self, uid: str) -> np.ndarray:
        return sitk.GetArrayFromImage(self.read(uid)[1])

    def json(self, name: str) -> Any:
        return json.loads((self.dataset / name).read_text())


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(sys, "argv", sys.argv)  # restored after tests that set it
    return Tree(tmp_path)


@pytest.mark.slow
def test_the_command_writes_a_dataset_that_nnunet_verifies_and_plans(
    tree: Tree, tmp_path: Path, forked_commands: Path
) -> None:
    tree.scan(A, 0)  # the first case in nnU-Net's order has no nodule
    tree.scan(B, 1, direction=FLIPPED, packed=True)
    tree.scan(C, 2)
    tree.nodules([(B, -32.8, 9.3, -293, 6), (C, -26.5, 16.5, -293, 5)])
    tree.candidates([(A, -28.0, 14.123456789012, -290.5, 0), (B, -32.8, 9.3, -293, 1), (D, 0, 0, 0, 0)])
    preprocessed = tmp_path / "preprocessed"
    environ = {**os.environ, "nnUNet_raw": str(tree.raw), "nnUNet_preprocessed": str(preprocessed)}
    environ["nnUNet_results"] = str(tmp_path / "results")

    def run(command: Path, *words: str) -> str:
        done = subprocess.run([command, *words], env=environ, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    script = str(SCRIPTS / "convert_luna16.py")
    said = run(forked_commands / "python", script, "-i", str(tree.luna), "-d", "16", "-np", "2")
    assert "3 training cases" in said
    assert "2 nodules in 2 of 3 scans" in said
    assert "1 nodules and 1 others" in said
    assert "fold 2 validates on subset2" in said
    assert "1 scans that the tables name are not there, nor are all subsets" in said
    assert tree.json("dataset.json")["channel_names"] == {"0": "CT"}
    with open(tree.dataset / "candidates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seriesuid"], row["coordY"], row["class"]) for row in rows] == [
        (A, "14.123456789012", "0"),
        (B, "9.3", "1"),
    ]
    as_users_have_it = Path(sys.executable).parent / "nnUNetv2_plan_and_preprocess"
    run(as_users_have_it, "-d", "16", "--verify_dataset_integrity", "--no_pp", "-npfp", "1")
    fingerprint = json.loads((preprocessed / tree.dataset.name / "dataset_fingerprint.json").read_text())
    assert len(fingerprint["spacings"]) == 3
    used = json.loads((preprocessed / tree.dataset.name / "splits_final.json").read_text())
    assert [fold["val"] for fold in used] == [[A], [B], [C]]
    assert used == tree.json("splits_final.json")


def test_scans_keep_their_voxels_their_place_and_their_type(luna16: ModuleType, tree: Tree) -> None:
    path = tree.scan(A, direction=FLIPPED)
    tree.nodules([(A, -31.4, 10.9, -298, 4)])
    tree.run(luna16)
    before, (after, label) = sitk.ReadImage(str(path)), tree.read(A)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(after), sitk.GetArrayFromImage(before))
    assert after.GetPixelID() == sitk.sitkInt16
    for image in (after, label):
        assert image.GetOrigin() == pytest.approx(ORIGIN)
        assert image.GetSpacing() == pytest.approx(SPACING)
        assert image.GetDirection() == FLIPPED


def test_a_nodule_has_the_volume_and_the_centre_of_its_sphere(luna16: ModuleType, tree: Tree) -> None:
    tree.scan(A, size=(64, 64, 20))
    centre, radius = (-7.3, 38.2, -276.0), 9.0
    tree.nodules([(A, *centre, 2 * radius)])
    tree.run(luna16)
    mask = tree.mask(A)
    assert mask.sum() * math.prod(SPACING) == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.03)
    z, y, x = (indices.mean() for indices in np.nonzero(mask))
    world = [o + s * i for o, s, i in zip(ORIGIN, SPACING, (x, y, z), strict=True)]
    assert world == pytest.approx(centre, abs=0.1)
    assert set(np.unique(mask)) == {0, 1}


def test_a_small_nodule_in_a_flipped_scan_is_painted_at_its_place(luna16: ModuleType, tree: Tree) -> None:
    tree.scan(A, direction=FLIPPED)
    # Voxel (3, 6, 2): x = -30 - 3 * 0.7, y = 12.5 - 6 * 0.8, z = -300.5 + 2 * 2.5; the point lies slightly beside it.
    tree.nodules([(A, -32.1 + 0.3, 7.7 - 0.3, -295.5 + 1, 0.5)])
    tree.run(luna16)
    assert np.argwhere(tree.mask(A)).tolist() == [[2, 6, 3]]


def test_a_nodule_partly_outside_is_painted_and_one_wholly_outside_is_named(
    luna16: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.scan(A, size=(32, 32, 12))
    tree.nodules([(A, ORIGIN[0], 24.9, -286.75, 14), (A, 500, 24.9, -286.75, 14)])
    tree.run(luna16)
    mask = tree.mask(A)
    half = 4 / 3 * math.pi * 7**3 / 2 / math.prod(SPACING)
    middle = math.pi * 7**2 / 2 / math.prod(SPACING[1:])  # the half ball contains half of the plane x = 0
    assert mask.sum() == pytest.approx(half + middle, rel=0.05)
    note = f"{A}: the nodule at (500, 24.9, -286.75) mm, 14 mm wide, lies outside of the scan"
    assert note in capsys.readouterr().out
    tree.run(luna16)
    assert note in capsys.readouterr().out  # also if nothing was left to do


def test_a_sphere_centred_outside_the_image_is_painted_inside(luna16: ModuleType) -> None:
    mask = np.zeros((4, 4, 4), np.uint8)
    assert luna16.paint_sphere(mask, (-2.0, 1.0, 1.0), 2.5, (1.0, 1.0, 1.0))
    # At z = 0 the rest of the radius is sqrt(2.5^2 - 2^2) = 1.5: a square of 3 by 3.
    assert np.argwhere(mask).tolist() == [[0, y, x] for y in range(3) for x in range(3)]
    assert not luna16.paint_sphere(mask, (-2.0, 1.0, 1.0), 1.9, (1.0, 1.0, 1.0))
    assert mask.sum() == 9


def test_a_second_run_makes_only_missing_files(luna16: ModuleType, tree: Tree) -> None:
    tree.scan(A), tree.scan(B)
    tree.nodules([(B, -28, 14, -293, 5)])
    tree.run(luna16)
    files = sorted((tree.dataset / "imagesTr").iterdir()) + sorted((tree.dataset / "labelsTr").iterdir())
    before = [file.stat().st_mtime_ns for file in files]
    (tree.dataset / "imagesTr" / f"{B}_0000.nii.gz").unlink()
    tree.run(luna16)
    after = [file.stat().st_mtime_ns for file in files]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True, False]
    assert not (tree.dataset / "unfinished").exists()


def test_subsets_may_be_added_later(luna16: ModuleType, tree: Tree) -> None:
    tree.nodules([(A, -28, 14, -293, 5)])
    tree.scan(A, 3), tree.scan(B, 3)
    tree.run(luna16)
    assert not (tree.dataset / "splits_final.json").exists()
    for path in (tree.luna / "subset3").iterdir():
        path.unlink()
    tree.scan(C, 7)
    tree.run(luna16)
    assert tree.json("splits_final.json") == [
        {"train": [C], "val": sorted([A, B])},
        {"train": sorted([A, B]), "val": [C]},
    ]
    assert tree.json("dataset.json")["numTraining"] == 3


def test_bad_files_are_named_and_the_others_converted(
    luna16: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {n: tree.scan(UID.format(n), packed=n == 13) for n in (10, 11, 12, 13, 14, 15)}
    tree.nodules([(UID.format(10), -28, 14, -293, 5)])
    raw = paths[11].with_suffix(".raw")
    whole = raw.read_bytes()
    raw.write_bytes(whole[:-7])
    paths[12].with_suffix(".raw").unlink()
    damaged = bytearray(paths[13].with_suffix(".zraw").read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    paths[13].with_suffix(".zraw").write_bytes(damaged)
    paths[14].unlink()
    paths[15].write_text("nothing\n")
    with pytest.raises(UserError, match=r"^5 files are bad.*run the same command"):
        tree.run(luna16)
    said = capsys.readouterr().out
    for sentence in (
        f"bad: {paths[11]}: its voxels, {raw.name}, end too early, after 1433 of 1440 bytes",
        f"bad: {paths[12]}: its voxels, {UID.format(12)}.raw, are missing",
        f"bad: {paths[13]}: its compressed voxels, {UID.format(13)}.zraw, are damaged",
        f"bad: {paths[14].with_suffix('.raw')}: its header, {UID.format(14)}.mhd, is missing",
        f"bad: {paths[15]}: of another kind, or damaged, or a MetaImage header that ends too early",
    ):
        assert sentence in said
    assert [path.name for path in (tree.dataset / "imagesTr").iterdir()] == [f"{UID.format(10)}_0000.nii.gz"]
    assert len((tree.dataset / "bad_cases.txt").read_text().splitlines()) == 5
    assert tree.json("dataset.json")["numTraining"] == 1

    raw.write_bytes(whole)
    for n in (12, 13, 14, 15):
        for path in (tree.luna / "subset0").glob(f"{UID.format(n)}.*"):
            path.unlink()
    tree.run(luna16)
    assert tree.json("dataset.json")["numTraining"] == 2
    assert (tree.dataset / "bad_cases.txt").read_text() == ""


def test_a_packed_scan_that_ends_too_early_is_bad(luna16: ModuleType, tree: Tree) -> None:
    voxels = tree.scan(A, packed=True).with_suffix(".zraw")
    voxels.write_bytes(voxels.read_bytes()[:-100])
    with pytest.raises(Unusable, match="end too early"):
        check_file(str(voxels.with_suffix(".mhd")))


def test_a_scan_missing_from_all_ten_subsets_is_bad(
    luna16: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    uids = [UID.format(n) for n in range(20)]
    for n, uid in enumerate(uids):
        tree.scan(uid, n % 10, size=(4, 4, 4))
    tree.nodules([(uids[0], -28, 14, -298, 5), (UID.format(99), 0, 0, 0, 5)])
    with pytest.raises(UserError, match="1 file is bad"):
        tree.run(luna16)
    assert f"bad: {UID.format(99)}.mhd: is in none of the subsets" in capsys.readouterr().out
    splits = tree.json("splits_final.json")
    assert [fold["val"] for fold in splits] == [sorted([uids[n], uids[n + 10]]) for n in range(10)]
    assert all(sorted(fold["train"] + fold["val"]) == sorted(uids) for fold in splits)


def test_lung_masks_and_hidden_files_are_skipped_and_copies_named(luna16: ModuleType, tree: Tree) -> None:
    path = tree.scan(A)
    for folder in ("seg-lungs-LUNA16", "subset1/subset1"):  # some people unpack into the second
        (tree.luna / folder).mkdir(parents=True)
        for ending in (".mhd", ".raw"):
            name = f"{A}{ending}"
            (tree.luna / folder / name).write_bytes(path.with_suffix(ending).read_bytes())
    (tree.luna / "subset1" / f"._{B}.mhd").write_bytes(b"")
    found = luna16.find(tree.luna)
    assert found.scans == {A: (path, 0)}
    assert [(b.where, b.reason) for b in found.bad] == [
        (str(tree.luna / "subset1" / "subset1" / f"{A}.mhd"), f"is there twice, the other one was taken: {path}")
    ]


def test_folds_of_another_program_are_kept_and_named(
    luna16: ModuleType, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    used = tmp_path / "preprocessed" / tree.dataset.name / "splits_final.json"
    tree.scan(A, 0), tree.scan(B, 1)
    tree.nodules([(A, -28, 14, -293, 5)])
    tree.run(luna16)
    assert json.loads(used.read_text()) == tree.json("splits_final.json")
    tree.run(luna16)
    assert "other folds" not in capsys.readouterr().out
    used.write_text("[]")
    tree.run(luna16)
    assert f"{used} has other folds and stays" in capsys.readouterr().out
    assert used.read_text() == "[]"


def test_a_file_that_was_changed_or_added_is_found_at_the_end(
    luna16: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.scan(A), tree.scan(B)
    tree.nodules([(A, -28, 14, -293, 5)])
    tree.run(luna16)
    label = tree.dataset / "labelsTr" / f"{A}.nii.gz"
    moved = sitk.ReadImage(str(label))
    moved.SetOrigin((0, 0, 0))
    sitk.WriteImage(moved, str(label))
    (tree.dataset / "imagesTr" / f"{B}_0000.nii.gz").write_bytes(b"no image")
    (tree.dataset / "imagesTr" / "own_0000.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match="3 files are bad"):
        tree.run(luna16)
    said = capsys.readouterr().out
    assert f"{label}: its origin is not the image's: delete it" in said
    assert f"{B}_0000.nii.gz: it or its label:" in said
    assert "own_0000.nii.gz: belongs to no case" in said


def test_an_impossible_conversion_ends_with_a_sentence(
    luna16: ModuleType, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree.luna / "subset4.zip").touch()
    with pytest.raises(UserError, match=r"no \.mhd file .* unpack subset4\.zip first"):
        tree.run(luna16)
    tree.scan(A)
    with pytest.raises(UserError, match="1 file is bad"):
        tree.run(luna16)
    tree.nodules([(A, -28, "?", -293, 5)])
    with pytest.raises(UserError, match=r"annotations\.csv, line 2, is damaged"):
        tree.run(luna16)
    tree.nodules([(A, -28, 14, -293, 5)])
    with pytest.raises(UserError, match=r"made with annotations\.csv \w+ \(now \w+\) and must not be mixed"):
        tree.run(luna16)
    (tree.luna / "annotations.csv").write_text("uid,x\n")
    with pytest.raises(UserError, match="has no column seriesuid"):
        tree.run(luna16)
    (tree.luna / "annotations.csv").unlink()
    with pytest.raises(UserError, match=r"has no annotations\.csv"):
        tree.run(luna16)
    (tree.raw / "Dataset016_Other").mkdir()
    with pytest.raises(UserError, match=r"ID 16 is taken by .*Dataset016_Other"):
        tree.run(luna16)
    monkeypatch.setattr(sys, "argv", ["convert_luna16.py", "-i", str(tree.luna), "-d", "16"])
    with pytest.raises(UserError, match="nnUNet_raw is not set"):
        luna16.main()


def test_without_candidates_everything_else_is_converted(
    luna16: ModuleType, tree: Tree, capsys: pytest.CaptureFixture[str]
) -> None:
    tree.scan(A)
    tree.nodules([(A, -28, 14, -293, 5)])
    (tree.luna / "CSVFILES" / "candidates_V2.csv").unlink()
    with pytest.raises(UserError, match="1 file is bad"):
        tree.run(luna16)
    assert "has no candidates_V2.csv" in capsys.readouterr().out
    assert tree.mask(A).any()


def test_the_tables_nearest_to_the_top_are_used(luna16: ModuleType, tree: Tree) -> None:
    tree.scan(A)
    tree.nodules([], "evaluationScript/annotations.csv")
    found = luna16.find(tree.luna)
    assert found.annotations == tree.luna / "annotations.csv"
    assert found.candidates == tree.luna / "CSVFILES" / "candidates_V2.csv"
