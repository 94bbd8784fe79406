"""The contract between a method of pretraining and the engine that trains it.

A method defines samples (`Views`), the loss of a batch (`Method`), and quantities that show whether it learns
(`Quantity`). The engine loads, trains, saves, resumes, shares a batch among processes, monitors and reports. The engine
knows no method by name. `docs/adding_a_method.md` has an example.

B: samples of a batch, C: image channels, c: channels of a feature, *: space.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.loading.samples import Views
from pcrl_nnunet.methods.quantities import Quantity
from pcrl_nnunet.plans import PlanFacts
from pcrl_nnunet.settings import replaced


@dataclass(frozen=True)
class StepOutput:
    """The result of one step.

    Attributes:
        loss: the loss with gradient, a mean over the batch's samples.
        terms: named parts of the loss, detached.
        values: values by `Quantity` and group (such as a level of the decoder), detached.
        vectors: features (K, c) by group, detached; the monitor measures their spread and rank.
        kept: (B, ...) by name, detached: tensors for `Method.after_step`, such as new keys of a queue. The engine
            gathers them from all processes, in the order of the samples.
    """

    loss: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """Images of K examples for the report. The second picture, usually the target, sets the grey scale of all.

    Attributes:
        title: title such as "input", "target" or "level 1".
        images: (K, C, *size).
        caption: text below the image.
        errors: (K, C), mean squared error over the variance of the target; None: unknown.
    """

    title: str
    images: Tensor
    caption: str = ""
    errors: Tensor | None = None


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimiser treats alike.

    Attributes:
        lr_factor: factor of the training's learning rate.
        decays: whether the learning rate decays by a cosine; otherwise it stays.
        clip: largest norm of this group's gradient; None: the gradients of all such groups are clipped together.
    """

    parameters: Sequence[nn.Parameter]
    lr_factor: float = 1.0
    decays: bool = True
    clip: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))  # `Module.parameters` is an iterator


@dataclass(frozen=True)
class Preparation:
    """The material of a stage before the training; see `Method.prepare`."""

    cases: Sequence[Case]
    network: nn.Module  # a copy of the plan's network, with random weights or the weights of -init; it may be trained
    channels: int
    settings: Any  # the method's own settings
    seed: int
    device: torch.device


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method without settings of its own."""


class Method(nn.Module, ABC):
    """A method of pretraining: the trained network, and one step of its training.

    A method holds the encoder of the plan's network, or more of that network, under any name. Fine-tuning loads the
    parts of the plan's network that its `groups` train. State other than parameters (a queue, a momentum copy) is a
    buffer or a submodule without gradient: the engine saves it, and copies it to all processes at the start.
    `after_step` has to do the same on all processes.

    Attributes of the class:
        name: name for ``-method`` and for folders; letters, digits and single underscores.
        title: name for display.
        citations: citations of the papers.
        Settings: a frozen dataclass, the plan's ``pcrl.pretrain.<name>``. `configure` sets fields without a default.
        dimensions: numbers of spatial axes of the plans that the method can train on.
        defaults: defaults of shared settings that differ from `SharedSettings`.
        min_batch_size: number of samples that a step needs, and why.
        min_cases: number of cases that a training needs, and why.
        min_samples_of_rank: number of samples that each of several processes needs.
        terms: labels of the loss's terms in log and pictures, by the name in `StepOutput.terms`.
        terms_caption: description of the terms' chart in a good training.
        quantities: the monitored quantities.
        pictures_caption: description of the report's pictures.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    citations: ClassVar[tuple[str, ...]] = ()
    Settings: ClassVar[type] = NoSettings
    dimensions: ClassVar[tuple[int, ...]] = (2, 3)
    defaults: ClassVar[Mapping[str, Any]] = {}
    min_batch_size: ClassVar[tuple[int, str]] = (1, "")
    min_cases: ClassVar[tuple[int, str]] = (1, "")
    min_samples_of_rank: ClassVar[int] = 1
    terms: ClassVar[Mapping[str, str]] = {}
    terms_caption: ClassVar[str] = "The loss should fall."
    quantities: ClassVar[tuple[Quantity, ...]] = ()
    pictures_caption: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Refuse a method whose most expensive steps the engine could not make, or whose terms have a reserved name."""
        super().__init_subclass__()
        if cls.draw is not Method.draw and cls.variants is Method.variants:
            raise TypeError(f"{cls.__name__} overrides draw and not variants; say what draw may give in variants, too")
        if "loss" in cls.terms:
            raise TypeError(f"{cls.__name__} has a term called loss, which is the name of the whole; rename the term")

    def __init__(self, network: Any, channels: int, settings: Any) -> None:  # noqa: ARG002, RUF100
        """Take the trained parts of the plan's network.

        Args:
            network: network of nnU-Net's plan.
            channels: C.
            settings: an instance of `Settings`.
        """
        super().__init__()

    @classmethod
    def configure(cls, plan: PlanFacts, given: Mapping[str, Any]) -> tuple[Any, int]:
        """Derive the method's own settings and the batch size from the plan.

        Args:
            plan: patch size, batch size, strides, median size and spacing of the configuration.
            given: the plan's ``pcrl.pretrain.<name>``.

        Returns:
            An instance of `Settings`, and the number of samples of a step that fit the plan's budget of voxels.

            Raises:
                UserError: a setting is unknown or out of range.
        """
        return replaced(cls.Settings(), f"pcrl.pretrain.{cls.name}", given), plan.batch_size

    @classmethod
    def for_cases(cls, settings: Any, number: int) -> Any:
        """Fit the settings to the number of cases of the training.

        Args:
            settings: an instance of `Settings`.
            number: number of cases, at least `min_cases`.

        Raises:
            UserError: a setting does not fit this number.
        """
        return settings

    @classmethod
    def facts(cls, settings: Any) -> Mapping[str, str]:
        """Return sizes and choices of the settings by name, for the dry run."""
        return {}

    @classmethod
    def editable(cls, settings: Any) -> dict[str, Any]:
        """Return the settings that a planner writes into a plan for users to edit, as plain values."""
        return asdict(settings)

    @classmethod
    def fitted(cls, given: Mapping[str, Any], median: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
        """Adapt the plan's ``pcrl.pretrain.<name>`` to another dataset.

        Args:
            given: the block; it may have wrong settings.
            median: size of that dataset's median image, voxels.

        Returns:
            The block without the sizes that exceed the image, and the names of these sizes.
        """
        return dict(given), []

    @classmethod
    def ablations(cls, plan: PlanFacts, batch_size: int) -> Mapping[str, Mapping[str, Any]]:
        """Return the rows of the paper's tables by name: settings over the plan's ``pcrl.pretrain``.

        Args:
            plan: plan of the comparison.
            batch_size: batch size of the method itself.
        """
        return {}

    @classmethod
    def prepare(cls, preparation: Preparation) -> dict[str, Any]:
        """Return plain values and arrays for `views`. Runs once before the training, on the first process."""
        return {}

    @classmethod
    @abstractmethod
    def views(cls, settings: Any, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]) -> Views:
        """Return the maker of samples."""

    def groups(self) -> list[ParameterGroup]:
        """Return the trained parameters."""
        return [ParameterGroup([p for p in self.parameters() if p.requires_grad])]

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw a step's random choices. All processes draw the same: `rng` is seeded by (seed, step)."""
        return None

    def variants(self) -> list[Any]:
        """Return choices of `draw`, the most expensive last. A step with each covers all that a training does."""
        return [None]

    @abstractmethod
    def forward(self, batch: Mapping[str, Tensor], drawn: Any, progress: float = 0.0) -> StepOutput:
        """Compute the loss of a batch.

        Args:
            batch: the arrays of `Views.arrays`, with B before their shapes.
            drawn: see `draw`.
            progress: share of the training that is done, 0 to 1.
        """

    def after_step(self, output: StepOutput, stepped: bool) -> None:
        """Update state without gradients. `stepped` is False if mixed precision has skipped the step."""

    def after_loading(self) -> None:
        """Follow the weights of ``-init``: a momentum copy from `__init__` still has the random weights."""

    def pictures(self, batch: Mapping[str, Tensor]) -> list[Picture]:
        """Return the report's pictures of a batch. Called without gradient and in evaluation mode."""
        return []
