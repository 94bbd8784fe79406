"""Convert NIH ChestX-ray14 to a raw nnU-Net dataset without masks, with 14 labels and the official split.

    python scripts/convert_nih_chestxray.py -i NIH_FOLDER -d 61
    pcrl_nnunet_preprocess -d 61

NIH_FOLDER holds the unpacked files of https://nihcc.app.box.com/v/ChestXray-NIHCC, in it or in any folder below:

- the images 00000001_000.png and so on, in images_001/images to images_012/images or in one folder
- Data_Entry_2017.csv or Data_Entry_2017_v2020.csv, train_val_list.txt and test_list.txt

The script writes into $nnUNet_raw/Dataset061_NIHChestXray:

- imagesTr: the images of train_val_list.txt, in grey, with a short side of 256 pixels (-size)
- imagesTs: the images of test_list.txt. No training, and no pretraining, of nnU-Net or of this package sees them
- classes.csv, classesTs.csv: 0 or 1 for each of the 14 labels, and the patient. "No Finding" is 0 for all labels
- splits_final.json: eight folds by patient. Fold 0 trains on 70 % of all images, validates on 10 %, and 20 % are the
  test images. pcrl_nnunet_preprocess takes the file over
- bad_cases.txt: the images that could not be used; missing_images.txt: listed images that are not there

Only a part of the images? -partial converts it. A patient stays in the same fold whatever is missing.
Stopped, or more images arrived? Run the same command to continue. Exit status 1: something was bad, and is named.
"""

from __future__ import annotations

import options  # isort: skip  # first: it answers --help without torch

import re
from filecmp import cmp
from pathlib import Path

import chest_xrays
import convert
from chest_xrays import Row, Source

from pcrl_nnunet.errors import UserError, console

LABELS = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia",
)  # fmt: skip
HEALTHY = "No Finding"
COLUMNS = ("Image Index", "Finding Labels", "Patient ID")
LISTS = {"Tr": "train_val_list.txt", "Ts": "test_list.txt"}
REFERENCE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
FOLDERS = [f"images_{number:03d}" for number in range(1, 13)]


def find(folder: Path) -> Source:
    """Find the tables and images below a folder, and read the tables."""
    tables: list[Path] = []
    images: list[Path] = []
    lists: dict[str, Path] = {}
    for path in convert.files_below(folder):
        if path.suffix.lower() == ".png":
            images.append(path)
        elif path.suffix.lower() == ".csv" and {*COLUMNS} <= {*chest_xrays.header_of(path)}:
            tables.append(path)
        elif path.name in LISTS.values() and not cmp(lists.setdefault(path.name, path), path, shallow=False):
            raise UserError(f"{lists[path.name]} and {path} differ; keep the list of the official split alone")
    table, ignored = choose(folder, tables)
    for name in LISTS.values():
        if name not in lists:
            raise UserError(f"{folder} has no {name}, nor has a folder below it; download it from {REFERENCE}")
    by_name, said = chest_xrays.indexed((path.stem, path) for path in images)
    rows, of_rows = read(table, {group: read_list(lists[name]) for group, name in LISTS.items()})
    return Source(folder, table, rows, by_name, LABELS, [*ignored, *said, *of_rows], missing_folders(images))


def choose(folder: Path, tables: list[Path]) -> tuple[Path, list[str]]:
    """Return the table of findings, and a sentence about others. The version of 2020 goes before the first version."""
    official = [path for path in tables if path.name.lower().startswith("data_entry_2017")]
    if candidates := sorted(official or tables[: len(tables) == 1], key=lambda path: (path.name.lower(), path)):
        others = [str(path) for path in tables if path != candidates[-1]]
        return candidates[-1], [f"labels from {candidates[-1]}, not from {', '.join(others)}"] if others else []
    if tables:
        raise UserError(
            f"{folder} has {len(tables)} tables of findings, {' and '.join(path.name for path in tables[:3])}, and "
            "none is called Data_Entry_2017; keep one"
        )
    raise UserError(
        f"{folder} has no table with the columns {', '.join(COLUMNS)}, which is Data_Entry_2017_v2020.csv; "
        f"{chest_xrays.content_of(folder)}: give the folder of the whole download"
    )


def read_list(path: Path) -> set[str]:
    """Return the names of cases in one of the two lists of images."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): download it again, or check its permissions") from error
    if not lines or not all(re.fullmatch(r".+\.png", line, re.I) for line in lines):
        raise UserError(f"{path} has other lines than names of images such as 00000001_000.png: download it again")
    return {Path(line).stem for line in lines}


def read(table: Path, lists: dict[str, set[str]]) -> tuple[list[Row], list[str]]:
    """Return the images of a table that one of the lists has, and sentences about other lines."""
    if both := sorted(lists["Tr"] & lists["Ts"]):
        raise UserError(f"{both[0]}.png is in both {' and '.join(LISTS.values())}: download the lists again")
    rows: dict[str, Row] = {}
    twice, unlisted = 0, []
    for line, row in chest_xrays.lines_of(table, COLUMNS):
        name = Path(row["Image Index"]).stem
        found = {label.strip() for label in row["Finding Labels"].split("|")} - {HEALTHY}
        if unknown := sorted(found - {*LABELS}):
            raise UserError(
                f"{table}, line {line}, has the finding '{unknown[0]}'; expected {HEALTHY} or some of "
                f"{', '.join(LABELS)}, with | between them: download the file again"
            )
        if not row["Patient ID"]:
            raise UserError(f"{table}, line {line}, has no patient: download the file again")
        group = "Tr" if name in lists["Tr"] else "Ts"
        if name not in lists[group]:
            unlisted.append(name)
            continue
        values = tuple(str(int(label in found)) for label in LABELS)
        twice += chest_xrays.add_row(rows, Row(name, group, row["Patient ID"], values), table, line)
    if not rows:
        raise UserError(f"{table} has none of the images of {' and '.join(LISTS.values())}: are they of one dataset?")
    said = [f"{twice} lines of {table.name} are there twice"] if twice else []
    if unlisted:
        said.append(f"{len(unlisted)} images of {table.name} are in neither list and were left out: {unlisted[0]} ...")
    if without := sorted((lists["Tr"] | lists["Ts"]) - rows.keys()):
        said.append(f"{len(without)} images of the lists are not in {table.name} and were left out: {without[0]} ...")
    return list(rows.values()), said


def missing_folders(images: list[Path]) -> str:
    """Return the end of a message: the folders of the download that have no images, if others have."""
    there = {part for path in {path.parent for path in images} for part in path.parts if part in FOLDERS}
    absent = [name for name in FOLDERS if name not in there]
    return f" (no images in {', '.join(absent)})" if there and absent else ""


def main() -> None:
    """Find, convert, write tables and folds, report."""
    args = options.convert_nih_chestxray().parse_args()
    folder = convert.dataset_folder(args, "NIHChestXray")
    chest_xrays.run(args, folder, find(args.i), {}, REFERENCE)


if __name__ == "__main__":
    console(main)
