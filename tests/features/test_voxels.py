"""Features of voxels, windows that own voxels, and heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from finished_pretraining import pretrain

from pcrl_nnunet.features import voxels
from pcrl_nnunet.features.encoder import network_of
from pcrl_nnunet.features.heads import VoxelHead
from pcrl_nnunet.features.voxels import Stages, at_voxels, chunks, staged
from pcrl_nnunet.features.windows import read, tiling
from pcrl_nnunet.plans import load_plan

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "patch"), [((7, 30, 11), (4, 12, 12)), ((3, 30, 11), (12, 8)), ((5, 5, 5), (8, 8, 8))]
)
def test_each_voxel_belongs_to_one_window_that_contains_it(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    owners = np.zeros(shape, int)
    volume = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    for window in tiling(shape, patch):
        owners[window.own_index[1:]] += 1
        places = window.places(len(patch))
        assert (places >= 0).all()
        assert (places < patch).all()
        image = read(volume, window.lower, patch)
        assert image.shape == (1, *patch)
        np.testing.assert_array_equal(image[0][tuple(places.T)], volume[window.own_index].ravel())
    assert (owners == 1).all()


def test_features_of_a_voxel_are_interpolated_in_each_stage() -> None:
    rng = np.random.default_rng(0)
    fine, coarse = rng.normal(size=(2, 8, 4)).astype(np.float32), rng.normal(size=(3, 2, 2)).astype(np.float32)
    places = np.array([[0, 0], [5, 3], [7, 1]])
    found = at_voxels([torch.from_numpy(fine), torch.from_numpy(coarse)], (8, 4), places)
    for (y, x), row in zip(places, found, strict=True):
        np.testing.assert_allclose(row[:2], fine[:, y, x], rtol=1e-5)
        down, right = min(y / 4, 1), min(x / 2, 1)  # strides 4 and 2, and the border repeated
        top = (1 - right) * coarse[:, 0, 0] + right * coarse[:, 0, 1]
        bottom = (1 - right) * coarse[:, 1, 0] + right * coarse[:, 1, 1]
        np.testing.assert_allclose(row[2:], (1 - down) * top + down * bottom, rtol=1e-4, atol=1e-6)


def test_stages_are_those_of_nnunets_own_network(tiny: Any) -> None:
    plan = load_plan(tiny.folder.name, "nnUNetPlans", "3d_fullres")
    path, _ = pretrain(tiny.results, method="mae", trains_decoder=True)
    network, _, report = network_of(plan, path)
    assert report is not None
    assert any(name.startswith("decoder.stages.") for name in report.loaded)
    image = torch.randn(2, 1, 12, 12, 12)
    seen: list[torch.Tensor] = []
    hooks = [stage.register_forward_hook(lambda *given: seen.append(given[2])) for stage in network.decoder.stages]
    with torch.no_grad():
        network(image)
        expected = [*network.encoder(image), *seen]
        for hook in hooks:
            hook.remove()
        found = Stages(network, with_decoder=True)(image)
    assert [f.shape for f in found] == [e.shape for e in expected]
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    assert len(Stages(network)(image)) == len(network.encoder.output_channels)


def test_chunks_and_batches_do_not_change_the_features(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = load_plan(tiny.folder.name, "nnUNetPlans", "3d_fullres")
    stages = Stages(network_of(plan, None)[0])
    volume = np.random.default_rng(0).normal(size=(1, 14, 20, 14)).astype(np.float32)
    windows = list(tiling(volume.shape[1:], (12, 12, 12)))

    def features() -> np.ndarray:
        of_windows = staged(stages, volume, windows, (12, 12, 12), CPU)
        parts = [part for w, s in of_windows for _, part in chunks(s, (12, 12, 12), w.places(3))]
        return np.concatenate(parts)

    at_once = features()
    assert at_once.shape == (14 * 20 * 14, 20)
    monkeypatch.setattr(voxels, "CHUNK_BYTES", 4 * 20 * 100)
    monkeypatch.setattr(voxels, "MOST_IN_BATCH", 1)
    np.testing.assert_allclose(features(), at_once, rtol=1e-4, atol=1e-5)


def test_a_head_on_informative_features_is_always_right() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 600)
    features = (1000 * np.eye(3)[labels] + rng.normal(size=(600, 3))).astype(np.float32)
    head = VoxelHead(features, labels, np.array([0.98, 0.01, 0.01]), 0)
    np.testing.assert_array_equal(head.predict(features), labels)


def test_a_class_that_no_case_shows_is_not_predicted() -> None:
    features = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    assert set(VoxelHead(features, np.repeat([0, 2], 25), np.array([0.5, 0, 0.5]), 0).predict(features)) <= {0, 2}
    assert (VoxelHead(features, np.full(50, 1), np.array([0, 1.0, 0]), 0).predict(features) == 1).all()
