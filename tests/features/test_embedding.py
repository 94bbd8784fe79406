"""Vectors of cases: windows, pooling, and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.features.embedding import columns, embedding
from pcrl_nnunet.features.table import Embeddings
from pcrl_nnunet.features.windows import starts_along, windows_of

CPU = torch.device("cpu")


class TwoStages(nn.Module):
    """Stands for an encoder: the image, and its negative at half the resolution."""

    def forward(self, image: Tensor) -> list[Tensor]:
        return [image, -image[..., ::2]]


@pytest.mark.parametrize(
    ("length", "size", "expected"), [(10, 10, [0]), (7, 10, [0]), (11, 10, [0, 1]), (25, 10, [0, 8, 15])]
)
def test_windows_cover_an_axis_evenly_with_the_fewest(length: int, size: int, expected: list[int]) -> None:
    assert starts_along(length, size) == expected


def test_a_vector_has_means_and_maxima_of_all_windows_and_stages() -> None:
    volume = np.random.default_rng(0).normal(size=(2, 8, 12, 4)).astype(np.float32)
    found = embedding(TwoStages(), volume, (8, 4, 4), CPU)  # three windows without overlap
    half = -volume[..., ::2]
    expected = [volume.mean((1, 2, 3)), volume.max((1, 2, 3)), half.mean((1, 2, 3)), half.max((1, 2, 3))]
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=1e-5)


def test_a_plan_of_slices_takes_each_slice() -> None:
    volume = np.random.default_rng(0).normal(size=(1, 5, 6, 4)).astype(np.float32)
    assert [window.shape for window in windows_of(volume, (6, 4))] == [(1, 6, 4)] * 5
    found = embedding(TwoStages(), volume, (6, 4), CPU)
    np.testing.assert_allclose(found[:2], [volume.mean(), volume.max()], rtol=1e-5)


def test_a_smaller_case_repeats_its_border() -> None:
    volume = np.arange(3, dtype=np.float32).reshape(1, 1, 3)
    (window,) = windows_of(volume, (2, 6))
    assert window[0].tolist() == [[0, 0, 1, 2, 2, 2]] * 2


def test_columns_name_stage_and_pooling() -> None:
    stages, poolings = columns([2, 1])
    assert stages.tolist() == [0, 0, 0, 0, 1, 1]
    assert poolings.tolist() == ["mean", "mean", "maximum", "maximum", "mean", "maximum"]


def vectors(number: int) -> Embeddings:
    rng = np.random.default_rng(0)
    names = [f"case_{n}" for n in range(number)]
    return Embeddings(names, rng.normal(size=(number, 3)), np.arange(number) < 2, *columns([1, 1])[:1], np.array([""]))


def test_the_map_tells_groups_of_cases_apart() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 6], 10)
    found = Embeddings([""] * 20, rng.normal(size=(20, 50)) + groups[:, None], groups > 0, *columns([25]))
    places, shares = found.map()
    assert len({*(places[:10, 0] > 0)}) == len({*(places[10:, 0] > 0)}) == 1
    assert shares[0] > shares[1] > 0


def test_two_cases_make_no_map() -> None:
    with pytest.raises(UserError, match=r"2 cases make no map; expected 3 or more"):
        vectors(2).map()


def test_a_file_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be written"):
        vectors(3).write(str(tmp_path / "missing" / "embeddings.npz"))
