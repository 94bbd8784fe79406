"""The data of the benchmarks: smooth noise in files as nnU-Net writes them, and plans as nnU-Net makes for LiTS."""

from __future__ import annotations

import json
import os
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # read when the libraries are imported: benchmarks import this file first

import numpy as np  # noqa: E402
import torch  # noqa: E402
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from scipy.ndimage import gaussian_filter  # noqa: E402

from pcrl_nnunet.plans import load_plan  # noqa: E402
from pcrl_nnunet.pretraining.preparation import make_anew, prepares  # noqa: E402
from pcrl_nnunet.pretraining.request import Request  # noqa: E402
from pcrl_nnunet.trainers.pretrain import pretrain_trainer  # noqa: E402

Volume = NDArray[np.float32]

DATASET = "Dataset900_Benchmark"
DATA = "nnUNetPlans_3d_fullres"
FEW = 10  # cases with a file of their own; further cases are links


@dataclass(frozen=True)
class Sizes:
    """The sizes of the benchmarks: a plan as nnU-Net makes for LiTS. A CPU gets half of the channels and samples."""

    features: int = 32 if torch.cuda.is_available() else 16  # channels of the first stage
    max_features: int = 320 if torch.cuda.is_available() else 160
    stages: tuple[int, int] = (6, 4)  # encoder stages of the two plans; only the step is measured with both
    patch: int = 128  # length of an edge in voxels
    samples: int = 8 if torch.cuda.is_available() else 4
    case: int = 128  # length of an edge of the training images in voxels
    rounds: int = 3  # each has all levels
    many: int = 100_000  # cases
    fingerprints: int = 400
    large_case: tuple[int, int, int] = (224, 224, 160)  # voxels, for the part `reading`
    large_cases: int = 16
    cold_batches: int = 8


QUICK = Sizes(4, 8, (4, 3), 32, 4, 48, 1, 200, 20, (48, 48, 48), 3, 2)


def volume_of(shape: tuple[int, ...], rng: np.random.Generator) -> Volume:
    """(1, *shape) float32, z-scored, smooth structure with noise on it, as preprocessed scans have."""
    smooth = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), 4)
    image = smooth / smooth.std() + 0.2 * rng.standard_normal(shape, dtype=np.float32)
    z_scored: Volume = ((image - image.mean()) / image.std()).astype(np.float32)[None]
    return z_scored


def plan_of(stages: int, sizes: Sizes) -> dict[str, Any]:
    """Return a plan as nnU-Net's default planner writes it for large, nearly isotropic CT; `stages` names it."""
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(sizes.max_features, sizes.features * 2**i) for i in range(stages)],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": DATA,
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [sizes.patch] * 3,
        "median_image_size_in_voxels": [4.0 * sizes.patch] * 3,
        "spacing": [1.0, 0.77, 0.77],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": architecture,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": f"Stages{stages}",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "configurations": {"3d_fullres": configuration},
        "pcrl": {"pretrain": {"batch_size": sizes.samples}},
    }


def write_case(path: Path, shape: tuple[int, ...], rng: np.random.Generator, patch: int = 128) -> None:
    """Write a case as nnU-Net's preprocessing does for a patch; `path` has no ending."""
    data = volume_of(shape, rng)
    blocks, chunks = comp_blosc2_params(data.shape, (patch,) * 3, data.itemsize)
    seg = np.zeros((1, 1, 1, 1), np.int8)
    nnUNetDatasetBlosc2.save_case(data, seg, {}, str(path), chunks, blocks, seg.shape, seg.shape)


def write_dataset(home: Path, sizes: Sizes, number: int = FEW) -> None:
    """Write a preprocessed dataset with two plans; cases beyond the tenth are links to the first ten."""
    folder = home / "preprocessed" / DATASET
    data = folder / DATA
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(FEW):
        write_case(data / f"case_{i:06d}", (sizes.case,) * 3, rng)
    for i in range(FEW, number):
        for ending in (".b2nd", "_seg.b2nd", ".pkl"):
            os.link(data / f"case_{i % FEW:06d}{ending}", data / f"case_{i:06d}{ending}")
    labels = {"background": 0, "liver": 1}
    described = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": number, "file_ending": ".nii.gz"}
    for name, content in (("dataset", described), *((f"Stages{n}", plan_of(n, sizes)) for n in sizes.stages)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def use_folders(home: Path, loaders: int = 0) -> None:
    """Let nnU-Net work below `home`, with so many loading processes."""
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(home / name)
    os.environ["nnUNet_n_proc_DA"] = str(loaders)
    os.environ["nnUNet_wandb_enabled"] = "0"


def device() -> torch.device:
    """Return a GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def trainer_of(home: Path, stages: int, method: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Return a trainer of a method, by default the default one, that is ready for its first step, and a batch."""
    use_folders(home)
    plan = load_plan(DATASET, f"Stages{stages}")
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):  # the trainer prints a page
        trainer = pretrain_trainer(Request.of_plan(plan, "all", method=method), device())
        trainer.initialize()
        if prepares(trainer.method):
            trainer.prepared = make_anew(trainer.method, trainer.preparation())
    return trainer, next(trainer.get_dataloaders())
