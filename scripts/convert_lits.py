"""Convert LiTS (the liver tumour segmentation challenge) to a raw nnU-Net dataset.

    python scripts/convert_lits.py -i LITS_FOLDER -d 17
    nnUNetv2_plan_and_preprocess -d 17 --verify_dataset_integrity

LITS_FOLDER holds volume-N.nii and segmentation-N.nii (or .nii.gz) in any folders below it. A volume belongs to the test
set if its own name (test-volume-N.nii) or folder says "test". Any other volume needs its segmentation. The script
writes into $nnUNet_raw/Dataset017_LiTS:

- imagesTr, labelsTr: LiTS_000 for volume-0, and so on, in HU. -labels liver: 1 is the liver with its tumours, as in the
  paper; -labels liver_tumour: 1 liver, 2 tumour
- imagesTs (and labelsTs, for volumes with a segmentation): LiTS_test_000 for the test set's volume 0
- conversion.json: each case's origin and oddities; bad_cases.txt: the files that could not be used

Volume and segmentation belong together voxel by voxel. If their headers place the voxels differently, as in some cases
of LiTS, the volume's header is used, and the script says so.

-crop_to_liver keeps the slices of the liver and 30 slices on each side of each labelled volume: the papers' protocol.
The segmentation gives the place, but no new patient has one. Scores on such volumes are therefore too good, and compare
only with the papers' scores. Choose another -d for them. Test volumes without a segmentation stay whole.

Stopped, or more files arrived? Run the same command to continue. Exit status 1: something was bad, and is named.
"""

from __future__ import annotations

import options  # isort: skip  # first: it answers --help without torch

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convert
import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from pcrl_nnunet.errors import UserError, console
from pcrl_nnunet.ingest.checks import short_reason
from pcrl_nnunet.ingest.scans import SetAside, Unusable

LABELS = {"liver": {"background": 0, "liver": 1}, "liver_tumour": {"background": 0, "liver": 1, "tumour": 2}}
REFERENCE = "https://competitions.codalab.org/competitions/17094"
MARGIN = 30  # slices around the liver in the papers' protocol
NAME = re.compile(r"(?:test[-_])?(volume|segmentation)-(\d+)\.nii(?:\.gz)?", re.I)
TEST = re.compile(r"(?<![a-z])test", re.I)  # not in "latest"


@dataclass(frozen=True)
class LitsCase(convert.Case):
    """A volume of LiTS with its segmentation, if it has one."""

    segmentation: Path | None
    merge: bool  # tumour into liver
    crop: bool

    def load(self) -> convert.Loaded:
        image = convert.int16_if_whole(convert.read(self.image))
        if self.segmentation is None:
            return convert.Loaded(image, None, [])
        try:
            truth = convert.read(self.segmentation)
            labels = read_labels(truth)
        except Exception as error:
            raise Unusable(f"its segmentation, {self.segmentation}: {short_reason(error)}") from error
        if truth.GetSize() != image.GetSize():
            raise Unusable(f"its size is {image.GetSize()}, that of {self.segmentation} is {truth.GetSize()}")
        apart = convert.differences(image, truth)
        notes = [f"its segmentation has another {' and '.join(apart)}; the volume's was taken"] if apart else []
        if self.merge:
            np.minimum(labels, 1, out=labels)
        label = convert.with_geometry(labels, image)
        if self.crop:
            index, size = liver_box(labels, image)
            image, label = (sitk.RegionOfInterest(volume, size, index) for volume in (image, label))
        return convert.Loaded(image, label, notes)

    def entry(self) -> dict[str, Any]:
        return {**super().entry(), "segmentation": str(self.segmentation.absolute()) if self.segmentation else None}


def read_labels(truth: sitk.Image) -> NDArray[np.uint8]:
    """Return the labels (Z, Y, X) from any number type. Raise `Unusable` for labels other than 0, 1, 2."""
    values = sitk.GetArrayViewFromImage(truth)
    labels = np.empty(values.shape, np.uint8)
    for to, plane in zip(labels, values, strict=True):
        odd = plane[(plane != 0) & (plane != 1) & (plane != 2)]
        if odd.size:
            found = ", ".join(f"{value:g}" for value in np.unique(odd)[:5])
            raise Unusable(f"has the label {found}; expected 0 (background), 1 (liver) and 2 (tumour)")
        to[...] = plane
    return labels


def liver_box(labels: NDArray[np.uint8], image: sitk.Image) -> tuple[list[int], list[int]]:
    """Return the slices of the liver and 30 more on each side, along the axis closest to the patient's long axis.

    Args:
        labels: (Z, Y, X).
        image: image with the same grid, which gives the direction.

    Returns:
        First index and size in voxels, X Y Z as SimpleITK has them.
    """
    axis = int(np.abs(np.reshape(image.GetDirection(), (3, 3))[2]).argmax())  # in X Y Z; world axis 2 is head to feet
    others = tuple(a for a in range(3) if a != 2 - axis)
    slices = np.flatnonzero(labels.any(others))
    if not len(slices):
        raise Unusable("its segmentation has no liver to crop to")
    index, size = [0, 0, 0], list(image.GetSize())
    index[axis] = max(0, int(slices[0]) - MARGIN)
    size[axis] = min(size[axis], int(slices[-1]) + MARGIN + 1) - index[axis]
    return index, size


def find(folder: Path, labels: str, crop: bool) -> tuple[list[LitsCase], list[SetAside]]:
    """Pair volumes and segmentations by number, the test set separately. A file without a partner is bad."""
    found: dict[tuple[bool, int], dict[str, list[Path]]] = defaultdict(lambda: {"volume": [], "segmentation": []})
    for path in convert.files_below(folder):
        if match := NAME.fullmatch(path.name):
            test = any(TEST.search(part) for part in path.relative_to(folder).parts)
            found[test, int(match[2])][match[1].lower()].append(path)
    if not found:
        raise UserError(f"{folder} has no volume-N.nii, nor has a folder below it; give the folder that has them")
    cases, bad = [], []
    for (test, number), files in sorted(found.items()):
        volumes, truths = files["volume"], files["segmentation"]
        for same in (volumes, truths):
            if len(same) > 1:
                bad.append(SetAside(str(same[0]), f"is there more than once, also as {same[1]}: remove all but one"))
        if len(volumes) > 1 or len(truths) > 1:
            continue
        if not volumes:
            bad.append(SetAside(str(truths[0]), f"its volume, volume-{number}.nii, is missing"))
        elif not truths and not test:
            bad.append(
                SetAside(
                    str(volumes[0]),
                    f"its segmentation, segmentation-{number}.nii, is missing, and neither its name nor a folder's "
                    "says that it is of the test set",
                )
            )
        else:
            name = f"LiTS_{'test_' * test}{number:03d}"
            truth = truths[0] if truths else None
            cases.append(
                LitsCase(name, "Ts" if test else "Tr", bool(truths), volumes[0], truth, labels == "liver", crop)
            )
    return cases, bad


def main() -> None:
    """Find, convert, check, report."""
    args = options.convert_lits().parse_args()
    folder = convert.dataset_folder(args, "LiTS")
    cases, bad = find(args.i, args.labels, args.crop_to_liver)
    print(f"{len(cases)} volumes in {args.i}; into {folder}", flush=True)
    with convert.opened(folder, {"labels": args.labels, "crop_to_liver": args.crop_to_liver}) as dataset:
        bad += convert.convert(cases, dataset, args.np)
        convert.write_dataset_json(dataset, LABELS[args.labels], REFERENCE)
        said = []
        if args.crop_to_liver:
            said.append(
                f"cropped to the liver and {MARGIN} slices to each side, by the segmentations: scores on this dataset "
                "flatter, since nobody has the segmentation of a new patient"
            )
        convert.finish(dataset, [*bad, *convert.check(dataset)], said)


if __name__ == "__main__":
    console(main)
