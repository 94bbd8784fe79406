"""Preprocessing scans without labels: the same voxels as nnU-Net's, resumable, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from in_this_process import InThisProcess
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest.find import find_scans
from pcrl_nnunet.ingest.scans import SetAside, Target
from pcrl_nnunet.ingest.unlabelled import BAD_LIST, MANIFEST, Summary, preprocess, unlabelled_folder
from pcrl_nnunet.ingest.workers import worker_pool
from pcrl_nnunet.loading.cases import find_cases

RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
CONFIGURATION = {
    "data_identifier": "nnUNetPlans_3d_fullres",
    "preprocessor_name": "DefaultPreprocessor",
    "batch_size": 2,
    "patch_size": [16, 12, 12],
    "spacing": [2.0, 1.0, 1.3],
    "normalization_schemes": ["ZScoreNormalization", "CTNormalization"],
    "use_mask_for_norm": [True, False],
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": RESAMPLING,
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True, "order": 1},
    "architecture": {},
}
INTENSITIES = {"mean": 100.0, "std": 50.0, "percentile_00_5": -80.0, "percentile_99_5": 300.0}


def make_target(channels: int = 1, **plans: Any) -> Target:
    first = deepcopy(CONFIGURATION)
    for key in ("normalization_schemes", "use_mask_for_norm"):
        first[key] = CONFIGURATION[key][:channels]  # type: ignore[index]
    content = {
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "original_median_shape_after_transp": [12, 16, 14],
        "foreground_intensity_properties_per_channel": {str(c): INTENSITIES for c in range(channels)},
        "configurations": {
            "3d_fullres": first,
            "2d": {**first, "spacing": [1.0, 1.3], "patch_size": [12, 12], "data_identifier": "nnUNetPlans_2d"},
        },
        **plans,
    }
    dataset_json = {
        "channel_names": {str(c): "MRI" for c in range(channels)},
        "labels": {"background": 0, "thing": 1},
        "file_ending": ".nii.gz",
    }
    return Target(content, dataset_json, "3d_fullres")


def write_scan(path: Path, seed: int = 0, shape: tuple[int, int, int] = (12, 16, 14)) -> Path:
    """Noise in a box, zeros around it, so that nnU-Net crops and masks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.zeros(shape, np.float32)
    inner = voxels[2:-2, 3:-1, 2:-3]
    inner[...] = np.random.default_rng(seed).normal(100, 60, inner.shape)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 1.2, 2.5))
    sitk.WriteImage(image, str(path), True)
    return path


def write_scans(folder: Path, count: int) -> Path:
    for k in range(count):
        write_scan(folder / f"case{k:02d}_0000.nii.gz", seed=k)
    return folder


def write_bad(folder: Path, count: int) -> None:
    for k in range(count):
        (folder / f"bad{k:02d}_0000.nii.gz").write_text("not an image")


def run(scans: Path, out: Path, target: Target | None = None, pool: Executor | None = None) -> Summary:
    target = target or make_target()
    found = find_scans(str(scans), target)
    return preprocess(found, target, str(out), pool or InThisProcess(), lambda line: None, progress=False)


def made(out: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in out.glob("*.b2nd")}


def others(out: Path) -> set[str]:
    return {path.name for path in out.iterdir() if path.suffix != ".b2nd"}


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
@pytest.mark.parametrize("transpose", [[0, 1, 2], [2, 0, 1]])
def test_voxels_and_file_layout_match_nnunets_own_preprocessing(
    tmp_path: Path, configuration: str, transpose: list[int]
) -> None:
    target = replace(make_target(channels=2, transpose_forward=transpose), configuration=configuration)
    files = [str(write_scan(tmp_path / "in" / f"a_{c:04d}.nii.gz", seed=c)) for c in range(2)]
    seg = sitk.GetImageFromArray((sitk.GetArrayFromImage(sitk.ReadImage(files[0])) > 130).astype(np.uint8))
    seg.CopyInformation(sitk.ReadImage(files[0]))
    sitk.WriteImage(seg, str(tmp_path / "a.nii.gz"))
    (tmp_path / "theirs").mkdir()
    DefaultPreprocessor(verbose=False).run_case_save(
        str(tmp_path / "theirs" / "a"), files, str(tmp_path / "a.nii.gz"), target.plans_manager,
        target.configuration_manager, target.dataset_json,
    )  # fmt: skip
    run(tmp_path / "in", tmp_path / "ours", target)
    theirs, ours = (blosc2.open(str(tmp_path / who / "a.b2nd"), mode="r") for who in ("theirs", "ours"))
    np.testing.assert_array_equal(ours[:], theirs[:])
    assert (ours.dtype, ours.chunks, ours.blocks) == (np.float32, theirs.chunks, theirs.blocks)


def test_the_folder_lies_beside_the_plans_data_and_holds_images_only(tmp_path: Path) -> None:
    out = Path(unlabelled_folder(str(tmp_path), "nnUNetPlans_3d_fullres"))
    assert out.parent == tmp_path
    assert out.name == "nnUNetPlans_3d_fullres_unlabelled"
    run(write_scans(tmp_path / "in", 3), out)
    assert [case.name for case in find_cases(str(out))] == ["case00", "case01", "case02"]
    assert others(out) == {MANIFEST, BAD_LIST, ".lock"}


def test_the_manifest_says_where_each_case_came_from(tmp_path: Path) -> None:
    run(write_scans(tmp_path / "in", 1), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["plans_name"] == "nnUNetPlans"
    case = manifest["cases"]["case00"]
    assert case["sources"] == [str(tmp_path / "in" / "case00_0000.nii.gz")]
    assert case["spacing"] == pytest.approx([2.5, 1.2, 1.0])
    assert tuple(case["shape"]) == blosc2.open(str(tmp_path / "out" / "case00.b2nd"), mode="r").shape


def test_a_second_run_makes_only_new_or_changed_cases(tmp_path: Path) -> None:
    scans, out = write_scans(tmp_path / "in", 3), tmp_path / "out"
    run(scans, out)
    before = made(out)
    write_scan(scans / "case01_0000.nii.gz", seed=99)
    write_scan(scans / "new_0000.nii.gz", seed=5)
    summary = run(scans, out)
    assert (summary.made, summary.already) == (2, 2)
    assert {name for name, content in made(out).items() if content != before.get(name)} == {"case01", "new"}


def test_a_damaged_or_missing_case_is_made_again(tmp_path: Path) -> None:
    scans, out = write_scans(tmp_path / "in", 3), tmp_path / "out"
    run(scans, out)
    before = made(out)
    (out / "case00.b2nd").unlink()
    (out / "case01.b2nd").write_bytes(before["case01"][:100])
    assert run(scans, out).made == 2
    assert made(out) == before


def test_a_case_is_removed_when_its_scan_becomes_unreadable(tmp_path: Path) -> None:
    scans, out = write_scans(tmp_path / "in", 12), tmp_path / "out"
    run(scans, out)
    (scans / "case03_0000.nii.gz").write_text("overwritten")
    assert len(run(scans, out).bad) == 1
    assert "case03" not in made(out)
    assert "case03" not in json.loads((out / MANIFEST).read_text())["cases"]


def test_a_folder_that_was_moved_is_recognised_and_another_one_is_kept_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(write_scans(tmp_path / "in", 2), out)
    (tmp_path / "in").rename(tmp_path / "moved")
    assert run(tmp_path / "moved", out).made == 0
    before = made(out)
    write_scan(tmp_path / "other" / "case00_0000.nii.gz", seed=77)
    for repeat in range(2):
        assert run(tmp_path / "other", out).made == 1 - repeat
    assert len(made(out)) == 3
    assert before.items() <= made(out).items()


@pytest.mark.parametrize(
    ("key", "value"), [("spacing", [1.0, 1.0, 1.0]), ("normalization_schemes", ["CTNormalization"])]
)
def test_another_preprocessing_is_not_mixed_in(tmp_path: Path, key: str, value: object) -> None:
    scans, out = write_scans(tmp_path / "in", 1), tmp_path / "out"
    run(scans, out)
    before, target = made(out), make_target()
    target.plans["configurations"]["3d_fullres"][key] = value
    with pytest.raises(UserError, match=f"another {key}.*delete the folder"):
        run(scans, out, target)
    assert made(out) == before


def test_a_plan_that_differs_in_the_network_only_shares_the_folder(tmp_path: Path) -> None:
    scans, out = write_scans(tmp_path / "in", 1), tmp_path / "out"
    run(scans, out)
    target = make_target(plans_name="PCRLPlans")
    target.plans["configurations"]["3d_fullres"].update(patch_size=[24, 24, 24], batch_size=7)
    assert run(scans, out, target).already == 1


@pytest.mark.parametrize("manifest", [None, "{", '{"cases": {}}'])
def test_cases_of_unknown_origin_are_not_mixed_in(tmp_path: Path, manifest: str | None) -> None:
    scans, out = write_scans(tmp_path / "in", 1), tmp_path / "out"
    run(scans, out)
    if manifest is None:
        (out / MANIFEST).unlink()
    else:
        (out / MANIFEST).write_text(manifest)
    with pytest.raises(UserError, match="delete the folder"):
        run(scans, out)


def test_a_copy_of_one_of_the_datasets_own_images_is_skipped(tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "in", 2)
    own = tmp_path / "raw" / "labelled_0000.nii.gz"
    own.parent.mkdir()
    own.write_bytes((scans / "case01_0000.nii.gz").read_bytes())
    summary = run(scans, tmp_path / "out", replace(make_target(), own_images={str(own): "labelled"}))
    assert summary.set_aside == [
        SetAside(
            str(scans / "case01_0000.nii.gz"), "the same file as the dataset's own image labelled_0000.nii.gz", False
        )
    ]
    assert list(made(tmp_path / "out")) == ["case00"]


def test_a_scan_that_the_plans_normalisation_clips_to_a_constant_is_bad(tmp_path: Path) -> None:
    scans, target = write_scans(tmp_path / "in", 11), make_target()
    image = sitk.ReadImage(str(scans / "case03_0000.nii.gz"))
    target.plans["configurations"]["3d_fullres"].update(
        normalization_schemes=["CTNormalization"], use_mask_for_norm=[False]
    )
    sitk.WriteImage(image + 2000, str(scans / "case03_0000.nii.gz"))  # statistics reach from -80 to 300
    summary = run(scans, tmp_path / "out", target)
    assert (summary.made, [Path(s.where).name for s in summary.bad]) == (10, ["case03_0000.nii.gz"])
    assert summary.bad[0].reason == "all voxels became the same: the plan's normalisation is for other intensities"


def test_a_label_map_is_left_out_and_named_and_a_flag_includes_it(tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "in", 1)
    labels = np.zeros((12, 16, 14), np.uint8)
    labels[2:7, 3:9, 3:8], labels[7:10, 9:13, 8:11] = 1, 2
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(scans / "label_0000.nii.gz"))
    summary = run(scans, tmp_path / "out")
    ((where, reason, bad),) = [(s.where, s.reason, s.bad) for s in summary.set_aside]
    assert where == str(scans / "label_0000.nii.gz")
    assert "a label map: only 3 different values: 0, 1, 2; if it is a scan, give --label_maps" in reason
    assert not bad
    assert run(scans, tmp_path / "out", replace(make_target(), takes_label_maps=True)).made == 1


def test_a_scan_named_like_a_label_is_used_with_a_note(tmp_path: Path) -> None:
    write_scan(tmp_path / "in" / "unlabelled_001.nii.gz", seed=1)
    write_scan(tmp_path / "in" / "masks" / "a.nii.gz", seed=2)
    summary = run(tmp_path / "in", tmp_path / "out")
    assert summary.made == 2
    (note,) = summary.notes
    assert "masks/a.nii.gz: its name says 'masks', its voxels are a scan's" in note


def test_a_case_below_the_networks_stride_is_refused_before_and_after_cropping(tmp_path: Path) -> None:
    target = make_target()
    strides = {"arch_kwargs": {"strides": [[1, 1, 1], [2, 4, 2], [1, 2, 2]]}}
    target.plans["configurations"]["3d_fullres"]["architecture"] = strides
    scans = write_scans(tmp_path / "in", 10)
    image = sitk.ReadImage(str(scans / "case03_0000.nii.gz"))
    image.SetSpacing((0.3, 0.5, 2.5))
    sitk.WriteImage(image, str(scans / "case03_0000.nii.gz"))
    assert "make a case of 15 x 8 x 3 voxels" in run(scans, tmp_path / "out", target).bad[0].reason
    voxels = np.zeros((12, 16, 14), np.float32)
    voxels[3:9, 3:8, 3:10] = np.random.default_rng(0).normal(100, 60, (6, 5, 7))
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 1.2, 2.5))
    sitk.WriteImage(image, str(scans / "case03_0000.nii.gz"))
    (bad,) = run(scans, tmp_path / "out", target).bad
    assert "without its empty border the case has 8 x 6 x 5 voxels" in bad.reason


def test_cases_that_an_older_version_has_read_are_not_mixed_in(tmp_path: Path) -> None:
    scans, out = write_scans(tmp_path / "in", 1), tmp_path / "out"
    run(scans, out)
    manifest = json.loads((out / MANIFEST).read_text())
    del manifest["read_by"]
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"read by another version of pcrl_nnunet.*delete the folder"):
        run(scans, out)


def test_one_bad_scan_in_ten_is_listed_and_the_others_are_made(tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "in", 9)
    write_bad(scans, 1)
    summary = run(scans, tmp_path / "out")
    assert (summary.made, len(summary.bad)) == (9, 1)
    listed = (tmp_path / "out" / BAD_LIST).read_text(encoding="utf-8")
    assert listed.startswith(f"bad\t{scans / 'bad00_0000.nii.gz'}\tnot a NIfTI file, whatever its name says")
    assert listed.count("\n") == 1


def test_more_than_ten_percent_of_bad_scans_stop_the_command(tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "in", 30)
    write_bad(scans, 12)
    with pytest.raises(UserError, match=r"of 42 scans are bad, over 10%.*bad\d\d_0000.nii.gz: not a NIfTI"):
        run(scans, tmp_path / "out")
    assert others(tmp_path / "out") == {MANIFEST, BAD_LIST, ".lock"}


def test_one_bad_scan_of_five_does_not_stop_the_others(tmp_path: Path) -> None:
    scans, out = write_scans(tmp_path / "in", 4), tmp_path / "out"
    write_bad(scans, 1)
    with pytest.raises(UserError, match="1 of 5 scans are bad"):
        run(scans, out)
    assert len(made(out)) == 4
    (scans / "bad00_0000.nii.gz").unlink()
    assert run(scans, out).already == 4


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    write_scan(tmp_path / "in" / "a.nii.gz", shape=(2, 16, 14))
    with pytest.raises(UserError, match=r"none of the scans can be used: only 2 slices \(a localiser\?\) \(1\)"):
        run(tmp_path / "in", tmp_path / "out")


def test_a_full_disk_is_not_blamed_on_the_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(data: object, seg: object, properties: object, truncated: str, **_: object) -> None:
        Path(f"{truncated}.b2nd").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(nnUNetDatasetBlosc2, "save_case", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(write_scans(tmp_path / "in", 12), tmp_path / "out")
    assert not made(tmp_path / "out")
    assert others(tmp_path / "out") == {MANIFEST, BAD_LIST, ".lock"}
    monkeypatch.undo()
    assert run(tmp_path / "in", tmp_path / "out").made == 12


def test_an_interrupted_run_leaves_finished_cases_only_and_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans, out = write_scans(tmp_path / "in", 4), tmp_path / "out"
    save = nnUNetDatasetBlosc2.save_case

    def interrupted(*args: Any, **kwargs: Any) -> None:
        save(*args, **kwargs)
        if "case02" in args[3]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nnUNetDatasetBlosc2, "save_case", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(scans, out)
    assert "case02" not in made(out)
    assert others(out) == {MANIFEST, BAD_LIST, ".lock"}
    run(scans, out)
    assert sorted(made(out)) == ["case00", "case01", "case02", "case03"]
    assert made(out) == _from_scratch(scans, tmp_path / "again")


def _from_scratch(scans: Path, out: Path) -> dict[str, bytes]:
    run(scans, out)
    return made(out)


def test_unfinished_files_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "out" / "unfinished" / "case00").mkdir(parents=True)
    (tmp_path / "out" / "unfinished" / "case00" / "case00.b2nd").write_bytes(b"half")
    run(write_scans(tmp_path / "in", 1), tmp_path / "out")
    assert others(tmp_path / "out") == {MANIFEST, BAD_LIST, ".lock"}


def test_a_killed_worker_is_explained(tmp_path: Path) -> None:
    class Killed(Executor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            scan, _, _, scratch = args
            os.makedirs(os.path.join(scratch, scan.name))  # the state while a scan is processed
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool())
            return future

    with pytest.raises(UserError, match=r"memory.*smaller -np.*In work were: case00"):
        run(write_scans(tmp_path / "in", 1), tmp_path / "out", pool=Killed())


def test_a_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    scans, out = write_scans(tmp_path / "in", 1), tmp_path / "out"
    run(scans, out)
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="Another pcrl_nnunet_preprocess"):
            run(scans, out)


@pytest.mark.slow
def test_processes_make_the_same_files(tmp_path: Path) -> None:
    scans = write_scans(tmp_path / "in", 4)
    write_scan(scans / "sub" / "x.mha", seed=9)
    with worker_pool(2) as pool:
        run(scans, tmp_path / "two", pool=pool)
    assert made(tmp_path / "two") == _from_scratch(scans, tmp_path / "one")
