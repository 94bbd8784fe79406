"""Convert LUNA16 to a raw nnU-Net dataset: scans, nodules as labels, the ten folds, candidates.

    python scripts/convert_luna16.py -i LUNA_FOLDER -d 16
    nnUNetv2_plan_and_preprocess -d 16 --verify_dataset_integrity

LUNA_FOLDER holds the unpacked files of https://luna16.grand-challenge.org/Download, in it or in any folder below: the
folders subset0 to subset9 with SERIESUID.mhd and SERIESUID.raw (or .zraw), annotations.csv and candidates_V2.csv. Some
of the subsets are enough. The script writes into $nnUNet_raw/Dataset016_LUNA16:

- imagesTr: the scans in HU; the series UID is the case's name
- labelsTr: 1 where a voxel's centre lies in the sphere of a nodule, half its diameter around the annotated point, and
  at the voxel nearest to that point; scans without a nodule have empty labels
- splits_final.json: fold k validates on subset k. nnU-Net's planning copies it. The script also writes it to
  $nnUNet_preprocessed/Dataset016_LUNA16 unless that folder has one. There are ten folds: for a command of nnU-Net that
  assumes five, such as nnUNetv2_find_best_configuration, add -f 0 1 2 3 4 5 6 7 8 9
- candidates.csv: the lines of candidates_V2.csv for the existing scans: seriesuid (the case), coordX, coordY, coordZ
  (mm in the world, LPS, as in SimpleITK), class (1: a nodule, 0: none)
- conversion.json: each case's origin; bad_cases.txt: the files that could not be used

Stopped, or more subsets arrived? Run the same command to continue. You may delete converted subsets before.
Exit status 1: something was bad, and is named.
"""

from __future__ import annotations

import options  # isort: skip  # first: it answers --help without torch

import csv
import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import convert
import numpy as np
from numpy.typing import NDArray

from pcrl_nnunet.errors import UserError, console
from pcrl_nnunet.files import write_text
from pcrl_nnunet.ingest.scans import SetAside

LABELS = {"background": 0, "nodule": 1}
REFERENCE = "https://luna16.grand-challenge.org"
SUBSETS = 10
POINT = ("coordX", "coordY", "coordZ")


class Nodule(NamedTuple):
    """A line of annotations.csv, in mm, with the centre in the world (LPS)."""

    centre: tuple[float, float, float]
    diameter: float


@dataclass(frozen=True)
class LunaCase(convert.Case):
    """A scan of LUNA16 with its nodules."""

    subset: int
    nodules: tuple[Nodule, ...]

    def load(self) -> convert.Loaded:
        image = convert.int16_if_whole(convert.read(self.image))
        mask = np.zeros(image.GetSize()[::-1], np.uint8)
        notes = []
        for nodule in self.nodules:
            centre = image.TransformPhysicalPointToContinuousIndex(nodule.centre)
            if not paint_sphere(mask, centre[::-1], nodule.diameter / 2, image.GetSpacing()[::-1]):
                where = ", ".join(f"{x:g}" for x in nodule.centre)
                notes.append(f"the nodule at ({where}) mm, {nodule.diameter:g} mm wide, lies outside of the scan")
        return convert.Loaded(image, convert.with_geometry(mask, image), notes)

    def entry(self) -> dict[str, Any]:
        return {**super().entry(), "subset": self.subset, "nodules": len(self.nodules)}


def paint_sphere(mask: NDArray[np.uint8], centre: Sequence[float], radius: float, spacing: Sequence[float]) -> bool:
    """Set the voxels with centres in a sphere to 1, and the voxel nearest to the sphere's centre.

    Args:
        mask: (Z, Y, X), written into.
        centre: in voxels, Z Y X; may lie outside the mask.
        radius: mm.
        spacing: mm for each voxel, Z Y X; the axes are at right angles.

    Returns:
        Whether any of these voxels is in the mask.
    """
    middle, step, shape = np.array(centre), np.array(spacing), np.array(mask.shape)
    low = np.maximum(np.ceil(middle - radius / step), 0).astype(int)
    high = np.maximum(np.minimum(np.floor(middle + radius / step) + 1, shape).astype(int), low)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    offsets = np.ogrid[box]  # voxels, along each axis
    squares = sum(((o - m) * s) ** 2 for o, m, s in zip(offsets, middle, step, strict=True))
    ball = squares <= radius**2
    mask[box][ball] = 1
    nearest = np.floor(middle + 0.5).astype(int)
    inside = bool((nearest >= 0).all() and (nearest < shape).all())
    if inside:
        mask[tuple(nearest)] = 1
    return inside or bool(ball.any())


# ------------------------------------------------------------------------------------------------------------ finding


@dataclass
class Luna:
    """The content of LUNA_FOLDER.

    Attributes:
        annotations, candidates: their files; None if missing.
        scans: series UID -> .mhd file and its subset.
    """

    annotations: Path | None
    candidates: Path | None
    scans: dict[str, tuple[Path, int]]
    bad: list[SetAside]


def find(folder: Path) -> Luna:
    """Search the folder. Files outside folders named subset0 to subset9 are not scans (for example lung masks)."""
    tables: dict[str, list[Path]] = defaultdict(list)
    headers: dict[str, list[tuple[Path, int]]] = defaultdict(list)
    voxels: dict[str, Path] = {}
    packed = []
    for path in convert.files_below(folder):
        subset = next((int(m[1]) for p in path.parents if (m := re.fullmatch(r"subset(\d)", p.name, re.I))), None)
        ending = path.suffix.lower()
        if ending == ".csv":
            tables[path.name.lower()].append(path)
        elif re.fullmatch(r"subset\d\.zip", path.name, re.I):
            packed.append(path.name)
        elif subset is not None and ending == ".mhd":
            headers[path.stem].append((path, subset))
        elif subset is not None and ending in (".raw", ".zraw"):
            voxels[path.stem] = path
    if not headers:
        unpack = f"; unpack {', '.join(packed)} first" if packed else ""
        raise UserError(f"{folder} has no .mhd file in a folder named subset0 to subset{SUBSETS - 1}{unpack}")
    luna = Luna(_shallowest(tables["annotations.csv"]), _shallowest(tables["candidates_v2.csv"]), {}, [])
    for uid, places in headers.items():
        luna.scans[uid] = places[0]
        for path, _ in places[1:]:
            luna.bad.append(SetAside(str(path), f"is there twice, the other one was taken: {places[0][0]}"))
    for uid in voxels.keys() - headers.keys():
        luna.bad.append(SetAside(str(voxels[uid]), f"its header, {uid}.mhd, is missing"))
    return luna


def _shallowest(paths: list[Path]) -> Path | None:
    """Return the path nearest to the top: the evaluation script has copies of the tables further down."""
    return min(paths, key=lambda path: (len(path.parts), path), default=None)


# ------------------------------------------------------------------------------------------------------------- tables


def rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the lines of a table. Raise `UserError` with the line if a column after the first is not a number."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
                raise UserError(
                    f"{path} has no column {', '.join(missing)}; expected {','.join(columns)}: is it LUNA16's?"
                )
            for row in reader:
                try:
                    if not all(np.isfinite(float(row[column])) for column in columns[1:]):
                        raise ValueError
                except (TypeError, ValueError):
                    raise UserError(f"{path}, line {reader.line_num}, is damaged: download the file again") from None
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): download it again, or check its permissions") from error


def read_annotations(path: Path) -> dict[str, tuple[Nodule, ...]]:
    """Return the nodules by series UID."""
    nodules: dict[str, list[Nodule]] = defaultdict(list)
    for row in rows(path, ("seriesuid", *POINT, "diameter_mm")):
        x, y, z = (float(row[axis]) for axis in POINT)
        nodules[row["seriesuid"]].append(Nodule((x, y, z), float(row["diameter_mm"])))
    return {uid: tuple(listed) for uid, listed in nodules.items()}


def write_candidates(source: Path, dataset: convert.Dataset) -> tuple[str, set[str]]:
    """Write the finished cases' candidates. Return a sentence about them, and the series UIDs of the whole table."""
    columns = ("seriesuid", *POINT, "class")
    lines, seen, classes = [",".join(columns)], set(), Counter[bool]()
    for row in rows(source, columns):
        seen.add(row["seriesuid"])
        if row["seriesuid"] in dataset.cases:
            lines.append(",".join(row[column] for column in columns))
            classes[float(row["class"]) > 0] += 1
    write_text(dataset.folder / "candidates.csv", "\n".join(lines) + "\n")
    return f"candidates.csv: {classes[True]} nodules and {classes[False]} others, from {source}", seen


# -------------------------------------------------------------------------------------------------------------- folds


def make_splits(subset_of: Mapping[str, int]) -> list[dict[str, list[str]]]:
    """Return a fold for each existing subset, in order; none for a single subset, which leaves no training cases."""
    subsets = sorted(set(subset_of.values()))
    return [
        {part: sorted(n for n, s in subset_of.items() if (s == subset) == (part == "val")) for part in ("train", "val")}
        for subset in (subsets if len(subsets) > 1 else ())
    ]


def write_splits(dataset: convert.Dataset) -> list[str]:
    """Write the folds to nnU-Net's places, but never over another file. Return sentences about them."""
    subset_of = {name: entry["subset"] for name, entry in dataset.cases.items()}
    subsets = sorted(set(subset_of.values()))
    splits, own = make_splits(subset_of), dataset.folder / convert.SPLITS
    if not splits:
        own.unlink(missing_ok=True)
        return [f"only subset{s} is there, so there are no folds: nnU-Net will draw five of its own" for s in subsets]
    text = json.dumps(splits, indent=1)
    write_text(own, text)
    said = [f"{own}: {len(splits)} folds, which nnU-Net's planning takes over"]
    if len(splits) < SUBSETS:
        said.append(
            f"{len(splits)} of {SUBSETS} subsets are there; "
            f"{', '.join(f'fold {fold} validates on subset{subset}' for fold, subset in enumerate(subsets))}"
        )
    if preprocessed := os.environ.get("nnUNet_preprocessed"):
        used = Path(preprocessed) / dataset.folder.name / convert.SPLITS
        if not used.exists():
            used.parent.mkdir(parents=True, exist_ok=True)
            write_text(used, text)
        elif _folds(used) != splits:
            said.append(
                f"{used} has other folds and stays as it is; nnU-Net's planning refuses two that differ: to use these, "
                f"copy {own} over it, otherwise delete {own}"
            )
    return said


def _folds(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None


def check_splits(dataset: convert.Dataset) -> list[SetAside]:
    """Return errors in the written folds: every case must validate once and train in all other folds."""
    path = dataset.folder / convert.SPLITS
    if not path.exists():
        return []
    folds = _folds(path)
    validated = Counter(name for fold in folds for name in fold["val"])
    whole = all(sorted([*fold["train"], *fold["val"]]) == sorted(dataset.cases) for fold in folds)
    if whole and validated == Counter(list(dataset.cases)):
        return []
    return [SetAside(str(path), "does not name every case that is there: run the same command again")]


# --------------------------------------------------------------------------------------------------------- the command


def missing_scans(known: Iterable[str], luna: Luna, dataset: convert.Dataset) -> tuple[list[SetAside], str]:
    """Return missing scans that the tables name: they are bad if all subsets exist, else worth a sentence."""
    missing = sorted(set(known) - luna.scans.keys() - dataset.cases.keys())
    there = {subset for _, subset in luna.scans.values()} | {entry["subset"] for entry in dataset.cases.values()}
    if len(there) == SUBSETS:
        return [SetAside(f"{uid}.mhd", "is in none of the subsets: download it again") for uid in missing], ""
    return [], f"{len(missing)} scans that the tables name are not there, nor are all subsets" if missing else ""


def main() -> None:
    """Find, convert, write folds and candidates, check, report."""
    args = options.convert_luna16().parse_args()
    folder = convert.dataset_folder(args, "LUNA16")
    luna = find(args.i)
    if luna.annotations is None:
        raise UserError(f"{args.i} has no annotations.csv; download it from {REFERENCE}/Download: it has the nodules")
    nodules = read_annotations(luna.annotations)
    settings = {"annotations.csv": hashlib.sha1(luna.annotations.read_bytes()).hexdigest()}
    cases = [LunaCase(uid, "Tr", True, path, n, nodules.get(uid, ())) for uid, (path, n) in luna.scans.items()]
    print(f"{len(cases)} scans in {args.i}, nodules from {luna.annotations}; into {folder}", flush=True)
    with convert.opened(folder, settings) as dataset:
        bad = [*luna.bad, *convert.convert(cases, dataset, args.np)]
        convert.write_dataset_json(dataset, LABELS, REFERENCE)
        said, known = write_splits(dataset), set(nodules)
        if luna.candidates:
            sentence, seen = write_candidates(luna.candidates, dataset)
            said.append(sentence)
            known |= seen
        else:
            bad.append(SetAside(str(args.i), "has no candidates_V2.csv, which only classification needs"))
        missing, sentence = missing_scans(known, luna, dataset)
        said += [sentence] if sentence else []
        counts = [entry["nodules"] for entry in dataset.cases.values()]
        said.append(f"{sum(counts)} nodules in {np.count_nonzero(counts)} of {len(counts)} scans")
        if counts and not any(counts):
            bad.append(SetAside(str(luna.annotations), "lists no nodule for any of these scans, and nnU-Net needs one"))
        convert.finish(dataset, [*bad, *missing, *convert.check(dataset), *check_splits(dataset)], said)


if __name__ == "__main__":
    console(main)
