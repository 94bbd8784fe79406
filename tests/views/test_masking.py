import numpy as np
import pytest

from pcrl_nnunet.views.masking import draw_masked, grid_of_blocks


@pytest.mark.parametrize(
    ("size", "block", "share"),
    [((32, 32, 32), (8, 8, 8), 0.75), ((20, 56, 40), (4, 16, 16), 0.6), ((56, 40), (8, 8), 0.9), ((5, 7), (2, 3), 0.5)],
)
def test_the_given_share_of_blocks_is_masked_in_whole_blocks(size, block, share):
    masked = draw_masked(size, block, share, np.random.default_rng(0))
    assert masked.shape == size
    assert masked.dtype == bool
    grid = grid_of_blocks(size, block)
    of_blocks = []
    for place in np.ndindex(*grid):
        inside = masked[tuple(slice(p * b, (p + 1) * b) for p, b in zip(place, block, strict=True))]
        assert inside.size  # the last block of an axis is cut, not left out
        assert inside.all() or not inside.any()
        of_blocks.append(bool(inside.flat[0]))
    assert sum(of_blocks) == round(share * len(of_blocks))


def test_all_blocks_are_equally_likely():
    rng = np.random.default_rng(0)
    draws = np.mean([draw_masked((8, 8), (2, 2), 0.75, rng) for _ in range(2000)], 0)
    assert np.abs(draws - 0.75).max() < 5 * (0.75 * 0.25 / 2000) ** 0.5
