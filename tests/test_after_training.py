"""After fine-tuning, stock nnU-Net works with the results without this package.

A tiny phantom dataset goes through planning, pretraining and fine-tuning with the commands of the environment that runs
the tests; an environment with nnU-Net alone then predicts, ensembles, compares and passes on. Commands run as processes
forked from one that has imported torch, and so do their workers; one prediction runs as a user's does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path

import nnunetv2
import numpy as np
import pytest
import SimpleITK as sitk
from numpy.typing import NDArray

from pcrl_nnunet.registration import EXT_TRAINER_FOLDER

DATASET = "Dataset007_PhantomOrgan"
TRAINER = "PCRLFinetuneTrainer"
PRETRAINING = "PCRLPretrainTrainer_pcrlv2__nnUNetPlans__3d_fullres/fold_all"
LABELS = {0, 1, 2}
COMMAND = """
import importlib, multiprocessing, sys
start = multiprocessing.get_context
multiprocessing.get_context = lambda method=None: start("fork")  # spawned workers would import torch again
multiprocessing.cpu_count = lambda: 1  # nnU-Net's number of threads of torch; a process that has none may fork
sys.argv = {argv!r}
{more}
getattr(importlib.import_module({module!r}), {function!r})()
"""
# A training's pictures take seconds, and so does compiling the loops of a pretraining's views.
QUICK = """
from pathlib import Path
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from pcrl_nnunet.report.page import Report
from pcrl_nnunet.report.progress import PretrainLogger
from pcrl_nnunet.views import kernels
kernels.compiled = False
Report.write = PretrainLogger.plot_progress_png = nnUNetTrainer.plot_network_architecture = lambda *_: None
MetaLogger.plot_progress_png = lambda self, folder: Path(folder, "progress.png").touch()  # an export needs it
"""
# Does the same as nnUNetv2_train with -pretrained_weights.
LOAD_PRETRAINED = """
import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
trainer = get_trainer_from_args("7", "3d_fullres", 0, device=torch.device("cpu"))
maybe_load_checkpoint(trainer, False, False, {0!r})
given = torch.load({0!r}, weights_only=True)["network_weights"]
state = trainer.network.state_dict()
print("Other than given:", *(name for name in state if not torch.equal(state[name], given[name])))
"""


@dataclass(frozen=True)
class Workplace:
    """An environment's site-packages and its variables for nnU-Net."""

    fork: Callable[..., tuple[int, str]]
    site_packages: Path
    variables: dict[str, str]

    @property
    def results(self) -> Path:
        return Path(self.variables["nnUNet_results"]) / DATASET

    @property
    def plan(self) -> Path:
        return Path(self.variables["nnUNet_preprocessed"]) / DATASET / "nnUNetPlans.json"

    def model(self, configuration: str) -> Path:
        return self.results / f"{TRAINER}__nnUNetPlans__{configuration}"

    def __call__(self, command: str) -> str:
        """Run a console script with its arguments. Returns the output; a failure shows it."""
        argv = command.split()
        (script,) = entry_points(group="console_scripts", name=argv[0])
        module, function = script.value.split(":")
        more = QUICK if argv[0] in ("pcrl_nnunet_pretrain", "nnUNetv2_train") else ""
        code = COMMAND.format(argv=argv, module=module, function=function, more=more)
        status, output = self.fork(code, self.site_packages, self.variables, timeout=120)
        assert status == 0, f"{command} ended with {status}:\n{output}"
        return output

    def predict(self, images: Path, output: Path, configuration: str, flags: str = "", fold: str = "0") -> Path:
        self(
            f"nnUNetv2_predict -d 7 -i {images} -o {output} -f {fold} -c {configuration} -tr {TRAINER} -device cpu "
            f"-npp 1 -nps 1 {flags}"
        )
        return output

    def predict_as_users_do(self, images: Path, output: Path) -> None:
        """Predict in a new interpreter, with nnU-Net's spawned workers."""
        python = self.site_packages.parents[2] / "bin" / "python"
        code = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as main; main()"
        flags = f"-d {DATASET} -i {images} -o {output} -f 0 -c 3d_fullres -tr {TRAINER} -device cpu -npp 1 -nps 1"
        flags += " --save_probabilities"
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("nnUNet", "PYTHON"))}
        environ |= self.variables | {"OMP_NUM_THREADS": "1"}
        command = [str(python), "-W", "ignore", "-c", code, *flags.split()]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environ, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr


def shrink(plan_file: Path) -> None:
    """Make networks small and trainings one step long; add a low resolution and a cascade, like nnU-Net's own tests."""
    plan = json.loads(plan_file.read_text())
    configurations = plan["configurations"]
    for configuration in (configurations["2d"], configurations["3d_fullres"]):
        configuration["batch_size"] = 2
        architecture = configuration["architecture"]["arch_kwargs"]
        n = architecture["n_stages"]
        architecture["features_per_stage"] = [4, *[8] * (n - 1)]
        architecture["n_conv_per_stage"], architecture["n_conv_per_stage_decoder"] = [1] * n, [1] * (n - 1)
    fullres = configurations["3d_fullres"]
    halved = [n // 2 for n in fullres["median_image_size_in_voxels"]]
    configurations["3d_lowres"] = {
        "inherits_from": "3d_fullres",
        "data_identifier": "nnUNetPlans_3d_lowres",
        "patch_size": [-(-n // 8) * 4 for n in fullres["patch_size"]],  # multiples of its network's two strides of 2
        "median_image_size_in_voxels": halved,
        "spacing": [2 * mm for mm in fullres["spacing"]],
        "next_stage": "3d_cascade_fullres",
    }
    configurations["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    plan["pcrl"] = {"finetune": {"epochs": 1, "iters_per_epoch": 1, "val_iters_per_epoch": 1}}
    plan_file.write_text(json.dumps(plan))


@pytest.fixture(scope="module")
def prepared(fork: Callable[..., tuple[int, str]], tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The environment that runs the tests, and a phantom dataset that is preprocessed in it."""
    home = tmp_path_factory.mktemp("home")
    folders = {f"nnUNet_{name}": str(home / name) for name in ("raw", "preprocessed", "results")}
    variables = {
        **folders,
        "nnUNet_n_proc_DA": "1",
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
        "MPLBACKEND": "Agg",
    }
    phantom = Path(__file__).parents[1] / "scripts" / "phantom.py"
    command = f"{phantom} -o {home / 'raw'} -d 7 -cases 5 -test 1 -size 24 22 20 -np 1"
    subprocess.run([sys.executable, *command.split()], check=True, capture_output=True, timeout=120)
    ours = Workplace(
        fork, Path(sysconfig.get_paths()["purelib"]), variables | {"nnUNet_extTrainer": EXT_TRAINER_FOLDER}
    )
    ours("nnUNetv2_plan_and_preprocess -d 7 -c 2d 3d_fullres --no_pp -npfp 1")
    shrink(ours.plan)
    ours("nnUNetv2_preprocess -d 7 -c 2d 3d_fullres 3d_lowres -np 1")
    return ours


@pytest.fixture(scope="module")
def pretrained(prepared: Workplace) -> Workplace:
    """A pretraining of each configuration except the cascade."""
    for configuration in ("2d", "3d_fullres", "3d_lowres"):
        prepared(f"pcrl_nnunet_pretrain -d 7 -c {configuration} -epochs 1 -iters_per_epoch 2 -device cpu")
    return prepared


@pytest.fixture(scope="module")
def finetuned(pretrained: Workplace) -> Workplace:
    """Fold 0 of 2d and 3d_fullres with probabilities for ensembling: one saves them at once, the other afterwards."""
    pretrained(f"nnUNetv2_train 7 2d 0 -tr {TRAINER} -device cpu --npz")
    pretrained(f"nnUNetv2_train 7 3d_fullres 0 -tr {TRAINER} -device cpu")
    pretrained(f"nnUNetv2_train 7 3d_fullres 0 -tr {TRAINER} -device cpu --val --npz")
    return pretrained


@pytest.fixture(scope="module")
def cascade(pretrained: Workplace) -> Workplace:
    """A cascade's two stages. The second uses the first stage's predictions of all cases, made by fold `all`."""
    for configuration in ("3d_lowres", "3d_cascade_fullres"):
        pretrained(f"nnUNetv2_train 7 {configuration} all -tr {TRAINER} -device cpu")
    return pretrained


@pytest.fixture(scope="module")
def elsewhere(dependencies: Path, prepared: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A virtual environment with the same nnU-Net and without us; it shares nnU-Net's folders."""
    folder = tmp_path_factory.mktemp("elsewhere") / "environment"
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    (source,) = nnunetv2.__path__
    shutil.copytree(source, site_packages / "nnunetv2", ignore=shutil.ignore_patterns("pcrl_nnunet_bridge*"))
    variables = {name: value for name, value in prepared.variables.items() if name != "nnUNet_extTrainer"}
    stock = replace(prepared, site_packages=site_packages, variables=variables)
    status, output = prepared.fork("import nnunetv2, pcrl_nnunet", site_packages, variables)
    assert status == 1
    assert output.splitlines()[-1] == "ModuleNotFoundError: No module named 'pcrl_nnunet'"
    return stock


@pytest.fixture(scope="module")
def images(finetuned: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test image, and the validation image of both trainings of fold 0."""
    folder = tmp_path_factory.mktemp("images")
    raw = Path(finetuned.variables["nnUNet_raw"]) / DATASET
    (held_out,) = json.loads(finetuned.plan.with_name("splits_final.json").read_text())[0]["val"]
    for image in (raw / "imagesTr" / f"{held_out}_0000.nii.gz", *(raw / "imagesTs").iterdir()):
        shutil.copy(image, folder)
    assert len(list(folder.iterdir())) == 2
    return folder


@pytest.fixture(scope="module")
def predicted(elsewhere: Workplace, images: Path) -> dict[str, Path]:
    """Folder of the predictions, with probabilities, of each configuration."""
    output = images.with_name("predicted")
    configurations = ("2d", "3d_fullres")
    return {c: elsewhere.predict(images, output / c, c, "--save_probabilities") for c in configurations}


def segmentations(folder: Path) -> dict[str, NDArray[np.int64]]:
    """Labels by file name, each of axes Z Y X."""
    files = sorted(folder.glob("*.nii.gz"))
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))).astype(np.int64) for file in files}


def probabilities(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Return the probabilities of the labels by case, with axes C Z Y X."""
    return {file.stem: np.load(file)["probabilities"] for file in sorted(folder.glob("*.npz"))}


def assert_same(a: dict[str, NDArray[np.int64]], b: dict[str, NDArray[np.int64]]) -> None:
    assert a.keys() == b.keys()
    for name, labels in a.items():
        np.testing.assert_array_equal(labels, b[name], err_msg=name)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_predictions_match_the_trainings_validation(
    finetuned: Workplace, predicted: dict[str, Path], configuration: str
) -> None:
    validation = finetuned.model(configuration) / "fold_0" / "validation"
    validated = segmentations(validation)
    assert len(validated) == 1
    again = segmentations(predicted[configuration])
    assert len(again) == 2
    assert_same(validated, {name: again[name] for name in validated})
    assert set(np.unique(np.concatenate([labels.ravel() for labels in again.values()]))) <= LABELS

    # After one step of training all voxels may have the same label; their probabilities still tell networks apart.
    ((case, expected),) = probabilities(validation).items()
    assert expected.std(axis=(1, 2, 3)).min() > 1e-3
    found = probabilities(predicted[configuration])
    np.testing.assert_allclose(found[case], expected, atol=1e-4)
    (other,) = (given for name, given in found.items() if name != case)
    assert other.shape != expected.shape or np.abs(other - expected).max() > 1e-3


def test_an_ensemble_is_the_mean_of_the_probabilities(
    elsewhere: Workplace, predicted: dict[str, Path], tmp_path: Path
) -> None:
    members = list(predicted.values())
    elsewhere(f"nnUNetv2_ensemble -i {members[0]} {members[1]} -o {tmp_path} -np 1")
    ensemble = segmentations(tmp_path)
    assert len(ensemble) == 2
    for name, labels in ensemble.items():
        of_members = [probabilities(member)[name.removesuffix(".nii.gz")] for member in members]
        np.testing.assert_array_equal(labels, np.mean(of_members, axis=0).argmax(0), err_msg=name)


def test_the_best_configuration_is_found_and_its_postprocessing_applied(
    elsewhere: Workplace, predicted: dict[str, Path], tmp_path: Path
) -> None:
    elsewhere(f"nnUNetv2_find_best_configuration 7 -tr {TRAINER} -c 2d 3d_fullres -f 0 -np 1")
    found = json.loads((elsewhere.results / "inference_information.json").read_text())
    names = [f"{TRAINER}__nnUNetPlans__{configuration}" for configuration in ("2d", "3d_fullres")]
    assert list(found["all_results"]) == [*names, f"ensemble___{names[0]}___{names[1]}___0"]
    best = found["best_model_or_ensemble"]
    assert {model["trainer"] for model in best["selected_model_or_models"]} == {TRAINER}
    assert f"-tr {TRAINER}" in (elsewhere.results / "inference_instructions.txt").read_text()

    elsewhere(
        f"nnUNetv2_apply_postprocessing -i {predicted['2d']} -o {tmp_path} -np 1 "
        f"-pp_pkl_file {best['postprocessing_file']} -plans_json {best['some_plans_file']}"
    )
    assert segmentations(tmp_path).keys() == segmentations(predicted["2d"]).keys()


@pytest.mark.parametrize("process", ["forked", pytest.param("a user's", marks=pytest.mark.long)])
def test_a_model_that_was_exported_and_installed_elsewhere_predicts_the_same(
    elsewhere: Workplace, images: Path, predicted: dict[str, Path], tmp_path: Path, process: str
) -> None:
    exported = tmp_path / "model.zip"
    elsewhere(f"nnUNetv2_export_model_to_zip -d 7 -o {exported} -c 2d 3d_fullres -f 0 -tr {TRAINER}")
    (tmp_path / "results").mkdir()
    nowhere = {f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")}
    other = replace(elsewhere, variables=elsewhere.variables | nowhere)
    other(f"nnUNetv2_install_pretrained_model_from_zip {exported}")
    assert {"2d", "3d_fullres"} == {path.name.split("__")[-1] for path in other.results.glob("PCRL*")}

    if process == "forked":
        other.predict(images, tmp_path / "out", "3d_fullres", "--save_probabilities")
    else:
        other.predict_as_users_do(images, tmp_path / "out")
    assert_same(segmentations(tmp_path / "out"), segmentations(predicted["3d_fullres"]))
    found, expected = probabilities(tmp_path / "out"), probabilities(predicted["3d_fullres"])
    assert found.keys() == expected.keys() != set()
    for case in expected:
        np.testing.assert_allclose(found[case], expected[case], atol=1e-4)


def test_a_cascade_starts_from_the_full_resolutions_encoder_and_predicts(
    cascade: Workplace, elsewhere: Workplace, tmp_path: Path
) -> None:
    report = json.loads((cascade.model("3d_cascade_fullres") / "fold_all" / "transfer.json").read_text())
    pretrained = cascade.results / PRETRAINING
    assert report["checkpoint"] == str(pretrained / "checkpoint_final.pth")
    assert report["encoder_share"] == 1
    assert list(report["notes"].values()) == ["1 input channels made 1 and 2 of labels, which get zero"]
    report = json.loads((cascade.model("3d_lowres") / "fold_all" / "transfer.json").read_text())
    assert report["configuration"] == "3d_lowres"

    images = Path(cascade.variables["nnUNet_raw"]) / DATASET / "imagesTs"
    first = elsewhere.predict(images, tmp_path / "first", "3d_lowres", fold="all")
    flags = f"-prev_stage_predictions {first}"
    second = elsewhere.predict(images, tmp_path / "second", "3d_cascade_fullres", flags, fold="all")
    assert segmentations(second).keys() == segmentations(first).keys() != set()


def test_stock_nnunet_accepts_a_pretrained_checkpoint(pretrained: Workplace, elsewhere: Workplace) -> None:
    checkpoint = pretrained.results / PRETRAINING / "checkpoint_final.pth"
    status, output = elsewhere.fork(
        LOAD_PRETRAINED.format(str(checkpoint)), elsewhere.site_packages, elsewhere.variables
    )
    assert status == 0, output
    (line,) = (line for line in output.splitlines() if line.startswith("Other than given:"))
    differing = line.split()[3:]
    assert differing
    assert all(".seg_layers." in name for name in differing), "nnU-Net leaves these out by design"
