"""pcrl_nnunet_compare on a phantom dataset that nnU-Net planned: nnU-Net's own trainings, each in a process.

Imports would take most of the time: commands and their steps are forked from a process that has imported everything.
"""

import json
import re
import shlex
import sys
import sysconfig
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from pcrl_nnunet import registration
from pcrl_nnunet.cli import compare

ROOT = Path(__file__).parents[2]
DATASET = "Dataset008_PhantomOrgan"
SHORT = {
    "pretrain": {"epochs": 1, "iters_per_epoch": 1},
    "finetune": {"epochs": 1, "iters_per_epoch": 2, "val_iters_per_epoch": 1},
}
COMMAND = "pcrl_nnunet_compare -d 8 -device cpu -labelled 2 -seeds 1 -methods stock pseudo_labels pcrlv2"
# Runs each command in its own process, and stops after the first failure.
COMMANDS = """
import importlib, multiprocessing, os, runpy, subprocess, sys, traceback
from types import SimpleNamespace
import pcrl_nnunet.cli.pretrain, pcrl_nnunet.trainers
from pcrl_nnunet.experiments import forecast, intervals, processes, report, steps
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.views import kernels

jobs = {jobs!r}
if "pcrl_nnunet.cli.compare" in [module for module, *_ in jobs]:
    kernels.compile_all()  # once, not in every process
forecast.MEASURED_SECONDS = 0.0
intervals.BOOTSTRAPS = 500
start = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: start("fork")  # spawned workers would import torch again
multiprocessing.cpu_count = lambda: 1  # nnU-Net's number of threads of torch; a process that has none may fork
Report.write = lambda *_: None  # seconds each, of which tests/report/test_page.py is

class Forked:
    def __init__(self, output, run):
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            status = run() or 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
            print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)

    def poll(self):
        return None

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

def step(command, stdin, stdout, stderr, env, cwd):
    assert command[:3] == (sys.executable, "-m", "pcrl_nnunet.experiments.steps"), command
    if command[3] == "shortcut":  # one kind of step as users have it
        return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd)
    def run():
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        steps.main(list(command[3:]))
    return Forked(stdout, run)

processes.subprocess = SimpleNamespace(Popen=step, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
for module, function, argv, path in jobs:
    def run():
        sys.argv = argv
        if module.endswith(".py"):
            sys.path.insert(0, os.path.dirname(module))  # as an interpreter does
            runpy.run_path(module, run_name="__main__")
        else:
            getattr(importlib.import_module(module), function)()
    with open(path, "w") as output:
        status = Forked(output, run).wait()
    if status:
        sys.exit(f"{{argv}} ended with {{status}}: " + open(path).read())
"""


@pytest.fixture(scope="module")
def run(fork, tmp_path_factory):
    """Runs commands one after the other; returns what each has printed."""
    outputs = tmp_path_factory.mktemp("outputs")

    def run_commands(environment, *commands):
        jobs = []
        for number, command in enumerate(commands):
            argv, module, function = shlex.split(command), "", ""
            if argv[0].endswith(".py"):
                module = argv[0]
            else:
                (script,) = entry_points(group="console_scripts", name=argv[0])
                module, function = script.value.split(":")
            jobs.append((module, function, argv, str(outputs / str(number))))
        code = COMMANDS.format(jobs=jobs)
        status, output = fork(code, Path(sysconfig.get_path("purelib")), environment)
        assert status == 0, output
        return [Path(path).read_text() for *_, path in jobs]

    return run_commands


@pytest.fixture(scope="module")
def environment(run, tmp_path_factory):
    """A dataset of ten cases, planned and preprocessed by nnU-Net, and one scan without labels."""
    home = tmp_path_factory.mktemp("compare")
    names = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
    environment = {**{name: str(home / name) for name in names}, "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "Agg"}
    phantom = f"{ROOT / 'scripts' / 'phantom.py'} -o {home / 'nnUNet_raw'} -d 8 -size 20 20 16 -cases 10 -test 0"
    scans = home / "nnUNet_raw" / DATASET / "imagesUn"
    run(
        {**environment, "nnUNet_n_proc_DA": "1"},
        f"{phantom} -unlabelled 1 -np 1",
        "nnUNetv2_plan_and_preprocess -d 8 -c 3d_fullres -np 1 -npfp 1",
        f"pcrl_nnunet_preprocess -d 8 -i {scans} -np 1",
    )
    file = home / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    content = json.loads(file.read_text())
    network = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [4] * len(network["features_per_stage"])
    file.write_text(json.dumps({**content, "pcrl": SHORT}))
    return {**environment, "nnUNet_n_proc_DA": "0"}


@pytest.fixture
def registered():
    """Registration, if the commands have made one, is undone."""
    before = registration.is_registered()
    yield
    if not before:
        registration.undo()


@pytest.mark.slow
def test_a_comparison_from_the_split_to_the_verdict(environment, run, registered, tmp_path):
    exists = tmp_path / "exists.py"
    exists.write_text("import os; print(os.path.exists(os.path.join(os.environ['nnUNet_results'], 'pcrl_compare')))")
    on_validation = f"{COMMAND} -scored val -methods pcrlv2"
    preprocessed = Path(environment["nnUNet_preprocessed"]) / DATASET
    before = {path: path.read_bytes() for path in preprocessed.rglob("*") if path.is_file()}
    dry, in_hours, exists_then, done, _, again = run(
        environment,
        f"{COMMAND} --dry_run",
        f"{COMMAND} --dry_run -hours 9",
        str(exists),
        COMMAND,
        on_validation,
        COMMAND,
    )
    assert "In 9 hours, pretrainings can have 1 epochs, and trainings with labels 1: 100% of the default" in in_hours
    assert "runs             4: 4 methods x 1 number of labelled cases x 1 subset\n" in dry
    assert "steps            6: 4 trainings, 1 prediction of pseudo-labels, 1 pretraining\n" in dry
    assert "done             0 of 6 steps\n" in dry
    assert "Measuring a step of training with labels\n" in dry
    assert "running: " in done
    assert "Scoring, and drawing figures\n" in done
    assert exists_then == "False\n"
    assert re.search(r"pretraining of pcrlv2: 1 to do, \d\.\d\d s a step on cpu, 1 min in all", dry)
    assert re.search(r"About \d+ min remain", dry)
    assert "stock equals scratch here" in dry
    assert "Please cite" not in dry  # nnU-Net's trainers print a page for every kind of training
    assert "stock equals scratch here" in done
    assert "done             6 of 6 steps\n" in again
    assert {path: path.read_bytes() for path in preprocessed.rglob("*") if path.is_file()} == before

    folder = Path(environment["nnUNet_results"]) / "pcrl_compare" / f"{DATASET}__nnUNetPlans__3d_fullres"
    description = json.loads((folder / "comparison.json").read_text())
    scores = pd.read_csv(folder / "results.csv")
    assert list(scores) == ["method", "labelled", "seed", "case", "label", "dice"]
    assert set(scores["method"]) == {"scratch", "stock", "pseudo_labels", "pcrlv2"}
    assert set(scores["case"]) == set(description["split"]["test"])

    # nnU-Net's own Dice equals a Dice computed here
    fold = list(description["folds"]).index("2_0_test")
    (scratch,) = (folder / "nnUNet_results" / DATASET).glob(
        f"PCRLScratchTrainer__*scratch_2_0__*/fold_{fold}/validation"
    )
    case = description["split"]["test"][0]
    prediction, truth = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        for path in (scratch / f"{case}.nii.gz", preprocessed / "gt_segmentations" / f"{case}.nii.gz")
    )
    for row in scores.query("method == 'scratch' and case == @case").itertuples():
        label = json.loads((preprocessed / "dataset.json").read_text())["labels"][row.label]
        p, t = prediction == label, truth == label
        expected = 2 * (p & t).sum() / (p.sum() + t.sum()) if (p | t).any() else np.nan
        assert row.dice == pytest.approx(expected, nan_ok=True)

    table = pd.read_csv(folder / "table.csv")
    points = scores.fillna({"dice": 1}).groupby(["method", "case"])["dice"].mean().mul(100).groupby("method").mean()
    assert table.set_index("method")["mean"].to_dict() == pytest.approx(points.to_dict())
    assert table.set_index("method").loc["pcrlv2", "difference"] == pytest.approx(points["pcrlv2"] - points["scratch"])

    for name in ("label_efficiency", "iterations", "segmentations"):
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{name}.png"))).std() > 10  # not all white
    assert not list(folder.rglob("checkpoint_best.pth"))
    last = done.strip().splitlines()[-1]
    # chance decides whether a network of a few iterations is better than a guess; the verdict goes with the table
    no_verdict = re.match(r"(Nothing was learned, and t|T)here is no verdict: ", last) is not None
    assert no_verdict == (not table["learned"].any())
    (log,) = (folder / "nnUNet_results" / DATASET).glob(f"PCRLFinetuneTrainer__*/fold_{fold}/transfer.json")
    assert json.loads(log.read_text())["validation_cases_seen"] == []

    assert set(pd.read_csv(folder / "results_val.csv")["case"]) == set(description["split"]["val"])
    trained, scored_again = (
        torch.load(file, weights_only=False)["network_weights"]
        for file in sorted(folder.rglob("PCRLFinetuneTrainer__*/fold_*/checkpoint_final.pth"))
    )
    assert all(torch.equal(trained[name], scored_again[name]) for name in trained)


@pytest.mark.long
@pytest.mark.slow
def test_semi_supervised_methods_are_compared_after_a_pretraining_of_the_decoder(
    environment, run, registered, tmp_path
):
    settings, out = tmp_path / "settings.json", tmp_path / "out"
    short = {"epochs": 2, "iters_per_epoch": 1, "val_iters_per_epoch": 1}  # an epoch of each phase
    settings.write_text(json.dumps({"finetune": short, "semi": {"longest_supervised_share": 0}}))
    flags = f"-methods mae semi_scratch semi -labelled 2 -seeds 1 -settings {settings} -o {out}"
    (done,) = run(environment, f"pcrl_nnunet_compare -d 8 -device cpu {flags}")
    arms = {"scratch", "scratch_longer", "scratch_pasted", "mae", "semi_scratch", "semi"}
    table = pd.read_csv(out / "table.csv")
    assert set(table["method"]) == arms
    assert table["mean"].notna().all()
    assert set(pd.read_csv(out / "results.csv")["method"]) == arms
    for name in ("label_efficiency", "iterations", "segmentations"):
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"{name}.png"))).std() > 10  # not all white
    assert len(list(out.rglob("PCRLSemiSupervised*Trainer__*/fold_*/pseudo_labels.png"))) == 2
    assert ("What the pretraining adds to semi: " in done) == table["learned"].any()
    (of_mae,) = out.rglob("PCRLFinetuneTrainer__*_mae_2_0__*/fold_*/transfer.json")
    transfer = json.loads(of_mae.read_text())
    assert transfer["trained_by_method"] == ["encoder", "decoder"]
    assert [name for name in transfer["loaded"] if name.startswith("decoder.stages.")]
    assert {name.split(".")[1] for name in transfer["random"]} == {"seg_layers"}
    (of_semi,) = out.rglob("PCRLSemiSupervisedTrainer__*/fold_*/transfer.json")
    assert json.loads(of_semi.read_text())["left_out_cases_seen"] == []


def test_an_impossible_comparison_is_refused_in_a_sentence(tiny, monkeypatch, capsys):

    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["pcrl_nnunet_compare", "-d", "999", "-device", "cpu", *arguments])
        with pytest.raises(SystemExit) as end:
            compare.main_entry()
        assert end.value.code != 0
        return str(end.value.code) + capsys.readouterr().err

    assert "3d_cascade_fullres takes the labels of 3d_lowres as input" in refused("-c", "3d_cascade_fullres")
    assert "-seeds is 0" in refused("-seeds", "0")
    assert not tiny.results.exists()


@pytest.mark.slow
def test_a_comparison_of_classifications_is_scored_by_auroc_beside_shortcuts(environment, run, registered):
    raw, out = (Path(environment[name]) / DATASET for name in ("nnUNet_raw", "nnUNet_results"))
    images = sorted((raw / "imagesTr").glob("*.nii.gz"))
    names = [image.name.removesuffix("_0000.nii.gz") for image in images]
    middle = sitk.ReadImage(str(images[0]))
    corner = middle.TransformContinuousIndexToPhysicalPoint([3, 3, 3])
    middle = middle.TransformContinuousIndexToPhysicalPoint([s / 2 for s in middle.GetSize()])
    # the last case is unknown: it is pretrained on, and never scored
    lines = [f"{n},{','.join(map(str, p))},{c}" for n in names[:-1] for p, c in ((middle, 1), (corner, 0))]
    (raw / "candidates.csv").write_text("\n".join(["seriesuid,coordX,coordY,coordZ,class", *lines]))
    settings = raw / "settings.json"
    settings.write_text(json.dumps({"classify": {"patch_mm": 16.0, "batch_size": 2}}))
    flags = f"-labelled 3 -seeds 1 -methods position pcrlv2 -task classification -settings {settings}"
    (done,) = run(environment, f"pcrl_nnunet_compare -d 8 -device cpu {flags}")
    (raw / "candidates.csv").unlink()
    folder = out.parent / "pcrl_compare" / f"{DATASET}__nnUNetPlans__3d_fullres__classification"
    split = json.loads((folder / "comparison.json").read_text())["split"]
    assert sorted(case for part in split.values() for case in part) == names[:-1]
    (pretraining,) = folder.rglob("PCRLPretrainTrainer_pcrlv2__*/fold_*/checkpoint_final.pth")
    seen = {case["name"] for case in torch.load(pretraining, weights_only=True)["cases"]}
    assert not seen & {*split["val"], *split["test"]}
    assert names[-1] in seen
    scores = pd.read_csv(folder / "results.csv")
    assert list(scores) == ["method", "labelled", "seed", "case", "label", "auroc"]
    assert set(scores["method"]) == {"scratch", "position", "pcrlv2"}
    assert scores.set_index("method").loc["position", "auroc"] == 1.0  # the position decides the label
    predictions = pd.read_csv(folder / "predictions.csv")
    assert set(predictions["case"]) == {*split["test"]}
    assert len(predictions) == 3 * 2 * len(split["test"])
    assert {"label_efficiency.png", "iterations.png", "roc.png"} <= {path.name for path in folder.iterdir()}
    assert "A shortcut is as good as the best network: with 3 labelled cases, position reaches 100.0" in done
    last = done.rstrip().splitlines()[-1]
    learned = "with 3 labelled cases no network "  # 2 scored cases tell nothing
    assert re.match(rf"(Nothing was learned, and t|T)here is no verdict: {learned}", last)
    assert "more scored cases" in last
