import os
import pickle

import pytest
import torch
from torch import nn

from pcrl_nnunet import checkpoint
from pcrl_nnunet.errors import UserError


def content(**more):
    return {"format": checkpoint.FORMAT, "tensor": torch.arange(5.0), "plain": {"a": [1, "b", None]}, **more}


def test_what_was_written_is_read(tmp_path):
    path = str(tmp_path / "c.pth")
    checkpoint.write(path, content())
    read = checkpoint.read(path)
    assert torch.equal(read["tensor"], torch.arange(5.0))
    assert read["plain"] == {"a": [1, "b", None]}
    assert os.listdir(tmp_path) == ["c.pth"]


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
    with pytest.raises(UserError, match="holds more than tensors and plain values and was not loaded"):
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


def test_a_file_that_is_no_checkpoint_is_not_called_dangerous(tmp_path):
    path = tmp_path / "c.pth"
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"cannot be read \(not a whole file of torch.save\)"):
        checkpoint.read(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing.pth does not exist; run pcrl_nnunet_pretrain"):
        checkpoint.read(str(tmp_path / "nothing.pth"))


def test_the_hash_sees_every_value_and_name_and_nothing_else():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = checkpoint.encoder_hash(module)
    assert before == checkpoint.encoder_hash(dict(reversed(module.state_dict().items())))
    with torch.no_grad():
        module[0].weight[1, 0, 2, 2] += 1e-3
    assert checkpoint.encoder_hash(module) != before


def test_a_file_of_another_version_is_said_to_be_one(tmp_path):
    path = str(tmp_path / "checkpoint_latest.pth")
    checkpoint.write(path, {"format": "pcrl_nnunet/state/1"})
    with pytest.raises(UserError, match=r"written by another version of pcrl_nnunet .* or pretrain again without --c"):
        checkpoint.read(path, checkpoint.STATE_FORMAT)
