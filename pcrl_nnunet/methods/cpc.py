"""Contrastive predictive coding (van den Oord et al., 2018; in 3D: Taleb et al., "3D Self-Supervised Methods for
Medical Imaging", NeurIPS 2020): the upper rows of a grid of patches predict the codes of the lower rows.

B: samples, C: image channels, c: channels of the bottleneck, d = 2c: channels of a code, A: rows above, R: predicted
rows, K: columns, T: patches of a pyramid, *: space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.samples import ArraySpec, Sample, ShownSample, ShownView, Views
from pcrl_nnunet.methods.base import Method, StepOutput
from pcrl_nnunet.methods.quantities import RANK, RIGHT, right_over_chance
from pcrl_nnunet.networks import accept_any_size, encoder_of, gathered, mean_and_maximum
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import number, replaced
from pcrl_nnunet.views.configure import MAX_SAMPLES, check_size, total_stride
from pcrl_nnunet.views.crop import Crop, draw_crop
from pcrl_nnunet.views.patch_grid import PatchGrid, cell_of, largest_number, patch_of, smallest_cell
from pcrl_nnunet.views.settings import Size, SpatialAugmentation, is_size
from pcrl_nnunet.views.sub_crop import Volume

WHERE = "pcrl.pretrain.cpc"
MOST_PATCHES = {2: 7, 3: 4}  # along an axis; Taleb et al.
OVERLAP = {2: 0.5, 3: 0.0}  # Taleb et al.
JITTER = 1 / 8  # share of a cell that its patch leaves free; Taleb et al., in 3D
LEAST_SAMPLES = 2


@dataclass(frozen=True)
class CPCSettings:
    """The settings of contrastive predictive coding.

    Attributes:
        grid: number of patches along each axis. By default up to 4 in 3D and up to 7 in 2D, as many as fit. Source:
            Taleb et al.; ours below.
        cell_size: size of a cell of the grid, voxels. Source: ours: the grid fills the plan's patch.
        patch_size: size of a patch, which lies anywhere in its cell, voxels. By default 7/8 of the cell, and more than
            the encoder's total stride. Source: Taleb et al., in 3D.
        overlap: share of a cell that overlaps with the next cell. 0.5 in 2D and 0 in 3D by default. Source: Taleb et
            al.
        augmentation: of the whole crop.
    """

    grid: Size
    cell_size: Size
    patch_size: Size
    overlap: float = number(0.0, at_least=0, at_most=0.5)
    augmentation: SpatialAugmentation = field(default_factory=SpatialAugmentation)

    def __post_init__(self) -> None:
        for name in ("grid", "cell_size", "patch_size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def geometry(self) -> PatchGrid:
        return PatchGrid(self.grid, self.cell_size, self.patch_size, self.overlap)


class GridsOfPatches(Views):
    """The array ``input`` (A + R, K, C, *patch size): the rows of a grid of patches."""

    def __init__(self, settings: CPCSettings, spacing: Sequence[float], channels: int) -> None:
        self.settings, self.spacing, self.grid = settings, tuple(spacing), settings.geometry
        patches = len(self.grid.rows), math.prod(self.grid.columns)
        self.arrays = {"input": ArraySpec((*patches, channels, *settings.patch_size))}

    def __call__(self, case: Case, volume: Volume, rng: np.random.Generator) -> Sample:
        """Make the arrays of one sample."""
        return self._make(volume, rng)[0]

    def show(self, case: Case, volume: Volume, rng: np.random.Generator) -> ShownSample:
        """Make a sample with its crop."""
        sample, crop = self._make(volume, rng)
        images = {"crop": crop.view, "patches": self.grid.mosaic(sample["input"])}
        view = ShownView("crop", f"rows along axis {self.grid.axis}", images, crop.box, crop.flipped)
        return ShownSample(sample, [view], crop.box, crop.slice)

    def _make(self, volume: Volume, rng: np.random.Generator) -> tuple[Sample, Crop]:
        crop = draw_crop(volume, self.grid.crop_size, self.spacing, self.settings.augmentation, rng)
        return {"input": self.grid.draw_patches(crop.view, rng)}, crop


class CPC(Method):
    """The plan's encoder, a recurrent context network over the rows above, and a linear predictor for each row below.

    The predictions are compared with the codes of all patches below, of all samples.
    """

    name = "cpc"
    title = "Contrastive predictive coding"
    citations = (
        "Taleb, A., Loetzsch, W., Danz, N., Severin, J., Gaertner, T., Bergner, B., & Lippert, C. (2020). 3D "
        "self-supervised methods for medical imaging. NeurIPS, 33, 18158-18172.",
        "van den Oord, A., Li, Y., & Vinyals, O. (2018). Representation learning with contrastive predictive coding. "
        "arXiv:1807.03748.",
    )
    Settings = CPCSettings
    defaults: ClassVar[Mapping[str, Any]] = {"initial_lr": 0.03}
    min_batch_size = (LEAST_SAMPLES, "the comparison with patches of other scans")
    min_cases = (2, "the comparison with patches of other scans")
    terms: ClassVar[Mapping[str, str]] = {"prediction": "prediction"}
    terms_caption = "The cross-entropy of the right patch should fall."
    quantities = (RIGHT, RANK)
    pyramids: Tensor

    def __init__(self, network: Any, channels: int, settings: CPCSettings) -> None:
        super().__init__(network, channels, settings)
        grid = settings.geometry
        self.rows_above, below = grid.rows_above, len(grid.rows) - grid.rows_above
        self.encoder = encoder_of(network)
        accept_any_size(self.encoder)  # patches are no multiples of the strides
        d = 2 * self.encoder.output_channels[-1]
        # features of patches hardly differ at first; without this norm the loss hardly falls (docs/methods/cpc.md)
        self.norm = nn.BatchNorm1d(d)
        self.code = nn.Linear(d, d)
        self.context = nn.GRU(d, d, batch_first=True)
        self.predictors = nn.ModuleList(nn.Linear(d, d) for _ in range(below))
        self.register_buffer("pyramids", torch.from_numpy(grid.pyramids()), persistent=False)  # (K, T)

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[CPCSettings, int]:
        """Derive the grid from the patch, the strides and the median image, and the batch from the plan's budget.

        Raises:
            UserError: a setting is unknown or out of range, or images are too small for two patches along an axis.
        """
        overlap = OVERLAP[len(plan.patch_size)]
        first = replaced(_sized(plan, None, overlap), WHERE, given)
        _check_grid(first, plan)
        settings = replaced(_sized(plan, first.grid if "grid" in given else None, first.overlap), WHERE, given)
        _check(settings, plan)
        patches = len(settings.geometry.rows) * math.prod(settings.geometry.columns)
        budget = math.prod(plan.patch_size) * plan.batch_size
        fitting = budget // (patches * math.prod(settings.patch_size))
        return settings, min(max(LEAST_SAMPLES, fitting), MAX_SAMPLES[len(plan.patch_size)])

    @classmethod
    def facts(cls, settings: CPCSettings) -> dict[str, str]:
        """Return the grid and the size of its patches."""
        grid, patch, crop = (
            "x".join(map(str, s)) for s in (settings.grid, settings.patch_size, settings.geometry.crop_size)
        )
        return {"grid": f"{grid} patches of {patch} voxels", "crop": f"{crop} voxels"}

    @classmethod
    def views(
        cls, settings: CPCSettings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]
    ) -> GridsOfPatches:
        """Return the maker of grids of patches."""
        return GridsOfPatches(settings, plan.spacing, channels)

    def forward(self, batch: Mapping[str, Tensor], drawn: None, progress: float = 0.0) -> StepOutput:
        """Compute InfoNCE of a batch from ``input`` (B, A + R, K, C, *)."""
        pooled = self.pooled(batch["input"])
        # float32 even under autocast: patches differ little
        with nullcontext() if pooled.is_meta else torch.autocast(pooled.device.type, enabled=False):
            codes = self.codes(pooled)  # (B, A + R, K, d)
            predicted = self.predicted(codes[:, : self.rows_above])  # (B, R, K, d)
            below = codes[:, self.rows_above :]
            # all samples of all processes: the number of candidates must not depend on the number of processes
            logits = gathered(predicted).flatten(0, 2) @ gathered(below).flatten(0, 2).T  # (BRK, BRK)
        right = torch.arange(len(logits), device=logits.device)
        loss = F.cross_entropy(logits, right)
        found = right_over_chance(logits.detach(), right)
        vectors = below.detach().flatten(0, 2)
        return StepOutput(loss, {"prediction": loss.detach()}, {RIGHT.name: {"": found}}, {"": vectors})

    def pooled(self, patches: Tensor) -> Tensor:
        """Return the means and maxima of the bottleneck's channels for (B, A + R, K, C, *): (B, A + R, K, d)."""
        vectors = mean_and_maximum(self.encoder(patches.flatten(0, 2))[-1].float())
        return vectors.unflatten(0, patches.shape[:3])

    def codes(self, pooled: Tensor) -> Tensor:
        """Return the codes of pooled features (B, A + R, K, d), which are standardised over all patches."""
        normalised = self.norm(pooled.flatten(0, 2))
        codes: Tensor = self.code(normalised).unflatten(0, pooled.shape[:3])
        return codes

    def predicted(self, above: Tensor) -> Tensor:
        """Return the predicted codes (B, R, K, d) of the rows below from the codes (B, A, K, d) of the rows above."""
        columns = above.shape[2]
        sequences = above.flatten(1, 2)[:, self.pyramids]  # (B, K, T, d)
        contexts = self.context(sequences.flatten(0, 1))[0][:, -1].unflatten(0, (-1, columns))  # (B, K, d)
        return torch.stack([predictor(contexts) for predictor in self.predictors], 1)


def _least(overlap: float) -> int:
    """Return the smallest number of rows: a row above, a row below, and a skipped one between overlapping rows."""
    return 3 if overlap else 2


def _sized(plan: PlanFacts, grid: Size | None, overlap: float) -> CPCSettings:
    """Return the sizes of a grid, or of the default grid, in a crop of the plan's patch.

    Along an axis where two patches do not fit (three if they overlap), the crop grows until they fit, but not beyond
    the median image. Otherwise this axis has one patch.
    """
    numbers, cells, patches = [], [], []
    least, most = _least(overlap), MOST_PATCHES[len(plan.patch_size)]
    total = total_stride(plan.strides)
    for axis, (edge, stride, median) in enumerate(zip(plan.patch_size, total, plan.median_size, strict=True)):
        small = PatchGrid((least,), (smallest_cell(stride),), (1,), overlap).crop_size[0]
        if edge < small <= median:
            edge = small
        wanted = largest_number(edge, stride, overlap, most) if grid is None else grid[axis]
        numbers.append(wanted)
        cells.append(cell_of(edge, wanted, overlap) or smallest_cell(stride))
        patches.append(patch_of(cells[-1], stride, JITTER))
    return CPCSettings(tuple(numbers), tuple(cells), tuple(patches), overlap)


def _check_grid(settings: CPCSettings, plan: PlanFacts) -> None:
    """Raise `UserError` for a grid that has no rows to predict."""
    dim, least = len(plan.patch_size), _least(settings.overlap)
    if not is_size(settings.grid, dim):
        raise UserError(f"{WHERE}.grid is {settings.grid}; expected {dim} positive numbers of patches")
    if max(settings.grid) < least:
        strides = total_stride(plan.strides)
        needed = tuple(PatchGrid((least,), (smallest_cell(t),), (1,), settings.overlap).crop_size[0] for t in strides)
        raise UserError(
            f"{WHERE}.grid is {settings.grid}; expected {least} patches or more along one axis: raise grid, or choose "
            f"another method if the median image {_rounded(plan.median_size)} is smaller than {needed} on every axis"
        )


def _rounded(size: Sequence[float]) -> Size:
    return tuple(round(length) for length in size)


def _check(settings: CPCSettings, plan: PlanFacts) -> None:
    """Raise `UserError` for patches that exceed their cell, or that the encoder cannot normalise."""
    dim = len(plan.patch_size)
    for name in ("cell_size", "patch_size"):
        if not is_size(getattr(settings, name), dim):
            raise UserError(f"{WHERE}.{name} is {getattr(settings, name)}; expected {dim} positive numbers of voxels")
    if any(patch > cell for patch, cell in zip(settings.patch_size, settings.cell_size, strict=True)):
        raise UserError(
            f"{WHERE}.patch_size is {settings.patch_size}; expected patches within the cells {settings.cell_size}: "
            f"lower patch_size or raise cell_size"
        )
    check_size(f"{WHERE}.patch_size", settings.patch_size, plan.strides)
