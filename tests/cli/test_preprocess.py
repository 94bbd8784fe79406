"""pcrl_nnunet_preprocess on a dataset that nnU-Net's own commands have planned and preprocessed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry

from pcrl_nnunet.cli import preprocess

NAME = "Dataset321_Tiny"


@pytest.fixture(scope="module")
def nnunet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders raw and pp, with three cases planned and preprocessed by nnU-Net's own command."""
    home = tmp_path_factory.mktemp("nnunet")
    raw = home / "raw" / NAME
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for k in range(3):
        z, y, x = np.ogrid[:22, : 20 + k, :24]
        ball = (z - 11) ** 2 + (y - 10) ** 2 + (x - 12) ** 2 < 40 + 10 * k
        image = sitk.GetImageFromArray((300 + 400 * ball + rng.normal(0, 60, ball.shape)).astype(np.int16))
        image.SetSpacing((1.0, 1.25, 1.5 + 0.25 * k))
        image = sitk.DICOMOrient(image, "RAS")
        labels = sitk.GetImageFromArray(ball.astype(np.uint8))
        labels.SetSpacing(image.GetSpacing())
        labels = sitk.DICOMOrient(labels, "RAS")
        sitk.WriteImage(image, str(raw / "imagesTr" / f"ball{k}_0000.nii.gz"))
        sitk.WriteImage(labels, str(raw / "labelsTr" / f"ball{k}.nii.gz"))
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "ball": 1},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        for variable, folder in (("nnUNet_raw", "raw"), ("nnUNet_preprocessed", "pp"), ("nnUNet_results", "res")):
            (home / folder).mkdir(exist_ok=True)
            patch.setenv(variable, str(home / folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        options = ["-d", "321", "-npfp", "1", "-np", "1", "-c", "3d_fullres", "--no_pbar"]
        patch.setattr(sys, "argv", ["nnUNetv2_plan_and_preprocess", *options])
        plan_and_preprocess_entry()
        yield home


def run(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pcrl_nnunet_preprocess", *arguments])
        preprocess.main_entry()


def write_dicom(image: sitk.Image, folder: Path) -> None:
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.KeepOriginalImageUIDOn()
    d = image.GetDirection()
    for z in range(image.GetDepth()):
        slice_ = image[:, :, z]
        slice_.SetMetaData("0008|0060", "MR")
        slice_.SetMetaData("0020|000e", "1.2.826.0.1.3680043.2.1125.9")
        slice_.SetMetaData("0020|0037", "\\".join(map(str, (d[0], d[3], d[6], d[1], d[4], d[7]))))
        slice_.SetMetaData("0020|0032", "\\".join(map(str, image.TransformIndexToPhysicalPoint((0, 0, z)))))
        writer.SetFileName(str(folder / f"I{z * 7 % 1009:04d}"))
        writer.Execute(slice_)


def test_scans_of_any_type_and_name_get_nnunets_preprocessed_voxels(
    nnunet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((nnunet / "raw" / NAME / "imagesTr").iterdir())
    dataset = nnunet / "pp" / NAME
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*") if p.is_file()}
    expected = {}
    for k, path in enumerate(images):
        image = sitk.ReadImage(str(path))  # the same voxels in other files
        (tmp_path / f"pat {k}" / "T1").mkdir(parents=True)
        for ending in (".mha", ".nrrd", ".nii"):
            name = tmp_path / f"pat {k}" / "T1" / f"scan{ending}"
            sitk.WriteImage(sitk.DICOMOrient(image, "LPI"), str(name))
            expected[str(name)] = path
        write_dicom(sitk.DICOMOrient(image, "PIR"), tmp_path / f"pat {k}" / "dicom")
        expected[str(tmp_path / f"pat {k}" / "dicom")] = path
    shutil.copy(images[0], tmp_path / "a copy.nii.gz")
    (tmp_path / "pat 0" / "notes.txt").write_text("nothing")
    (tmp_path / "pat 0" / "broken.nii.gz").write_bytes(images[0].read_bytes()[:2000])

    run("-d", "321", "-i", str(tmp_path), "-c", "3d_fullres", "2d", "-np", "1")

    for configuration in ("3d_fullres", "2d"):
        out = dataset / f"nnUNetPlans_{configuration}_unlabelled"
        cases = json.loads((out / "cases.json").read_text())["cases"]
        assert {entry["sources"][0] for entry in cases.values()} == set(expected)
        assert {path.stem for path in out.glob("*.b2nd")} == set(cases)
    out, own_folder = dataset / "nnUNetPlans_3d_fullres_unlabelled", dataset / "nnUNetPlans_3d_fullres"
    for name, entry in json.loads((out / "cases.json").read_text())["cases"].items():
        own = expected[entry["sources"][0]].name.removesuffix("_0000.nii.gz")
        theirs, ours = (
            blosc2.open(str(file), mode="r")[:] for file in (own_folder / f"{own}.b2nd", out / f"{name}.b2nd")
        )
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert {p for p in dataset.rglob("*") if p.is_file() and "_unlabelled" not in str(p)} == set(before)
    printed = capsys.readouterr().out
    assert "14 scans: 3 .mha, 3 .nii, 3 .nrrd, 3 DICOM series, 2 .nii.gz" in printed
    assert "12 made, 0 there already, 1 skipped, 1 bad" in printed
    assert f"bad: {tmp_path}/pat 0/broken.nii.gz: the compressed data is damaged or ends too early" in printed
    assert "a copy.nii.gz: the same file as the dataset's own image ball0_0000.nii.gz" in printed
    assert "1 files are no scans: 1 .txt" in printed

    run("-d", NAME, "-i", str(tmp_path), "-np", "1")
    assert "0 made, 12 there already, 1 skipped, 1 bad" in capsys.readouterr().out


def test_too_many_bad_scans_end_with_status_1_and_one_sentence(
    nnunet: Path, tmp_path: Path, forked_commands: Path
) -> None:
    for k in range(3):
        (tmp_path / f"{k}.mha").write_text("nothing")
    command = [forked_commands / "pcrl_nnunet_preprocess", "-d", "321", "-i", str(tmp_path), "-np", "1"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: 3 of 3 scans are bad, over 10%")
    assert "Traceback" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("-d 321", "-i is missing"),
        ("-d 987 -i {here}", "dataset '987' was not found"),
        ("-d 321 -i {here} -p OtherPlans", "OtherPlans.json does not exist"),
        ("-d 321 -i {here} -c 3d_lowres", "configuration '3d_lowres' is not in nnUNetPlans"),
        ("-d 321 -i {here}/nowhere", "nowhere, which is not a folder"),
        ("-d 321 -i {here} -np 0", "-np is 0; expected 1 or more"),
        ("-d 321 -i {here} -np 1", "no scan in {here}, only 1 .txt"),
        ("-d 321 -pl NoPlanner", "-pl is 'NoPlanner'; expected PCRLPlanner"),
    ],
)
def test_wrong_use_ends_with_one_sentence(nnunet: Path, tmp_path: Path, options: str, sentence: str) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(SystemExit) as caught:
        run(*options.format(here=tmp_path).split())
    message = str(caught.value)
    assert message.startswith("Error: ")
    assert sentence.format(here=tmp_path) in message
    assert "\n" not in message


def test_unset_variables_are_named(nnunet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(SystemExit, match="nnUNet_preprocessed is not set"):
        run("-d", "321", "-i", str(tmp_path))
    monkeypatch.setenv("nnUNet_preprocessed", str(nnunet / "pp"))
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(SystemExit, match="set nnUNet_raw"):
        run("-d", NAME, "-pl", "PCRLPlanner")


def test_our_planners_work_without_registration(nnunet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("-d", "321", "-pl", "PCRLPlanner")
    plan = nnunet / "pp" / NAME / "PCRLPlans.json"
    assert "pcrl" in json.loads(plan.read_text())
    assert f"Wrote the plan {plan}; use it with -p PCRLPlans" in capsys.readouterr().out
