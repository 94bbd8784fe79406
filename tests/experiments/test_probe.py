"""A probe says 1 of features that are the labels, 0.5 of labels that are nothing in the image, and disturbs nothing."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import blosc2
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import make_plan
from torch import Tensor, nn

from pcrl_nnunet import checkpoint
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments import probe
from pcrl_nnunet.experiments.probe import Probe, labelled
from pcrl_nnunet.ingest.unlabelled import unlabelled_folder
from pcrl_nnunet.loading.cases import CaseVolume, find_cases
from pcrl_nnunet.pretraining.settings import pretrain_settings
from pcrl_nnunet.trainers import PCRLPretrainTrainer

CPU = torch.device("cpu")


def write(folder: Path, name: str, image: np.ndarray, labels: np.ndarray) -> None:
    """A preprocessed case: image (C, *), labels (*)."""
    blosc2.asarray(image.astype(np.float32), urlpath=str(folder / f"{name}.b2nd"), mode="w")
    blosc2.asarray(labels[None].astype(np.int8), urlpath=str(folder / f"{name}_seg.b2nd"), mode="w")
    places = {label: np.argwhere(labels[None] == label) for label in (1, 2, 3)}
    (folder / f"{name}.pkl").write_bytes(pickle.dumps({"class_locations": places}))


class OneHot(nn.Module):
    """Features are whether a voxel's first channel is 0, 1 or 2, at full resolution and at every fourth voxel."""

    stride = 4

    def forward(self, image: Tensor) -> list[Tensor]:
        assert not torch.is_grad_enabled()
        assert not self.training
        fine = torch.cat([image[:, :1] == value for value in range(3)], 1).float()
        return [fine, fine[(..., *[slice(None, None, self.stride)] * (image.ndim - 2))]]


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, shape)


@pytest.mark.parametrize("size", [(12, 8, 12), (12, 12), (24, 20, 20), (24, 20)])
def test_features_that_are_the_labels_have_1_whatever_the_box_and_the_image(tmp_path: Path, size: tuple[int, ...]):
    """Labels are noise: at a voxel's neighbour nothing is known of it. Boxes are smaller than images, or larger."""
    for i, shape in enumerate([(12, 17, 14), (20, 9, 31)] * 3):
        labels = noise(shape, i)
        write(tmp_path, f"case_{i}", labels[None], labels)
    found = Probe(find_cases(str(tmp_path)), size, seed=0)(OneHot().train(), CPU)
    assert found["probe_stage_1"] == pytest.approx(1, abs=1e-3)
    assert found["probe"] > 0.98
    assert abs(found["probe_stage_2"] - 0.5) < 0.1  # three of four voxels an axis are not there


def test_a_coarse_stage_is_looked_at_in_the_nearest_place(tmp_path: Path):
    """Voxels 4j - 2 to 4j + 1 have the label of 4j, the middle of a strided convolution's place j."""
    nearest = np.minimum((np.arange(24) + 2) // 4, 5)
    for i in range(6):
        labels = noise((6, 6, 6), i)[np.ix_(nearest, nearest, nearest)]
        write(tmp_path, f"case_{i}", labels[None], labels)
    found = Probe(find_cases(str(tmp_path)), (24, 24, 24), seed=0)(OneHot(), CPU)
    assert found["probe_stage_2"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("num_labels", [2, 3])
def test_labels_that_are_nothing_in_the_image_have_chance(tmp_path: Path, num_labels: int):
    for i in range(12):
        write(tmp_path, f"case_{i}", noise((12, 12, 12), i)[None], noise((12, 12, 12), 100 + i) % num_labels)
    found = Probe(find_cases(str(tmp_path)), (8, 8, 8), seed=0)(OneHot(), CPU)
    assert all(abs(value - 0.5) < 0.08 for value in found.values()), found


def test_it_is_fitted_to_one_half_of_the_cases_and_scored_on_the_other(tmp_path: Path):
    """In which the image shows the opposite."""
    labels = {f"case_{i}": noise((12, 12, 12), i) % 2 for i in range(8)}
    for name, of_case in labels.items():
        write(tmp_path, name, of_case[None], of_case)
    cases = find_cases(str(tmp_path))
    fitted, scored = ({patch.case.name for patch in half} for half in Probe(cases, (8, 8, 8), seed=0).halves)
    assert (len(fitted), len(scored), len(fitted | scored)) == (4, 4, 8)
    for name in scored:
        write(tmp_path, name, 1 - labels[name][None], labels[name])
    assert Probe(cases, (8, 8, 8), seed=0)(OneHot(), CPU)["probe_stage_1"] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("size", [(6, 6, 6), (6, 6), (30, 30, 30)])
def test_voxels_are_drawn_evenly_within_the_image_and_none_that_is_ignored(tmp_path: Path, size: tuple[int, ...]):
    labels = np.zeros((20, 21, 22), int)
    labels[10:12, 10:12, 10:13] = 1  # 12 of 9240 voxels
    labels[9], labels[12] = -1, 3
    labels[:, :5] = 3
    for i in range(3):
        write(tmp_path, f"case_{i}", labels[None], labels)
    drawn = Probe(find_cases(str(tmp_path)), size, seed=1, ignored=3)
    patches = [patch for half in drawn.halves for patch in half]
    assert len(patches) == 3 * probe.BOXES
    assert {int(label) for patch in patches for label in patch.labels} == {0, 1}
    flat = 3 - len(size)
    for patch in patches:
        lower = [c - n // 2 for c, n in zip(patch.centre, [1] * flat + [*size], strict=True)]
        at = patch.voxels + lower[flat:]
        place = (*lower[:flat], *at.T) if flat else tuple(at.T)
        np.testing.assert_array_equal(labels[place], patch.labels)
        assert (at >= 0).all()  # else it would be counted from the end
        assert (patch.voxels < size).all()
        assert len(np.unique(patch.voxels, axis=0)) == len(patch.voxels)
        assert (patch.labels == 0).sum() <= probe.VOXELS
    counts = [sum(int((patch.labels == label).sum()) for patch in patches) for label in (0, 1)]
    assert counts[1] > 0.3 * counts[0]  # of the image it is 0.001


def test_cases_boxes_and_voxels_follow_from_the_seed(tmp_path: Path):
    for i in range(6):
        write(tmp_path, f"case_{i}", noise((1, 14, 14, 14), i), noise((14, 14, 14), i))
    cases = find_cases(str(tmp_path))

    def drawn(seed: int) -> list[Any]:
        halves = Probe(cases, (6, 6, 6), seed).halves
        return [(patch.case.name, patch.centre, patch.voxels.tolist()) for half in halves for patch in half]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_of_many_cases_a_few_dozen_are_opened_and_segmentations_by_box(tmp_path: Path, monkeypatch):
    read: dict[str, int] = {}
    getitem = CaseVolume.__getitem__

    def recorded(volume: CaseVolume, index: tuple[slice, ...]) -> np.ndarray:
        part = getitem(volume, index)
        read[volume.case.path] = max(read.get(volume.case.path, 0), part.size)
        return part

    monkeypatch.setattr(CaseVolume, "__getitem__", recorded)
    labels = noise((14, 14, 14), 0)
    write(tmp_path, "case_0", labels[None], labels)
    for i in range(1, 60):
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            os.link(tmp_path / f"case_0{ending}", tmp_path / f"case_{i}{ending}")
    Probe(find_cases(str(tmp_path)), (6, 6, 6), seed=0)
    assert len(read) == 40
    assert max(read.values()) <= 6**3


def test_features_that_are_not_finite_are_no_number_and_no_crash(tmp_path: Path):
    class Broken(OneHot):
        def forward(self, image: Tensor) -> list[Tensor]:
            fine, coarse = super().forward(image)
            return [fine, coarse / 0]

    for i in range(2):
        write(tmp_path, f"case_{i}", noise((1, 9, 9, 9), i), noise((1, 9, 9, 9), i)[0])
    found = Probe(find_cases(str(tmp_path)), (8, 8, 8), seed=0)(Broken(), CPU)
    assert found["probe_stage_1"] == pytest.approx(1, abs=1e-3)
    assert np.isnan([found["probe_stage_2"], found["probe"]]).all()


def test_one_label_or_one_case_is_too_little(tmp_path: Path):
    for i in range(3):
        write(tmp_path, f"case_{i}", noise((1, 9, 9, 9), i), np.zeros((9, 9, 9), int))
    cases = find_cases(str(tmp_path))
    with pytest.raises(
        UserError, match=r"needs two labels .* in 1 cases to fit and 2 to score, and found \[0\] in the"
    ):
        Probe(cases, (8, 8, 8), seed=0)
    with pytest.raises(UserError, match=r"in 0 cases to fit and 1 to score, and found \[\] in the former"):
        Probe(cases[:1], (8, 8, 8), seed=0)


# ------------------------------------------------------------------------------------------- within a pretraining


def plan_of(**pretrain: Any) -> dict[str, Any]:
    """Batch normalisation and dropout: both would notice a probe that is not in evaluation."""
    plan = make_plan(pretrain=pretrain)
    kwargs = plan["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["norm_op"] = kwargs["norm_op"].replace("instancenorm.Instance", "batchnorm.Batch")
    kwargs["dropout_op"], kwargs["dropout_op_kwargs"] = "torch.nn.modules.dropout.Dropout3d", {"p": 0.3}
    return plan


def make(tiny: Any, fold: int | str = "all", continues: bool = False, plan: Any = None, **overrides: Any) -> Any:
    plan = plan or plan_of()
    configuration = PlansManager(plan).get_configuration("3d_fullres").configuration
    overrides = {"epochs": 3, "iters_per_epoch": 2, "batch_size": 4, **overrides}
    settings = pretrain_settings(plan, "3d_fullres", configuration, **overrides)
    plans = {**copy.deepcopy(plan), "continue_training": continues, "pcrl_settings": settings}
    return PCRLPretrainTrainer(plans, "3d_fullres", fold, tiny.dataset_json, CPU)


def folder_of(tiny: Any, fold: int | str = "all") -> Path:
    return tiny.results / "PCRLPretrainTrainer__nnUNetPlans__3d_fullres" / f"fold_{fold}"


def final(tiny: Any) -> dict[str, Any]:
    return checkpoint.read(str(folder_of(tiny) / checkpoint.FINAL))


def curves(trainer: Any) -> dict[str, list[float]]:
    return {key: trainer.logger.get_value(key, None) for key in trainer.probe_keys}


def test_the_weights_are_the_same_bit_for_bit_with_and_without_it(tiny):
    torch.set_num_threads(1)
    np.random.seed(7)
    found, after = [], []
    for every in (0, 1):
        trainer = make(tiny, probe_every=every)
        trainer.run_training()
        found.append(final(tiny))
        after.append((torch.get_rng_state(), np.random.get_state()[1], np.random.get_state()[2]))
        np.random.seed(7)
    for name in ("network_weights", "method_weights"):
        assert any("running" in key for key in found[0][name]), "the test would not see a change of statistics"
        assert found[0][name].keys() == found[1][name].keys()
        assert all(torch.equal(found[0][name][key], found[1][name][key]) for key in found[0][name]), name
    assert torch.equal(after[0][0], after[1][0])
    np.testing.assert_array_equal(after[0][1], after[1][1])
    assert after[0][2] == after[1][2]
    assert found[0]["probe"] == {}
    assert list(found[1]["probe"]) == [0, 1, 2, 3]


def test_log_curves_picture_and_checkpoint_have_its_values(tiny):
    trainer = make(tiny, probe_every=2)
    trainer.run_training()
    probed = final(tiny)["probe"]
    assert list(probed) == [0, 2, 3]  # before, in its turn, at the end
    names = ["probe_stage_1", "probe_stage_2", "probe_stage_3", "probe"]
    assert all(list(values) == names and min(values.values()) >= 0 for values in probed.values())
    nan = float("nan")
    for name in names:
        np.testing.assert_array_equal(curves(trainer)[name], [nan, probed[2][name], probed[3][name]])
    np.testing.assert_array_equal(curves(trainer)["probe_start"], [nan, probed[0]["probe"], probed[0]["probe"]])
    (log,) = folder_of(tiny).glob("training_log_*.txt")
    lines = log.read_text().splitlines()
    assert any(f"Before the first step: probe_stage_1 {probed[0]['probe_stage_1']:.4f}, " in line for line in lines)
    (second,) = (line for line in lines if "epoch 2/3" in line)
    assert f"probe {probed[2]['probe']:.4f}, probe_start {probed[0]['probe']:.4f}" in second
    assert not any("probe_stage" in line for line in lines if "epoch 1/3" in line)
    assert any("fitted to 2 cases, scored on 2 cases" in line for line in lines)
    height = plt.imread(folder_of(tiny) / "progress.png").shape[0]
    without = make(tiny)
    without.run_training()
    assert height == pytest.approx(plt.imread(folder_of(tiny) / "progress.png").shape[0] * 6 / 5, abs=2)


def test_the_value_before_the_first_step_is_that_of_the_encoder_as_it_was_made(tiny):
    trainer = make(tiny, probe_every=2)
    trainer.initialize()
    encoder = copy.deepcopy(trainer.plan_network.encoder)
    trainer.run_training()
    cases = find_cases(str(tiny.data))
    independent = Probe(cases, trainer.settings.views.global_input_size, trainer.settings.seed)
    assert independent(encoder, CPU) == trainer.probed[0]
    assert independent(trainer.plan_network.encoder, CPU) == trainer.probed[3]
    assert trainer.probed[0] != trainer.probed[3]


def test_it_takes_the_datasets_own_cases_that_are_pretrained_on_alone(tiny, monkeypatch):
    others = unlabelled_folder(str(tiny.folder), "nnUNetPlans_3d_fullres")
    shutil.copytree(tiny.data, others)  # with segmentations, which nobody may take for labels
    opened = []
    init = CaseVolume.__init__
    monkeypatch.setattr(CaseVolume, "__init__", lambda volume, case: (opened.append(case.path), init(volume, case))[1])
    trainer = make(tiny, fold=0, probe_every=1, epochs=1)
    trainer.run_training()
    names = {patch.case.name for half in trainer.probe.halves for patch in half}
    assert names == set(tiny.splits[0]["train"]) == {"case_0", "case_1", "case_2"}
    segmentations = {path for path in opened if "_seg" in path}
    assert segmentations == {str(tiny.data / f"{name}_seg.b2nd") for name in names}


@pytest.mark.parametrize("kind", ["without segmentations", "without masks", "of another dataset"])
def test_without_labels_it_stops_in_a_sentence_before_anything_is_trained(tiny, kind):
    if kind == "without segmentations":
        for path in tiny.data.glob("*_seg.b2nd"):
            path.unlink()
        expected = r"a probe needs labels, and of the 4 cases in .* none has NAME_seg.b2nd .*; leave probe_every out"
    elif kind == "without masks":  # what maskless.py has made of images
        raw = tiny.folder.parents[1] / "raw" / tiny.folder.name
        (raw / "imagesTr").mkdir(parents=True)
        shutil.copy(tiny.folder / "dataset.json", raw)
        expected = r"Dataset999_Tiny has no masks in nnUNet_raw, and a probe is of labels of voxels"
    else:
        tiny.data.rename(unlabelled_folder(str(tiny.folder), "nnUNetPlans_3d_fullres"))
        expected = "a probe needs labels, and of the 0 cases in"
    trainer = make(tiny, probe_every=1)
    trainer.initialize()
    before = checkpoint.encoder_hash(trainer.network)
    with pytest.raises(UserError, match=expected):
        trainer.run_training()
    assert checkpoint.encoder_hash(trainer.network) == before
    assert not list(tiny.results.rglob("*.pth"))
    shutil.rmtree(tiny.results)
    make(tiny).run_training()  # without a probe nobody minds


def test_stopped_within_an_epoch_it_goes_on_to_the_same_values(tiny, monkeypatch):
    torch.set_num_threads(1)
    whole = make(tiny, probe_every=1)
    whole.run_training()
    shutil.rmtree(folder_of(tiny))
    stopped = make(tiny, probe_every=1)
    train_step = stopped.train_step

    def step(batch: Any, number: int) -> Any:
        if number in (0, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(batch, number)

    monkeypatch.setattr(stopped, "train_step", step)
    with pytest.raises(SystemExit):
        stopped.run_training()
    for _ in range(2):  # within the first epoch; within the second; to the end
        resumed = make(tiny, continues=True, probe_every=1)
        resumed.load_checkpoint(str(folder_of(tiny) / checkpoint.LATEST))
        train_step = resumed.train_step
        if resumed.step == 1:
            monkeypatch.setattr(resumed, "train_step", step)
            with pytest.raises(SystemExit):
                resumed.run_training()
        else:
            assert resumed.step == 3
            resumed.run_training()
    assert resumed.probed == whole.probed
    for key, values in curves(whole).items():
        np.testing.assert_array_equal(curves(resumed)[key], values)
    assert final(tiny)["probe"] == whole.probed


@pytest.mark.parametrize(("then", "now"), [(0, 1), (1, 0), (2, 1)])
def test_it_may_be_switched_on_and_off_between(tiny, then, now):
    first = make(tiny, probe_every=then)
    first.num_epochs = 2
    first.on_train_end = lambda: None
    first.run_training()
    second = make(tiny, continues=True, probe_every=now)
    second.load_checkpoint(str(folder_of(tiny) / checkpoint.LATEST))
    second.run_training()
    last = {key: values[2] for key, values in curves(second).items()}
    assert all(len(values) == 3 for values in curves(second).values())
    if then == 0:  # there is nothing to compare with
        assert np.isnan(last["probe_start"])
        assert list(second.probed) == [3]
        assert last["probe"] == second.probed[3]["probe"]
    elif now == 0:
        assert last == {}
        assert second.probed == first.probed
    else:
        assert list(second.probed) == [0, 2, 3]
        assert last["probe_start"] == first.probed[0]["probe"]


def test_an_older_preprocessing_is_unpacked_with_its_labels(tiny, monkeypatch):
    expected = make(tiny, probe_every=1, epochs=1)
    expected.run_training()
    shutil.rmtree(tiny.results)
    for path in tiny.data.glob("case_?.b2nd"):
        labels = path.with_name(f"{path.stem}_seg.b2nd")
        np.savez_compressed(path.with_suffix(".npz"), data=blosc2.open(str(path))[:], seg=blosc2.open(str(labels))[:])
        path.unlink(), labels.unlink()
    trainer = make(tiny, probe_every=1, epochs=1)
    trainer.run_training()
    assert trainer.probed == expected.probed


def test_labels_in_the_folder_are_found_without_opening_anything(tiny):
    for path in tiny.data.glob("*_seg.b2nd"):
        path.write_bytes(b"not to be read")
    (tiny.data / "case_2.pkl").unlink()
    names = [case.name for case in labelled(find_cases(str(tiny.data)), str(tiny.data))]
    assert names == ["case_0", "case_1", "case_3"]
