import os
from pathlib import Path

import pytest

from pcrl_nnunet.files import new_folder, whole, write_text


def test_the_new_file_appears_at_once_at_the_end(tmp_path):
    path = tmp_path / "image.nii.gz"
    path.write_text("before")
    with whole(path) as draft:
        assert draft.endswith("image.nii.gz")  # libraries need the ending
        Path(draft).write_text("half")
        assert path.read_text() == "before"
    assert path.read_text() == "half"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("written", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, written):
    path = tmp_path / "text"
    path.write_text("before")

    def fail():
        with whole(path) as draft:
            if written:
                Path(draft).write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("missing", ["folder", "draft"])
def test_an_error_names_the_file_that_the_user_knows(tmp_path, missing):
    path = tmp_path / "folder" / "plan.json"
    if missing == "draft":
        path.parent.mkdir()

    def write():
        with whole(path) as draft:
            if missing == "folder":
                Path(draft).write_text("there is no such folder")

    with pytest.raises(FileNotFoundError) as error:  # from opening the draft, or from renaming it
        write()
    assert error.value.filename == str(path)
    assert "draft" not in str(error.value)


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_removes_new_folders_and_keeps_others(tmp_path, depth):
    there = tmp_path / "there"
    there.mkdir()
    (there / "kept").touch()
    folder = there.joinpath(*"ab"[:depth])

    def fail():
        with new_folder(str(folder)):
            (folder / "new").touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fail()
    assert sorted(os.listdir(there)) == (["kept"] if depth else ["kept", "new"])
    with new_folder(str(folder)):
        pass
    assert folder.is_dir()


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    path = tmp_path / "text"
    with whole(path) as draft:
        Path(draft).write_text("the slower one")
        monkeypatch.setattr(os, "getpid", lambda: -1)  # another process
        write_text(path, "the other \udcff")  # a file name that is not UTF-8
        assert path.read_bytes() == b"the other \xff"
    assert path.read_text() == "the slower one"
