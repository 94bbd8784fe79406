"""Pictures of a classification show the right values."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from matplotlib.figure import Figure

from pcrl_nnunet.classification import figures
from pcrl_nnunet.report import progress


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, instead of files."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: saved.append(figure))
    return saved


def test_the_progress_of_a_classification_is_its_losses_auroc_and_rate(
    drawn: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "whole", nullcontext)
    keys = ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs")
    log = {key: [i + 0.1, i + 0.2, i + 0.3] for i, key in enumerate(keys)}
    logger = progress.ClassificationLogger("Dataset060_X")
    logger.my_fantastic_logging |= log
    logger.plot_progress_png("folder")
    shown = [[list(line.get_ydata()) for line in axis.lines if len(line.get_ydata()) == 3] for axis in drawn[0].axes]
    assert shown == [[log[keys[0]], log[keys[1]]], [log[keys[2]], log[keys[3]]], [log[keys[4]]]]
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == [0, 1, 2]  # numbered as in nnU-Net's log
    assert drawn[0].get_suptitle() == "Dataset060_X\nDotted: chance."
    assert "AUROC" in drawn[0].axes[1].get_title("left")


def test_roc_uses_known_samples_only(drawn: list[Figure]) -> None:
    truth = np.array([[1.0, 1], [0, 1], [1, 1], [0, 1], [np.nan, 1]])
    score = np.array([[0.9, 0.1], [0.4, 0.2], [0.3, 0.3], [0.1, 0.4], [0.99, 0.5]])
    found = {name: {"auroc": 0.75, "low": 0.5, "high": 1.0, "known": 4, "positive": 2} for name in ("a", "b")}
    figures.roc(truth, score, ("a", "b"), found, "x.png")
    curve, chance = drawn[0].axes[0].lines  # all samples of b are positive, so b has no curve
    assert list(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == [
        (0, 0),
        (0, 0.5),
        (0.5, 0.5),
        (0.5, 1),
        (1, 1),
    ]
    assert curve.get_label() == "a: AUROC 0.750, 95 % interval 0.500 to 1.000\nn = 4, 2 of them positive"
    assert list(chance.get_xdata()) == list(chance.get_ydata()) == [0, 1]


@pytest.mark.parametrize("size", [(6, 8, 10), (8, 10)])
def test_an_activation_map_lies_over_the_middle_slice_of_its_input(drawn: list[Figure], size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    image, maps = rng.normal(size=(2, *size)), rng.normal(size=(3, *size))
    figures.activation(image, maps, ["a", "b", "c"], "case_1", "x.png")
    middle = (size[0] // 2,) if len(size) == 3 else ()
    *axes, bar = drawn[0].axes
    assert "logit" in bar.get_xlabel()
    for i, axis in enumerate(axes):
        np.testing.assert_array_equal(axis.images[0].get_array(), image[(0, *middle)])
        if i:
            np.testing.assert_array_equal(axis.images[1].get_array(), maps[(i - 1, *middle)])
    assert [axis.get_title() for axis in axes] == ["input", "a", "b", "c"]
    assert "middle slice" in drawn[0].get_suptitle() or len(size) == 2
    limit = axes[1].images[1].norm.vmax
    assert bar.get_xlim() == (-limit, limit)
