"""Flips and quarter turns of a batch, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcrl_nnunet.views.transformations import Transformations, plane_of_quarters, turned
from pcrl_nnunet.views.turns import Turn

IN_3D = Transformations(3, (1, 2))
IN_2D = Transformations(2, (0, 1))


def images(*size: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((16, 2, *size)).astype(np.float32))


@pytest.mark.parametrize("told", [IN_3D, IN_2D, Transformations(3), Transformations(2), Transformations(3, (0, 1))])
def test_each_image_is_transformed_as_numpy_does(told: Transformations) -> None:
    size = {None: (3, 4, 5), (1, 2): (3, 4, 4), (0, 1): (4, 4, 3)}[told.plane][: told.dim]
    batch, rng = images(*size), np.random.default_rng(1)
    indicators = np.stack([told.draw(rng) for _ in batch])
    expected = []
    for image, bits in zip(batch.numpy(), indicators, strict=True):
        new = np.flip(image, [axis + 1 for axis in range(told.dim) if bits[axis]])
        if told.plane is not None:
            new = np.rot90(new, int(bits[told.dim :].argmax()), [axis + 1 for axis in told.plane])
        expected.append(new)
    np.testing.assert_array_equal(told.apply(batch, torch.from_numpy(indicators)).numpy(), np.stack(expected))


def test_an_indicator_of_zeros_changes_nothing() -> None:
    batch = images(3, 4, 5)
    assert torch.equal(Transformations(3).apply(batch, torch.zeros(16, 3)), batch)


def test_indicators_have_a_bit_for_each_flip_and_one_of_four_for_the_turn() -> None:
    assert [told.bits for told in (IN_3D, IN_2D, Transformations(3), Transformations(2))] == [7, 6, 3, 2]
    rng = np.random.default_rng(0)
    drawn = np.stack([IN_3D.draw(rng) for _ in range(4000)])
    assert drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn[:, 3:].sum(1), 1)
    np.testing.assert_allclose(drawn.mean(0), [0.5] * 3 + [0.25] * 4, atol=0.03)
    assert len({tuple(bits) for bits in drawn.tolist()}) == 2**3 * 4


def test_images_turn_as_a_turn_of_one_image_does() -> None:
    batch, quarters = images(3, 4, 4), torch.arange(16) % 4
    expected = [Turn((1, 2), int(k)).apply(x) for x, k in zip(batch.numpy(), quarters, strict=True)]
    np.testing.assert_array_equal(turned(batch, quarters, (1, 2)).numpy(), np.stack(expected))


def test_the_plane_is_the_last_one_with_equal_spacing_and_equal_edges() -> None:
    assert plane_of_quarters((3.0, 0.8, 0.8)) == (1, 2)
    assert plane_of_quarters((1.0, 1.0, 1.0)) == (1, 2)
    assert plane_of_quarters((1.0, 1.0, 3.0)) == (0, 1)
    assert plane_of_quarters((1.0, 3.0)) is None
    assert plane_of_quarters((1.0, 1.0), (8, 8)) == (0, 1)
    assert plane_of_quarters((1.0, 1.0), (8, 16)) is None
