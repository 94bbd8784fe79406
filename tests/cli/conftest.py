"""pcrl_nnunet_pretrain in this process."""

import sys

import pytest

from pcrl_nnunet import registration
from pcrl_nnunet.cli import pretrain
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.report.progress import PretrainLogger


@pytest.fixture
def command(tiny, monkeypatch):
    """Runs the command in this process; returns its exit status."""
    monkeypatch.setattr(registration, "is_registered", lambda: True)
    monkeypatch.setattr(Report, "write", lambda *_: None)  # pictures take seconds each, and have tests of their own
    monkeypatch.setattr(PretrainLogger, "plot_progress_png", lambda *_: None)
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
