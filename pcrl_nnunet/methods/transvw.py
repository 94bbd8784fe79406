"""TransVW (Haghighi et al., "Transferable Visual Words", IEEE TMI 2021; as Semantic Genesis: MICCAI 2020): a network
restores corrupted crops, and recognises the places that they come from.

A sample is a crop at one of K places, which are fixed on a reference case. The places count in the cases that look most
like this case, because a place shows the same anatomy there. B: samples, C: image channels, K: places, N: cases,
S: slices of a case (1 in 3D), d: axes of the image, c: channels of a feature, *: space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case, CaseVolume
from pcrl_nnunet.loading.reduced import reduced_image, reduced_slices
from pcrl_nnunet.loading.samples import ArraySpec, Sample
from pcrl_nnunet.losses import known_class_loss, restoration_loss
from pcrl_nnunet.methods.base import Preparation, StepOutput
from pcrl_nnunet.methods.quantities import RESTORATION, RIGHT, Quantity, right_over_chance, variance_within
from pcrl_nnunet.methods.restoration import CropViews, RestorationMethod
from pcrl_nnunet.networks import Autoencoder, encoder_of, gathered, mean_and_maximum
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import number, replaced
from pcrl_nnunet.views.boxes import Box
from pcrl_nnunet.views.configure import MAX_SAMPLES, MIN_BOTTLENECK_VOXELS
from pcrl_nnunet.views.corruption import Strengths, corrupt_once
from pcrl_nnunet.views.crop import Crop, crop_at, draw_crop
from pcrl_nnunet.views.settings import Size, SpatialAugmentation, is_size
from pcrl_nnunet.views.sub_crop import Volume

WHERE = "pcrl.pretrain.transvw"
NEAREST_CASES = {2: 1000, 3: 200}
LARGEST_CROP = 1 / 2  # of the median image
TRIES = 10  # draws of a place that differs from the others
CANDIDATES = 5  # times `nearest_cases`, the largest number of cases that are compared with the reference case
GRID = {2: 64, 3: 32}  # edge of the images that the autoencoder sees, voxels
SLICES = 5  # of a case that a 2D autoencoder sees
AUTOENCODER_BATCH = {2: 16, 3: 4}
AUTOENCODER_LR = 1e-3
UNCHANGED = SpatialAugmentation(p_flip=0.0, rotation_degrees=0.0, scale=0.0)


@dataclass(frozen=True)
class TransVWSettings:
    """Settings of TransVW: crops and places, the search of similar cases, and the corruption.

    Attributes:
        crop_size: size of a crop, voxels. By default the plan's patch, but at most half of the median image, rounded
            down to a multiple of the encoder's total stride, and at least two such strides. Source: ours.
        nearest_cases: number of cases with places: the cases most like the reference case; 1000 in 2D. If there are
            fewer cases, all have places. Source: TransVW.
        places: K, number of places. Source: TransVW's code.
        jitter: largest shift of a crop from its place, as a share of the crop's edge. Source: ours.
        classification_weight: factor of the cross-entropy of the place. Source: TransVW.
        autoencoder_steps: steps of the autoencoder whose features tell which cases look alike. It is trained only if
            there are more cases than `nearest_cases`. Source: ours.
        corruption: strengths of each kind of corruption.
        augmentation: none. A flip would show a left organ at the place of the right one. Source: ours.
    """

    crop_size: Size
    nearest_cases: int = number(NEAREST_CASES[3], at_least=2)
    places: int = number(44, at_least=2)
    jitter: float = number(0.1, at_least=0, at_most=1)
    classification_weight: float = number(0.01, at_least=0)
    autoencoder_steps: int = number(300, at_least=1)
    corruption: Strengths = field(default_factory=Strengths)
    augmentation: SpatialAugmentation = UNCHANGED

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_size", tuple(self.crop_size))


class CropsAtPlaces(CropViews):
    """Crops at the places of `TransVW.prepare`; ``place`` (): number of the place, -1 for cases without places.

    A case without places has crops from anywhere. A case that the preparation has not seen has places, too.
    """

    def __init__(self, settings: TransVWSettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]) -> None:
        super().__init__(settings, replace(plan, patch_size=settings.crop_size), channels)
        self.arrays = {**self.arrays, "place": ArraySpec((), "int64")}
        self.places: np.ndarray = prepared["places"]
        self.without_places = frozenset(prepared["without_places"])

    def spoiled(self, target: np.ndarray, rng: np.random.Generator) -> Sample:
        """Return the crop, corrupted in one way."""
        return {"input": corrupt_once(target, self.settings.corruption, rng)}

    def _make(self, case: Case, volume: Volume, rng: np.random.Generator) -> tuple[Sample, Crop]:
        spacing, augmentation = self.spacing, self.settings.augmentation
        if case.name in self.without_places:
            place, crop = -1, draw_crop(volume, self.size, spacing, augmentation, rng)
        else:
            place = int(rng.integers(len(self.places)))
            shift = rng.uniform(-1, 1, len(self.size)) * self.settings.jitter * np.array(self.size)
            box, plane = box_at(self.places[place], volume.shape[1:], self.size, shift)
            crop = crop_at(volume, box, plane, spacing, augmentation, rng)
        return {"target": crop.view, **self.spoiled(crop.view, rng), "place": np.array(place, np.int64)}, crop


class TransVW(RestorationMethod):
    """Restoration with the plan's whole U-Net, and a linear layer on the bottleneck that names the place."""

    name = "transvw"
    title = "TransVW"
    citations = (
        "Haghighi, F., Hosseinzadeh Taher, M. R., Zhou, Z., Gotway, M. B., & Liang, J. (2021). Transferable visual "
        "words: Exploiting the semantics of anatomical patterns for self-supervised learning. IEEE Transactions on "
        "Medical Imaging, 40(10), 2857-2868.",
    )
    Settings = TransVWSettings
    min_cases = (2, "the recognition of a place in other scans")
    terms: ClassVar[Mapping[str, str]] = {"restoration": "restoration", "classification": "recognition of the place"}
    terms_caption = (
        "Both should fall. The cross-entropy of the place begins near the logarithm of the number of places. It counts "
        "with a small weight."
    )
    quantities: ClassVar[tuple[Quantity, ...]] = (RESTORATION, RIGHT)
    pictures_caption = "A corrupted crop, the crop itself, and the network's restoration."

    def __init__(self, network: nn.Module, channels: int, settings: TransVWSettings) -> None:
        super().__init__(network, channels, settings)
        self.weight = settings.classification_weight
        self.head = nn.Linear(2 * encoder_of(network).output_channels[-1], settings.places)

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[TransVWSettings, int]:
        """Derive the crop's size from patch and median image, and as many crops as fit the plan's budget of voxels.

        Raises:
            UserError: a setting is unknown or out of range.
        """
        dim, total = len(plan.patch_size), [math.prod(strides) for strides in zip(*plan.strides, strict=True)]
        size = tuple(
            min(patch, max(2 * stride, math.floor(LARGEST_CROP * median / stride) * stride))
            for patch, median, stride in zip(plan.patch_size, plan.median_size, total, strict=True)
        )
        settings = replaced(TransVWSettings(size, NEAREST_CASES[dim]), WHERE, given)
        crop = settings.crop_size
        if not is_size(crop, dim) or any(length % stride for length, stride in zip(crop, total, strict=True)):
            raise UserError(
                f"{WHERE}.crop_size is {crop}; expected {dim} multiples of the encoder's total stride {tuple(total)}, "
                f"such as {size}"
            )
        left = math.prod(crop) // math.prod(total)
        if left < MIN_BOTTLENECK_VOXELS:
            raise UserError(
                f"{WHERE}.crop_size {crop} leaves {left} of the {MIN_BOTTLENECK_VOXELS} voxels at the bottleneck that "
                f"normalisation needs; make it larger, such as {size}"
            )
        fitting = math.prod(plan.patch_size) * plan.batch_size // math.prod(crop)
        return settings, max(1, min(fitting, MAX_SAMPLES[dim]))

    @classmethod
    def facts(cls, settings: TransVWSettings) -> dict[str, str]:
        """Return the crop's size and the number of places."""
        return {
            "crop": f"{'x'.join(map(str, settings.crop_size))} voxels",
            "places": f"{settings.places}, in at most {settings.nearest_cases} cases that look alike",
        }

    @classmethod
    def fitted(cls, given: Mapping[str, Any], median: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
        """Drop the crop's size if it exceeds the median image."""
        size = given.get("crop_size")
        if not is_size(size, len(median)) or not any(s > limit for s, limit in zip(size or (), median, strict=True)):
            return dict(given), []
        return {name: value for name, value in given.items() if name != "crop_size"}, ["crop_size"]

    @classmethod
    def prepare(cls, preparation: Preparation) -> dict[str, Any]:
        """Draw a reference case and places on it, and find the cases that look unlike it.

        Returns:
            ``reference``, the case's name; ``places`` (K, d), the centres as shares of the image's axes;
            ``without_places``, the names of the cases in which the places do not count.
        """
        settings: TransVWSettings = preparation.settings
        rng = np.random.default_rng((preparation.seed, 1))
        cases = [preparation.cases[i] for i in rng.permutation(len(preparation.cases))]
        reference = _with_room(cases, settings)
        places = draw_places(CaseVolume(reference), settings, rng)
        nearest = {case.name for case in cases}
        if len(cases) > settings.nearest_cases:
            others = [case for case in cases if case != reference]
            candidates = [reference, *others[: CANDIDATES * settings.nearest_cases - 1]]
            order = np.argsort(distances(candidates, preparation, rng), kind="stable")
            nearest = {candidates[i].name for i in order[: settings.nearest_cases]}
        without = [case.name for case in preparation.cases if case.name not in nearest]
        return {"reference": reference.name, "places": places, "without_places": without}

    @classmethod
    def views(
        cls, settings: TransVWSettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]
    ) -> CropsAtPlaces:
        """Return the maker of samples."""
        return CropsAtPlaces(settings, plan, channels, prepared)

    def forward(self, batch: Mapping[str, Tensor], drawn: None, progress: float = 0.0) -> StepOutput:
        """Compute the error of the restoration, plus the weighted cross-entropy of the samples with a place."""
        target, places = batch["target"], batch["place"]
        stages = self.unet.encoder(batch["input"])
        restoration = restoration_loss(self.unet.decode(stages), target)
        # half precision would round small differences of the means
        logits = self.head(mean_and_maximum(stages[-1].float())).float()
        known = places >= 0
        classification = known_class_loss(logits, places, gathered(known.float()).mean())
        error = restoration.detach()
        values = {RESTORATION.name: {"": error / variance_within(target)}}
        if not known.is_meta and known.any():
            values[RIGHT.name] = {"": right_over_chance(logits.detach()[known], places[known])}
        terms = {"restoration": error, "classification": classification.detach()}
        return StepOutput(restoration + self.weight * classification, terms, values)


def box_at(
    place: np.ndarray, shape: Sequence[int], size: Sequence[int], shift: Sequence[float]
) -> tuple[Box, tuple[int, ...]]:
    """Return the crop at a place of an image, moved into the image, and the index of its slice (empty in 3D).

    Args:
        place: (d,), the crop's centre as a share of each axis.
        shape: (d,), shape of the image, voxels.
        size: size of the crop, voxels, one axis less than the image for a slice.
        shift: shift of the crop from its place, voxels.
    """
    extra = len(shape) - len(size)
    plane = tuple(min(int(p * length), length - 1) for p, length in zip(place[:extra], shape[:extra], strict=True))
    lower = []
    for p, length, edge, by in zip(place[extra:], shape[extra:], size, shift, strict=True):
        if edge > length:  # the crop exceeds the image by the same number of voxels on both sides
            lower.append(-((edge - length) // 2))
        else:
            lower.append(min(max(0, round(p * length - edge / 2 + by)), length - edge))
    return Box.of_size(lower, size), plane


def draw_places(volume: Volume, settings: TransVWSettings, rng: np.random.Generator) -> np.ndarray:
    """Draw K crops of an image that are not background. Returns their centres as shares of the axes, (K, d).

    Places differ from each other if the image has room for that.
    """
    shape, found = np.array(volume.shape[1:]), []
    for _ in range(settings.places):
        for _ in range(TRIES):
            crop = draw_crop(volume, settings.crop_size, (1.0,) * len(settings.crop_size), UNCHANGED, rng)
            centre = [(low + high) / 2 for low, high in zip(crop.box.lower, crop.box.upper, strict=True)]
            place = [*(index + 0.5 for index in crop.slice), *centre]
            if place not in found:
                break
        found.append(place)
    return np.array(found) / shape


def distances(cases: Sequence[Case], preparation: Preparation, rng: np.random.Generator) -> np.ndarray:
    """Train an autoencoder on small images of cases. Returns the Euclidean distance of each code from the first one.

    The codes are the encoder's bottlenecks. The small images of all cases lie in memory, at most some hundred kilobytes
    for each case and channel.
    """
    settings, device = preparation.settings, preparation.device
    torch.manual_seed(preparation.seed)
    autoencoder = Autoencoder(preparation.network, preparation.channels).to(device).train()
    images = torch.from_numpy(np.stack([small_images(case, autoencoder.encoder.strides) for case in cases]))
    samples = images.flatten(0, 1)  # (N * S, C, *)
    optimiser = torch.optim.AdamW(autoencoder.parameters(), AUTOENCODER_LR)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        for _ in range(settings.autoencoder_steps):
            batch = samples[torch.from_numpy(rng.integers(len(samples), size=AUTOENCODER_BATCH[samples.ndim - 2]))].to(
                device
            )
            optimiser.zero_grad(set_to_none=True)
            F.mse_loss(autoencoder(batch), batch).backward()
            nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
            optimiser.step()
        autoencoder.eval()
        with torch.no_grad():
            reference = autoencoder.code(images[0].to(device))
            found = [float((autoencoder.code(image.to(device)) - reference).norm()) for image in images]
    return np.array(found)


def small_images(case: Case, strides: Sequence[Sequence[int]]) -> np.ndarray:
    """Return a case as small images of one size, (S, C, *): the whole image, or in 2D evenly spaced slices.

    An edge has one voxel more than the total stride, if that is more than `GRID`, so that two remain at the bottleneck.
    """
    total = [math.prod(of_axis) for of_axis in zip(*strides, strict=True)]
    size = tuple(max(GRID[len(total)], stride + 1) for stride in total)
    volume = CaseVolume(case)
    return reduced_image(volume, size)[None] if len(total) == 3 else reduced_slices(volume, size, SLICES)


def _with_room(cases: Sequence[Case], settings: TransVWSettings) -> Case:
    """Return the first case in which a crop has several places."""
    size = settings.crop_size
    for case in cases:
        shape = CaseVolume(case).shape[1:]
        extra = len(shape) - len(size)
        if any(n > 1 for n in shape[:extra]) or any(n > s for n, s in zip(shape[extra:], size, strict=True)):
            return case
    raise UserError(
        f"{WHERE}.crop_size is {size}, and no image is larger, so that all places are the same; make crop_size smaller"
    )
