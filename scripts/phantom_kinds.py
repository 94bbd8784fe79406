"""The anatomy of `phantom.py`'s phantoms: the parts of each kind, from outside to inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Part:
    """A part of the anatomy, painted over the parts before it.

    Attributes:
        means: intensity in every channel.
        centre, radii: in half fields of view, axes X Y Z, for ellipsoids.
        label: written into the segmentation; None keeps the label below (an unlabelled vessel).
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
    jitter: float = 0.08  # shift of the centre, in the centre's own units
    tilt: float = 20.0  # degrees, at most
    rough: float = 0.12
    texture: float = 0.04
    size_mm: float = 1.5


@dataclass(frozen=True)
class Kind:
    """The common properties of a family of cases."""

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
            # The same brightness as the organ: brightness alone does not find the organ.
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
