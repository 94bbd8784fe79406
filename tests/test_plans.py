"""Names of datasets, plans and configurations, and the commands at the end of errors."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from nnunetv2.experiment_planning import plan_and_preprocess_entrypoints as nnunet

from pcrl_nnunet.cli import classify, compare, preprocess, pretrain, transfer
from pcrl_nnunet.commands import corrected
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import find_cases
from pcrl_nnunet.plans import has_masks, lacks_masks, load_plan, nearest_datasets, planning_command

KNOWN = ["Dataset004_Hippocampus", "Dataset027_ACDC", "Dataset050_LIDCNodules", "Dataset070_CHAOSLiverMR"]


@pytest.fixture
def as_typed(monkeypatch: pytest.MonkeyPatch):
    def typed(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"/usr/bin/{words[0]}", *words[1:]])

    return typed


def write_raw(tiny: SimpleNamespace, name: str, masks: bool) -> None:
    folder = tiny.folder.parent.parent / "raw" / name
    (folder / ("labelsTr" if masks else "imagesTr")).mkdir(parents=True)
    (folder / "dataset.json").write_text(json.dumps(tiny.dataset_json))


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [
        ("Dataset004_Hipocampus", ["Dataset004_Hippocampus"]),
        ("dataset004_hippocampus", ["Dataset004_Hippocampus"]),
        ("Hippocampus", ["Dataset004_Hippocampus"]),
        ("4_Hippo", ["Dataset004_Hippocampus"]),
        ("Dataset04_Hippocampus", ["Dataset004_Hippocampus"]),
        ("Dataset027_Heart", ["Dataset027_ACDC"]),
        ("liver", ["Dataset070_CHAOSLiverMR"]),
        ("40", ["Dataset004_Hippocampus"]),
        ("Dataset27", ["Dataset027_ACDC"]),
        ("998", []),
        ("Dataset998_Zebrafish", []),
        ("", []),
    ],
)
def test_a_misspelt_dataset_is_answered_with_the_nearest_name(typed: str, nearest: list[str]) -> None:
    assert nearest_datasets(typed, KNOWN) == nearest


COMMANDS = {
    "pcrl_nnunet_pretrain": (pretrain, []),
    "pcrl_nnunet_preprocess": (preprocess, ["-i", "."]),
    "pcrl_nnunet_compare": (compare, ["-o", "a folder"]),
    "pcrl_nnunet_transfer": (transfer, ["-i", "x.pth", "-name", "y"]),
    "pcrl_nnunet_classify": (classify, ["-c", "2d", "-f", "0", "-i", "x", "-o", "y.csv"]),
}


@pytest.mark.parametrize("wrong", ["Dataset999_Tny", "99"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_with_itself_and_the_nearest_dataset(tiny, as_typed, name: str, wrong: str) -> None:
    module, options = COMMANDS[name]
    (tiny.results.parent).mkdir()
    as_typed(name, "-d", wrong, *options)
    with pytest.raises(SystemExit) as end:
        module.main_entry()
    said = str(end.value)
    assert said.startswith(f"Error: dataset '{wrong}' was not found in ")
    quoted = " ".join(f"'{word}'" if " " in word else word for word in options)
    assert said.endswith(f"; the nearest is Dataset999_Tiny: {name} -d Dataset999_Tiny {quoted}".rstrip())


def test_preprocessing_without_scans_also_names_the_nearest_dataset(tiny, as_typed) -> None:
    as_typed("pcrl_nnunet_preprocess", "-d", "Tini")
    with pytest.raises(SystemExit, match=r"'Tini' was not found .* -d Dataset999_Tiny$"):
        preprocess.main_entry()


def test_all_datasets_are_listed_if_no_name_is_near(tiny) -> None:
    with pytest.raises(UserError, match=r"'1' was not found in .*; use -d with one of: Dataset999_Tiny$"):
        load_plan("1", "nnUNetPlans")
    with pytest.raises(UserError, match=r"'liver' was not found in .*; use -d with one of"):
        load_plan("liver", "nnUNetPlans")


def test_a_number_of_two_datasets_asks_for_the_name(tiny, as_typed) -> None:
    write_raw(tiny, "Dataset999_Other", True)
    as_typed("pcrl_nnunet_pretrain", "-d", "999")
    with pytest.raises(UserError) as error:
        load_plan("999", "nnUNetPlans")
    assert str(error.value) == (
        "several datasets have the ID 999, Dataset999_Other, Dataset999_Tiny; give the name instead: "
        "pcrl_nnunet_pretrain -d Dataset999_Other"
    )


@pytest.mark.parametrize(
    ("masks", "command"), [(True, "nnUNetv2_plan_and_preprocess -d 61"), (False, "pcrl_nnunet_preprocess -d 61")]
)
def test_a_raw_dataset_that_is_not_prepared_gets_the_one_right_command(tiny, masks: bool, command: str) -> None:
    write_raw(tiny, "Dataset061_Chest", masks)
    for dataset in ("61", "Dataset061_Chest"):  # nnU-Net's command takes numbers alone
        with pytest.raises(UserError, match=rf"Dataset061_Chest is not in .*; run {command} first$"):
            load_plan(dataset, "nnUNetPlans")
    (tiny.folder.parent / "Dataset061_Chest").mkdir()
    with pytest.raises(UserError, match=rf"nnUNetPlans.json does not exist; run {command} first$"):
        load_plan("61", "nnUNetPlans")


def test_the_commands_that_are_advised_take_these_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks nnU-Net's own parsers, which refuse a dataset's name."""

    parse = argparse.ArgumentParser.parse_known_args

    def only_parse(parser: argparse.ArgumentParser, *given: object) -> None:
        _, unknown = parse(parser, *given)
        raise SystemExit(f"unknown: {unknown}")  # nnU-Net itself lets unknown options pass

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", only_parse)
    name = "Dataset016_Lungs"
    for command, entry in (
        (planning_command(name), nnunet.plan_and_preprocess_entry),
        (planning_command(name, "nnUNetv2_extract_fingerprint", " --clean"), nnunet.extract_fingerprint_entry),
        (planning_command(name, "nnUNetv2_preprocess", " -plans_name P -c 2d"), nnunet.preprocess_entry),
    ):
        monkeypatch.setattr(sys, "argv", command.split())
        with pytest.raises(SystemExit, match=r"unknown: \[\]"):
            entry()


def test_a_dataset_with_results_only_is_refused(tiny) -> None:
    (tiny.results.parent / "Dataset005_Elsewhere").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Dataset005_Elsewhere is neither in .*preprocessed nor, .*raw; set"):
        load_plan("5", "nnUNetPlans")


def test_a_missing_plan_is_answered_with_the_existing_plans(tiny) -> None:
    with pytest.raises(
        UserError, match=r"Other.json does not exist; .*, or choose an existing plan with -p: nnUNetPlans$"
    ):
        load_plan("999", "Other")


@pytest.mark.parametrize(("masks", "step"), [(True, "nnUNetv2_preprocess -d 999 -plans_name"), (False, "")])
def test_a_configuration_without_preprocessed_data_gets_the_preprocessing_command(tiny, masks: bool, step: str) -> None:
    write_raw(tiny, "Dataset999_Tiny", masks)
    expected = f"{step or 'pcrl_nnunet_preprocess -d 999 -p'} nnUNetPlans -c 2d"
    with pytest.raises(UserError, match=f"run {expected} first$"):
        find_cases(str(tiny.folder / "nnUNetPlans_2d"))


@pytest.mark.parametrize(
    ("words", "configuration", "remedy"),
    [
        ("pcrl_nnunet_pretrain -d 999 -c 2d -f 0", "2d", "pcrl_nnunet_pretrain -d 999 -c 3d_fullres -f 0"),
        ("pcrl_nnunet_pretrain -d 999 -c 3d_lowrs", "3d_lowrs", "pcrl_nnunet_pretrain -d 999 -c 3d_lowres"),
        ("pcrl_nnunet_transfer -d 2d -c 2d", "2d", "pcrl_nnunet_transfer -d 2d -c 3d_fullres"),
        ("nnUNetv2_train 999 2d 0 -tr X", "2d", "nnUNetv2_train 999 3d_fullres 0 -tr X"),
        ("pytest -c 2d", "2d", "-c 3d_fullres"),
    ],
)
def test_a_missing_configuration_is_answered_with_the_whole_command(
    tiny, as_typed, words: str, configuration: str, remedy: str
) -> None:
    as_typed(*words.split())
    with pytest.raises(UserError) as error:
        load_plan("999", "nnUNetPlans", configuration)
    assert str(error.value) == (
        f"configuration '{configuration}' is not in nnUNetPlans; it has 3d_fullres, 3d_lowres, 3d_cascade_fullres: "
        f"{remedy}"
    )


def test_a_plan_of_several_configurations_without_the_usual_one_shows_the_command(tiny, as_typed) -> None:
    plan = json.loads((tiny.folder / "nnUNetPlans.json").read_text())
    plan["configurations"] = {name: plan["configurations"]["3d_fullres"] for name in ("2d", "3d_lowres")}
    (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(plan))
    as_typed("pcrl_nnunet_pretrain", "-d", "999")
    with pytest.raises(UserError, match=r"2d, 3d_lowres; choose .* -c, such as pcrl_nnunet_pretrain -d 999 -c 2d$"):
        load_plan("999", "nnUNetPlans")


def test_a_corrected_command_keeps_all_other_words_and_is_quoted(as_typed) -> None:
    as_typed("pcrl_nnunet_pretrain", "-d", "4", "16", "-o", "a folder", "-epochs", "4")
    assert corrected("-d", "16", "50") == "pcrl_nnunet_pretrain -d 4 50 -o 'a folder' -epochs 4"
    assert corrected("-c", None, "2d").endswith("'a folder' -epochs 4 -c 2d")
    as_typed("pcrl_nnunet_pretrain.exe", "-d4")
    assert corrected("-d", "4", "5") == "pcrl_nnunet_pretrain -d4 -d 5"


def test_masks_are_looked_for_where_nnunet_does(tiny, tmp_path: Path) -> None:
    assert not has_masks(str(tmp_path), {})
    (tmp_path / "labelsTr").mkdir()
    assert has_masks(str(tmp_path), {})
    assert not has_masks(str(tmp_path), {"dataset": {"a": {"images": []}}})
    assert not lacks_masks("Dataset999_Tiny")  # nnUNet_raw does not have it
    write_raw(tiny, "Dataset061_Chest", False)
    assert lacks_masks("Dataset061_Chest")
