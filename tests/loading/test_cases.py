"""Cases on disk, and the parts that are read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from noise_cases import write, write_three

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading import cases as cases_module
from pcrl_nnunet.loading.cases import Case, CaseVolume, find_cases
from pcrl_nnunet.views.boxes import Box


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_three(tmp_path)


def read_box(case: Case, box: Box) -> np.ndarray:
    return CaseVolume(case)[box.index()]


def test_cases_are_the_images_in_order_of_name(folder: Path) -> None:
    assert [case.name for case in find_cases(str(folder))] == ["a", "b", "c"]
    assert find_cases(str(folder))[0].path == str(folder / "a.b2nd")


@pytest.mark.parametrize("name", ["", "missing"])
def test_an_empty_folder_names_the_command_to_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no preprocessed images in .*: run nnUNetv2_preprocess"):
        find_cases(str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".b2nd", ".npy", ".npz"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_box_is_read_from_each_of_nnunets_formats(tmp_path: Path, suffix: str, dtype: type) -> None:
    path = tmp_path / f"x{suffix}"
    array: np.ndarray = np.random.default_rng(0).standard_normal((2, 9, 10, 11)).astype(dtype)
    if suffix == ".b2nd":
        write(path, array)
    elif suffix == ".npy":
        np.save(path, array)
    else:
        np.savez_compressed(path, data=array, seg=np.zeros(3))
    box, (case,) = Box((1, 0, 5), (4, 10, 6)), find_cases(str(tmp_path))
    read = read_box(case, box)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, array[box.index()].astype(np.float32))


def test_an_unpacked_array_is_preferred_to_its_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1, 2, 2, 2)))
    np.savez(tmp_path / "x.npz", data=np.zeros((1, 2, 2, 2)))
    assert find_cases(str(tmp_path)) == [Case("x", str(tmp_path / "x.npy"))]


def test_an_archive_is_unpacked_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).standard_normal((1, 4, 5, 6))
    np.savez(tmp_path / "x.npz", data=image, seg=np.ones((1, 4, 5, 6), np.int8))
    (case,) = find_cases(str(tmp_path))

    def killed(path: str, array: np.ndarray) -> None:
        Path(path).write_bytes(b"half")
        monkeypatch.setattr(cases_module.os, "remove", lambda path: None)  # a killed process cleans nothing up
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cases_module.np, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            cases_module.unpack(case)
    assert len(list(tmp_path.glob("*.npy"))) == 1
    assert find_cases(str(tmp_path)) == [case]
    unpacked = cases_module.unpack(case)
    assert unpacked == Case("x", str(tmp_path / "x.npy")) == cases_module.unpack(unpacked)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), image)
    (tmp_path / "y.npz").write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"case y cannot be read from .*y\.npz .*: preprocess the image again"):
        cases_module.unpack(Case("y", str(tmp_path / "y.npz")))


def test_only_the_box_is_read_from_disk(tmp_path: Path) -> None:
    array = write(tmp_path / "x.b2nd", np.random.default_rng(0).standard_normal((1, 64, 64, 64)).astype(np.float32))
    volume = CaseVolume(Case("x", str(tmp_path / "x.b2nd")))
    content = bytearray((tmp_path / "x.b2nd").read_bytes())
    middle = len(content) // 2
    content[middle : middle + len(content) // 4] = bytes(len(content) // 4)  # overwrites other chunks in place
    with open(tmp_path / "x.b2nd", "r+b") as file:
        file.write(content)
    box, whole = Box((0, 0, 0), (20, 20, 20)), Box((0, 0, 0), (64, 64, 64))
    np.testing.assert_array_equal(volume[box.index()], array[box.index()])
    with pytest.raises((UserError, AssertionError)):  # the damage lies outside the box above
        np.testing.assert_array_equal(volume[whole.index()], array)


@pytest.mark.parametrize("suffix", [".b2nd", ".npy", ".npz"])
@pytest.mark.parametrize("left", [0.0, 0.5])
def test_a_truncated_case_is_named(tmp_path: Path, suffix: str, left: float) -> None:
    path = tmp_path / f"case_7{suffix}"
    array = np.random.default_rng(0).standard_normal((1, 30, 30, 30)).astype(np.float32)
    if suffix == ".b2nd":
        write(path, array)
    elif suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, data=array)
    os.truncate(path, int(left * path.stat().st_size))
    with pytest.raises(UserError, match=rf"case case_7 cannot be read from .*case_7\{suffix} \(.*preprocess the image"):
        read_box(Case("case_7", str(path)), Box((0, 0, 0), (30, 30, 30)))


@pytest.mark.parametrize("suffix", [".b2nd", ".npy"])
def test_a_case_truncated_while_it_is_open_is_named(tmp_path: Path, suffix: str) -> None:
    array = np.random.default_rng(0).standard_normal((1, 64, 64, 64)).astype(np.float32)
    if suffix == ".npy":
        np.save(tmp_path / "x.npy", array)
    else:
        write(tmp_path / "x.b2nd", array)
    volume = CaseVolume(Case("x", str(tmp_path / f"x{suffix}")))
    os.truncate(tmp_path / f"x{suffix}", 2000)
    with pytest.raises(UserError, match="case x cannot be read"):
        volume[Box((0, 0, 0), (64, 64, 64)).index()]


def test_a_case_that_vanished_is_named(folder: Path) -> None:
    cases = find_cases(str(folder))
    (folder / "b.b2nd").unlink()
    with pytest.raises(UserError, match=r"case b cannot be read from .*b\.b2nd \(the file is missing\)"):
        CaseVolume(cases[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_case_with_voxels_that_are_not_finite_is_named(tmp_path: Path, value: float) -> None:
    array = np.zeros((1, 6, 6, 6), dtype=np.float32)
    array[0, 3, 3, 3] = value
    write(tmp_path / "x.b2nd", array)
    with pytest.raises(UserError, match=r"case x has voxels that are not finite numbers \(NaN or infinity\)"):
        read_box(Case("x", str(tmp_path / "x.b2nd")), Box((0, 0, 0), (6, 6, 6)))
    np.testing.assert_array_equal(read_box(Case("x", str(tmp_path / "x.b2nd")), Box((0, 0, 0), (6, 6, 3))), 0)


def test_a_full_name_has_one_dataset() -> None:
    assert Case("case_0", "x").full_name("Dataset999_Tiny") == "Dataset999_Tiny/case_0"
    assert Case("Dataset016_Other/case_0", "x").full_name("Dataset999_Tiny") == "Dataset016_Other/case_0"
