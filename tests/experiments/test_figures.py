"""Pictures of a comparison show the right values."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pcrl_nnunet.experiments import figures
from pcrl_nnunet.experiments.pictures import _label_names

ROC = np.array([0, 1]), np.array([0, 1])  # a run's truth and score
FOUND = {"points": 71.23, "low": 60.0, "high": 81.04}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, instead of files."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: saved.append(figure))
    return saved


def test_an_arm_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    figures_made = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: figures_made.append(self))
    run = (np.arange(1, 4), np.array([0.1, 0.2, 0.3]))
    given = {"10": {"a": [run], "b": [run], "c": [run]}, "all": {"a": [run], "c": [run]}}
    figures.score_while_training(given, "Dice", "title", "x.png")
    first, second = (
        {line.get_label(): line.get_color() for line in axis.lines if line.get_linewidth() == 2}
        for axis in figures_made[0].axes
    )
    assert first["c"] == second["c"] != first["b"]


def test_an_arm_has_the_same_colour_in_all_pictures_of_a_comparison(drawn: list[Figure]) -> None:
    """The order of the arms does not matter; the control always has the first colour."""
    run = (np.arange(1, 4), np.array([0.1, 0.2, 0.3]))
    runs = pd.DataFrame({"method": ["b", "scratch", "a"], "labelled": 5, "seed": 0, "points": 50.0})
    figures.label_efficiency(runs, "Dice", 0.0, "title", "x.png")
    figures.score_while_training({"5": {"scratch": [run], "a": [run]}, "10": {"b": [run]}}, "Dice", "title", "x.png")
    panels = {"5": {name: [ROC] for name in ("a", "b", "scratch")}}
    figures.roc_of_arms(panels, {"5": dict.fromkeys(panels["5"], FOUND)}, "title", "x.png")
    of_pictures = [
        {line.get_label().split(":")[0]: to_hex(line.get_color()) for axis in figure.axes for line in axis.lines}
        for figure in drawn
    ]
    for name in ("a", "b", "scratch"):
        assert len({of_picture[name] for of_picture in of_pictures}) == 1
    assert of_pictures[0]["scratch"] == to_hex("C0")


def test_panels_of_many_numbers_of_labels_are_in_rows_of_two(drawn: list[Figure]) -> None:
    run = (np.arange(1, 4), np.array([0.1, 0.2, 0.3]))
    figures.score_while_training({str(n): {"a": [run]} for n in range(5)}, "Dice", "title", "x.png")
    panels = {str(n): {"a": [ROC]} for n in range(5)}
    figures.roc_of_arms(panels, {name: {"a": FOUND} for name in panels}, "title", "x.png")
    for figure in drawn:
        assert [axis.get_title("left")[0] for axis in figure.axes] == list("01234")
        assert {axis.get_gridspec().get_geometry() for axis in figure.axes} == {(3, 2)}


def test_missing_curves_raise_an_error_with_the_reason() -> None:
    """The report of a comparison catches this error: if only shortcuts are finished, there are no curves."""
    with pytest.raises(LookupError, match="no finished run has a curve"):
        figures.score_while_training({}, "Dice", "title", "x.png")
    with pytest.raises(LookupError, match="no finished run has a curve"):
        figures.roc_of_arms({}, {}, "title", "x.png")


def test_all_built_in_arms_have_different_colours(drawn: list[Figure]) -> None:
    arms = [f"arm_{i}" for i in range(40)]
    runs = pd.DataFrame({"method": arms, "labelled": 5, "seed": 0, "points": 50.0})
    run = (np.arange(1, 4), np.array([0.1, 0.2, 0.3]))
    figures.label_efficiency(runs, "Dice", 0.0, "title", "x.png")
    figures.score_while_training({"5": {name: [run] for name in arms}}, "Dice", "title", "x.png")
    for figure in drawn:
        lines = [line for line in figure.axes[0].lines if line.get_label() in arms]
        assert len({to_hex(line.get_color()) for line in lines}) == len(lines) == 40


def test_the_legend_hides_no_run(drawn: list[Figure]) -> None:
    corners = [(0, 100.0), (1, 0.0)]  # scores in all four corners
    table = [(name, n, seed, points) for name in "abc" for n in (5, 40) for seed, points in corners]
    runs = pd.DataFrame(table, columns=["method", "labelled", "seed", "points"])
    figures.label_efficiency(runs, "Dice", 12.5, "title", "x.png")
    (legend,), (axis,) = drawn[0].legends, drawn[0].axes
    drawn[0].draw_without_rendering()
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "c", "without a look at the image"]
    assert list(axis.lines[-1].get_ydata()) == [12.5, 12.5]
    assert axis.get_legend() is None
    assert legend.get_window_extent().y1 < axis.get_window_extent().y0


def test_a_chance_far_below_the_runs_is_stated_and_not_drawn(drawn: list[Figure]) -> None:
    runs = pd.DataFrame({"method": "a", "labelled": 5, "seed": range(3), "points": [80.0, 82.0, 84.0]})
    figures.label_efficiency(runs, "Dice", 46.0, "title", "x.png")
    drawn[0].draw_without_rendering()
    texts = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert texts == ["a", "without a look at the image: 46, below the axis"]
    assert drawn[0].axes[0].get_ylim()[0] > 46


@pytest.mark.parametrize(("areas", "shown"), [([0, 2, 3, 1, 0], 2), ([0, 2, 2, 2, 0], 2), ([0, 0, 0], 1)])
def test_the_example_is_the_middle_one_of_slices_with_most_truth(
    areas: list[int], shown: int, drawn: list[Figure]
) -> None:
    image = np.random.default_rng(0).random((len(areas), 4, 4))
    truth = np.zeros(image.shape, int)
    for index, area in enumerate(areas):
        truth[index, :area, 0] = 1
    figures.segmentations({"case": {"truth": (image, truth), "scratch": (image, 0 * truth)}}, {}, "title", "")
    panels = [axis.images[0].get_array() for axis in drawn[0].axes]
    assert len(panels) == 2
    for panel in panels:
        np.testing.assert_array_equal(panel, image[shown])


def test_colours_of_labels_have_a_legend_and_an_empty_prediction_is_named(drawn: list[Figure]) -> None:
    image, truth = np.random.default_rng(0).random((3, 4, 4)), np.zeros((3, 4, 4), int)
    truth[1, :2], truth[1, 2:] = 1, 3
    elsewhere = np.where(np.arange(3)[:, None, None] == 2, 3, 0) * np.ones_like(truth)
    panels = {"truth": truth, "all": truth, "elsewhere": elsewhere, "nothing": 0 * truth}
    rows = {"case": {name: (image, labels) for name, labels in panels.items()}}
    figures.segmentations(rows, {1: "organ", 2: "vessel", 3: "lesion"}, "title", "")
    assert [axis.get_title() for axis in drawn[0].axes] == [
        "truth",
        "all",
        "elsewhere\nempty in this slice",
        "nothing\nempty",
    ]
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["organ", "lesion"]
    colours = {to_hex(colour) for lines in drawn[0].axes[0].collections for colour in lines.get_edgecolor()}
    assert {to_hex(line.get_color()) for line in legend.get_lines()} == colours


def test_regions_that_share_a_value_are_all_in_its_name() -> None:
    labels = {"background": 0, "whole tumour": [1, 2], "core": [2]}
    assert _label_names({"labels": labels}) == {0: "background", 1: "whole tumour", 2: "whole tumour + core"}


def test_a_roc_has_its_number_of_samples_and_intervals(drawn: list[Figure]) -> None:
    truth, score = np.array([0, 1, 1]), np.array([0.1, 0.4, 0.3])
    unknown = {"points": 50.0, "low": np.nan, "high": np.nan}
    figures.roc_of_arms(
        {"a": {"x": [(truth, score)], "y": [(truth, score)]}}, {"a": {"x": FOUND, "y": unknown}}, "", ""
    )
    (axis,) = drawn[0].axes
    assert axis.get_title("left") == "a\nn = 3, 2 of them positive"
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["x: 71.2 (60.0 to 81.0)", "y: 50.0 (no interval)"]
