"""The end of demo.sh: a table of Dice on the test cases, the findings, and a picture of the predictions."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

# Bounds that the demo's networks miss after a few steps: 0.77 and 0.55 after four and two steps.
RESTORED = 0.5  # share of the images' variance
FOUND = 0.6  # Dice
COLOURS = ListedColormap(["#00b4d8", "#ffd60a", "#ef476f", "#80ed99"])  # labels 1, 2, ...


def dice_per_label(summary: Path) -> dict[str, float]:
    """Read mean Dice over cases by label from nnUNetv2_evaluate_folder's summary.json; "mean" is over labels."""
    content = json.loads(summary.read_text())
    dice = {label: float(metrics["Dice"]) for label, metrics in content["mean"].items()}
    return {**dice, "mean": float(content["foreground_mean"]["Dice"])}


def table(dice: dict[str, dict[str, float]], names: dict[str, str]) -> str:
    """Return a table with a row for each label and a column for each training.

    Args:
        dice: Dice by training and label.
        names: names of the labels.
    """
    lines = ["".join([f"{'Dice on the test cases':<26}", *(f"{training:>16}" for training in dice)])]
    for label in next(iter(dice.values())):
        row = [dice[training][label] for training in dice]
        cells = (f"{'none' if math.isnan(value) else f'{value:.3f}':>16}" for value in row)
        lines.append("".join([f"{names.get(label, label):<26}", *cells]))
    return "\n".join(lines)


def restoration_error(folder: Path) -> float:
    """Return the error of a pretraining's last restorations as a share of the images' variance, from its log."""
    log = max(folder.glob("training_log_*.txt"))
    return float(re.findall(r"restoration_error ([\d.]+)", log.read_text())[-1])


def findings(error: float, dice: dict[str, dict[str, float]], label: str, name: str) -> tuple[list[str], bool]:
    """Return a run's findings as sentences, and whether both pretraining and segmentation work.

    Args:
        error: error of the restoration.
        dice: Dice by training and label, and "mean".
        label, name: label and name of the structure that has to be found.
    """
    restored = error < RESTORED
    lines = [
        f"The pretraining {'restores images' if restored else 'does not restore images'}: the error is {error:.2f} of "
        f"their variance (1: nothing restored)."
    ]
    for training, of_label in dice.items():
        verb = "finds" if of_label[label] >= FOUND else "does not find"
        lines.append(f"The {training} network {verb} the {name} (Dice {of_label[label]:.3f}).")
    (better, high), *_, (worse, low) = sorted(
        ((training, of_label["mean"]) for training, of_label in dice.items()), key=lambda item: -item[1]
    )
    gap = f"{better} is better than {worse} by {high - low:.3f} Dice" if round(high - low, 3) > 0 else "all are alike"
    lines.append(
        f"In this run {gap}. One run proves nothing: easy phantoms, minutes of training, one fold, one seed. "
        f"pcrl_nnunet_compare tells whether pretraining pays on your data."
    )
    works = restored and all(of_label[label] >= FOUND for of_label in dice.values())
    if not works:
        lines.append("So this run does not show what the demo is for: trainings that work.")
    return lines, works


def draw(
    images: Path, segmentations: dict[str, Path], names_of_labels: dict[str, str], path: Path, cases: int = 4
) -> None:
    """Draw each case as a row of a PNG: the slice with most of the last label, alone and with each segmentation."""
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
        row[0].set_ylabel(f"{name.removesuffix('.nii.gz')}, slice {z}")
        for axis, title in zip(row, ["image", *labels], strict=True):
            axis.imshow(image[z], cmap="gray")
            axis.set(xticks=[], yticks=[])
            if title in labels:
                shown = np.ma.masked_equal(labels[title][z], 0)
                axis.imshow(shown, cmap=COLOURS, vmin=1, vmax=COLOURS.N, alpha=0.55, interpolation="nearest")
    handles = [
        Patch(color=COLOURS(int(value) - 1), alpha=0.55, label=label) for value, label in names_of_labels.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"Test cases, the slice with most of {list(names_of_labels.values())[-1]}")
    figure.savefig(path, dpi=110)


def _read(path: Path) -> NDArray[np.generic]:
    array: NDArray[np.generic] = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))  # (Z, Y, X)
    return array


def main() -> None:
    """Print the table and the findings, write the picture; status 1 if the trainings do not work."""
    parser = argparse.ArgumentParser(
        description="Compare evaluated predictions of several trainings.",
        epilog="example:\n  python scripts/demo_report.py -raw RAW -predictions one=A two=B -pretraining C -o D.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-raw", type=Path, required=True, help="raw dataset with imagesTs and labelsTs")
    parser.add_argument("-predictions", nargs="+", required=True, metavar="NAME=FOLDER", help="each with summary.json")
    parser.add_argument("-pretraining", type=Path, required=True, metavar="FOLDER", help="its fold's folder")
    parser.add_argument("-o", type=Path, required=True, metavar="PNG", help="the picture to write")
    args = parser.parse_args()
    folders = {name: Path(folder) for name, folder in (item.split("=", 1) for item in args.predictions)}
    labels = json.loads((args.raw / "dataset.json").read_text())["labels"]
    names = {str(tuple(value) if isinstance(value, list) else value): name for name, value in labels.items()}
    dice = {name: dice_per_label(folder / "summary.json") for name, folder in folders.items()}
    print(table(dice, names), end="\n\n")
    last = list(names)[-1]  # the lesion
    lines, works = findings(restoration_error(args.pretraining), dice, last, names[last])
    print("\n".join(lines))
    foreground = {value: name for value, name in names.items() if value != "0"}
    draw(args.raw / "imagesTs", {"truth": args.raw / "labelsTs", **folders}, foreground, args.o)
    sys.exit(0 if works else 1)


if __name__ == "__main__":
    main()
