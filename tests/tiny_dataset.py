"""A tiny dataset, as nnU-Net's planning and preprocessing write it: trainings of milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

DATASET = "Dataset999_Tiny"
DATASET_JSON = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "a": 1, "b": 2},
    "numTraining": 4,
    "file_ending": ".nii.gz",
}
SPLITS = [
    {"train": ["case_0", "case_1", "case_2"], "val": ["case_3"]},
    {"train": ["case_1", "case_2", "case_3"], "val": ["case_0"]},
]


def make_plan(features: Sequence[int] = (4, 8, 8), **pcrl: Any) -> dict[str, Any]:
    """A plan as nnU-Net reads it, of a network that trains in milliseconds."""
    n = len(features)
    fullres = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [12, 12, 12],
        "median_image_size_in_voxels": [14.0, 14.0, 14.0],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": n,
                "features_per_stage": list(features),
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3]] * n,
                "strides": [[1, 1, 1]] + [[2, 2, 2]] * (n - 1),
                "n_conv_per_stage": [1] * n,
                "n_conv_per_stage_decoder": [1] * (n - 1),
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    pcrl.setdefault("finetune", {"epochs": 1, "iters_per_epoch": 1, "val_iters_per_epoch": 1})
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "configurations": {
            "3d_fullres": fullres,
            "3d_lowres": {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
        "pcrl": pcrl,
    }


def write_preprocessed(root: Path) -> Path:
    """Four cases below nnUNet_preprocessed, with the files beside them; returns the dataset's folder."""
    folder = root / DATASET
    data = folder / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        image = rng.normal(size=(1, 14, 14, 14)).astype(np.float32)
        seg = np.zeros((1, 14, 14, 14), np.int8)
        seg[:, 4:8, 4:8, 4:8], seg[:, 8:11, 4:8, 4:8] = 1, 2
        locations = {label: np.argwhere(seg == label) for label in (1, 2)}
        chunks = {name: image.shape for name in ("chunks", "blocks", "chunks_seg", "blocks_seg")}
        nnUNetDatasetBlosc2.save_case(image, seg, {"class_locations": locations}, str(data / f"case_{i}"), **chunks)
    files = {
        "dataset.json": DATASET_JSON,
        "splits_final.json": SPLITS,
        "dataset_fingerprint.json": {},
        "nnUNetPlans.json": make_plan(),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder
