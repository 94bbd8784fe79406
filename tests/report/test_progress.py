"""progress.png numbers epochs like the log, and names its training."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import seaborn
from matplotlib import rc_context
from matplotlib.figure import Figure

from pcrl_nnunet.methods import method_class
from pcrl_nnunet.report import progress
from pcrl_nnunet.report.progress import PretrainLogger

RUN = "Dataset001_$x$\nmethod pcrlv2, configuration 2d, plan nnUNetPlans, fold all"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, instead of files."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: saved.append(figure))
    monkeypatch.setattr(progress, "whole", nullcontext)
    return saved


def figure_of(drawn: list[Figure], method: str, epochs: int) -> Figure:
    logger = PretrainLogger(method_class(method), RUN)
    for number, values in enumerate(logger.my_fantastic_logging.values()):
        values.extend(number + 0.1 * epoch for epoch in range(epochs))
    logger.plot_progress_png("folder")
    drawn[-1].draw_without_rendering()
    return drawn[-1]


@pytest.mark.parametrize("epochs", [1, 2, 3, 40])
def test_epochs_begin_with_1_and_ticks_are_whole_numbers(drawn: list[Figure], epochs: int) -> None:
    for axis in figure_of(drawn, "pcrlv2", epochs).axes:
        assert list(axis.lines[0].get_xdata()) == list(range(1, epochs + 1))
        ticks = np.array([tick for tick in axis.get_xticks() if axis.get_xlim()[0] <= tick <= axis.get_xlim()[1]])
        assert len(ticks)
        np.testing.assert_array_equal(ticks, ticks.round())


def test_terms_of_one_scale_share_a_panel(drawn: list[Figure]) -> None:
    titles = [axis.get_title("left") for axis in figure_of(drawn, "pcrlv2", 3).axes]
    assert titles[:4] == ["loss", "restoration", "comparison", "Restoration error (falls well below 1)"]
    assert titles[-1] == "learning rate"
    comparison = drawn[-1].axes[2]
    assert [text.get_text() for text in comparison.get_legend().get_texts()] == [
        "comparison, global",
        "comparison, local",
    ]
    assert figure_of(drawn, "mae", 3).axes[0].get_title("left") == "loss = restoration"


def test_a_quantity_that_no_epoch_has_gets_no_panel(drawn: list[Figure]) -> None:
    logger = PretrainLogger(method_class("pcrlv2"), RUN)
    for name, values in logger.my_fantastic_logging.items():
        values.extend([float("nan") if name == "right_over_chance" else 1.0] * 3)
    logger.plot_progress_png("folder")
    titles = [axis.get_title("left") for axis in drawn[-1].axes]
    assert "Margin (rises above 0)" in titles
    assert not any("Right answers" in title for title in titles)


def test_a_log_of_a_version_without_a_quantity_is_continued(drawn: list[Figure]) -> None:
    logger = PretrainLogger(method_class("pcrlv2"), RUN)
    before = {name: [1.0, 2.0] for name in logger.my_fantastic_logging if name != "right_over_chance"}
    logger.load_checkpoint(before)
    assert np.isnan(logger.my_fantastic_logging["right_over_chance"]).tolist() == [True, True]
    assert logger.my_fantastic_logging["margin"] == [1.0, 2.0]
    logger.log("right_over_chance", 5.0, 2)
    assert logger.my_fantastic_logging["right_over_chance"][2] == 5.0


def test_the_heading_names_the_training(drawn: list[Figure]) -> None:
    assert figure_of(drawn, "pcrlv2", 2).get_suptitle().startswith(RUN)


def test_the_style_is_not_the_one_that_nnunet_leaves_behind(drawn: list[Figure]) -> None:
    with rc_context():
        before = figure_of(drawn, "mae", 2).axes[0].title.get_fontsize()
        seaborn.set_theme(font_scale=2.5)  # nnU-Net's progress.png does this
        assert figure_of(drawn, "mae", 2).axes[0].title.get_fontsize() == before
