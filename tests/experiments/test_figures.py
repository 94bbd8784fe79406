"""Pictures show what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from pcrl_nnunet.classification import figures as classification_figures
from pcrl_nnunet.experiments import figures
from pcrl_nnunet.report import pictures
from pcrl_nnunet.views.boxes import Box, ViewBoxes


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, instead of files."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: saved.append(figure))
    return saved


def test_boxes_are_drawn_in_mm_on_the_slices_through_the_middle_of_the_pair(
    drawn: list[Figure], tmp_path: Path
) -> None:
    volume, spacing = np.random.default_rng(0).standard_normal((1, 8, 20, 30)).astype(np.float32), (5.0, 1.0, 0.5)
    first, second, local = Box((0, 2, 4), (4, 12, 19)), Box((2, 4, 5), (6, 14, 25)), Box((3, 5, 6), (4, 7, 9))
    bounds = first.union_bounds(second)
    big, small = np.zeros((2, 1, 4, 6, 6), np.float32), np.ones((1, 1, 2, 3, 3), np.float32)
    sample = {"boxes": ViewBoxes((first, second), bounds, (local,)), "slice": (), "input": big, "local": small}
    pictures.views_of_a_case("case_7", volume, sample, [*big, *small], spacing, ["MRI (0000)"], str(tmp_path / "x.png"))
    upper, lower = drawn[0].subfigs
    middle = [(low + high) // 2 for low, high in zip(bounds.lower, bounds.upper, strict=True)]
    expected = [volume[0, middle[0]], volume[0, :, middle[1]], volume[0, :, :, middle[2]]]
    named = {"global 1": first, "global 2": second, "local": local, "box around them": bounds}
    for axis, image, (row, column) in zip(upper.axes, expected, [(1, 2), (0, 2), (0, 1)], strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), image)
        shown = {patch.get_label(): patch for patch in axis.patches}
        for label, box in named.items():
            assert shown[label].get_xy() == (box.lower[column] * spacing[column], box.lower[row] * spacing[row])
            assert shown[label].get_width() == box.shape[column] * spacing[column]
            assert shown[label].get_height() == box.shape[row] * spacing[row]
    assert "8x20x30 voxels" in drawn[0].get_suptitle()
    titles = [axis.get_title() for axis in lower.axes[:3]]
    assert titles[0] == "global 1\n4x10x15 voxels\n20x10x7.5 mm\nto 4x6x6 voxels"
    assert titles[2] == "local 1\n1x2x3 voxels\n5x2x1.5 mm\nto 2x3x3 voxels"


def test_2d_views_are_drawn_on_their_slice(drawn: list[Figure], tmp_path: Path) -> None:
    volume = np.random.default_rng(0).standard_normal((2, 5, 20, 30)).astype(np.float32)
    box = Box((2, 4), (12, 19))
    big, small = np.zeros((2, 2, 6, 6), np.float32), np.ones((1, 2, 3, 3), np.float32)
    sample = {"boxes": ViewBoxes((box, box), box, (box,)), "slice": (3,), "input": big, "local": small}
    names = ["T1 (0000)", "T2 (0001)"]
    pictures.views_of_a_case("case_7", volume, sample, [*big, *small], (1.0, 0.5), names, str(tmp_path / "x.png"))
    axes = drawn[0].subfigs[0].axes
    assert len(axes) == 2
    for channel, axis in enumerate(axes):
        np.testing.assert_array_equal(axis.images[0].get_array(), volume[channel, 3])
    assert "slice 3 of 5" in drawn[0].get_suptitle()


def test_every_channel_is_drawn_with_its_name_in_a_grey_scale_of_its_own(drawn: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    scales = np.array([1, 10, 100, 1000], np.float32)[:, None, None, None]
    volume = rng.random((4, 8, 20, 30), np.float32) * scales
    box = Box((0, 2, 4), (4, 12, 19))
    sample = {"boxes": ViewBoxes((box, box), box, (box,)), "slice": ()}
    sample |= {"input": rng.random((2, 4, 4, 6, 6)) * scales, "local": rng.random((1, 4, 2, 3, 3)) * scales}
    before = [*(sample["input"] + 1), *(sample["local"] + 1)]
    names = ["FLAIR (0000)", "$T1 (0001)", "T1$ (0002)", "T2 (0003)"]
    pictures.views_of_a_case("case_7", volume, sample, before, (1.0, 1.0, 1.0), names, "x.png")
    drawn[0].draw_without_rendering()  # a name is no formula
    upper, lower = drawn[0].subfigs
    for channel, name in enumerate(names):
        slices = upper.axes[3 * channel : 3 * channel + 3]
        assert name in slices[0].get_ylabel()
        through = volume[channel, 2], volume[channel, :, 7], volume[channel, :, :, 11]
        for axis, expected in zip(slices, through, strict=True):
            np.testing.assert_array_equal(axis.images[0].get_array(), expected)
            assert axis.images[0].norm.vmax == pytest.approx(scales[channel].item(), rel=0.05)
            assert {patch.get_label() for patch in axis.patches} == {"global 1", "global 2", "local", "box around them"}
        for row, views in ((2 * channel, before), (2 * channel + 1, [*sample["input"], *sample["local"]])):
            shown = lower.axes[3 * row : 3 * row + 3]
            assert name in shown[0].get_ylabel()
            for axis, view in zip(shown, views, strict=True):
                np.testing.assert_array_equal(axis.images[0].get_array(), view[channel, view.shape[1] // 2])


def test_an_arm_has_one_colour_in_all_panels(tmp_path, monkeypatch):
    figures_made = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *_, **__: figures_made.append(self))
    run = (np.arange(1, 4), np.array([0.1, 0.2, 0.3]))
    given = {"10": {"a": [run], "b": [run], "c": [run]}, "all": {"a": [run], "c": [run]}}
    figures.score_while_training(given, "Dice", "x.png")
    first, second = (
        {line.get_label(): line.get_color() for line in axis.lines if line.get_linewidth() == 2}
        for axis in figures_made[0].axes
    )
    assert first["c"] == second["c"] != first["b"]


def test_an_arm_has_the_same_colour_in_all_pictures_of_a_comparison(drawn: list[Figure]) -> None:
    """In whatever order they come; the control has the first colour also where another's name comes before."""
    run = (np.arange(1, 4), np.array([0.1, 0.2, 0.3]))
    runs = pd.DataFrame({"method": ["b", "scratch", "a"], "labelled": 5, "seed": 0, "points": 50.0})
    figures.label_efficiency(runs, "Dice", 0.0, "title", "x.png")
    figures.score_while_training({"5": {"scratch": [run], "a": [run]}, "10": {"b": [run]}}, "Dice", "x.png")
    figures.roc_of_arms({"5": {name: [(np.array([0, 1]), np.array([0, 1]))] for name in ("a", "b", "scratch")}}, "x")
    of_pictures = [
        {line.get_label(): to_hex(line.get_color()) for axis in figure.axes for line in axis.lines} for figure in drawn
    ]
    for name in ("a", "b", "scratch"):
        assert len({of_picture[name] for of_picture in of_pictures}) == 1
    assert of_pictures[0]["scratch"] == to_hex("C0")


def test_panels_of_many_numbers_of_labels_are_in_rows_of_three(drawn: list[Figure]) -> None:
    run = (np.arange(1, 4), np.array([0.1, 0.2, 0.3]))
    figures.score_while_training({str(n): {"a": [run]} for n in range(5)}, "Dice", "x.png")
    figures.roc_of_arms({str(n): {"a": [(np.array([0, 1]), np.array([0, 1]))]} for n in range(5)}, "x.png")
    for figure in drawn:
        assert [axis.get_title() for axis in figure.axes] == list("01234")
        assert {axis.get_gridspec().get_geometry() for axis in figure.axes} == {(2, 3)}


def test_without_a_curve_there_is_no_picture_and_a_reason() -> None:
    """An error that the report of a comparison catches: where only shortcuts are done there are no curves."""
    with pytest.raises(LookupError, match="no finished run has a curve"):
        figures.score_while_training({}, "Dice", "x.png")
    with pytest.raises(LookupError, match="no finished run has a curve"):
        figures.roc_of_arms({}, "x.png")


def test_all_built_in_arms_have_different_colours(drawn: list[Figure]) -> None:
    arms = [f"arm_{i}" for i in range(12)]
    runs = pd.DataFrame({"method": arms, "labelled": 5, "seed": 0, "points": 50.0})
    run = (np.arange(1, 4), np.array([0.1, 0.2, 0.3]))
    figures.label_efficiency(runs, "Dice", 0.0, "title", "x.png")
    figures.score_while_training({"5": {name: [run] for name in arms}}, "Dice", "x.png")
    for figure in drawn:
        lines = [line for line in figure.axes[0].lines if line.get_label() in arms]
        assert len({to_hex(line.get_color()) for line in lines}) == len(lines) == 12


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
    assert legend.get_window_extent().x0 > axis.get_window_extent().x1


def test_the_progress_of_a_classification_is_its_losses_auroc_and_rate(drawn: list[Figure]) -> None:
    keys = ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs")
    log = {key: [i + 0.1, i + 0.2, i + 0.3] for i, key in enumerate(keys)}
    classification_figures.classification_progress(log, "x.png")
    shown = [[list(line.get_ydata()) for line in axis.lines] for axis in drawn[0].axes]
    assert shown == [[log[keys[0]], log[keys[1]]], [log[keys[2]], log[keys[3]]], [log[keys[4]]]]
    assert "AUROC" in drawn[0].axes[1].get_title()


def test_a_roc_is_that_of_the_known_samples(drawn: list[Figure]) -> None:
    truth = np.array([[1.0, 1], [0, 1], [1, 1], [0, 1], [np.nan, 1]])
    score = np.array([[0.9, 0.1], [0.4, 0.2], [0.3, 0.3], [0.1, 0.4], [0.99, 0.5]])
    found = {name: {"auroc": 0.75, "low": 0.5, "high": 1.0} for name in ("a", "b")}
    classification_figures.roc(truth, score, ("a", "b"), found, "x.png")
    curve, chance = drawn[0].axes[0].lines  # of b all are positive: it has none
    assert list(zip(curve.get_xdata(), curve.get_ydata(), strict=True)) == [
        (0, 0),
        (0, 0.5),
        (0.5, 0.5),
        (0.5, 1),
        (1, 1),
    ]
    assert curve.get_label() == "a: 0.750 (0.500 to 1.000)"
    assert list(chance.get_xdata()) == list(chance.get_ydata()) == [0, 1]


@pytest.mark.parametrize("size", [(6, 8, 10), (8, 10)])
def test_an_activation_map_lies_over_the_middle_slice_of_its_input(drawn: list[Figure], size: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    image, maps = rng.normal(size=(2, *size)), rng.normal(size=(3, *size))
    classification_figures.activation(image, maps, ["a", "b", "c"], "case_1", "x.png")
    middle = (size[0] // 2,) if len(size) == 3 else ()
    for i, axis in enumerate(drawn[0].axes):
        np.testing.assert_array_equal(axis.images[0].get_array(), image[(0, *middle)])
        if i:
            np.testing.assert_array_equal(axis.images[1].get_array(), maps[(i - 1, *middle)])
    assert [axis.get_title() for axis in drawn[0].axes] == ["input", "a", "b", "c"]


@pytest.mark.parametrize(("areas", "shown"), [([0, 2, 3, 1, 0], 2), ([0, 2, 2, 2, 0], 2), ([0, 0, 0], 1)])
def test_the_example_is_the_slice_with_the_most_truth_and_of_several_the_middle_one(
    areas: list[int], shown: int, drawn: list[Figure]
) -> None:
    image = np.random.default_rng(0).random((len(areas), 4, 4))
    truth = np.zeros(image.shape, int)
    for index, area in enumerate(areas):
        truth[index, :area, 0] = 1
    figures.segmentations({"case": {"truth": (image, truth), "scratch": (image, 0 * truth)}}, "")
    panels = [axis.images[0].get_array() for axis in drawn[0].axes]
    assert len(panels) == 2
    for panel in panels:
        np.testing.assert_array_equal(panel, image[shown])
