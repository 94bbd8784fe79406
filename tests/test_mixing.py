"""Patches that are pasted into each other."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from pcrl_nnunet.finetuning import mixing


def edges_and_starts(boxes: torch.Tensor) -> tuple[set[tuple[int, ...]], np.ndarray]:
    """The edges of all boxes, and where each starts; each mask has to be one full box."""
    edges, starts = set(), []
    for box in boxes[:, 0].numpy():
        places = np.argwhere(box)
        low, high = places.min(0), places.max(0) + 1
        assert len(places) == np.prod(high - low)
        edges.add(tuple(int(n) for n in high - low))
        starts.append(low)
    return edges, np.array(starts)


@pytest.mark.parametrize(
    ("patch", "share", "edge"),
    [
        ((12, 12), 2 / 3, (8, 8)),
        ((6, 12, 9), 2 / 3, (4, 8, 6)),
        ((1, 10, 10), 2 / 3, (1, 7, 7)),
        ((2, 8, 8), 0.1, (1, 1, 1)),
        ((1, 8, 9), 0.99, (1, 7, 8)),
    ],
)
def test_boxes_have_the_share_of_each_axis_and_reach_every_place(
    patch: tuple[int, ...], share: float, edge: tuple[int, ...]
) -> None:
    boxes = mixing.random_boxes(np.random.default_rng(0), 400, patch, share)
    assert boxes.shape == (400, 1, *patch)
    assert boxes.dtype == torch.bool
    edges, starts = edges_and_starts(boxes)
    assert edges == {edge}
    for axis, (n, size) in enumerate(zip(patch, edge, strict=True)):
        assert set(starts[:, axis]) == set(range(n - size + 1))


def test_boxes_are_the_same_for_the_same_seed() -> None:
    one, other, third = (mixing.random_boxes(np.random.default_rng(seed), 3, (9, 9, 9), 0.5) for seed in (0, 0, 1))
    assert torch.equal(one, other)
    assert not torch.equal(one, third)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("around", [0, 2, 5])
def test_only_the_first_patches_are_labelled_around_the_box(dim: int, around: int) -> None:
    boxes = mixing.random_boxes(np.random.default_rng(0), 5, (6,) * dim, 2 / 3)
    parts = mixing.labelled_parts(boxes, around)
    assert torch.equal(parts[:around], ~boxes[:around])
    assert torch.equal(parts[around:], boxes[around:])


def test_pasting_shows_one_image_inside_the_part_and_another_outside() -> None:
    rng = np.random.default_rng(0)
    here, elsewhere = rng.normal(size=(2, 2, 3, 5, 6)).astype(np.float32)
    part = rng.random((2, 1, 5, 6)) > 0.5
    pasted = mixing.paste(torch.from_numpy(here), torch.from_numpy(elsewhere), torch.from_numpy(part)).numpy()
    everywhere = np.broadcast_to(part, here.shape)
    np.testing.assert_array_equal(pasted[everywhere], here[everywhere])
    np.testing.assert_array_equal(pasted[~everywhere], elsewhere[~everywhere])


def test_label_maps_are_ignored_outside_of_the_part() -> None:
    labels = torch.tensor([[[[0, 1], [2, 3]]]], dtype=torch.int16)
    part = torch.tensor([[[[True, False], [True, False]]]])
    ignored = mixing.with_ignored(labels, part, -1)
    assert ignored.dtype == torch.int16
    assert ignored.tolist() == [[[[0, -1], [2, -1]]]]
    assert labels.tolist() == [[[[0, 1], [2, 3]]]]


def test_regions_are_ignored_outside_of_the_part_and_where_they_were_before() -> None:
    regions = torch.tensor([[[[True, True]], [[False, True]], [[True, False]]]])  # the last one marks ignored voxels
    part = torch.tensor([[[[True, False]]]])
    assert mixing.with_ignored(regions, part, 7).tolist() == [[[[True, True]], [[False, True]], [[True, True]]]]
    assert mixing.with_ignored(regions, ~part, 7)[:, -1].tolist() == [[[True, False]]]


@pytest.mark.parametrize(
    ("patch", "scales"),
    [
        ((12, 10), [(1, 1), (0.5, 0.5), (0.25, 0.5)]),
        ((12, 11, 13), [(1, 1, 1), (1, 0.5, 0.5), (0.5, 0.25, 0.25)]),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_labels_at_scales_are_nnunets(patch: tuple[int, ...], scales: list[tuple[float, ...]], channels: int) -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(-1, 4, (2, channels, *patch))).to(torch.int16)
    if channels > 1:
        labels = labels > 1
    nnunet = DownsampleSegForDSTransform(scales)
    expected = [
        torch.stack(level) for level in zip(*(nnunet(segmentation=s)["segmentation"] for s in labels), strict=True)
    ]
    other = [torch.zeros_like(level) for level in expected]
    found = mixing.at_scales(labels, other)
    assert len(found) == len(scales)
    for level, wanted in zip(found, expected, strict=True):
        assert level.dtype == labels.dtype
        assert torch.equal(level, wanted)
