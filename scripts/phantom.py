"""Write phantoms as raw nnU-Net datasets: random anatomy with realistic structure for segmentation networks.

    python scripts/phantom.py -o $nnUNet_raw -d 901 -kind organ -cases 24 -test 8 -unlabelled 40
    python scripts/phantom.py -o $nnUNet_raw -d 902 -kind brats
    python scripts/phantom.py -o $nnUNet_raw -d 903 -kind lits -size 512 512 600 -cases 2

A case is a list of parts (deformed ellipsoids, tubes, patches), each a level-set on a coarse grid. Parts are painted
over one another slice by slice at full resolution, so that only the case's own int16 voxels need memory. Everything is
a function of (seed, group, number of the case): a dataset can be made again, in parallel, or with more cases.

Arrays are (Z, Y, X) as in SimpleITK, world coordinates are LPS, sizes on the command line are X Y Z.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from phantom_kinds import KINDS, Kind, Vector
from scipy.ndimage import gaussian_filter

Field = NDArray[np.float32]

COARSE_POINTS = 80  # at most, for each axis: shapes are smooth; only edges, texture and noise need full resolution


def smooth_noise(shape: tuple[int, ...], sigma: NDArray[np.float64], rng: np.random.Generator) -> Field:
    """Draw a random field of mean 0 and standard deviation 1, correlated over `sigma` grid points on each axis."""
    field = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    normalised: Field = (field - field.mean()) / max(float(field.std()), 1e-6)
    return normalised


def linear_interpolation(coarse: int, fine: int) -> Field:
    """Return the matrix (fine, coarse) that interpolates linearly between grids with common end points."""
    position = np.linspace(0, coarse - 1, fine) if fine > 1 else np.array([(coarse - 1) / 2])
    matrix: Field = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(coarse)[None])).astype(np.float32)
    return matrix


@dataclass(frozen=True)
class Layer:
    """A part of a case: its position and appearance, as fields on the coarse grid."""

    level: Field  # mm, positive inside
    means: NDArray[np.float64]  # (C,)
    texture: Field
    label: int | None


class Grid:
    """The coarse grid of a case: mm coordinates relative to the centre, axes Z Y X."""

    def __init__(self, size: tuple[int, int, int], spacing: Vector) -> None:
        """Take the size in voxels and the spacing in mm, axes X Y Z."""
        self.fine = size[::-1]
        self.shape = tuple(min(n, COARSE_POINTS) for n in self.fine)
        self.half = np.array([n * s / 2 for n, s in zip(self.fine, spacing[::-1], strict=True)])  # mm
        self.step = 2 * self.half / np.array(self.shape)  # mm between coarse points
        axes = [np.linspace(-h, h, n) if n > 1 else np.zeros(1) for h, n in zip(self.half, self.shape, strict=True)]
        self.mm = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)
        self.upsample = [linear_interpolation(n, f) for n, f in zip(self.shape, self.fine, strict=True)]

    def noise(self, sigma_mm: float, rng: np.random.Generator) -> Field:
        return smooth_noise(self.shape, sigma_mm / self.step, rng)

    def slices(self, field: Field) -> Iterator[Field]:
        """Yield the field's slices (Y, X) at full resolution."""
        along_z, along_y, along_x = self.upsample
        for weights in along_z:
            yield along_y @ np.tensordot(weights, field, 1) @ along_x.T


def random_rotation(rng: np.random.Generator, degrees: float) -> NDArray[np.float64]:
    """Draw a rotation about a random axis by up to `degrees` (Rodrigues' formula)."""
    axis = rng.standard_normal(3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    rotation: NDArray[np.float64] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return rotation


def make_layers(kind: Kind, grid: Grid, rng: np.random.Generator) -> dict[str, Layer]:
    """Draw a case: every part's place, shape, contrast and texture."""
    layers: dict[str, Layer] = {}
    ellipsoids = {"": (np.zeros(3), grid.half)}  # centre and radii in mm, Z Y X; "" is the field of view
    level: NDArray[np.floating]  # mm
    for name, part in kind.parts.items():
        if part.form == "tubes":  # curves on which two random fields are both 0
            wave = 8 * part.size_mm
            level = part.size_mm - wave * np.hypot(grid.noise(wave, rng), grid.noise(wave, rng))
        elif part.form == "patches":
            level = part.size_mm * (grid.noise(part.size_mm / 2, rng) - 0.4)
        else:
            origin, scale = ellipsoids[(part.inside if part.within else None) or ""]
            centre = origin + scale * (np.array(part.centre[::-1]) + rng.uniform(-part.jitter, part.jitter, 3))
            radii = scale * np.array(part.radii[::-1]) * rng.uniform(0.85, 1.15, 3)
            ellipsoids[name] = (centre, radii)
            offset = grid.mm - centre.astype(np.float32)[:, None, None, None]
            turned = np.tensordot(random_rotation(rng, part.tilt), offset, 1) / radii[:, None, None, None]
            size = float(radii.min())
            level = size * (1 - np.sqrt((turned**2).sum(0)) + part.rough * grid.noise(0.4 * size, rng))
        if part.inside:
            rim = float(grid.step.max()) if part.within else 0.0  # keep about a voxel of the organ around a lesion
            level = np.minimum(level, layers[part.inside].level - rim)
        means = np.array(part.means) * rng.uniform(0.94, 1.06, len(part.means))
        texture = part.texture * grid.noise(float(grid.half.max()) / 10, rng)
        layers[name] = Layer(level.astype(np.float32), means, texture, part.label)
    return layers


def paint(
    kind: Kind, grid: Grid, layers: dict[str, Layer], rng: np.random.Generator
) -> tuple[list[NDArray[np.int16]], NDArray[np.uint8]]:
    """Render a case slice by slice: an image (Z, Y, X) for each channel, and labels (Z, Y, X)."""
    images = [np.empty(grid.fine, np.int16) for _ in kind.channels]
    labels = np.zeros(grid.fine, np.uint8)
    gains = np.exp(rng.uniform(-kind.gain, kind.gain, len(images)))
    noise = kind.noise * rng.uniform(0.7, 1.3)
    edge = float(2 * grid.half[1] / grid.fine[1])  # mm: a soft edge of about one voxel is partial volume
    bias = grid.slices(np.exp(kind.bias * grid.noise(0.6 * float(grid.half.max()), rng)))
    levels = [grid.slices(layer.level) for layer in layers.values()]
    textures = [grid.slices(layer.texture) for layer in layers.values()]
    for z in range(grid.fine[0]):
        shading = next(bias)
        values = [np.full(grid.fine[1:], kind.air, np.float32) for _ in images]
        for (name, layer), level_slices, texture_slices in zip(layers.items(), levels, textures, strict=True):
            level, texture = next(level_slices), next(texture_slices)
            cover = np.clip(level / edge + 0.5, 0, 1)
            if layer.label is not None:
                labels[z][level > 0] = layer.label
            if name == kind.stripped:
                mask = level > 0
            for value, mean in zip(values, layer.means, strict=True):
                value += cover * (mean + abs(mean) * texture - value)
        for image, value, gain in zip(images, values, gains, strict=True):
            grain = gaussian_filter(rng.standard_normal(value.shape, dtype=np.float32), 0.6) * (noise / 0.5)
            value = gain * (shading * gaussian_filter(value, 0.5) + grain)  # 0.5: the filter reduces it
            image[z] = np.clip(value, -1024 if kind.air < 0 else 0, 3071).round()
            if kind.stripped:
                image[z][~mask] = int(kind.air)
    return images, labels


def make_case(
    kind: Kind, seed: tuple[int, ...], vary_size: bool = True
) -> tuple[list[NDArray[np.int16]], NDArray[np.uint8], Vector]:
    """Make a case as arrays: an image (Z, Y, X) for each channel, labels (Z, Y, X), spacing in mm (X, Y, Z)."""
    rng = np.random.default_rng(seed)
    spacing = tuple(float(s) for s in np.round(np.array(kind.spacing) * rng.uniform(0.95, 1.05, 3), 3))
    vary = rng.uniform(0.92, 1.08, 3) if vary_size else np.ones(3)
    size = tuple(max(1, round(n * v)) for n, v in zip(kind.size, vary, strict=True))
    grid = Grid((size[0], size[1], size[2]), (spacing[0], spacing[1], spacing[2]))
    images, labels = paint(kind, grid, make_layers(kind, grid, rng), rng)
    return images, labels, (spacing[0], spacing[1], spacing[2])


def write_image(path: Path, array: NDArray[np.int16] | NDArray[np.uint8], spacing: Vector) -> None:
    """Write (Z, Y, X) voxels with the middle of the volume near the scanner's isocentre."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin([-n * s / 2 for n, s in zip(array.shape[::-1], spacing, strict=True)])
    sitk.WriteImage(image, str(path), useCompression=True, compressionLevel=1)


def write_case(job: tuple[str, int, int, bool], folder: Path, kind: Kind, seed: int, vary_size: bool) -> None:
    """Write case `number` of a group ("Tr", "Ts", "Un"), with labels if requested."""
    group, stream, number, labelled = job
    images, labels, spacing = make_case(kind, (seed, stream, number), vary_size)
    name = f"{'scan' if group == 'Un' else 'case'}_{group.lower()}_{number:03d}"
    for channel, image in enumerate(images):
        write_image(folder / f"images{group}" / f"{name}_{channel:04d}.nii.gz", image, spacing)
    if labelled:
        write_image(folder / f"labels{group}" / f"{name}.nii.gz", labels, spacing)


def write_dataset(
    raw: str | Path,
    dataset: int,
    kind_name: str = "organ",
    cases: int = 24,
    test: int = 0,
    unlabelled: int = 0,
    size: tuple[int, int, int] | None = None,
    spacing: Vector | None = None,
    seed: int = 0,
    processes: int = 2,
) -> Path:
    """Write a raw nnU-Net data set and return its folder.

    Args:
        raw: nnU-Net's folder nnUNet_raw.
        dataset: ID of the dataset, 1 to 999.
        kind_name: a key of KINDS.
        cases: labelled cases, in imagesTr and labelsTr.
        test: further labelled cases, in imagesTs and labelsTs.
        unlabelled: further cases without labels, in imagesUn, which nnU-Net ignores.
        size: voxels X Y Z, the same for every case; by default the kind's own, varied by 8 %.
        spacing: mm X Y Z, by default the kind's own field of view divided by the size; always varied by 5 %.
        seed: another seed gives other anatomy.
        processes: cases written at a time.
    """
    kind = KINDS[kind_name]
    if size:
        same_view = tuple(s * n / m for s, n, m in zip(kind.spacing, kind.size, size, strict=True) if m)
        one_slice = kind.spacing if 1 in size else (same_view[0], same_view[1], same_view[2])
        kind = replace(kind, size=size, spacing=spacing or one_slice)
    elif spacing:
        kind = replace(kind, spacing=spacing)
    folder = Path(raw) / f"Dataset{dataset:03d}_Phantom{kind_name.capitalize()}"
    # A group's index seeds its random numbers: more cases in one group do not change the others.
    groups = [("Tr", cases, True), ("Ts", test, True), ("Un", unlabelled, False)]
    jobs = [(g, stream, n, labelled) for stream, (g, total, labelled) in enumerate(groups) for n in range(total)]
    for group, _, _, labelled in jobs:
        (folder / f"images{group}").mkdir(parents=True, exist_ok=True)
        if labelled:
            (folder / f"labels{group}").mkdir(exist_ok=True)
    description: dict[str, object] = {
        "channel_names": {str(i): name for i, name in enumerate(kind.channels)},
        "labels": dict(kind.labels),
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    if kind.regions_class_order:
        description["regions_class_order"] = list(kind.regions_class_order)
    (folder / "dataset.json").write_text(json.dumps(description, indent=2) + "\n")
    write = partial(write_case, folder=folder, kind=kind, seed=seed, vary_size=size is None)
    if processes > 1:
        with ProcessPoolExecutor(processes) as pool:
            list(pool.map(write, jobs))
    else:
        for job in jobs:
            write(job)
    return folder


def main() -> None:
    """Write a data set from the command line."""
    parser = argparse.ArgumentParser(
        description="Write random anatomical phantoms as a raw nnU-Net dataset.",
        epilog='example:\n  python scripts/phantom.py -o "$nnUNet_raw" -d 901 -cases 24 -test 8 -unlabelled 40',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", required=True, metavar="FOLDER", help="nnUNet_raw")
    parser.add_argument("-d", type=int, default=901, metavar="ID", help="dataset id (default: 901)")
    parser.add_argument("-kind", choices=sorted(KINDS), default="organ")
    parser.add_argument("-cases", type=int, default=24, help="labelled training cases (default: 24)")
    parser.add_argument("-test", type=int, default=0, help="labelled test cases, in imagesTs and labelsTs")
    parser.add_argument("-unlabelled", type=int, default=0, help="scans without labels, in imagesUn")
    parser.add_argument("-size", type=int, nargs=3, metavar=("X", "Y", "Z"), help="voxels, the same for every case")
    parser.add_argument("-spacing", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm")
    parser.add_argument("-seed", type=int, default=0)
    parser.add_argument("-np", type=int, default=2, help="processes (default: 2)")
    a = parser.parse_args()
    size = None if a.size is None else (a.size[0], a.size[1], a.size[2])
    spacing = None if a.spacing is None else (a.spacing[0], a.spacing[1], a.spacing[2])
    folder = write_dataset(a.o, a.d, a.kind, a.cases, a.test, a.unlabelled, size, spacing, a.seed, a.np)
    print(folder)


if __name__ == "__main__":
    main()
