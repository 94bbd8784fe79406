"""Write phantoms as raw nnU-Net datasets: random anatomy with the structure that segmentation networks meet.

    python scripts/phantom.py -o $nnUNet_raw -d 901 -kind organ -cases 24 -test 8 -unlabelled 40
    python scripts/phantom.py -o $nnUNet_raw -d 902 -kind brats
    python scripts/phantom.py -o $nnUNet_raw -d 903 -kind lits -size 512 512 600 -cases 2

A case is a list of parts (deformed ellipsoids, tubes, patches), each a level-set on a coarse grid, painted over one
another slice by slice at full resolution: memory is that of the case's own int16 voxels. Everything is a function of
(seed, group, number of the case), so a data set can be made again, in parallel, or with more cases.

Arrays are (Z, Y, X) as SimpleITK has them, world coordinates LPS; sizes on the command line are X Y Z.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Field = NDArray[np.float32]
Vector = tuple[float, float, float]

COARSE_POINTS = 80  # an axis, at most: shapes are smooth, only edges, texture and noise need the full resolution


@dataclass(frozen=True)
class Part:
    """One part of the anatomy, painted over the parts before it.

    Attributes:
        means: intensity in every channel.
        centre, radii: in half fields of view, axes X Y Z, for ellipsoids.
        label: written into the segmentation; None leaves the label of what lies below (an unlabelled vessel).
        inside: the part that bounds this one.
        form: `tubes` and `patches` are level-sets of random fields and fill the whole volume or `inside`.
        within: centre and radii are relative to `inside` instead of the field of view.
        texture: standard deviation of the smooth texture, relative to the mean's distance from 0.
        size_mm: radius of tubes; wave length of patches.
    """

    means: tuple[float, ...]
    centre: Vector = (0.0, 0.0, 0.0)
    radii: Vector = (1.0, 1.0, 1.0)
    label: int | None = 0
    inside: str | None = None
    form: Literal["ellipsoid", "tubes", "patches"] = "ellipsoid"
    within: bool = False
    jitter: float = 0.08  # of the centre, in the centre's own units
    tilt: float = 20.0  # degrees, at most
    rough: float = 0.12
    texture: float = 0.04
    size_mm: float = 1.5


@dataclass(frozen=True)
class Kind:
    """What a family of cases has in common."""

    channels: tuple[str, ...]
    labels: Mapping[str, int | list[int]]
    parts: Mapping[str, Part]
    size: tuple[int, int, int]  # voxels, X Y Z
    spacing: Vector  # mm
    noise: float  # standard deviation, in intensity units
    air: float = 0.0
    bias: float = 0.0  # standard deviation of the log of the bias field
    gain: float = 0.0  # half width of the log of a channel's random gain: MR has no units
    stripped: str | None = None  # everything outside this part is exactly `air`, as after skull stripping
    regions_class_order: tuple[int, ...] = ()


KINDS: dict[str, Kind] = {
    "organ": Kind(
        channels=("MRI",),
        labels={"background": 0, "organ": 1, "lesion": 2},
        size=(40, 44, 36),
        spacing=(1.0, 1.0, 1.2),
        noise=22.0,
        bias=0.12,
        gain=0.3,
        air=10.0,
        parts={
            "body": Part((260.0,), radii=(1.25, 1.2, 1.3), texture=0.12),
            "fat": Part((430.0,), inside="body", form="patches", size_mm=7.0),
            "vessels": Part((620.0,), inside="body", form="tubes", size_mm=1.1),
            # As bright as the organ: brightness alone does not find it.
            "neighbour": Part((400.0,), centre=(-0.6, -0.4, 0.1), radii=(0.26, 0.34, 0.5), jitter=0.15),
            "bone": Part((90.0,), centre=(-0.1, 0.8, 0.0), radii=(0.28, 0.24, 1.2), texture=0.2),
            "organ": Part(
                (400.0,), centre=(0.25, -0.05, 0.0), radii=(0.5, 0.42, 0.55), label=1, jitter=0.12, rough=0.2
            ),
            "organ vessels": Part((500.0,), inside="organ", form="tubes", label=None, size_mm=0.8),
            "lesion": Part((310.0,), radii=(0.4, 0.4, 0.4), label=2, inside="organ", within=True, jitter=0.4),
        },
    ),
    # Large parts, sharp contrasts and little noise: a small network learns it within minutes on a CPU.
    "simple": Kind(
        channels=("MRI",),
        labels={"background": 0, "organ": 1, "lesion": 2},
        size=(32, 36, 28),
        spacing=(1.25, 1.2, 1.5),
        noise=6.0,
        bias=0.05,
        gain=0.15,
        air=10.0,
        parts={
            "body": Part((260.0,), radii=(0.88, 0.86, 0.92), texture=0.06),
            "neighbour": Part((430.0,), centre=(-0.45, -0.3, 0.1), radii=(0.26, 0.34, 0.5), jitter=0.1),
            "bone": Part((60.0,), centre=(-0.1, 0.58, 0.0), radii=(0.24, 0.2, 0.8)),
            "organ": Part((430.0,), centre=(0.25, -0.05, 0.0), radii=(0.54, 0.54, 0.6), label=1),
            "lesion": Part((750.0,), radii=(0.66, 0.66, 0.66), label=2, inside="organ", within=True, jitter=0.25),
        },
    ),
    "brats": Kind(
        channels=("T1", "T1ce", "T2", "FLAIR"),
        labels={"background": 0, "whole_tumor": [1, 2, 3], "tumor_core": [2, 3], "enhancing_tumor": [3]},
        regions_class_order=(1, 2, 3),
        size=(72, 88, 64),
        spacing=(2.0, 2.0, 2.0),
        noise=14.0,
        bias=0.08,
        gain=0.25,
        stripped="brain",
        parts={
            "brain": Part((380.0, 400.0, 420.0, 400.0), radii=(0.85, 0.88, 0.85), rough=0.05, tilt=8, jitter=0.03),
            "white matter": Part((480.0, 500.0, 330.0, 340.0), inside="brain", form="patches", size_mm=14.0),
            "vessels": Part((350.0, 800.0, 200.0, 260.0), inside="brain", form="tubes", size_mm=1.4),
            "ventricle r": Part(
                (160.0, 170.0, 850.0, 120.0), centre=(-0.13, 0.0, 0.05), radii=(0.1, 0.4, 0.25), jitter=0.03
            ),
            "ventricle l": Part(
                (160.0, 170.0, 850.0, 120.0), centre=(0.13, 0.0, 0.05), radii=(0.1, 0.4, 0.25), jitter=0.03
            ),
            "oedema": Part(
                (330.0, 350.0, 680.0, 720.0), radii=(0.4, 0.36, 0.42), label=1, inside="brain", within=True, jitter=0.4
            ),
            "enhancing": Part(
                (360.0, 780.0, 600.0, 560.0), radii=(0.6, 0.6, 0.6), label=3, inside="oedema", within=True, rough=0.25
            ),
            "necrosis": Part(
                (230.0, 240.0, 760.0, 480.0), radii=(0.65, 0.65, 0.65), label=2, inside="enhancing", within=True
            ),
        },
    ),
    "lits": Kind(
        channels=("CT",),
        labels={"background": 0, "liver": 1, "tumour": 2},
        size=(128, 128, 150),
        spacing=(2.8, 2.8, 4.0),
        noise=14.0,
        air=-1000.0,
        parts={
            "fat": Part((-100.0,), radii=(0.95, 0.7, 3.5), rough=0.04, texture=0.05, tilt=3, jitter=0.03),
            "muscle": Part((50.0,), radii=(0.85, 0.6, 3.5), rough=0.04, tilt=3, jitter=0.03, inside="fat"),
            "gut": Part((-20.0,), centre=(0.1, -0.1, -0.8), radii=(0.65, 0.35, 0.5), rough=0.2, inside="muscle"),
            "bowel": Part((30.0,), inside="gut", form="patches", label=None, size_mm=30.0),
            "lung r": Part(
                (-850.0,), centre=(-0.42, 0.0, 0.95), radii=(0.38, 0.48, 0.6), texture=0.03, tilt=5, inside="muscle"
            ),
            "lung l": Part(
                (-850.0,), centre=(0.42, 0.0, 0.95), radii=(0.38, 0.48, 0.6), texture=0.03, tilt=5, inside="muscle"
            ),
            "spine": Part((280.0,), centre=(0.0, 0.38, 0.0), radii=(0.11, 0.11, 3.5), texture=0.2, tilt=2, jitter=0.02),
            "aorta": Part((170.0,), centre=(0.06, 0.2, 0.0), radii=(0.05, 0.05, 3.5), tilt=2, jitter=0.02),
            "spleen": Part((112.0,), centre=(0.58, 0.15, 0.25), radii=(0.17, 0.25, 0.22), inside="muscle"),
            "kidney r": Part((160.0,), centre=(-0.35, 0.3, -0.3), radii=(0.13, 0.13, 0.25)),
            "kidney l": Part((160.0,), centre=(0.38, 0.3, -0.25), radii=(0.13, 0.13, 0.25)),
            "liver": Part(
                (105.0,), centre=(-0.32, -0.05, 0.25), radii=(0.5, 0.46, 0.4), label=1, rough=0.15, inside="muscle"
            ),
            "portal vein": Part((165.0,), inside="liver", form="tubes", label=None, size_mm=4.0),
            "tumour": Part(
                (60.0,), radii=(0.3, 0.3, 0.3), label=2, inside="liver", within=True, jitter=0.45, rough=0.2
            ),
        },
    ),
}


def smooth_noise(shape: tuple[int, ...], sigma: NDArray[np.float64], rng: np.random.Generator) -> Field:
    """A random field of mean 0 and standard deviation 1, correlated over `sigma` grid points an axis."""
    field = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    normalised: Field = (field - field.mean()) / max(float(field.std()), 1e-6)
    return normalised


def linear_interpolation(coarse: int, fine: int) -> Field:
    """The (fine, coarse) matrix that interpolates linearly between grids with common end points."""
    position = np.linspace(0, coarse - 1, fine) if fine > 1 else np.array([(coarse - 1) / 2])
    matrix: Field = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(coarse)[None])).astype(np.float32)
    return matrix


@dataclass(frozen=True)
class Layer:
    """A part of one case: where it is and what it looks like there. Fields are on the coarse grid."""

    level: Field  # mm, positive inside
    means: NDArray[np.float64]  # (C,)
    texture: Field
    label: int | None


class Grid:
    """The coarse grid of one case: mm coordinates relative to the centre, axes Z Y X."""

    def __init__(self, size: tuple[int, int, int], spacing: Vector) -> None:
        """Sizes in voxels and spacing in mm, axes X Y Z."""
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
        """The field's slices at full resolution, (Y, X), one after the other."""
        along_z, along_y, along_x = self.upsample
        for weights in along_z:
            yield along_y @ np.tensordot(weights, field, 1) @ along_x.T


def random_rotation(rng: np.random.Generator, degrees: float) -> NDArray[np.float64]:
    """A rotation about a random axis by up to `degrees` (Rodrigues' formula)."""
    axis = rng.standard_normal(3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.deg2rad(rng.uniform(-degrees, degrees))
    rotation: NDArray[np.float64] = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return rotation


def make_layers(kind: Kind, grid: Grid, rng: np.random.Generator) -> dict[str, Layer]:
    """Draw one case: every part's place, shape, contrast and texture."""
    layers: dict[str, Layer] = {}
    ellipsoids = {"": (np.zeros(3), grid.half)}  # centre and radii in mm, Z Y X; "" is the field of view
    level: NDArray[np.floating]  # mm
    for name, part in kind.parts.items():
        if part.form == "tubes":  # curves where two random fields are both 0
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
            rim = float(grid.step.max()) if part.within else 0.0  # about a voxel of the organ stays around a lesion
            level = np.minimum(level, layers[part.inside].level - rim)
        means = np.array(part.means) * rng.uniform(0.94, 1.06, len(part.means))
        texture = part.texture * grid.noise(float(grid.half.max()) / 10, rng)
        layers[name] = Layer(level.astype(np.float32), means, texture, part.label)
    return layers


def paint(
    kind: Kind, grid: Grid, layers: dict[str, Layer], rng: np.random.Generator
) -> tuple[list[NDArray[np.int16]], NDArray[np.uint8]]:
    """Render a case slice by slice: images, one (Z, Y, X) a channel, and labels (Z, Y, X)."""
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
            value = gain * (shading * gaussian_filter(value, 0.5) + grain)  # 0.5: what the filter leaves of it
            image[z] = np.clip(value, -1024 if kind.air < 0 else 0, 3071).round()
            if kind.stripped:
                image[z][~mask] = int(kind.air)
    return images, labels


def make_case(
    kind: Kind, seed: tuple[int, ...], vary_size: bool = True
) -> tuple[list[NDArray[np.int16]], NDArray[np.uint8], Vector]:
    """One case as arrays: images (Z, Y, X) a channel, labels (Z, Y, X), spacing in mm (X, Y, Z)."""
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
    """Write case `number` of a group ("Tr", "Ts", "Un"), with labels if asked for."""
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
        raw: the folder nnU-Net calls nnUNet_raw.
        dataset: its id, 1 to 999.
        kind_name: a key of KINDS.
        cases: labelled cases, in imagesTr and labelsTr.
        test: further labelled cases, in imagesTs and labelsTs.
        unlabelled: further cases without labels, in imagesUn, which nnU-Net itself does not look at.
        size: voxels X Y Z, the same for every case; by default the kind's own, varied by 8 %.
        spacing: mm X Y Z, by default the kind's own field of view divided by the size; always varied by 5 %.
        seed: another seed, other anatomy.
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
    # A group's stream of random numbers is its place here: more cases of one leave the others as they are.
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
    parser = argparse.ArgumentParser(description="Write random anatomical phantoms as a raw nnU-Net dataset.")
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
