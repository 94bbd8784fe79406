"""Convert CheXpert or CheXpert-small to a raw nnU-Net dataset without masks, with 14 labels and the official split.

    python scripts/convert_chexpert.py -i CHEXPERT_FOLDER -d 62
    pcrl_nnunet_preprocess -d 62

CHEXPERT_FOLDER holds the unpacked files of https://stanfordmlgroup.github.io/competitions/chexpert, in it or in any
folder below: train.csv, valid.csv and images such as train/patient00001/study1/view1_frontal.jpg, and perhaps test.csv
(or test_labels.csv) with its images. The script writes into $nnUNet_raw/Dataset062_CheXpert:

- imagesTr: the images of train.csv, in grey, with a short side of 256 pixels (-size). patient00001_study1_view1_frontal
  is the name of a case
- imagesTs: the images of valid.csv, 200 patients with the labels of radiologists. The public tests on them, because the
  test set was not released at first. No training and no pretraining sees them. If test.csv is there, its images are the
  test images, and the images of valid.csv are the validation part of fold 0, in imagesTr
- classes.csv, classesTs.csv: 0, 1 or nothing for each of the 14 labels, and the patient
- splits_final.json: eight folds by patient. pcrl_nnunet_preprocess takes the file over
- bad_cases.txt: the images that could not be used; missing_images.txt: listed images that are not there

Labels. Uncertain labels (-1) become unknown: the loss and the AUROC leave them out. -uncertain 0 and -uncertain 1 make
them 0 or 1. An empty cell of CheXpert means that the report does not mention the finding. It becomes 0.

Views. Only frontal images are converted. NIH ChestX-ray14 has no others, and CheXpert's labels belong to a study: some
findings show in one of its views only. -lateral takes both.

Only a part of the images? -partial converts it. A patient stays in the same fold whatever is missing.
Stopped, or more images arrived? Run the same command to continue. Exit status 1: something was bad, and is named.
"""

from __future__ import annotations

import options  # isort: skip  # first: it answers --help without torch

import re
from collections import defaultdict
from pathlib import Path

import chest_xrays
import convert
from chest_xrays import Row, Source

from pcrl_nnunet.errors import UserError, console

LABELS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
TABLES = ("train.csv", "valid.csv", "test.csv")
LATER_NAMES = {"val_labels.csv": "valid.csv", "test_labels.csv": "test.csv"}  # of the release with the test set
COLUMNS = ("Path", *LABELS)
REFERENCE = "https://stanfordmlgroup.github.io/competitions/chexpert"
IMAGE = re.compile(r"(patient\d+)/(study\d+)/(view\d+_(frontal|lateral))\.(?:jpg|jpeg|png)", re.I)  # the end of a path


def find(folder: Path, uncertain: str, lateral: bool) -> Source:
    """Find the tables and images below a folder, and read the tables."""
    tables: dict[str, list[Path]] = defaultdict(list)
    files = []
    for path in convert.files_below(folder):
        if match := image_of(path.as_posix()):
            if lateral or is_frontal(match):
                files.append((name_of(match), path))
        elif (name := LATER_NAMES.get(path.name, path.name)) in TABLES:
            tables[name].append(path)
    train, valid = (one(folder, name, tables[name]) for name in TABLES[:2])
    test = one(folder, "test.csv", tables["test.csv"]) if tables["test.csv"] else None
    images, said = chest_xrays.indexed(files)
    rows: dict[str, Row] = {}
    said += read(train, "Tr", uncertain, lateral, rows)
    said += read(valid, "Tr" if test else "Ts", uncertain, lateral, rows, validation=test is not None)
    if test:
        said += read(test, "Ts", uncertain, lateral, rows)
    what = test.name if test else f"{valid.name}, because there is no test.csv or test_labels.csv"
    said.append(f"the test images are the images of {what}")
    return Source(folder, train, list(rows.values()), images, LABELS, said)


def image_of(path: str) -> re.Match[str] | None:
    """Return the patient, study and view of an image's path; None for another path."""
    return IMAGE.fullmatch("/".join(path.split("/")[-3:]))


def name_of(image: re.Match[str]) -> str:
    """Return the name of the image's case."""
    return "_".join(image.groups()[:3])


def is_frontal(image: re.Match[str]) -> bool:
    """Tell a frontal from a lateral image by its name, since test.csv has no column for it."""
    return image[4].lower() == "frontal"


def one(folder: Path, name: str, paths: list[Path]) -> Path:
    """Return the only table of this name. Raise `UserError` for none or several."""
    if not paths:
        raise UserError(
            f"{folder} has no {name}, nor has a folder below it; {chest_xrays.content_of(folder)}"
            f"{chest_xrays.packed_in(folder) or ': give the folder of the whole download'}"
        )
    if len(paths) > 1:
        raise UserError(
            f"{folder} has {name} more than once, {paths[0]} and {paths[1]}; give the folder of one of the two "
            "downloads"
        )
    return paths[0]


def read(
    table: Path, group: str, uncertain: str, lateral: bool, rows: dict[str, Row], validation: bool = False
) -> list[str]:
    """Add the images of a table to `rows`, and return sentences about some lines.

    Args:
        uncertain: what -1 becomes: "ignore", "0" or "1".
        rows: images by name.
        validation: the images are the dataset's own validation part.

    Raises:
        UserError: the table is damaged.
    """
    values = {"": "0", "0": "0", "1": "1", "-1": "" if uncertain == "ignore" else uncertain}
    twice = laterals = 0
    for line, row in chest_xrays.lines_of(table, COLUMNS):
        image = image_of(row["Path"])
        if image is None:
            raise UserError(
                f"{table}, line {line}, has the path '{row['Path']}'; expected the form "
                "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg: download the file again"
            )
        if not lateral and not is_frontal(image):
            laterals += 1
            continue
        cells = [re.sub(r"\.0+$", "", row[label]) for label in LABELS]
        if wrong := [cell for cell in cells if cell not in values]:
            raise UserError(
                f"{table}, line {line}, has the label '{wrong[0]}'; expected 1, 0, -1 or nothing: download it again"
            )
        made = Row(name_of(image), group, image[1], tuple(values[cell] for cell in cells), validation)
        twice += chest_xrays.add_row(rows, made, table, line)
    said = [f"{twice} lines of {table.name} are there twice"] if twice else []
    if laterals:
        said.append(f"{laterals} lateral images of {table.name} were left out; -lateral takes them")
    return said


def main() -> None:
    """Find, convert, write tables and folds, report."""
    args = options.convert_chexpert().parse_args()
    folder = convert.dataset_folder(args, "CheXpert")
    source = find(args.i, args.uncertain, args.lateral)
    chest_xrays.run(args, folder, source, {"lateral": args.lateral}, REFERENCE)


if __name__ == "__main__":
    console(main)
