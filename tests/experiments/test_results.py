"""The results of finished runs, and their pictures."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.pictures import examples
from pcrl_nnunet.experiments.preparation import plans_of, prepare
from pcrl_nnunet.experiments.results import collect, curve
from pcrl_nnunet.experiments.scores import COLUMNS, DiceScores

RUNS = [Run(arm, labelled, seed) for arm in ("scratch", "pcrlv2") for labelled in (2, 3) for seed in (0, 1)]


def test_results_keep_other_runs_and_ignore_half_written_summaries(layout):
    this = layout()
    prepare(this, RUNS)
    summary = Path(this.evaluation(RUNS[0]))
    summary.parent.mkdir(parents=True)
    summary.write_text('{"metric_per_case": [')
    assert not this.is_done(RUNS[0])
    counts = {"n_ref": 10, "TP": 6, "FP": 8, "FN": 4, "TN": 22}
    metrics = {
        "1": {"Dice": 0.5, **counts},
        "2": {"Dice": float("nan"), "n_ref": 0, "TP": 0, "FP": 0, "FN": 0, "TN": 40},
    }
    summary.write_text(json.dumps({"metric_per_case": [{"prediction_file": "x/case_1.nii.gz", "metrics": metrics}]}))
    Path(this.file("results.csv")).write_text("method,labelled,seed,case,label,dice\nmine,2,0,case_1,a,0.25\n")
    of_dice = collect(this, RUNS)
    assert of_dice.chance == pytest.approx(100 * (2 * 0.25 / 1.25 + 1) / 2)  # a label in a quarter, another absent
    scores = pd.read_csv(this.file("results.csv"))
    assert scores[["method", "label"]].to_numpy().tolist() == [["scratch", "a"], ["scratch", "b"], ["mine", "a"]]


def test_the_curve_of_an_earlier_calls_arm_is_found(layout):
    run = Run("mine", 2, 0)
    own = {"mine": {"pretrain": None, "pseudo_labels": True, "finetune": {"iters_per_epoch": 7}}}
    for scored, dice in (("test", [0.1, 0.2]), ("val", [0.3, 0.4])):
        earlier = layout(methods=["mine"], own=own, scored=scored)
        prepare(earlier, [run, RUNS[0]])
        Path(earlier.output(run)).mkdir(parents=True)
        content = {
            "logging": {"mean_fg_dice": dice},
            "init_args": {"plans": plans_of(earlier, run)[earlier.plans_name(run)]},
        }
        torch.save(content, Path(earlier.output(run)) / "checkpoint_final.pth")
    this = layout()
    prepare(this, RUNS)
    iterations, dice = curve(this, run)
    assert iterations.tolist() == [7, 14]
    assert dice.tolist() == [0.1, 0.2]
    assert curve(this, RUNS[0]) is None


@pytest.mark.parametrize("last", ["stock", "pcrlv2"])
def test_examples_show_a_pretrained_arm_whichever_was_called_last(tiny, layout, monkeypatch, last):
    runs = [Run(method, labelled, 0) for method, labelled in (("scratch", 2), ("scratch", 3), ("pcrlv2", 3))]
    first = layout()
    prepare(first, runs)
    Path(first.output(runs[0])).mkdir(parents=True)
    this = layout(methods=[last])
    runs.append(Run("stock", 2, 0))
    prepare(this, [run for run in runs if run.arm in ("scratch", last)])
    if last == "pcrlv2":
        runs.pop()
    raw, truth = (
        tiny.folder.parent.parent / "raw",
        Path(this.data_folder) / "gt_segmentations",
    )
    images, labels = raw / this.comparison.dataset / "imagesTr", raw / this.comparison.dataset / "labelsTr"
    case = this.comparison.cases.split.test[0]
    places = [labels, truth, *(Path(this.output(run)) / "validation" for run in runs)]
    for value, folder in enumerate([images, *places]):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{case}{'_0000' * (folder == images)}.nii.gz"
        sitk.WriteImage(sitk.GetImageFromArray(np.full((2, 2, 2), value, np.uint8)), str(folder / name))
    monkeypatch.setenv("nnUNet_raw", str(raw))
    dice = [(run.arm, run.labelled, run.seed, case, "a", 0.5) for run in runs]
    scores = DiceScores(pd.DataFrame(dice, columns=COLUMNS))
    (panels,) = examples(this, runs, scores, {2: ["scratch"], 3: ["scratch"]}).values()
    assert [title.split("\n")[0] for title in panels] == ["truth", "scratch", "pcrlv2"]
    assert [labels.flat[0] for _, labels in panels.values()] == [2, 4, 5]  # with 3 labels, as pcrlv2 has
