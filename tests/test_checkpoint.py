import errno
import os
import pickle
import signal
import stat
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from pcrl_nnunet import checkpoint
from pcrl_nnunet.errors import UserError


def content(**more):
    return {"format": checkpoint.FORMAT, "tensor": torch.arange(5.0), "plain": {"a": [1, "b", None]}, **more}


def test_a_checkpoint_is_read_as_written(tmp_path):
    path = str(tmp_path / "c.pth")
    checkpoint.write(path, content())
    read = checkpoint.read(path)
    assert torch.equal(read["tensor"], torch.arange(5.0))
    assert read["plain"] == {"a": [1, "b", None]}
    assert os.listdir(tmp_path) == ["c.pth"]


def test_writing_works_on_a_file_system_without_folder_flush(tmp_path, monkeypatch):
    fsync = os.fsync

    def of_files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    path = str(tmp_path / "c.pth")
    checkpoint.write(path, content())
    assert torch.equal(checkpoint.read(path)["tensor"], torch.arange(5.0))


class Unwritable:
    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_the_last_good_file(tmp_path):
    path = str(tmp_path / "c.pth")
    checkpoint.write(path, content())
    with pytest.raises(UserError, match=r"No space left on device.*last good one"):
        checkpoint.write(path, content(bad=Unwritable()))
    assert torch.equal(checkpoint.read(path)["tensor"], torch.arange(5.0))
    assert os.listdir(tmp_path) == ["c.pth"]


@pytest.mark.parametrize("room", [100, 100_000, 1_000_000])
def test_a_disk_that_is_full_leaves_the_last_good_file(tmp_path, room):
    resource = pytest.importorskip("resource")
    path = str(tmp_path / "c.pth")
    checkpoint.write(path, content())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # a file that grows beyond fails as on a full disk
    try:
        with pytest.raises(UserError, match=r"could not write .*c.pth \(.*\); the file .* last good one"):
            checkpoint.write(path, content(large=torch.rand(500_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert torch.equal(checkpoint.read(path)["tensor"], torch.arange(5.0))
    assert os.listdir(tmp_path) == ["c.pth"]


def test_a_bit_that_has_changed_is_noticed(tmp_path):
    path = tmp_path / "c.pth"
    checkpoint.write(str(path), content(large=torch.zeros(1000)))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (archive.getinfo(name) for name in archive.namelist() if name.endswith("data.pkl"))
        length = len(archive.read(pickled))
    start = whole.index(b"\x80\x02}", pickled.header_offset)  # a dict in pickle's protocol 2
    within_the_tensor = whole.index(bytes(2000)) + 1000
    for place in (within_the_tensor, *range(start, start + length, 7)):
        for bit in (1, 1 << place % 8):
            data = bytearray(whole)
            data[place] ^= bit
            path.write_bytes(data)
            with pytest.raises(UserError, match=r"c.pth cannot be read \(the checksum of .* has changed\): .* damaged"):
                checkpoint.read(str(path))


def test_damage_anywhere_gives_an_error_or_changes_nothing(tmp_path):
    path = tmp_path / "c.pth"
    checkpoint.write(str(path), content())
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    expected = checkpoint.read(str(path))
    for _ in range(300):
        data = bytearray(whole)
        place = int(rng.integers(len(data)))
        data[place : place + int(rng.integers(1, 9))] = rng.bytes(8)[: len(data) - place]
        path.write_bytes(data)
        try:
            found = checkpoint.read(str(path))
        except UserError:
            continue
        assert found["plain"] == expected["plain"]  # the damage is in padding, which nothing reads
        assert torch.equal(found["tensor"], expected["tensor"])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_named(tmp_path, share):
    path = tmp_path / "c.pth"
    checkpoint.write(str(path), content())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"c.pth cannot be read .* truncated or damaged"):
        checkpoint.read(str(path))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch should_not_exist",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content(bad=Malicious()), "c.pth")
    with pytest.raises(UserError, match=r"more than tensors and plain values \(posix.system\) and was not loaded"):
        checkpoint.read("c.pth")
    with open("plain.pth", "wb") as file:
        pickle.dump(Malicious(), file, protocol=2)
    with pytest.raises(UserError, match=r"was not loaded|cannot be read"):
        checkpoint.read("plain.pth")
    assert not os.path.exists("should_not_exist")


def test_another_programs_file_is_refused(tmp_path):
    path = str(tmp_path / "c.pth")
    torch.save({"network_weights": {}}, path)
    with pytest.raises(UserError, match="is not one of pcrl_nnunet_pretrain's"):
        checkpoint.read(path)


def test_the_state_of_an_unfinished_pretraining_is_not_taken_for_a_finished_one(tmp_path):
    path = str(tmp_path / checkpoint.LATEST)
    checkpoint.write(path, {**content(), "format": checkpoint.STATE_FORMAT})
    assert torch.equal(checkpoint.read(path, checkpoint.STATE_FORMAT)["tensor"], torch.arange(5.0))
    with pytest.raises(UserError, match=r"is of an unfinished pretraining; finish it with --c"):
        checkpoint.read(path)


def test_an_unrelated_file_is_not_called_dangerous(tmp_path):
    path = tmp_path / "c.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"cannot be read \(not a whole file of torch.save\)"):
        checkpoint.read(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing.pth does not exist; run pcrl_nnunet_pretrain"):
        checkpoint.read(str(tmp_path / "nothing.pth"))


def test_the_hash_depends_on_names_and_values_only():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = checkpoint.encoder_hash(module)
    assert before == checkpoint.encoder_hash(dict(reversed(module.state_dict().items())))
    with torch.no_grad():
        module[0].weight[1, 0, 2, 2] += 1e-3
    assert checkpoint.encoder_hash(module) != before


def test_a_file_of_another_version_is_refused_as_such(tmp_path):
    path = str(tmp_path / "checkpoint_latest.pth")
    checkpoint.write(path, {"format": "pcrl_nnunet/state/1"})
    with pytest.raises(UserError, match=r"written by another version of pcrl_nnunet .* or pretrain again"):
        checkpoint.read(path, checkpoint.STATE_FORMAT)


def test_the_line_for_the_old_format_runs_no_code_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content(bad=Malicious()), "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(SystemExit, match=r"Error: .*old.pth holds more than tensors .* was not loaded"):
        checkpoint.save_as_zip("old.pth", "new.pth")
    assert os.listdir() == ["old.pth"]
