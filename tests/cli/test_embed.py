"""pcrl_nnunet_embed on a tiny dataset with unlabelled scans."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_pretraining import pretrain
from unlabelled_scans import make_full_plan, write_scans

from pcrl_nnunet.cli import embed
from pcrl_nnunet.features.embedding import embedding
from pcrl_nnunet.features.encoder import network_of
from pcrl_nnunet.loading.cases import CaseVolume, find_cases
from pcrl_nnunet.networks import encoder_of
from pcrl_nnunet.plans import load_plan


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """Run the command in this process, and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_embed", "-device", "cpu", *arguments])
    try:
        embed.main_entry()
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def checkpoint(tiny: Any) -> str:
    return pretrain(tiny.results)[0]


def test_all_cases_get_the_vector_of_the_pretrained_encoder(
    tiny: Any, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scans(tiny.folder, make_full_plan(), {"scan_1": 1, "scan_2": 2})
    file = str(tmp_path / "found.npz")
    assert run(monkeypatch, "-d", tiny.folder.name, "-i", checkpoint, "-o", file) == 0
    found = np.load(file)
    own = [case.name for case in find_cases(str(tiny.data))]
    assert found["names"].tolist() == [*own, "scan_1", "scan_2"]
    assert found["labelled"].tolist() == [True] * len(own) + [False] * 2
    assert (tmp_path / "found.png").stat().st_size > 10_000
    # by another road: the weights of the file in nnU-Net's own network
    plan = load_plan(tiny.folder.name, "nnUNetPlans", "3d_fullres")
    network, _, _ = network_of(plan, None)
    network.load_state_dict(torch.load(checkpoint, weights_only=True)["network_weights"])
    volume = CaseVolume(find_cases(str(tiny.data))[1])
    expected = embedding(encoder_of(network), volume, plan.resolved["patch_size"], torch.device("cpu"))
    np.testing.assert_allclose(found["embeddings"][1], expected, rtol=1e-4, atol=1e-5)
    assert len(expected) == len(found["stages"]) == len(found["poolings"])
    assert len({row.tobytes() for row in found["embeddings"]}) == len(found["names"])


def test_a_damaged_case_is_named_and_the_others_are_written(
    tiny: Any, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = find_cases(str(tiny.data))[0]
    Path(damaged.path).write_bytes(b"nothing")
    file = str(tmp_path / "found.npz")
    assert run(monkeypatch, "-d", tiny.folder.name, "-i", checkpoint, "-o", file) == 1
    assert f"case {damaged.name} cannot be read" in capsys.readouterr().out
    assert damaged.name not in np.load(file)["names"]


def test_no_label_is_read(tiny: Any, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in tiny.data.iterdir():
        if "_seg" in path.name or path.suffix == ".pkl":
            path.unlink()
    assert run(monkeypatch, "-d", tiny.folder.name, "-i", checkpoint, "-o", str(tmp_path / "found.npz")) == 0


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"-i": "nowhere.pth"}, r"-i is nowhere.pth, which does not exist"),
        ({"-o": "found.csv"}, r"-o is found.csv; expected a file that ends with .npz"),
        ({"-o": "nowhere/found.npz"}, r"the folder of -o is .*nowhere, which is not a folder"),
    ],
)
def test_wrong_arguments_are_refused(
    tiny: Any,
    checkpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, str],
    sentence: str,
) -> None:
    given = {"-d": tiny.folder.name, "-i": checkpoint, **changed}
    assert re.match(f"Error: {sentence}", run(monkeypatch, *(word for pair in given.items() for word in pair)))
