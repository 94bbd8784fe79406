"""The picture of the README shows a real pretraining."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("readme_picture")


def test_the_readme_begins_with_a_small_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "](docs/pictures/overview.png)" in text[:600]
    content = (ROOT / "docs" / "pictures" / "overview.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) < 300_000


def test_the_panels_show_boxes_curve_and_restoration(picture: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: drawn.append(figure))
    images = {name: np.full((4, 4), i, np.float32) for i, name in enumerate(("input", "output", "target"))}
    boxes = [(title, (i, 2 * i), (3, 5)) for i, title in enumerate(("global 1", "global 2", "local 1", "local 2"))]
    shown = picture.Shown(np.zeros((20, 30), np.float32), (1,), boxes, images, 0.3, [1.2, 0.7, 0.4], 25)
    picture.draw(shown, Path("x.png"))
    above, below = drawn[0].subfigs
    assert below.get_suptitle() == '3. The network restores the crop "global 1", flipped left to right'
    (views,), (curve,) = (part.axes for part in above.subfigs)
    places = [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in views.patches]
    assert places == [((2 * i, i), 5, 3) for i in range(4)]
    labels = [text.get_text() for text in views.get_legend().get_texts()]
    assert labels == ["global 1", "global 2", "local"]
    assert list(curve.lines[0].get_xdata()) == [1, 2, 3]
    assert list(curve.lines[0].get_ydata()) == shown.curve
    assert curve.get_xlabel() == "epoch of 25 steps"
    assert [axis.get_title() for axis in below.axes] == list(images)
    assert [axis.images[0].get_array().flat[0] for axis in below.axes] == [0, 1, 2]


@pytest.mark.long
@pytest.mark.slow
def test_it_pretrains_and_draws(tmp_path: Path) -> None:
    path = tmp_path / "new" / "overview.png"
    command = [sys.executable, str(ROOT / "scripts" / "readme_picture.py"), "--quick", "-o", str(path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "after 4 steps the restoration error is" in done.stdout
