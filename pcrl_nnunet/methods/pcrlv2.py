"""PCRLv2 (Zhou et al., "A Unified Visual Information Preservation Framework for Self-supervised Pre-training in Medical
Image Analysis", IEEE TPAMI 2023): multi-scale pixel restoration and siamese feature comparison.

A sample is a pair of global views and N local views. B: samples, N: local views, C: image channels, c: channels of a
level, G: global input size, L: local input size, *: space. Levels i = 1..n-1 are the decoder's, from coarse to full
resolution; level 0 is the encoder's last output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.losses import comparison_loss, local_comparison_loss, restoration_loss
from pcrl_nnunet.methods.base import Method, Picture, StepOutput
from pcrl_nnunet.methods.pairs import PairViews, fitted_views, pair_settings
from pcrl_nnunet.methods.points import POINTS, PointHead, number_of_pairs_with_points, point_comparison
from pcrl_nnunet.methods.quantities import (
    MATCHING,
    RANK,
    RESTORATION,
    RIGHT,
    SPREAD,
    matched_minus_shuffled,
    restoration_error,
)
from pcrl_nnunet.networks import ComparisonHead, Decoder, RestorationHead, accept_any_size, encoder_of
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import number, replaced
from pcrl_nnunet.views.configure import MIN_SAMPLES, check_views, configure_views, fitting_samples
from pcrl_nnunet.views.settings import Augmentation, ViewSettings

WHERE = "pcrl.pretrain.pcrlv2"
DENSE = "dense"  # the comparison at points
NO_COMPARISON = "to leave the comparison out, set levels to [[1, null], [2, null], ...] and views to num_local 0"
EDITABLE = ("global_crop_sizes", "local_crop_sizes", "global_input_size", "local_input_size", "num_local")


@dataclass(frozen=True)
class PCRLv2Settings:
    """The settings of PCRLv2.

    Attributes:
        restoration: ``single``: each step draws one level for both losses, and the decoder stops there (the paper).
            ``full``: also restoration at full resolution in every step, with the drawn level's restoration fading out
            by a cosine (the authors' code). Source: PCRLv2, Eq. 2-4.
        levels: pairs [level to restore from, level to compare], null for none (Table 3). Each step draws one pair. By
            default every level of the decoder for both. Source: PCRLv2, Table 3.
        comparison: ``pairwise`` compares features of the same level (the paper's choice), ``cross_scale`` of two drawn
            levels (Table 2), and ``dense`` of the same points in both global views, which have to find each other
            among all points of the batch. With ``dense`` there are no local views. Source: PCRLv2, Table 2; ``dense``
            is ours.
        comparison_weight: weight of both comparison terms; 1 in the paper. Behind instance norm, the averages that
            are compared differ little between samples. So the comparison's gradients in the encoder are at first 5 to
            20 times as large as the restoration's gradients (docs/evidence/classification.md). Source: PCRLv2, Eq. 10.
        skip_connections: give the decoder skip connections (Table 1). Source: PCRLv2, Table 1.
    """

    views: ViewSettings
    restoration: Literal["single", "full"] = "single"
    levels: tuple[tuple[int | None, int | None], ...] = ()
    comparison: Literal["pairwise", "cross_scale", "dense"] = "pairwise"
    comparison_weight: float = number(1.0, f" ({NO_COMPARISON})", above=0)
    skip_connections: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        for drawn in self.levels:
            if not _are_levels(drawn):
                raise UserError(
                    f"{WHERE}.levels has {drawn!r}; expected pairs of the level to restore from and the level to "
                    f"compare, such as [1, 1], with null for none"
                )
        object.__setattr__(self, "levels", tuple(tuple(drawn) for drawn in self.levels))


def _are_levels(given: Any) -> bool:
    """Tell whether a value is [level to restore from, level to compare], each a level or None, but not both None."""
    return (
        isinstance(given, (list, tuple))
        and len(given) == 2
        and all(level is None or (type(level) is int and level >= 0) for level in given)
        and any(level is not None for level in given)
    )


class Levels(NamedTuple):
    """The levels that a step restores from and compares. None: the step does not."""

    restoration: int | None
    comparison: int | None
    comparison_of_second: int | None  # level of the second global view; differs only in a cross-scale comparison

    @property
    def deepest(self) -> int:
        """The level at which the decoder can stop."""
        return max(level for level in self if level is not None)


class PCRLv2(Method):
    """The encoder of a plan, a decoder without skip connections, and the heads of every level."""

    name = "pcrlv2"
    title = "PCRLv2"
    citations = (
        "Zhou, H.-Y., Lu, C., Chen, C., Yang, S., & Yu, Y. (2023). A unified visual information preservation framework "
        "for self-supervised pre-training in medical image analysis. IEEE TPAMI, 45(7), 8020-8035.",
    )
    Settings = PCRLv2Settings
    # hippocampus in 2D, 200 steps: error 0.58 of the variance; with a rate of 0.1 the error is 0.65 and the rank lower
    defaults: ClassVar[Mapping[str, Any]] = {"initial_lr": 0.03}
    # batch normalisation of 2 samples maps every feature to +-1
    min_batch_size = (4, "the comparison heads' batch normalisation")
    min_samples_of_rank = 2  # the quantities compare the samples of the first rank
    terms: ClassVar[Mapping[str, str]] = {
        "restoration": "restoration",
        "comparison_global": "comparison, global",
        "comparison_local": "comparison, local",
    }
    terms_caption = (
        "Restoration should fall, and the comparison as well, towards -1. A comparison near -1 alone is no proof: "
        "features that are the same for all images reach it, too; see above. A dense comparison should fall below the "
        "log of the number of points in a batch."
    )
    quantities = (RESTORATION, MATCHING, RIGHT, SPREAD, RANK)
    pictures_caption = (
        "A global view: what the network gets (augmented, with blocks swapped), what it should restore, and what it "
        "restores at each level. Level 1 is the coarsest, the last one has full resolution. Finer levels should show "
        "finer structures."
    )

    def __init__(self, network: Any, channels: int, settings: PCRLv2Settings) -> None:
        super().__init__(network, channels, settings)
        encoder = encoder_of(network)
        self.comparison_weight = settings.comparison_weight
        self.encoder = encoder
        accept_any_size(encoder)  # local views' sizes are not multiples of the strides
        self.decoder = Decoder(encoder, settings.skip_connections)
        self.full_resolution = settings.restoration == "full"
        n = self.decoder.num_levels
        self.levels = [tuple(drawn) for drawn in settings.levels] or [(i, i) for i in range(1, n + 1)]
        for drawn in self.levels:
            restored, compared = drawn
            if restored not in (None, *range(1, n + 1)) or compared not in (None, *range(n + 1)):
                raise UserError(
                    f"{WHERE}.levels has {list(drawn)}; expected the level to restore from, 1 to {n} or null, and the "
                    f"level to compare, 0 to {n} or null"
                )
        self.compared = sorted({level for _, level in self.levels if level is not None})
        self.crosses_scales = settings.comparison == "cross_scale"
        self.compares_points = settings.comparison == DENSE
        of_levels, kernels = [encoder.output_channels[-1], *self.decoder.channels], encoder.kernel_sizes[::-1]
        restored_levels = {n} if self.full_resolution else set()
        restored_levels |= {level for level, _ in self.levels if level is not None}
        self.restoration_heads = nn.ModuleDict(
            {
                str(i): RestorationHead(encoder.conv_op, of_levels[i], channels, kernels[i])
                for i in sorted(restored_levels)
            }
        )
        width = max((of_levels[i] for i in self.compared), default=0) if self.crosses_scales else None
        self.comparison_heads = nn.ModuleDict(
            {
                str(i): PointHead(of_levels[i]) if self.compares_points else ComparisonHead(of_levels[i], width)
                for i in self.compared
            }
        )

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[PCRLv2Settings, int]:
        """Derive the views' sizes and the batch size from the plan, see `configure_views`."""
        if given.get("comparison") == DENSE:
            # swapped blocks would move the voxels of about a fifth of the points
            own = PCRLv2Settings(pair_settings(plan), augmentation=Augmentation(p_swap=0.0))
            settings = replaced(own, WHERE, given)
            return settings, number_of_pairs_with_points(settings.views, plan, WHERE, "a dense comparison")
        rule = plan.patch_size, plan.batch_size, plan.strides, plan.median_size, plan.spacing
        views, batch_size = configure_views(*rule)
        settings = replaced(PCRLv2Settings(views), WHERE, given)
        check_views(settings.views, plan.strides)
        if settings.views != views:
            batch_size = max(MIN_SAMPLES, fitting_samples(plan.patch_size, plan.batch_size, settings.views))
        return settings, batch_size

    @classmethod
    def editable(cls, settings: PCRLv2Settings) -> dict[str, Any]:
        """Return the settings that a planner writes into a plan for users to edit."""
        views = {name: value for name, value in asdict(settings.views).items() if name in EDITABLE}
        return {"restoration": settings.restoration, "levels": settings.levels, "views": views}

    @classmethod
    def fitted(cls, given: Mapping[str, Any], median: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
        """Drop the crop sizes if one of them exceeds the median image."""
        return fitted_views(given, median)

    @classmethod
    def facts(cls, settings: PCRLv2Settings) -> dict[str, str]:
        """Return the views' sizes and a step's choices."""
        views = settings.views
        return {
            "global crops": f"{', '.join(map(_x, views.global_crop_sizes))} voxels",
            "global input": f"{_x(views.global_input_size)} voxels",
            "local crops": f"{', '.join(map(_x, views.local_crop_sizes))} voxels",
            "local input": f"{_x(views.local_input_size)} voxels, {views.num_local} a sample",
            "spacing": f"{' x '.join(f'{s:g}' for s in views.spacing)} mm",
            "restoration": settings.restoration,
            "comparison": settings.comparison,
        }

    @classmethod
    def ablations(cls, plan: PlanFacts, batch_size: int) -> dict[str, dict[str, Any]]:
        """Return the rows of Tables 1 to 3.

        Table 3 extends the method step by step. Its rows before the last two have only global views, and its last row,
        with sub-crop, is PCRLv2 itself. All rows have the same batch size, though more samples would fit without local
        views.
        """
        n = len(plan.strides) - 1

        def row(**own: Any) -> dict[str, Any]:
            return {"batch_size": batch_size, cls.name: own}

        global_only = {"num_local": 0}
        rows: dict[str, dict[str, Any]] = {
            "skip_connections": {cls.name: {"skip_connections": True}},  # Table 1
            "cross_scale": {cls.name: {"comparison": "cross_scale"}},  # Table 2
            "restoration_only": row(levels=[[n, None]], views=global_only),  # Table 3, row 0
            "comparison_only": row(levels=[[None, 0]], views=global_only),  # row 1
            "one_level": row(levels=[[n, 0]], views=global_only),  # row 2
            "three_levels": row(levels=[[i, i] for i in (1, (n + 1) // 2, n)], views=global_only),  # row 3
            "all_levels": row(views=global_only),  # row 4
            "multi_crop": row(views={"crops": "multi_crop"}),  # row 5
        }
        if n <= 3:
            del rows["three_levels"]  # they would be all levels
        return rows

    @classmethod
    def views(cls, settings: PCRLv2Settings, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]) -> PairViews:
        """Return the maker of pairs and their local views, or of pairs and their common points."""
        points = POINTS if settings.comparison == DENSE else 0
        return PairViews(settings.views, settings.augmentation, channels, points)

    def draw(self, rng: np.random.Generator) -> Levels:
        """Draw the levels, i ~ U{1..n-1}."""
        restoration, comparison = self.levels[rng.integers(len(self.levels))]
        other = comparison
        if self.crosses_scales and comparison is not None:
            other = self.compared[rng.integers(len(self.compared))]
        return Levels(restoration, comparison, other)

    def variants(self) -> list[Levels]:
        """Return one choice for each pair of levels, the deepest last."""
        each = [Levels(restored, compared, compared) for restored, compared in self.levels]
        return sorted(each, key=lambda levels: levels.deepest)

    def forward(self, batch: Mapping[str, Tensor], drawn: Levels, progress: float = 0.0) -> StepOutput:
        """Compute the losses of one batch (PCRLv2, Eq. 10).

        Args:
            batch: ``input`` and ``target`` (B, 2, C, *G), ``local`` (B, N, C, *L) unless N is 0, and ``points``
                (B, 2, P, d) for a dense comparison.
            drawn: the step's levels.
            progress: share of the training that is done, 0 to 1.
        """
        levels, target, local = drawn, batch["target"], batch.get("local")
        deepest = self.decoder.num_levels if self.full_resolution else levels.deepest
        of_local = None
        if levels.comparison is not None and local is not None:
            of_local = self._features_of_local(local.flatten(0, 1), levels.comparison)
        features = self._features(batch["input"].flatten(0, 1), deepest)
        terms: dict[str, Tensor] = {}
        values: dict[str, dict[str, Tensor]] = {}
        vectors: dict[str, Tensor] = {}
        if levels.restoration is not None:
            restored = self._restored(features, levels.restoration, target)
            terms["restoration"] = _both_views(restored, target)
            group = f"level {levels.restoration}"
            values[RESTORATION.name] = {group: restoration_error(restored.detach(), target)}
        if self.full_resolution:
            whole = _both_views(self._restored(features, self.decoder.num_levels, target), target)
            fading = 0.5 * (1 + math.cos(math.pi * progress))
            terms["restoration"] = whole + fading * terms.get("restoration", torch.zeros_like(whole))
        if levels.comparison is not None and self.compares_points:
            head: Any = self.comparison_heads[str(levels.comparison)]
            at = head.vectors([features[levels.comparison]], batch["points"], target.shape[3:])
            terms["comparison_global"], right = point_comparison(at)
            group = f"level {levels.comparison}"
            values[RIGHT.name] = {group: right}
            of_points = at.detach().flatten(0, 2)
            vectors[group] = of_points - of_points.mean(0)  # as behind the pooled features' norm: the spread needs it
        elif levels.comparison is not None and levels.comparison_of_second is not None:
            v, p = self._compared_global(features, levels.comparison, levels.comparison_of_second)
            terms["comparison_global"] = comparison_loss(v[:, 0], p[:, 0], v[:, 1], p[:, 1])
            if local is not None:
                both = self.comparison_heads[str(levels.comparison)](of_local)
                v_l, p_l = (x.unflatten(0, local.shape[:2]) for x in both)
                terms["comparison_local"] = local_comparison_loss(v_l, p_l, v, p)
            group = f"level {levels.comparison}"
            values[MATCHING.name] = {group: matched_minus_shuffled(p.detach()[:, 0], v.detach()[:, 1])}
            vectors[group] = v.detach().flatten(0, 1)
        weighted = [t if name == "restoration" else self.comparison_weight * t for name, t in terms.items()]
        detached = {name: term.detach() for name, term in terms.items()}
        return StepOutput(torch.stack(weighted).sum(), detached, values, vectors)

    def pictures(self, batch: Mapping[str, Tensor]) -> list[Picture]:
        """Return the first global view: input, target, and every level's restoration."""
        target = batch["target"]
        shown = [
            Picture("input", batch["input"][:, 0], "what the network gets"),
            Picture("target", target[:, 0], "what it should restore"),
        ]
        levels = sorted({level for level, _ in self.levels if level is not None})
        for level in levels:
            restored = self._restored(self._features(batch["input"].flatten(0, 1), level), level, target)[:, 0]
            squared = (restored.float() - target[:, 0].float()).flatten(2).square().mean(2)  # (K, C)
            variance = target[:, 0].float().flatten(2).var(2, correction=0).clamp_min(1e-12)
            shown.append(Picture(f"level {level}", restored, errors=squared / variance))
        return shown if levels else []

    def _features(self, x: Tensor, level: int) -> list[Tensor]:
        return self.decoder(self.encoder(x), level)

    def _features_of_local(self, x: Tensor, level: int) -> Tensor:
        """Return the local views' features of one level.

        At full resolution, where a step takes the most memory, the backward pass recomputes them instead of keeping the
        activations before them. They come first in the forward pass and last in the backward pass, when the global
        views' activations are already freed.
        """
        if level < self.decoder.num_levels:
            return self._features(x, level)[-1]
        return checkpoint(lambda x: self._features(x, level)[-1], x, use_reentrant=False)

    def _compared_global(self, features: list[Tensor], first: int, second: int) -> tuple[Tensor, Tensor]:
        """Return v and p (B, 2, c) of the two global views, each from its own level."""
        if first == second:
            both = self.comparison_heads[str(first)](features[first])
            v, p = (x.unflatten(0, (-1, 2)) for x in both)
            return v, p
        of_views = [
            self.comparison_heads[str(level)](features[level].unflatten(0, (-1, 2))[:, view])
            for view, level in enumerate((first, second))
        ]
        v, p = (torch.stack(x, 1) for x in zip(*of_views, strict=True))
        return v, p

    def _restored(self, features: list[Tensor], level: int, target: Tensor) -> Tensor:
        """Return the restored views (B, 2, C, *G)."""
        restored: Tensor = self.restoration_heads[str(level)](features[level], target.shape[3:])
        return restored.unflatten(0, target.shape[:2])


def _both_views(restored: Tensor, target: Tensor) -> Tensor:
    """Return L_R = MSE of the first view + MSE of the second (PCRLv2, Eq. 4)."""
    return restoration_loss(restored[:, 0], target[:, 0]) + restoration_loss(restored[:, 1], target[:, 1])


def _x(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
