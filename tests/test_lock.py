from pathlib import Path

import pytest

from pcrl_nnunet import lock
from pcrl_nnunet.errors import UserError

fcntl = pytest.importorskip("fcntl")


def test_a_lock_removed_while_being_opened_still_excludes_others(tmp_path: Path, monkeypatch) -> None:
    path, flock, removed = tmp_path / lock.LOCK, fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not removed:
            path.unlink()  # the lock's holder cleans up
            removed.append(path)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with (
        lock.locked(str(tmp_path), "a command"),
        pytest.raises(UserError, match="Another command is at work"),
        lock.locked(str(tmp_path), "command"),
    ):
        pass
    with lock.locked(str(tmp_path), "command"):
        pass
