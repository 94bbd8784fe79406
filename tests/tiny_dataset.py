"""A tiny dataset in the form of nnU-Net's planning and preprocessing, for trainings of milliseconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
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
    """A plan for nnU-Net with a network that trains in milliseconds."""
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


def write_source(
    home: Path, name: str, images: Mapping[str, np.ndarray], channel: str = "CT", spacing: Sequence[float] = (1, 1, 1)
) -> Path:
    """A raw dataset and its fingerprint, with all voxels as foreground; returns its preprocessed folder.

    Args:
        home: of the folders raw and preprocessed.
        images: case -> (C, Z, Y, X).
        spacing: mm, Z Y X.
    """
    raw, folder = home / "raw" / name, home / "preprocessed" / name
    (raw / "imagesTr").mkdir(parents=True)
    (raw / "labelsTr").mkdir()
    folder.mkdir(parents=True)
    for case, channels in images.items():
        for number, voxels in enumerate(channels):
            image = sitk.GetImageFromArray(voxels)
            image.SetSpacing([float(s) for s in spacing[::-1]])
            sitk.WriteImage(image, str(raw / "imagesTr" / f"{case}_{number:04d}.nii.gz"))
        (raw / "labelsTr" / f"{case}.nii.gz").write_text("nobody reads this")
    num_channels = len(next(iter(images.values())))
    description = {**DATASET_JSON, "numTraining": len(images)}
    description["channel_names"] = {str(c): channel for c in range(num_channels)}
    (raw / "dataset.json").write_text(json.dumps(description))
    voxels_of = [np.concatenate([image[c].ravel() for image in images.values()]) for c in range(num_channels)]
    fingerprint = {
        "spacings": [list(spacing) for _ in images],
        "shapes_after_crop": [image.shape[1:] for image in images.values()],
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {
            str(c): intensities(voxels) for c, voxels in enumerate(voxels_of)
        },
    }
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return folder


def intensities(voxels: np.ndarray) -> dict[str, float]:
    """The foreground intensities of a fingerprint."""
    low, median, high = np.percentile(voxels, (0.5, 50, 99.5))
    return {
        "mean": float(voxels.mean()),
        "std": float(voxels.std()),
        "median": float(median),
        "percentile_00_5": float(low),
        "percentile_99_5": float(high),
    }


def write_target(
    home: Path, name: str, scheme: str, statistics: Mapping[str, float], num_channels: int = 1, **configuration: Any
) -> dict[str, Any]:
    """A planned dataset without images, with the tiny network; returns the plan.

    Args:
        scheme, statistics: normalisation of all channels.
        configuration: values that replace values of `make_plan`.
    """
    plan = make_plan(pretrain={"epochs": 1, "iters_per_epoch": 2, "batch_size": 4})
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    plan |= {
        "dataset_name": name,
        "foreground_intensity_properties_per_channel": {str(c): dict(statistics) for c in range(num_channels)},
    }
    plan["configurations"]["3d_fullres"] |= {
        "normalization_schemes": [scheme] * num_channels,
        "use_mask_for_norm": [False] * num_channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        **configuration,
    }
    folder = home / "preprocessed" / name
    folder.mkdir(parents=True)
    (folder / "nnUNetPlans.json").write_text(json.dumps(plan))
    channels = {str(c): "CT" for c in range(num_channels)}
    (folder / "dataset.json").write_text(json.dumps({**DATASET_JSON, "channel_names": channels}))
    return plan
