"""The teacher, and the cleaning of its labels."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from pcrl_nnunet.semi_supervised.teacher import Teacher, keep_largest_pieces


class Network(nn.Module):
    """Stands in for a U-Net: it has a decoder with deep supervision, a batch norm with buffers, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Module()
        self.decoder.deep_supervision = True
        self.conv, self.norm, self.dropout = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.dropout(self.norm(self.conv(images)))
        return [output, output[..., ::2, ::2]] if self.decoder.deep_supervision else output


def randomise(network: nn.Module, seed: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator))
    return {name: value.numpy().copy() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("momentum", [0.0, 0.8, 0.99])
def test_the_teacher_is_the_moving_average_with_its_ramp(momentum: float) -> None:
    student = Network()
    teacher = Teacher(student, momentum)
    expected: dict[str, np.ndarray] = {}
    for update in range(8):
        now = randomise(student, update)
        teacher.update(student)
        keep = min(1 - 1 / (update + 1), momentum) if update else 0.0  # the first update copies
        expected = {name: keep * expected.get(name, 0) + (1 - keep) * value for name, value in now.items()}
        found = teacher.average.module.state_dict()
        for name, value in expected.items():
            if "num_batches" not in name:
                np.testing.assert_allclose(found[name].numpy(), value, rtol=1e-5)


def test_the_teacher_is_in_evaluation_mode_without_gradients_and_apart_from_the_student() -> None:
    student = Network().train()
    before = randomise(student, 0)
    teacher = Teacher(student, 0.5)
    teacher.update(student)
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    first, second = teacher.labels(images, False), teacher.labels(images, False)
    assert torch.equal(first, second)  # no dropout, no statistics of the batch
    assert not first.requires_grad
    assert not any(p.requires_grad for p in teacher.average.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert student.training
    assert student.decoder.deep_supervision
    for name, value in student.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[name])
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.average.parameters()}


def test_labels_are_the_most_likely_class_or_the_regions_above_one_half() -> None:
    student = Network()
    randomise(student, 0)
    teacher = Teacher(student, 0.5)
    teacher.update(student)
    student.decoder.deep_supervision = False
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        logits = student.eval()(images).numpy()
    labels = teacher.labels(images, False)
    assert labels.dtype == torch.int16
    np.testing.assert_array_equal(labels.numpy(), logits.argmax(1)[:, None])
    regions = teacher.labels(images, True)
    assert regions.dtype == torch.bool
    np.testing.assert_array_equal(regions.numpy(), 1 / (1 + np.exp(-logits)) > 0.5)
    assert 0 < regions.float().mean() < 1


def test_a_teacher_restored_from_its_state_continues_identically() -> None:
    student = Network()
    teacher = Teacher(student, 0.99)
    for seed in range(3):
        randomise(student, seed)
        teacher.update(student)
    other = Teacher(Network(), 0.99)
    other.load_state_dict({name: value.clone() for name, value in teacher.state_dict().items()})
    randomise(student, 3)
    for each in (teacher, other):
        each.update(student)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """The largest piece, connected by faces, edges or corners, by scipy."""
    pieces, number = ndimage.label(mask, np.ones([3] * mask.ndim))
    if number == 0:
        return mask
    sizes = ndimage.sum_labels(mask, pieces, range(1, number + 1))
    assert number == 1 or sorted(sizes)[-1] > sorted(sizes)[-2]  # the example has a largest one
    return np.asarray(pieces == 1 + sizes.argmax())


def blobs(shape: tuple[int, ...], threshold: float, seed: int) -> np.ndarray:
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), [0, *[1] * (len(shape) - 1)])
    return np.asarray(smooth / smooth.std() > threshold)


@pytest.mark.parametrize("patch", [(40, 40), (16, 16, 16)])
def test_each_class_keeps_its_largest_piece_of_each_patch(patch: tuple[int, ...]) -> None:
    labels = np.zeros((3, *patch), np.int16)
    for number, threshold in ((1, 0.5), (2, 0.7), (3, 0.9)):
        labels[blobs((3, *patch), threshold, number)] = number
    labels[2] = 0  # a patch of background
    kept = keep_largest_pieces(torch.from_numpy(labels[:, None].copy()), [1, 3])
    expected = labels.copy()
    for of_patch in expected:
        for number in (1, 3):
            of_patch[(of_patch == number) & ~largest_piece(of_patch == number)] = 0
    assert (expected != labels).any()
    assert kept.dtype == torch.int16
    np.testing.assert_array_equal(kept.numpy()[:, 0], expected)


@pytest.mark.parametrize("patch", [(40, 40), (16, 16, 16)])
def test_each_region_keeps_its_largest_piece_independently(patch: tuple[int, ...]) -> None:
    regions = np.stack([blobs((2, *patch), threshold, 0) for threshold in (0.3, 0.6, 0.9)], 1)  # one inside the other
    given = torch.from_numpy(regions.copy())
    kept = keep_largest_pieces(given, [0, 2])
    expected = regions.copy()
    for of_patch in expected:
        for number in (0, 2):
            of_patch[number] = largest_piece(of_patch[number])
    changed = (expected != regions).reshape(2, 3, -1).any((0, 2))
    assert changed.tolist() == [True, False, True]
    assert kept.dtype == torch.bool
    np.testing.assert_array_equal(kept.numpy(), expected)
    np.testing.assert_array_equal(given.numpy(), regions)


@pytest.mark.parametrize("corner", [(0, 0), (30, 25)])
def test_a_small_box_of_classes_in_a_large_patch_is_cleaned_in_its_place(corner: tuple[int, int]) -> None:
    labels = np.zeros((2, 1, 40, 40), np.int16)
    rows, columns = (slice(start, start + 10) for start in corner)
    labels[0, 0, rows, columns], labels[1, 0, rows, columns] = blobs((2, 10, 10), 0.3, 5)
    labels[:, :, 18:21, 18:21] = 2  # another class, outside the box
    kept = keep_largest_pieces(torch.from_numpy(labels), [1, 3]).numpy()
    expected = np.where(labels == 1, 0, labels)
    for patch, own in zip(expected, labels, strict=True):
        patch[0][largest_piece(own[0] == 1)] = 1
    assert (expected != labels).any()
    np.testing.assert_array_equal(kept, expected)


def test_labels_of_classes_that_come_in_pieces_are_left_as_they_are() -> None:
    labels = torch.tensor([[[[1, 0, 1, 0, 2]]]], dtype=torch.int16)
    assert torch.equal(keep_largest_pieces(labels, []), labels)
    assert torch.equal(keep_largest_pieces(labels, [2]), labels)
    corners = torch.tensor([[[[1, 0, 0], [0, 1, 0], [0, 0, 0]]]], dtype=torch.int16)
    assert torch.equal(keep_largest_pieces(corners, [1]), corners)  # one piece, connected by a corner
