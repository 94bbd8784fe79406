"""pseudo_labels.png of a semi-supervised training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from pcrl_nnunet.report.pseudo_labels import draw_pseudo_labels
from pcrl_nnunet.semi_supervised.label_facts import LabelFacts
from pcrl_nnunet.semi_supervised.watch import Pseudo

FACTS = LabelFacts(["liver", "tumour"], [0.1, 0.004], [1.0, 0.6])
HISTORY = [Pseudo([0.2, 0.0], [0.5, float("nan")]), Pseudo([0.12, 0.003], [0.8, 0.4])]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved; the files are empty."""
    saved: list[Figure] = []

    def save(figure: Figure, path: str, **how: object) -> None:
        Path(path).touch()
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def test_the_curves_show_the_history_from_the_second_phase(drawn: list[Figure], tmp_path: Path) -> None:
    images, labels = np.zeros((1, 1, 4, 4), np.float32), np.ones((1, 1, 4, 4), np.int16)
    draw_pseudo_labels(HISTORY, FACTS, 7, images, labels, "run", str(tmp_path / "x.png"))
    shares, agreement = drawn[0].subfigs[0].axes
    for axis, kind, unit in ((shares, "shares", 100), (agreement, "agreement", 1)):
        curves = {str(line.get_label()): line for line in axis.lines}
        for number, name in enumerate(FACTS.names):
            assert list(curves[name].get_xdata()) == [7, 8]
            np.testing.assert_array_equal(
                np.asarray(curves[name].get_ydata(), float), [unit * getattr(epoch, kind)[number] for epoch in HISTORY]
            )
    dotted = [line.get_ydata()[0] for line in shares.lines if line.get_linestyle() == ":"]  # type: ignore[index]
    assert dotted == pytest.approx([10, 0.4])  # %
    assert drawn[0].get_suptitle().startswith("run")
    (legend,) = drawn[0].subfigs[0].legends
    assert [text.get_text() for text in legend.get_texts()] == FACTS.names


@pytest.mark.parametrize("regions", [False, True])
def test_a_volume_is_shown_in_the_slice_with_the_most_labelled_voxels(
    drawn: list[Figure], tmp_path: Path, regions: bool
) -> None:
    images = np.random.default_rng(0).normal(size=(2, 1, 5, 6, 7)).astype(np.float32)
    labels = np.zeros((2, 1, 5, 6, 7), np.int16)
    labels[0, 0, 3, 1:5, 1:5], labels[0, 0, 1, 2, 2] = 2, 1
    given = np.concatenate([labels == 1, labels == 2], 1) if regions else labels
    draw_pseudo_labels(HISTORY, FACTS, 1, images, given, "run", str(tmp_path / "x.png"))
    axes = drawn[0].subfigs[1].axes
    assert len(axes) == 4
    first, second, labelled, unlabelled = axes
    for axis, patch, index in ((first, 0, 3), (labelled, 0, 3), (second, 1, 2), (unlabelled, 1, 2)):
        np.testing.assert_array_equal(axis.images[0].get_array(), images[patch, 0, index])
    assert [len(axis.collections) for axis in axes] == [0, 0, 1, 0]
    assert axes[1] is second
    assert [axis.get_xlabel() for axis in axes] == ["", "", "", "no label"]


def test_the_picture_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pseudo_labels.png"
    images, labels = np.ones((4, 2, 8, 8), np.float32), np.ones((4, 1, 8, 8), np.int16)
    labels[:, :, 4:] = 2
    draw_pseudo_labels(HISTORY, FACTS, 1, images, labels, "run", str(path))
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    assert before.endswith(b"IEND\xaeB`\x82")

    def fails(figure: Figure, draft: str, **how: object) -> None:
        assert draft != str(path)
        Path(draft).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError, match="No space left"):
        draw_pseudo_labels(HISTORY, FACTS, 1, images, labels, "run", str(path))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
