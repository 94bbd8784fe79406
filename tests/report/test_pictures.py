"""Pictures of views show the right content."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from small_views import NumberedViews

from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.samples import ShownSample, ShownView
from pcrl_nnunet.report import pictures
from pcrl_nnunet.views.boxes import Box


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, instead of files."""
    saved: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **how: saved.append(figure))
    return saved


def of_boxes(images: Mapping[str, np.ndarray], *boxes: Box, local: int = 0, index: tuple[int, ...] = ()) -> ShownSample:
    """A sample whose views all have the same images; the last ones are local."""
    kinds = [f"global {i + 1}" if i < len(boxes) - local else "local" for i in range(len(boxes))]
    bounds = boxes[0].union_bounds(boxes[1])
    return ShownSample(
        {}, [ShownView(kind, kind, images, box) for kind, box in zip(kinds, boxes, strict=True)], bounds, index
    )


def test_boxes_are_drawn_in_mm_on_slices_through_the_pairs_middle(drawn: list[Figure], tmp_path: Path) -> None:
    volume, spacing = np.random.default_rng(0).standard_normal((1, 8, 20, 30)).astype(np.float32), (5.0, 1.0, 0.5)
    first, second, local = Box((0, 2, 4), (4, 12, 19)), Box((2, 4, 5), (6, 14, 25)), Box((3, 5, 6), (4, 7, 9))
    bounds = first.union_bounds(second)
    big, small = {"": np.zeros((1, 4, 6, 6), np.float32)}, {"": np.ones((1, 2, 3, 3), np.float32)}
    views = [
        ShownView("global 1", "global 1", big, first, (0, 2)),
        ShownView("global 2", "global 2", big, second),
        ShownView("local", "local 1", small, local, ()),
    ]
    shown = ShownSample({}, views, bounds)
    pictures.views_of_a_case("case_7", volume, shown, spacing, "mm", ["MRI (0000)"], str(tmp_path / "x.png"))
    upper, lower = drawn[0].subfigs
    middle = [(low + high) // 2 for low, high in zip(bounds.lower, bounds.upper, strict=True)]
    expected = [volume[0, middle[0]], volume[0, :, middle[1]], volume[0, :, :, middle[2]]]
    named = {"global 1": first, "global 2": second, "local": local, "box around the global crops": bounds}
    for axis, image, (row, column) in zip(upper.axes, expected, [(1, 2), (0, 2), (0, 1)], strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), image)
        patches = {patch.get_label(): patch for patch in axis.patches}
        for label, box in named.items():
            assert patches[label].get_xy() == (box.lower[column] * spacing[column], box.lower[row] * spacing[row])
            assert patches[label].get_width() == box.shape[column] * spacing[column]
            assert patches[label].get_height() == box.shape[row] * spacing[row]
    assert "8x20x30 voxels" in drawn[0].get_suptitle()
    titles = [axis.get_title() for axis in lower.axes]
    assert titles[0] == "global 1\n4x10x15 voxels\n20x10x7.5 mm\nto 4x6x6\nflip: axes 0, 2"
    assert titles[2] == "local 1\n1x2x3 voxels\n5x2x1.5 mm\nto 2x3x3\nno flip"


def test_2d_views_are_drawn_on_their_slice(drawn: list[Figure]) -> None:
    volume = np.random.default_rng(0).standard_normal((2, 5, 20, 30)).astype(np.float32)
    box = Box((2, 4), (12, 19))
    shown = of_boxes({"": np.zeros((2, 6, 6), np.float32)}, box, box, index=(3,))
    pictures.views_of_a_case("case_7", volume, shown, (1.0, 0.5), "mm", ["T1 (0000)", "T2 (0001)"], "x.png")
    axes = drawn[0].subfigs[0].axes
    assert len(axes) == 2
    for channel, axis in enumerate(axes):
        np.testing.assert_array_equal(axis.images[0].get_array(), volume[channel, 3])
    assert "slice 3 of 5" in drawn[0].get_suptitle()


def test_every_channel_has_its_name_and_its_own_grey_scale(drawn: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    scales = np.array([1, 10, 100, 1000], np.float32)[:, None, None, None]
    volume = rng.random((4, 8, 20, 30), np.float32) * scales
    box = Box((0, 2, 4), (4, 12, 19))
    after = rng.random((4, 4, 6, 6)) * scales
    shown = of_boxes({"before": after + 1, "after": after}, box, box, box, local=1)
    names = ["FLAIR (0000)", "$T1 (0001)", "T1$ (0002)", "T2 (0003)"]
    pictures.views_of_a_case("case_7", volume, shown, (1.0, 1.0, 1.0), "mm", names, "x.png")
    drawn[0].draw_without_rendering()  # fails if the name is read as a formula
    upper, lower = drawn[0].subfigs
    for channel, name in enumerate(names):
        slices = upper.axes[3 * channel : 3 * channel + 3]
        assert name in slices[0].get_ylabel()
        through = volume[channel, 2], volume[channel, :, 7], volume[channel, :, :, 11]
        for axis, expected in zip(slices, through, strict=True):
            np.testing.assert_array_equal(axis.images[0].get_array(), expected)
            assert axis.images[0].norm.vmax == pytest.approx(scales[channel].item(), rel=0.05)
            assert {patch.get_label() for patch in axis.patches} == {
                "global 1",
                "global 2",
                "local",
                "box around the global crops",
            }
        for row, (label, image) in enumerate({"before": after + 1, "after": after}.items()):
            of_row = lower.axes[3 * (2 * channel + row) :][:3]
            assert of_row[0].get_ylabel() == f"{name}\n{label}"
            for axis in of_row:
                np.testing.assert_array_equal(axis.images[0].get_array(), image[channel, 2])


@pytest.mark.parametrize("row", ["first", "second"])
def test_a_view_that_lacks_a_row_leaves_it_empty(drawn: list[Figure], row: str) -> None:
    volume, box = np.random.default_rng(0).random((1, 20, 30)).astype(np.float32), Box((0, 0), (9, 9))
    image = np.ones((1, 6, 6), np.float32)
    views = [ShownView("a", "a", {"first": image, "second": image}, box), ShownView("b", "b", {row: image}, box)]
    pictures.views_of_a_case("case_7", volume, ShownSample({}, views), (1.0, 1.0), "mm", ["MRI (0000)"], "x.png")
    number = [len(axis.images) for axis in drawn[0].subfigs[1].axes]
    assert number == [1, row == "first", 1, row == "second"]


@pytest.mark.parametrize("spacing", [(3.0, 1.0, 1.0), (1.0, 1.0)])
def test_any_sample_is_drawn_also_without_boxes_and_without_views(
    drawn: list[Figure], spacing: tuple[float, ...]
) -> None:
    """`Views.show` makes such a sample by default; then the middle of the image replaces the middle of the views."""
    volume = np.random.default_rng(0).random((2, 6, 8, 10)).astype(np.float32)
    views = NumberedViews()
    views.spacing = (1.0, 1.0, 1.0)
    shown = views.show(Case("a", ""), volume, np.random.default_rng(0))
    assert [(view.title, view.box) for view in shown.views] == [("input", None)]
    for sample in (shown, ShownSample(shown.sample, [])):
        pictures.views_of_a_case("case_7", volume, sample, spacing, "mm", ["T1", "T2"], "x.png")
        axes = drawn[-1].subfigs[0].axes
        assert not any(axis.patches for axis in axes)
        np.testing.assert_array_equal(axes[0].images[0].get_array(), volume[0, 3])
    assert len(drawn[-1].subfigs) == 1


def test_boxes_of_a_kind_have_the_numbers_of_their_views(drawn: list[Figure]) -> None:
    volume, image = np.random.default_rng(0).random((1, 30, 30)).astype(np.float32), {"": np.ones((1, 6, 6))}
    boxes = [Box((0, 0), (20, 20)), Box((2, 3), (9, 9)), Box((5, 1), (8, 12))]
    titles = {"global 1": "global 1", "local 1": "local", "local 2": "local"}
    views = [ShownView(kind, title, image, box) for (title, kind), box in zip(titles.items(), boxes, strict=True)]
    pictures.views_of_a_case("case_7", volume, ShownSample({}, views), (2.0, 1.0), "mm", ["MRI (0000)"], "x.png")
    (axis,) = drawn[0].subfigs[0].axes
    numbers = {text.get_text(): text.xy for text in axis.texts if isinstance(text, Annotation)}
    assert numbers == {"": (0, 0), "1": (3, 4), "2": (1, 10)}


def test_a_natural_image_has_pixels_and_no_mm(drawn: list[Figure]) -> None:
    volume, box = np.random.default_rng(0).random((1, 1, 20, 30)).astype(np.float32), Box((2, 4), (12, 19))
    shown = of_boxes({"": np.zeros((1, 6, 6), np.float32)}, box, box, index=(0,))
    pictures.views_of_a_case("x_ray", volume, shown, (1.0, 1.0), "pixels", ["RGB (0000)"], "x.png")
    assert drawn[0].get_suptitle() == "x_ray\nimage of 20x30 pixels"
    upper, lower = drawn[0].subfigs
    assert (upper.axes[0].get_xlabel(), upper.axes[0].get_ylabel()) == ("axis 1, pixels", "axis 0, pixels")
    assert lower.axes[0].get_title() == "global 1\n10x15 pixels\nto 6x6"


def test_more_than_four_views_are_in_rows_of_four(drawn: list[Figure]) -> None:
    volume, box = np.random.default_rng(0).random((1, 20, 30)).astype(np.float32), Box((2, 4), (12, 19))
    shown = of_boxes({"before": np.zeros((1, 6, 6)), "after": np.ones((1, 6, 6))}, *6 * [box], local=4)
    pictures.views_of_a_case("case_7", volume, shown, (1.0, 1.0), "mm", ["MRI (0000)"], "x.png")
    assert [len(part.axes) for part in drawn[0].subfigs] == [1, 8, 4]
    assert all(axis.images for part in drawn[0].subfigs for axis in part.axes)


def test_a_picture_is_written_as_a_png() -> None:
    volume, box, file = np.zeros((1, 5, 6, 7), np.float32), Box((0, 0, 0), (2, 3, 4)), BytesIO()
    shown = of_boxes({"": np.zeros((1, 2, 2, 2), np.float32)}, box, box)
    pictures.views_of_a_case("case_7", volume, shown, (1.0, 1.0, 1.0), "mm", ["MRI (0000)"], file)
    assert file.getvalue().startswith(b"\x89PNG")
