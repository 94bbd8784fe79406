"""A plan with one dataset's intensities and another one's network, and its views."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blosc2
import numpy as np
import pytest
from in_this_process import InThisProcess
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter
from tiny_dataset import write_source, write_target

from pcrl_nnunet import checkpoint, registration
from pcrl_nnunet.cli import preprocess, pretrain
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.ingest import workers
from pcrl_nnunet.ingest.target import Source, plan_for, read_source
from pcrl_nnunet.loading.cases import Case, CaseVolume, find_cases
from pcrl_nnunet.loading.loader import ViewLoader, make_loader
from pcrl_nnunet.methods import PlanFacts, method_class
from pcrl_nnunet.pretraining.cases import of_several
from pcrl_nnunet.pretraining.settings import pretrain_settings
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.report.progress import PretrainLogger
from pcrl_nnunet.trainers import pretrain as trainer
from pcrl_nnunet.transfer.seen import cases_seen

SOURCE, TARGET = "Dataset016_Lungs", "Dataset042_Liver"
NAME = f"nnUNetPlans_for_{TARGET}"
LIVER = {"mean": 99.0, "std": 42.0, "percentile_00_5": -17.0, "percentile_99_5": 201.0}  # HU, as in LiTS
MRI = {"mean": 600.0, "std": 250.0, "percentile_00_5": 50.0, "percentile_99_5": 1500.0}


def lung_ct(seed: int, size: int = 40) -> np.ndarray:
    """(1, Z, Y, X), HU: parenchyma with small vessels and a nodule."""
    rng = np.random.default_rng(seed)
    texture = gaussian_filter(rng.normal(size=(size, size, size)), 1.0)
    voxels = np.where(texture > np.quantile(texture, 0.75), -300.0, -850.0)
    nodule = ((np.indices(voxels.shape) - 7) ** 2).sum(0) < 5**2
    voxels[nodule] = 40 + 20 * texture[nodule] / texture.std()
    return (voxels + rng.normal(0, 40, voxels.shape))[None].astype(np.int16)


def mri(seed: int, size: int = 40, channels: int = 1) -> np.ndarray:
    """(C, Z, Y, X): smooth tissue far above what CT calls liver."""
    rng = np.random.default_rng(seed)
    texture = gaussian_filter(rng.normal(size=(channels, size, size, size)), (0, 2, 2, 2))
    return (700 + 150 * texture / texture.std() + rng.normal(0, 20, texture.shape)).clip(205).astype(np.int16)


def hashes(*folders: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders, where preprocessing starts no processes."""

    @contextmanager
    def pool(num: int) -> Iterator[InThisProcess]:
        yield InThisProcess()

    for folder in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{folder}", str(tmp_path / folder))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(workers, "worker_pool", pool)
    monkeypatch.setattr(registration, "is_registered", lambda: True)
    monkeypatch.setattr(Report, "write", lambda *_: None)  # pictures take seconds each, and have tests of their own
    monkeypatch.setattr(PretrainLogger, "plot_progress_png", lambda *_: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    return tmp_path


def run(command: Any, *arguments: str) -> Any:
    """Run a command in this process; return its exit status, or the error's sentence."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        try:
            command.main_entry()
        except SystemExit as end:
            return end.code
    return 0


@pytest.fixture
def lungs_for_liver(home: Path) -> SimpleNamespace:
    """Three chest CTs with their own planning and fingerprint, and a plan for liver CTs."""
    folder = write_source(home, SOURCE, {f"lung_{k}": lung_ct(k, 24 + 2 * k) for k in range(3)})
    (folder / "nnUNetPlans.json").write_text('{"dataset_name": "of its own"}')
    (folder / "nnUNetPlans_3d_fullres").mkdir()
    (folder / "nnUNetPlans_3d_fullres" / "lung_0.b2nd").write_bytes(b"preprocessed by its own plan")
    (folder / "splits_final.json").write_text("[]")
    (folder / "dataset.json").write_bytes((home / "raw" / SOURCE / "dataset.json").read_bytes() + b"\n")
    plan = write_target(home, TARGET, "CTNormalization", LIVER)
    preprocessed = home / "preprocessed"
    return SimpleNamespace(folder=folder, target=preprocessed / TARGET, plan=plan, raw=home / "raw", home=home)


# ----------------------------------------------------------------------------------------------------------- the plan


def described(channel: str = "CT", channels: int = 1, shapes: Any = None, spacings: Any = None) -> Source:
    """A description of a dataset as its fingerprint gives it."""
    statistics = {"mean": -700.0, "std": 300.0, "percentile_00_5": -950.0, "percentile_99_5": 100.0}
    return Source(
        SOURCE,
        {"channel_names": {str(c): channel for c in range(channels)}},
        {
            "spacings": spacings or [[2.0, 0.7, 0.7], [1.0, 0.8, 0.8], [2.5, 0.6, 0.6]],
            "shapes_after_crop": shapes or [[100, 400, 410], [250, 420, 420], [90, 500, 512]],
            "median_relative_size_after_cropping": 0.9,
            "foreground_intensity_properties_per_channel": {str(c): statistics for c in range(channels)},
        },
        "NibabelIO",
    )


def planned(tmp_path: Path, **configuration: Any) -> dict[str, Any]:
    return write_target(tmp_path, TARGET, "ZScoreNormalization", MRI, **configuration)


def test_a_plan_for_its_own_dataset_differs_in_names_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_source(home, SOURCE, {f"lung_{k}": lung_ct(k, 8) for k in range(3)})
    fingerprint = json.loads((folder / "dataset_fingerprint.json").read_text())
    # the last axis has the thickest slices, and zeros were cropped: axes change places, and MR is normalised in a mask
    fingerprint |= {"spacings": [[0.9, 1.0, 3.0], [1.1, 1.2, 3.5], [1.0, 1.0, 5.0]]}
    fingerprint |= {"shapes_after_crop": [[90, 70, 24], [100, 80, 20], [77, 61, 33]]}
    fingerprint["median_relative_size_after_cropping"] = 0.5
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    description = json.loads((home / "raw" / SOURCE / "dataset.json").read_text())
    description["channel_names"] = {"0": "T2"}
    (home / "raw" / SOURCE / "dataset.json").write_text(json.dumps(description))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # this planner takes it for a number of threads
    ExperimentPlanner(SOURCE).plan_experiment()
    expected = json.loads((folder / "nnUNetPlans.json").read_text())
    assert expected["transpose_forward"] == [2, 0, 1]
    assert expected["configurations"]["3d_fullres"]["use_mask_for_norm"] == [True]

    other = copy.deepcopy(expected)  # everything that comes from the source gets another dataset's value
    other["foreground_intensity_properties_per_channel"] = {}
    other["original_median_shape_after_transp"] = other["original_median_spacing_after_transp"] = [1, 1, 1]
    other["image_reader_writer"] = "Tiff3DIO"
    for configuration in other["configurations"].values():
        configuration["median_image_size_in_voxels"] = [1] * len(configuration["spacing"])
        configuration |= {"normalization_schemes": ["NoNormalization"] * 2, "use_mask_for_norm": [False] * 2}
    plan, notes = plan_for(read_source(str(folder), str(home / "raw" / SOURCE)), other)

    assert notes == []
    assert plan.pop("plans_name") == f"nnUNetPlans_for_{SOURCE}"
    assert plan.pop("pcrl_target") == {"dataset_name": SOURCE, "plans_name": expected.pop("plans_name")}
    del expected["experiment_planner_used"]
    for configuration in expected["configurations"].values():
        own = configuration["data_identifier"].replace("nnUNetPlans", f"nnUNetPlans_for_{SOURCE}")
        configuration["data_identifier"] = own
    assert plan == expected


def test_the_target_gives_space_and_network_the_source_intensities_and_channels(tmp_path: Path) -> None:
    theirs = planned(tmp_path, spacing=[3.0, 1.0, 1.0])
    before, source = copy.deepcopy(theirs), described()
    plan, _ = plan_for(source, theirs)
    assert theirs == before
    assert (plan["dataset_name"], plan["plans_name"]) == (SOURCE, NAME)
    assert plan["image_reader_writer"] == "NibabelIO"
    statistics = source.fingerprint["foreground_intensity_properties_per_channel"]
    assert plan["foreground_intensity_properties_per_channel"] == statistics
    assert plan["original_median_shape_after_transp"] == [100, 420, 420]
    assert plan["original_median_spacing_after_transp"] == [2.0, 0.7, 0.7]
    ours, own = plan["configurations"]["3d_fullres"], theirs["configurations"]["3d_fullres"]
    assert ours["normalization_schemes"] == ["CTNormalization"]
    # 100 x 2 / 3 = 67, 250 / 3 = 83 and 90 x 2.5 / 3 = 75 slices; rows 400 x 0.7 = 280, 336, 300; columns 287, 336, 307
    assert ours["median_image_size_in_voxels"] == [75, 300, 307]
    of_source = {"normalization_schemes", "use_mask_for_norm", "median_image_size_in_voxels", "data_identifier"}
    assert {k: v for k, v in ours.items() if k not in of_source} == {k: v for k, v in own.items() if k not in of_source}


def test_the_plan_has_its_own_data_folders_and_shares_them_like_the_target(tmp_path: Path) -> None:
    theirs = planned(tmp_path)
    theirs["configurations"] |= {
        "3d_lowres": {"inherits_from": "3d_fullres", "spacing": [2.0, 2.0, 2.0], "data_identifier": "their_lowres"},
        "larger_batch": {"inherits_from": "3d_fullres", "batch_size": 7},
    }
    plan, _ = plan_for(described(), theirs)
    manager = PlansManager(plan)
    assert {name: manager.get_configuration(name).data_identifier for name in plan["configurations"]} == {
        "3d_fullres": f"{NAME}_3d_fullres",
        "3d_lowres": f"{NAME}_3d_lowres",
        "3d_cascade_fullres": f"{NAME}_3d_fullres",
        "larger_batch": f"{NAME}_3d_fullres",
    }
    assert manager.get_configuration("3d_lowres").median_image_size_in_voxels == [112, 150, 154]
    assert manager.get_configuration("larger_batch").batch_size == 7
    assert manager.get_configuration("3d_cascade_fullres").previous_stage_name == "3d_lowres"


def test_the_targets_normalisation_needs_a_flag_and_equal_channels(tmp_path: Path) -> None:
    theirs = planned(tmp_path)
    plan, _ = plan_for(described(), theirs, "target")
    assert plan["configurations"]["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization"]
    assert plan["foreground_intensity_properties_per_channel"] == {"0": MRI}
    with pytest.raises(UserError, match=r"have 4 channels and .* for 1; leave -normalization target out"):
        plan_for(described(channels=4), theirs, "target")
    plan, _ = plan_for(described(channels=4), theirs)
    assert plan["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"] * 4


def test_only_pretraining_settings_of_the_target_are_copied(tmp_path: Path) -> None:
    theirs = planned(tmp_path)
    views = {"num_local": 3, "global_crop_sizes": [[20, 20, 20]], "local_crop_sizes": [[5, 5, 5]]}
    augmentation = {"p_flip": 0.1}
    pretrain = {"epochs": 7, "pcrlv2": {"augmentation": augmentation}, "3d_fullres": {"pcrlv2": {"views": views}}}
    theirs["pcrl"] = {"pretrain": pretrain, "finetune": {"epochs": 3}, "checkpoint": "/of/another.pth"}
    plan, notes = plan_for(described(), theirs)
    assert plan["pcrl"] == {"pretrain": pretrain}
    assert notes == []
    small = described(shapes=[[19, 60, 60]], spacings=[[1, 1, 1]])
    plan, notes = plan_for(small, theirs)
    smaller = {"pcrlv2": {"views": {"num_local": 3}}}
    assert plan["pcrl"] == {"pretrain": {**pretrain, "3d_fullres": smaller}}
    assert len(notes) == 1
    assert "of pcrl.pretrain.3d_fullres.pcrlv2 exceed the median image of 19 x 60 x 60 voxels" in notes[0]
    theirs["pcrl"]["pretrain"] = {"pcrlv2": {"views": views}}  # for all configurations
    plan, notes = plan_for(small, theirs)
    assert plan["pcrl"] == {"pretrain": smaller}
    assert ["of pcrl.pretrain.pcrlv2 exceed" in note for note in notes] == [True]
    del theirs["pcrl"]
    assert "pcrl" not in plan_for(small, theirs)[0]


def test_flat_images_pretrain_only_in_2d(tmp_path: Path) -> None:
    theirs = planned(tmp_path)
    theirs["configurations"]["2d"] = {**theirs["configurations"]["3d_fullres"], "spacing": [1.0, 1.0]}
    theirs["pcrl"] = {"pretrain": {"epochs": 7, "3d_fullres": {"epochs": 3}}}
    flat = described(shapes=[[1, 300, 300]], spacings=[[999, 1, 1]])
    plan, notes = plan_for(flat, theirs)
    assert list(plan["configurations"]) == ["2d"]
    assert plan["configurations"]["2d"]["median_image_size_in_voxels"] == [300, 300]
    assert plan["pcrl"] == {"pretrain": {"epochs": 7}}
    three = "3d_fullres, 3d_lowres, 3d_cascade_fullres"
    assert notes == [f"{three} of nnUNetPlans of {TARGET} cannot be pretrained on the flat images of {SOURCE}"]
    del theirs["configurations"]["2d"]
    with pytest.raises(UserError, match=r"Dataset016_Lungs are flat, .* \(3d_fullres, .* give a -target that has a 2d"):
        plan_for(flat, theirs)


# ---------------------------------------------------------------------------------------------------------- the files


def made(folder: Path) -> Path:
    return folder / f"{NAME}_3d_fullres_unlabelled"


def test_images_get_the_sources_normalisation(lungs_for_liver: SimpleNamespace) -> None:
    assert run(preprocess, "-d", "16", "-target", "42") == 0
    statistics = json.loads((lungs_for_liver.folder / "dataset_fingerprint.json").read_text())[
        "foreground_intensity_properties_per_channel"
    ]["0"]
    for k in range(3):
        raw = lung_ct(k, 24 + 2 * k).astype(np.float64)  # the spacing is the target's already
        clipped = np.clip(raw, statistics["percentile_00_5"], statistics["percentile_99_5"])
        expected = (clipped - statistics["mean"]) / statistics["std"]
        voxels = blosc2.open(str(made(lungs_for_liver.folder) / f"lung_{k}.b2nd"), mode="r")[:]
        np.testing.assert_allclose(voxels, expected, atol=1e-4)


def test_existing_files_of_both_datasets_stay_byte_identical(lungs_for_liver: SimpleNamespace, tmp_path: Path) -> None:
    folders = lungs_for_liver.folder, lungs_for_liver.target, lungs_for_liver.raw
    before = hashes(*folders)
    assert run(preprocess, "-d", "16", "-target", TARGET) == 0
    after = hashes(*folders)
    assert {path: after[path] for path in before} == before
    new = {str(Path(path).relative_to(lungs_for_liver.folder)) for path in after.keys() - before.keys()}
    cases = {f"{made(lungs_for_liver.folder).name}/lung_{k}.b2nd" for k in range(3)}
    others = {f"{made(lungs_for_liver.folder).name}/{name}" for name in ("cases.json", "bad_cases.txt", ".lock")}
    assert new == {f"{NAME}.json"} | cases | others


@pytest.mark.parametrize("when", ["the plan is written", "a case is written"])
def test_a_failure_midway_keeps_existing_files_and_the_next_run_continues(
    lungs_for_liver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    folders = lungs_for_liver.folder, lungs_for_liver.target, lungs_for_liver.raw
    before = hashes(*folders)

    def failing(function: Callable[..., Any], on: str) -> Callable[..., Any]:
        def fails(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(arg, str) and on in arg for arg in args):
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return fails

    with monkeypatch.context() as patch:
        if when == "the plan is written":
            patch.setattr("os.replace", failing(__import__("os").replace, f"{NAME}.json"))
        else:
            patch.setattr(nnUNetDatasetBlosc2, "save_case", failing(nnUNetDatasetBlosc2.save_case, "lung_1"))
        assert "No space left on device" in run(preprocess, "-d", "16", "-target", "42")
    after = hashes(*folders)
    assert {path: after[path] for path in before} == before
    assert not any("draft_" in path for path in after)
    plan_file = lungs_for_liver.folder / f"{NAME}.json"
    assert plan_file.exists() == (when == "a case is written")
    assert not (made(lungs_for_liver.folder) / "lung_1.b2nd").exists()
    assert run(preprocess, "-d", "16", "-target", "42") == 0
    assert len(find_cases(str(made(lungs_for_liver.folder)))) == 3


def test_a_second_run_makes_nothing_again_and_keeps_an_edited_block(
    lungs_for_liver: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    run(preprocess, "-d", "16", "-target", "42")
    plan_file = lungs_for_liver.folder / f"{NAME}.json"
    plan = json.loads(plan_file.read_text())
    assert plan["pcrl"] == {"pretrain": lungs_for_liver.plan["pcrl"]["pretrain"]}
    plan["pcrl"] = {"pretrain": {"epochs": 99}}
    plan_file.write_text(json.dumps(plan))
    before = hashes(lungs_for_liver.folder)
    capsys.readouterr()
    assert run(preprocess, "-d", "16", "-target", "42") == 0
    printed = capsys.readouterr().out
    assert "0 made, 3 there already" in printed
    assert "Wrote the plan" not in printed
    assert "pcrl_nnunet_pretrain -d 16 -target 42" in printed
    assert hashes(lungs_for_liver.folder) == before


def test_a_changed_image_in_a_moved_raw_folder_keeps_its_name(
    lungs_for_liver: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(preprocess, "-d", "16", "-target", "42")
    (lungs_for_liver.home / "elsewhere").mkdir()
    lungs_for_liver.raw.rename(lungs_for_liver.home / "elsewhere" / "raw")
    monkeypatch.setenv("nnUNet_raw", str(lungs_for_liver.home / "elsewhere" / "raw"))
    images = lungs_for_liver.home / "elsewhere" / "raw" / SOURCE / "imagesTr"
    (images / "lung_1_0000.nii.gz").write_bytes((images / "lung_2_0000.nii.gz").read_bytes())
    assert run(preprocess, "-d", "16", "-target", "42") == 0
    cases = find_cases(str(made(lungs_for_liver.folder)))
    assert [case.name for case in cases] == ["lung_0", "lung_1", "lung_2"]
    one, two = (blosc2.open(case.path, mode="r")[:] for case in cases[1:])
    np.testing.assert_array_equal(one, two)


def test_an_outdated_plan_is_not_overwritten(lungs_for_liver: SimpleNamespace) -> None:
    run(preprocess, "-d", "16", "-target", "42")
    before = hashes(lungs_for_liver.folder)
    lungs_for_liver.plan["configurations"]["3d_fullres"]["patch_size"] = [16, 16, 16]
    (lungs_for_liver.target / "nnUNetPlans.json").write_text(json.dumps(lungs_for_liver.plan))
    message = run(preprocess, "-d", "16", "-target", "42")
    expected = r"3d_fullres.patch_size, .*was Dataset042_Liver planned again.*delete or rename that file"
    assert re.search(rf"Error: {re.escape(str(lungs_for_liver.folder / NAME))}.json exists, .*{expected}", message)
    assert hashes(lungs_for_liver.folder) == before
    (lungs_for_liver.folder / f"{NAME}.json").unlink()
    assert run(preprocess, "-d", "16", "-target", "42") == 0  # the images still fit the plan
    assert "normalization_schemes" not in message


def test_scans_without_labels_join_the_datasets_own_images(
    lungs_for_liver: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = write_source(tmp_path / "more", SOURCE, {"other": lung_ct(8, 24), "lung_1": lung_ct(9, 24)})
    scans = more.parents[1] / "raw" / SOURCE / "imagesTr"
    own = lungs_for_liver.raw / SOURCE / "imagesTr" / "lung_0_0000.nii.gz"
    (scans / "copy_of_an_own_one.nii.gz").write_bytes(own.read_bytes())
    assert run(preprocess, "-d", "16", "-target", "42", "-i", str(scans)) == 0
    assert "3 images of Dataset016_Lungs itself" in capsys.readouterr().out
    names = [case.name for case in find_cases(str(made(lungs_for_liver.folder)))]
    namesake = next(name for name in names if name.startswith("lung_1_"))
    assert names == ["lung_0", "lung_1", namesake, "lung_2", "other"]
    assert run(preprocess, "-d", "16", "-target", "42", "-i", str(own.parent)) == 0
    assert len(find_cases(str(made(lungs_for_liver.folder)))) == 5


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        ("", "-d 16 -target 16", "-target 16 is the dataset of -d itself"),
        ("", "-d 16 -target 43", "dataset '43' was not found"),
        ("", "-d 17 -target 42", "dataset '17' was not found"),
        ("", "-d 16 -target 42 -p Other", r"Other.json does not exist; run nnUNetv2_plan_and_preprocess -d 42"),
        ("", "-d 16 -target 42 -c 2d", "configuration '2d' is not in nnUNetPlans; it has 3d_fullres"),
        ("", "-d 16 -i {here} -normalization target", "-normalization needs -target"),
        ("", "-d 16 -target 42 -pl PCRLPlanner", "-pl and -target exclude each other"),
        ("", "-d 16 -target 42 -i {here}/nowhere", "nowhere, which is not a folder"),
        ("preprocessed/{}/dataset_fingerprint.json", "-d 16 -target 42",
         "dataset_fingerprint.json does not exist; run nnUNetv2_extract_fingerprint -d 16 first"),
        ("*/{}/dataset.json", "-d 16 -target 42", "dataset.json does not exist; set nnUNet_raw"),
        ("raw/{}/imagesTr/*", "-d 16 -target 42", "no image of Dataset016_Lungs was found in .*; set nnUNet_raw"),
    ],
)  # fmt: skip
def test_wrong_use_ends_with_one_sentence_and_leaves_nothing_behind(
    lungs_for_liver: SimpleNamespace, spoil: str, arguments: str, message: str
) -> None:
    for path in lungs_for_liver.home.glob(spoil.format(SOURCE)) if spoil else ():
        path.unlink()
    before = hashes(lungs_for_liver.home)
    said = run(preprocess, *arguments.format(here=lungs_for_liver.home).split())
    assert re.search(f"^Error: .*{message}", said), said
    assert "\n" not in said
    assert hashes(lungs_for_liver.home) == before


def test_an_incomplete_fingerprint_or_images_that_cannot_be_read_are_named(lungs_for_liver: SimpleNamespace) -> None:
    for image in (lungs_for_liver.raw / SOURCE / "imagesTr").iterdir():
        image.write_text("not an image")
    assert "images can be read, the first is " in run(preprocess, "-d16", "-target", "42")
    (lungs_for_liver.folder / "dataset_fingerprint.json").write_text('{"spacings": []}')
    message = run(preprocess, "-d", "16", "-target", "42")
    assert "shapes_after_crop; run nnUNetv2_extract_fingerprint -d 16 --clean" in message


# -------------------------------------------------------------------------------------------------------- pretraining


@pytest.mark.parametrize(("channels", "for_channels"), [(1, 1), (4, 1), (1, 4)])
def test_pretraining_with_a_target_writes_a_described_checkpoint(
    home: Path, capsys: pytest.CaptureFixture[str], channels: int, for_channels: int
) -> None:
    write_source(home, SOURCE, {f"brain_{k}": mri(k, 18, channels) for k in range(3)}, "MRI")
    write_target(home, TARGET, "CTNormalization", LIVER, for_channels)
    assert run(preprocess, "-d", "16", "-target", "42") == 0
    capsys.readouterr()
    assert run(pretrain, "-d", "16", "-target", "42", "-device", "cpu") == 0
    path = home / "results" / SOURCE / f"PCRLPretrainTrainer_pcrlv2__{NAME}__3d_fullres" / "fold_all" / checkpoint.FINAL
    content = checkpoint.read(str(path))
    assert content["num_input_channels"] == channels
    assert content["plans"]["pcrl_target"] == {"dataset_name": TARGET, "plans_name": "nnUNetPlans"}
    assert (content["plans"]["plans_name"], content["datasets"]) == (NAME, [SOURCE])
    assert [case["name"] for case in content["cases"]] == ["brain_0", "brain_1", "brain_2"]
    assert content["cases"][0]["path"] == f"{SOURCE}/{NAME}_3d_fullres_unlabelled/brain_0.b2nd"
    assert content["epochs"] == 1  # from the target's block
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last == (
        f"Bring it into {TARGET} with: pcrl_nnunet_transfer -i {path} -d {TARGET} -c 3d_fullres -p nnUNetPlans "
        f"-name {SOURCE}"
    )


def test_several_datasets_pretrain_one_network(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, third = "Dataset017_Knees", "Dataset018_Many"
    write_source(home, SOURCE, {f"scan_{k}": mri(k, 18) for k in range(3)}, "MRI")
    write_source(home, other, {f"scan_{k}": mri(9 + k, 18) for k in range(2)}, "MRI")
    write_source(home, third, {"scan_0": mri(20, 18, 2)}, "MRI")
    write_target(home, TARGET, "CTNormalization", LIVER)
    run(preprocess, "-d", "16", "-target", "42")
    command = ["-target", "42", "-device", "cpu"]
    message = run(pretrain, "-d", "16", "17", *command)
    assert message.endswith(f"{NAME}.json does not exist; run pcrl_nnunet_preprocess -d 17 -target 42 first")
    for dataset in ("17", "18"):
        run(preprocess, "-d", dataset, "-target", "42")
    assert f"{third} has 2 channels and {SOURCE} 1" in run(pretrain, "-d", "16", "18", *command)
    assert f"-d has {other} more than once" in run(pretrain, "-d", "16", "17", other, *command)
    capsys.readouterr()
    of_other = home / "preprocessed" / other / f"{NAME}.json"
    plan = of_other.read_text()
    changed = json.loads(plan)
    changed["configurations"]["3d_fullres"]["spacing"] = [9, 1, 1]
    of_other.write_text(json.dumps(changed))  # the plan of the target was another one then
    message = run(pretrain, "-d", "16", "17", *command)
    assert re.search(rf"{other} was preprocessed with a spacing of \[9, 1, 1\].*preprocess -d 17 -target 42", message)
    of_other.write_text(plan)
    drawn_from: list[list[Case]] = []

    def loader(cases: list[Case], *args: Any, **kwargs: Any) -> Any:
        drawn_from.append(cases)
        return make_loader(cases, *args, **kwargs)

    monkeypatch.setattr(trainer, "make_loader", loader)
    assert run(pretrain, "-d", "16", "17", *command) == 0
    assert f"and 2 of {other}" in capsys.readouterr().out
    assert [case.weight for case in drawn_from[0]] == pytest.approx([3**-0.5] * 3 + [2**-0.5] * 2)
    path = home / "results" / SOURCE / f"PCRLPretrainTrainer_pcrlv2__{NAME}__3d_fullres" / "fold_all" / checkpoint.FINAL
    content = checkpoint.read(str(path))
    assert content["datasets"] == [SOURCE, other]
    folders = [f"{name}/{NAME}_3d_fullres_unlabelled" for name in 3 * [SOURCE] + 2 * [other]]
    names = ["scan_0", "scan_1", "scan_2", "scan_0", "scan_1"]
    assert [case["name"] for case in content["cases"]] == names
    assert [case["path"] for case in content["cases"]] == [f"{a}/{b}.b2nd" for a, b in zip(folders, names, strict=True)]
    changed = json.loads(plan)
    changed["configurations"]["3d_fullres"]["normalization_schemes"] = ["NoNormalization"]
    of_other.write_text(json.dumps(changed))
    message = run(pretrain, "-d", "16", "17", *command, "--c")
    assert f"is finished, with other plans of other datasets ({other})" in message
    one_of_the_other = find_cases(str(home / "preprocessed" / other / f"{NAME}_3d_fullres_unlabelled"))[1:]
    assert cases_seen(content, other, one_of_the_other) == ["scan_1"]


def test_a_datasets_own_plan_pretrains_on_several_prepared_datasets(home: Path) -> None:
    other = "Dataset017_Knees"
    for number, name in ((3, SOURCE), (2, other)):
        write_source(home, name, {f"scan_{k}": mri(9 * number + k, 18) for k in range(number)}, "MRI")
    write_target(home, TARGET, "ZScoreNormalization", MRI)
    for dataset in ("16", "17"):
        run(preprocess, "-d", dataset, "-target", "42")
    file = home / "preprocessed" / TARGET / "nnUNetPlans.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "original_median_shape_after_transp": [18, 18, 18]}))
    run(preprocess, "-d", "42", "-i", str(home / "raw" / SOURCE / "imagesTr"))
    assert run(pretrain, "-d", "42", "16", "17", "-p", "nnUNetPlans", "-device", "cpu") == 0
    path = (
        home
        / "results"
        / TARGET
        / "PCRLPretrainTrainer_pcrlv2__nnUNetPlans__3d_fullres"
        / "fold_all"
        / checkpoint.FINAL
    )
    content = checkpoint.read(str(path))
    assert content["datasets"] == [TARGET, SOURCE, other]
    assert [case["path"].split("/")[0] for case in content["cases"]] == 3 * [TARGET] + 3 * [SOURCE] + 2 * [other]


def test_a_dataset_is_drawn_by_the_square_root_of_its_size() -> None:
    sizes = {"Dataset004_A": 4, "Dataset016_B": 400}
    cases = of_several({name: [Case(f"c{i}", f"{name}/c{i}") for i in range(n)] for name, n in sizes.items()})
    assert [case.name for case in cases[:5]] == ["c0", "c1", "c2", "c3", "Dataset016_B/c0"]
    shares = [sum(case.weight for case in cases if case.path.startswith(name)) for name in sizes]
    assert shares[1] / shares[0] == pytest.approx(10)  # root of 100


def test_the_plan_may_be_given_by_its_own_name(lungs_for_liver: SimpleNamespace) -> None:
    run(preprocess, "-d", "16", "-target", "42")
    assert run(pretrain, "-d", SOURCE, "-p", NAME, "-device", "cpu") == 0
    (path,) = lungs_for_liver.home.joinpath("results").rglob(checkpoint.FINAL)
    assert path.parts[-3] == f"PCRLPretrainTrainer_pcrlv2__{NAME}__3d_fullres"


def test_missing_steps_before_pretraining_are_named(lungs_for_liver: SimpleNamespace) -> None:
    options = ["-d", "16", "-target", "42", "-device", "cpu"]
    message = run(pretrain, *options, "-p", "Other")
    assert f"Other_for_{TARGET}.json does not exist; run pcrl_nnunet_preprocess -d 16 -target 42 -p Other" in message
    run(preprocess, "-d", "16", "-target", "42")
    message = run(pretrain, *options, "-f", "0")
    assert re.search(f"fold 0 of {TARGET} was asked for, but its cases, .*, are not in .*, or leave -f out", message)
    message = run(pretrain, *options, "-c", "3d_lowres")
    assert message == 0  # shares the data of 3d_fullres in this plan
    for path in made(lungs_for_liver.folder).glob("*.b2nd"):
        path.unlink()
    message = run(pretrain, *options)
    assert f"run pcrl_nnunet_preprocess -d {SOURCE} -target {TARGET} -c 3d_fullres first" in message


# ---------------------------------------------------------------------------------------------------------- the views


def loader_of(folder: Path) -> ViewLoader:
    plan = json.loads((folder / f"{NAME}.json").read_text())
    configuration = PlansManager(plan).get_configuration("3d_fullres").configuration
    settings = pretrain_settings(plan, "3d_fullres", configuration)
    cases = find_cases(str(made(folder)))
    method, facts = method_class("pcrlv2"), PlanFacts.of("3d_fullres", configuration)
    return ViewLoader(cases, method.views(settings.own, facts, 1, {}), 8, seed=0)


def global_views(folder: Path, count: int = 60) -> np.ndarray:
    """Standard deviation of global views as the loader draws them, before noise and the like; count x 2 of them."""
    loader = loader_of(folder)
    return np.array([loader.sample(0, k)[1]["target"].std(axis=(1, 2, 3, 4)) for k in range(count)])


def local_views(folder: Path, count: int = 20) -> np.ndarray:
    """Standard deviation of the local views, before noise and the like."""
    loader = loader_of(folder)
    of_samples = [
        loader.views.show(case, CaseVolume(case), np.random.default_rng(k)).views[2:]
        for k, case in zip(range(count), cycle(find_cases(str(made(folder)))), strict=False)
    ]  # the first two are global
    return np.array([[view.images["before"].std() for view in views] for views in of_samples])


LUNGS = {f"case_{k}": lung_ct(k) for k in range(3)}
HEADS = {f"case_{k}": mri(k) for k in range(3)}


@pytest.mark.parametrize(
    ("channel", "images", "scheme", "statistics", "spacing", "clipped_by_the_targets"),
    [
        ("CT", LUNGS, "CTNormalization", LIVER, [1.0, 1.0, 1.0], True),
        ("CT", LUNGS, "ZScoreNormalization", MRI, [2.5, 1.2, 1.2], False),
        ("MRI", HEADS, "CTNormalization", LIVER, [2.5, 0.8, 0.8], True),
    ],
    ids=["lung CT for liver CT", "CT for MR", "MR for CT"],
)
def test_no_view_is_clipped_to_a_constant(
    home: Path,
    channel: str,
    images: dict[str, np.ndarray],
    scheme: str,
    statistics: dict[str, float],
    spacing: list[float],
    clipped_by_the_targets: bool,
) -> None:
    folder = write_source(home, SOURCE, images, channel)
    write_target(home, TARGET, scheme, statistics, spacing=spacing)
    assert run(preprocess, "-d", "16", "-target", "42") == 0
    assert global_views(folder).min() > 0.1  # all voxels have a standard deviation of 1
    assert local_views(folder).min() > 0.02
    whole = np.concatenate([blosc2.open(case.path, mode="r")[:].ravel() for case in find_cases(str(made(folder)))])
    assert 0.7 < whole.std() < 1.1
    if clipped_by_the_targets:  # proves that the assertion above can fail
        (folder / f"{NAME}.json").unlink()
        made(folder).rename(folder / "before")
        said = run(preprocess, "-d", "16", "-target", "42", "-normalization", "target")
        if channel == "MRI":  # all intensities lie outside the window
            assert "all voxels became the same: the plan's normalisation is for other intensities" in said
        else:
            assert said == 0
            assert np.mean(global_views(folder) < 1e-5) > 0.3
            assert np.mean(local_views(folder) < 1e-5) > 0.3
