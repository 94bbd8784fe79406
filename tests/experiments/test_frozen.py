"""The cheap look first: heads on frozen features, their files and their table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from pcrl_nnunet import checkpoint as checkpoint_file
from pcrl_nnunet.classification.auroc import auroc
from pcrl_nnunet.classification.label_table import LabelTable, read_labels
from pcrl_nnunet.classification.shortcuts import predict, thumbnail
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments import frozen as module
from pcrl_nnunet.experiments import frozen_segmentation
from pcrl_nnunet.experiments.arms import Arm
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.forecast import measure
from pcrl_nnunet.experiments.frozen import FrozenLook, frozen_methods, task_of
from pcrl_nnunet.experiments.frozen_classification import TableTask
from pcrl_nnunet.experiments.frozen_report import report, table
from pcrl_nnunet.experiments.frozen_segmentation import VoxelTask
from pcrl_nnunet.experiments.jobs import pretrainings_of
from pcrl_nnunet.experiments.layout import Layout
from pcrl_nnunet.experiments.preparation import prepare
from pcrl_nnunet.experiments.scores import COLUMNS, DiceScores
from pcrl_nnunet.experiments.side_by_side import surely_best
from pcrl_nnunet.features import heads, information
from pcrl_nnunet.loading.cases import Case, CaseVolume
from pcrl_nnunet.networks.of_plan import network_of_plan

CPU = torch.device("cpu")
RUNS = [Run("pcrlv2", labelled, seed) for seed in (0, 1) for labelled in (2, 3)]
ARMS = {
    "scratch": Arm(None),
    "stock": Arm(None),
    "pcrlv2": Arm(),
    "mae": Arm(),
    "semi": Arm(pretraining="pcrlv2", semi={}),
}


def pretrained(layout: Layout, run: Run) -> None:
    """Write the file of a run's finished pretraining, with the weights of another seed."""
    plan = layout.comparison.plan
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(50 + run.seed)
        network, _ = network_of_plan(plan.plans, plan.configuration, plan.dataset_json)
    state = network.state_dict()
    path = Path(layout.pretrained(run))
    path.parent.mkdir(parents=True)
    content = {
        "format": checkpoint_file.FORMAT,
        "network_weights": state,
        "random_keys": [name for name in state if name.startswith("decoder.")],
        "num_input_channels": 1,
        "cases": [],
        "nnssl_adaptation_plan": checkpoint_file.nnssl_adaptation_plan(plan, (8, 8, 8), 1, network),
        "plans": plan.plans,
        "method": "pcrlv2",
        "datasets": [],
        "configuration": plan.configuration,
        "fold": 0,
        "epochs": 1,
    }
    checkpoint_file.write(str(path), content)


@pytest.fixture
def looked(layout: Callable[..., Layout], monkeypatch: pytest.MonkeyPatch) -> Callable[..., FrozenLook]:
    """Looks at the tiny dataset with few crops; both pretrainings are there."""
    monkeypatch.setattr(information, "TRAINING", 20)
    monkeypatch.setattr(information, "HELD_OUT", 10)
    monkeypatch.setattr(heads, "MOST_EPOCHS", 1)
    monkeypatch.setattr(frozen_segmentation, "VOXELS_OF_A_CASE", 60)

    def make(runs: list[Run] = RUNS, **given: Any) -> FrozenLook:
        this = layout(methods=["pcrlv2"], **given)
        prepare(this, runs)
        for run in {run.seed: run for run in runs}.values():
            if not Path(this.pretrained(run)).exists():
                pretrained(this, run)
        frozen = FrozenLook(this, runs)
        frozen.look(CPU)
        return frozen

    return make


def test_the_report_has_all_methods_subsets_and_questions(looked: Callable[..., FrozenLook]) -> None:
    frozen = looked()
    lines = "\n".join(report(frozen))
    folder = Path(frozen.layout.folder)
    found = pd.read_csv(folder / "frozen.csv")
    assert list(found) == ["method", "labelled", "seed", "case", "label", "dice"]
    scored = frozen.comparison.scored_cases
    assert len(found) == 2 * 2 * 2 * 2 * len(scored)  # methods, numbers, subsets, labels, cases
    assert list(dict.fromkeys(found["method"])) == ["pcrlv2", "random"]
    assert set(found["case"]) == set(scored)
    assert found["dice"].dropna().between(0, 1).all()
    answers = pd.read_csv(folder / "information.csv")
    assert len(answers) == 2 * 2 * 2  # methods, subsets, questions
    assert answers.groupby("task")["chance"].first().to_dict() == pytest.approx({"turn": 1 / 10, "place": 1 / 6})
    assert (folder / "frozen.png").stat().st_size > 10_000
    assert "2 labelled cases" in lines
    assert "turn, % (chance 10.0)" in lines
    assert not list(folder.rglob("draft_*"))


def test_the_same_command_goes_on_and_other_weights_are_looked_at_again(
    looked: Callable[..., FrozenLook], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = looked(RUNS[:2])
    files = {path: path.read_bytes() for path in Path(frozen.folder).iterdir()}
    assert len(files) == 2 * 2 + 2
    trained = []
    head = VoxelTask.head
    monkeypatch.setattr(VoxelTask, "head", lambda *given: trained.append(given[2]) or head(*given))
    looked(RUNS[:2])
    assert not trained
    next(path for path in files if path.name == "run_random_3_0_test.json").unlink()
    looked(RUNS)
    assert len(trained) == 1 + 4  # the missing one, and both methods with both numbers of the new subset
    assert {path: path.read_bytes() for path in files} == files  # equal bytes: the head is repeated exactly
    changed = torch.load(frozen.layout.pretrained(RUNS[0]), weights_only=True)
    name = "encoder.stages.0.0.convs.0.conv.weight"
    changed["network_weights"][name] += 1
    checkpoint_file.write(frozen.layout.pretrained(RUNS[0]), changed)
    trained.clear()
    looked(RUNS)
    assert len(trained) == 2


def test_labels_of_unlabelled_cases_are_never_opened(tiny: Any, looked: Callable[..., FrozenLook]) -> None:
    runs = [Run("pcrlv2", 2, 0)]
    frozen = looked(runs)
    cases = frozen.comparison.cases
    known = {*frozen.comparison.labelled_cases(runs[0]), *frozen.comparison.scored_cases}
    expected = frozen.kept("run")
    for path in Path(frozen.folder).iterdir():
        path.unlink()
    for ending in ("_seg.b2nd", ".pkl"):
        content = (tiny.data / f"case_0{ending}").read_bytes()  # the other cases' files are links to it
        for name in cases.by_name:
            (tiny.data / f"{name}{ending}").unlink()
        for name in known:
            (tiny.data / f"{name}{ending}").write_bytes(content)
    pd.testing.assert_frame_equal(looked(runs).kept("run"), expected)


def test_pretrainings_and_subsets_are_those_of_the_comparison(layout: Callable[..., Layout]) -> None:
    whole, frozen = layout(), layout(methods=["pcrlv2"])
    prepare(whole, [Run("scratch", 2, 0), *RUNS])
    assert [frozen.comparison.labelled_cases(run) for run in RUNS] == [
        whole.comparison.labelled_cases(run) for run in RUNS
    ]
    prepare(frozen, RUNS)
    names = [job.name for job in pretrainings_of(frozen, RUNS, CPU)]
    assert names == ["nnUNetPlans_pcrlv2_pretrain_0", "nnUNetPlans_pcrlv2_pretrain_1"]
    assert [frozen.pretrained(run) for run in RUNS] == [whole.pretrained(run) for run in RUNS]


def test_a_transfer_looks_at_the_checkpoint(looked: Callable[..., FrozenLook], layout: Callable[..., Layout]) -> None:
    path = looked(RUNS[:1]).layout.pretrained(RUNS[0])
    content = torch.load(path, weights_only=True)
    path = str(Path(path).with_name("other.pth"))
    checkpoint_file.write(path, {**content, "datasets": ["Dataset123_Other"], "all_cases_known": True})
    this = layout("transfer", methods=["pcrlv2"], checkpoint=path)
    assert not pretrainings_of(this, RUNS, CPU)
    assert {look.checkpoint for look in FrozenLook(this, RUNS).looks} == {path, None}


class Truth(nn.Module):
    """Stands for a network whose features are the labels, which the image holds."""

    def forward(self, image: Tensor) -> list[Tensor]:
        return [torch.cat([image == value for value in range(3)], 1).float()]


@pytest.fixture
def of_labels(tiny: Any, layout: Callable[..., Layout]) -> tuple[VoxelTask, Layout]:
    """A task whose images are the labels. A class is missing in one of the scored cases."""
    import blosc2

    this = layout()
    for name in this.comparison.cases.by_name:
        labels = np.asarray(blosc2.open(str(tiny.data / "case_0_seg.b2nd"))[:]).copy()
        if name == this.comparison.scored_cases[0]:
            labels[labels == 2] = 0
        for ending in ("", "_seg"):
            path = tiny.data / f"{name}{ending}.b2nd"
            path.unlink()
            blosc2.asarray(labels.astype(np.int8 if ending else np.float32), urlpath=str(path))
    task = task_of(this.comparison)
    assert isinstance(task, VoxelTask)
    return task, this


def test_perfectly_informative_features_reach_dice_1(of_labels: tuple[VoxelTask, Layout]) -> None:
    task, this = of_labels
    head = task.head(Truth(), this.comparison.labelled_cases(Run("pcrlv2", 3, 0)), 0, CPU)
    first, second = (task.scores(Truth(), {"a": head}, name, CPU)["a"] for name in this.comparison.scored_cases)
    assert second == [(this.comparison.scored_cases[1], "a", 1.0), (this.comparison.scored_cases[1], "b", 1.0)]
    assert first[0][1:] == ("a", 1.0)
    assert np.isnan(first[1][2])  # neither truth nor prediction: counts as 1, as in the comparison
    rows = pd.DataFrame(
        [("m", 3, 0, *row) for row in first], columns=["method", "labelled", "seed", "case", "label", "dice"]
    )
    assert DiceScores(rows).runs["points"].tolist() == [100.0]


def test_voxels_are_balanced_and_no_more_than_allowed(
    of_labels: tuple[VoxelTask, Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, this = of_labels
    given: list[Any] = []
    monkeypatch.setattr(frozen_segmentation, "VoxelHead", lambda *a: given.append(a))
    monkeypatch.setattr(frozen_segmentation, "VOXELS_OF_A_CASE", 90)
    names = this.comparison.labelled_cases(Run("pcrlv2", 3, 0))
    task.head(Truth(), names, 0, CPU)
    features, classes, shares, _ = given[0]
    assert np.bincount(classes).tolist() == [90, 90, 90]  # 30 of each class and case
    np.testing.assert_array_equal(features, np.eye(3)[classes])
    np.testing.assert_allclose(shares[1:], [64 / 14**3, 48 / 14**3])
    monkeypatch.setattr(frozen_segmentation, "TRAINING_BYTES", 3 * 4 * 3 * 30)
    task.head(Truth(), names, 0, CPU)
    assert len(given[1][0]) == 3 * 30  # three features of 4 bytes, 30 voxels of each of three cases


def test_ignored_voxels_are_neither_learned_nor_scored(of_labels: tuple[VoxelTask, Layout]) -> None:
    task, this = of_labels
    task.ignored, task.values, task.members = 2, [0, 1], {"a": [1]}
    heads = {"a": task.head(Truth(), this.comparison.labelled_cases(Run("pcrlv2", 3, 0)), 0, CPU)}
    assert heads["a"].present.tolist() == [0, 1]
    assert task.scores(Truth(), heads, this.comparison.scored_cases[1], CPU)["a"][0][2] == 1.0


class Channels(nn.Module):
    """Stands for an encoder whose only stage is the image."""

    output_channels = (1,)

    def forward(self, image: Tensor) -> list[Tensor]:
        return [image]


def test_vectors_of_cases_are_classified(tiny: Any, layout: Callable[..., Layout]) -> None:
    comparison = layout().comparison
    names = sorted(comparison.cases.by_name)
    brightest = {name: float(CaseVolume(comparison.cases.by_name[name])[:].max()) for name in names}
    middle = float(np.median(list(brightest.values())))
    value = np.array([[float(brightest[name] > middle)] for name in names])
    labels = LabelTable("classes", ("bright",), False, np.array(names), None, value, {})
    task = TableTask(comparison.plan, labels, comparison.cases.by_name)
    found = task.scores(Channels(), {6: names[:6], 8: names[:8]}, names[2:], CPU)
    assert list(found) == [6, 8]
    assert [row[:4] for row in found[8]] == [(name, i, "bright", value[i + 2, 0]) for i, name in enumerate(names[2:])]
    of_all = task.scores(Channels(), {10: names}, names, CPU)[10]
    assert auroc(np.array([row[3] for row in of_all]), np.array([row[4] for row in of_all])) > 0.9


def test_shortcuts_stand_beside_the_methods_of_a_classification(looked: Callable[..., FrozenLook], tiny: Any) -> None:
    names = np.array(sorted(path.name.removesuffix("_seg.b2nd") for path in tiny.data.glob("*_seg.b2nd")))
    value = np.arange(len(names))[:, None] % 2.0
    lines = [f"{name},{number % 2}" for number, name in enumerate(names)]
    (tiny.folder / "classes.csv").write_text("\n".join(["case,bright", *lines]) + "\n")
    labels = read_labels(str(tiny.folder))
    frozen = looked(label_table=labels)
    told = "\n".join(report(frozen))
    found = pd.read_csv(Path(frozen.layout.folder) / "frozen.csv")
    assert list(dict.fromkeys(found["method"])) == ["pcrlv2", "random", "thumbnail", "mean_intensity"]
    assert found.groupby("method").size().eq(2 * 2).all()  # subsets, numbers of labelled cases
    assert all(name in told for name in ("thumbnail", "mean_intensity"))
    run = json.loads((Path(frozen.folder) / "run_thumbnail_3_0_test.json").read_text())
    labelled = frozen.comparison.labelled_cases(Run("thumbnail", 3, 0))
    of_cases = {case.name: np.asarray(CaseVolume(case)[(slice(None),) * 4]) for case in tiny_cases(frozen)}
    small = {name: thumbnail(image, np.zeros(3)) for name, image in of_cases.items()}
    of_name = dict(zip(names, value, strict=True))
    scored = [row[0] for row in run["rows"]]
    expected = predict(
        np.stack([small[name] for name in sorted(labelled)]),
        np.stack([of_name[name] for name in sorted(labelled)]),
        np.stack([small[name] for name in scored]),
    )
    assert [row[4] for row in run["rows"]] == pytest.approx(expected[:, 0].tolist())
    files = {path: path.stat().st_mtime_ns for path in Path(frozen.folder).iterdir()}
    looked(label_table=labels)
    assert {path: path.stat().st_mtime_ns for path in Path(frozen.folder).iterdir()} == files


def tiny_cases(frozen: FrozenLook) -> list[Case]:
    return list(frozen.comparison.cases.by_name.values())


def scores(**points: list[float]) -> DiceScores:
    """Scores of four cases with a number of labelled cases, by method and subset."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, 4)
    rows = [
        (name, 5, seed, f"case_{case}", "a", value / 100 + noise[case])
        for name, values in points.items()
        for seed, value in enumerate(values)
        for case in range(4)
    ]
    return DiceScores(pd.DataFrame(rows, columns=list(COLUMNS)))


def test_the_best_is_marked_only_where_the_intervals_say_so() -> None:
    clear = scores(a=[60, 61, 60], b=[50, 51, 51], random=[20, 21, 22])
    assert surely_best(clear, 5) == "a"
    close = scores(a=[60, 50, 61], b=[55, 56, 54], random=[20, 21, 22])
    assert surely_best(close, 5) is None
    answers = pd.DataFrame({"method": ["a", "b"], "task": "turn", "accuracy": [0.5, 0.3], "chance": 0.25})
    lines = "\n".join(table(clear, answers))
    assert lines.count(" *") == 1
    assert f"{clear.runs['points'][:3].mean():.1f} (" in lines
    assert "turn, % (chance 25.0)" in lines
    assert "surely the best: the 95 % interval" in lines
    assert "No method is surely the best with 5 labelled cases." in "\n".join(table(close, answers))
    one = "\n".join(table(scores(a=[60], random=[20]), answers))
    assert "(" not in one.split("25.0)")[1]  # a single subset has no interval


def test_methods_without_a_pretraining_are_left_out_or_refused() -> None:
    assert frozen_methods(["pcrlv2", "mae"], ARMS, None) == (["pcrlv2", "mae"], "")
    chosen, note = frozen_methods(["stock", "semi", "mae"], ARMS, None)
    assert chosen == ["pcrlv2", "mae"]
    assert note == "-frozen leaves out semi (the pretraining of pcrlv2), stock (no pretraining)"
    assert frozen_methods(["mae", "pcrlv2"], ARMS, "file.pth")[0] == ["mae"]
    with pytest.raises(UserError, match=r"-frozen looks at pretrainings, and stock have none; give some of pcrlv2"):
        frozen_methods(["stock"], ARMS, None)
    with pytest.raises(UserError, match=r"-frozen calls the network with random weights random; give your method"):
        frozen_methods(["mae"], {**ARMS, "random": Arm()}, None)


def test_regions_are_scored_as_unions_of_classes(tiny: Any, layout: Callable[..., Layout]) -> None:
    path = tiny.folder / "dataset.json"
    content = json.loads(path.read_text())
    content["labels"] = {"background": 0, "whole": [1, 2], "b": 2}
    content["regions_class_order"] = [1, 2]
    path.write_text(json.dumps(content))
    task = task_of(layout().comparison)
    assert isinstance(task, VoxelTask)
    truth, predicted = np.random.default_rng(0).integers(0, 3, (2, 500))
    counts = np.histogram2d(truth, predicted, bins=np.arange(4))[0]
    expected = {}
    for name, values in {"whole": [1, 2], "b": [2]}.items():
        one, other = np.isin(truth, values), np.isin(predicted, values)
        expected[name] = 2 * (one & other).sum() / (one.sum() + other.sum())
    assert dict(task._rows(counts)) == pytest.approx(expected)


def test_a_kept_file_of_another_format_is_computed_again(
    looked: Callable[..., FrozenLook], monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = looked(RUNS[:1])
    (path,) = Path(frozen.folder).glob("run_pcrlv2_*")
    before = path.read_text()
    monkeypatch.setattr(module, "FORMAT", 0)
    looked(RUNS[:1])
    assert path.read_text() != before


def test_a_forecast_counts_pretrainings_alone(layout: Callable[..., Layout]) -> None:
    this = layout(methods=["pcrlv2"])
    prepare(this, RUNS)
    work = measure(this, RUNS, CPU, ModuleType("none"), lambda *given: 3.6, frozen=True)
    lines = list(work.lines(CPU, 1))
    assert lines[0].startswith("  pretraining of pcrlv2: 2 to do, 3.60 s a step on cpu")
    assert not any("with labels" in line for line in lines)
