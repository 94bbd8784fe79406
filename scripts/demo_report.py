"""The end of demo.sh: a table of Dice on the test cases, and a picture that puts the predictions side by side."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

COLOURS = ListedColormap(["#00b4d8", "#ffd60a", "#ef476f", "#80ed99"])  # of labels 1, 2, ...


def dice_per_label(summary: Path) -> dict[str, float]:
    """Mean Dice over the cases by label, from the summary.json of nnUNetv2_evaluate_folder; "mean" is over labels."""
    content = json.loads(summary.read_text())
    dice = {label: float(metrics["Dice"]) for label, metrics in content["mean"].items()}
    return {**dice, "mean": float(content["foreground_mean"]["Dice"])}


def table(dice: dict[str, dict[str, float]], names: dict[str, str]) -> str:
    """One row a label, one column a training.

    Args:
        dice: by training, by label.
        names: of the labels.
    """
    lines = ["".join([f"{'Dice on the test cases':<26}", *(f"{training:>16}" for training in dice)])]
    for label in next(iter(dice.values())):
        row = [dice[training][label] for training in dice]
        cells = (f"{'none' if math.isnan(value) else f'{value:.3f}':>16}" for value in row)
        lines.append("".join([f"{names.get(label, label):<26}", *cells]))
    return "\n".join(lines)


def draw(images: Path, segmentations: dict[str, Path], path: Path, cases: int = 4) -> None:
    """Write a PNG: a row a case, in the slice with most of the last label; the image, then every segmentation on it."""
    names = sorted(p.name for p in next(iter(segmentations.values())).glob("*.nii.gz"))[:cases]
    figure = Figure(figsize=(2.6 * (1 + len(segmentations)), 2.6 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 1 + len(segmentations), squeeze=False)
    for axis, title in zip(axes[0], ["image", *segmentations], strict=True):
        axis.set_title(title)
    for row, name in zip(axes, names, strict=True):
        image = _read(images / name.replace(".nii.gz", "_0000.nii.gz"))
        labels = {title: _read(folder / name) for title, folder in segmentations.items()}
        truth = next(iter(labels.values()))
        z = int((truth == truth.max()).sum((1, 2)).argmax())
        row[0].set_ylabel(name.removesuffix(".nii.gz"))
        for axis, title in zip(row, ["image", *labels], strict=True):
            axis.imshow(image[z], cmap="gray")
            axis.set(xticks=[], yticks=[])
            if title in labels:
                shown = np.ma.masked_equal(labels[title][z], 0)
                axis.imshow(shown, cmap=COLOURS, vmin=1, vmax=COLOURS.N, alpha=0.55, interpolation="nearest")
    figure.savefig(path, dpi=110)


def _read(path: Path) -> NDArray[np.generic]:
    array: NDArray[np.generic] = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))  # (Z, Y, X)
    return array


def main() -> None:
    """Print the table and write the picture."""
    parser = argparse.ArgumentParser(description="Compare evaluated predictions of several trainings.")
    parser.add_argument("-raw", type=Path, required=True, help="raw dataset with imagesTs and labelsTs")
    parser.add_argument("-predictions", nargs="+", required=True, metavar="NAME=FOLDER", help="each with summary.json")
    parser.add_argument("-o", type=Path, required=True, metavar="PNG", help="the picture to write")
    args = parser.parse_args()
    folders = {name: Path(folder) for name, folder in (item.split("=", 1) for item in args.predictions)}
    labels = json.loads((args.raw / "dataset.json").read_text())["labels"]
    names = {str(tuple(value) if isinstance(value, list) else value): name for name, value in labels.items()}
    print(table({name: dice_per_label(folder / "summary.json") for name, folder in folders.items()}, names))
    draw(args.raw / "imagesTs", {"truth": args.raw / "labelsTs", **folders}, args.o)


if __name__ == "__main__":
    main()
