"""pcrl_nnunet_pretrain in this process, and a thread that permissions bind."""

import ctypes
import os
import sys

import pytest

from pcrl_nnunet.cli import pretrain, register
from pcrl_nnunet.report import Report


@pytest.fixture
def command(tiny, monkeypatch):
    """Runs the command in this process; returns its exit status."""
    monkeypatch.setattr(register, "is_registered", lambda: True)
    monkeypatch.setattr(Report, "write", lambda *_: None)  # seconds each, of which tests/test_report.py is
    tiny.cwd = tiny.folder.parents[1] / "here"
    tiny.cwd.mkdir()
    monkeypatch.chdir(tiny.cwd)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_pretrain", *arguments])
        try:
            pretrain.main_entry()
        except SystemExit as end:
            return end.code
        return 0

    return run


@pytest.fixture
def as_users_do():
    """Permissions count for this thread, also where it is root's: without CAP_DAC_OVERRIDE and _READ_SEARCH."""
    if os.geteuid() != 0:
        yield
        return
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3; effective first, of two
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform != "linux" or libc.capget(header, sets) != 0:
        pytest.skip("the tests run as root, whom no permission binds")
    effective = sets[0]
    sets[0] = effective & ~0b110
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = effective
    assert libc.capset(header, sets) == 0
