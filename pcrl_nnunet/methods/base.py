"""The contract between a method of pretraining and the engine that trains it.

A method says what a sample is (`Views`), what is learned from a batch (`Method`) and how to see that something is
learned (`Quantity`). The engine loads, trains, saves, resumes, shares a batch among processes, watches and reports. The
engine knows no method by name. `docs/adding_a_method.md` has an example.

B samples of a batch, C image channels, c channels of a feature, * space.
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
        loss: with gradient; a mean over the batch's samples.
        terms: named parts of the loss, detached.
        values: by `Quantity` and group (such as a level of the decoder), detached.
        vectors: (K, c) by group, detached: features whose spread and rank the monitor looks at.
        kept: (B, ...) by name, detached: what `Method.after_step` takes, such as new keys of a queue. The engine
            gathers the tensors of all processes, in the order of the samples.
    """

    loss: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """Images of K examples for the report. All have the grey scale of the second one, by custom the target.

    Attributes:
        title: such as "input", "target" or "level 1".
        images: (K, C, *size).
        caption: below the image.
        errors: (K, C), mean squared error over the variance of the target; None: no error is known.
    """

    title: str
    images: Tensor
    caption: str = ""
    errors: Tensor | None = None


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimiser treats alike.

    Attributes:
        lr_factor: of the training's learning rate.
        decays: the learning rate decays by a cosine; False: it stays.
        clip: largest norm of this group's gradient; None: the gradients of all such groups are clipped together.
    """

    parameters: Sequence[nn.Parameter]
    lr_factor: float = 1.0
    decays: bool = True
    clip: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(self.parameters))  # what `Module.parameters` gives is used up once


@dataclass(frozen=True)
class Preparation:
    """The material of a stage before the training; see `Method.prepare`."""

    cases: Sequence[Case]
    network: nn.Module  # a copy of the plan's, with random weights, or with those of -init; it may be trained
    channels: int
    settings: Any  # the method's own
    seed: int
    device: torch.device


@dataclass(frozen=True)
class NoSettings:
    """The settings of a method that has none of its own."""


class Method(nn.Module, ABC):
    """A method of pretraining: the network that is trained, and one step of its training.

    It holds the encoder of the plan's network, or more of that network, under any name. What its `groups` train of the
    plan's network is what fine-tuning loads. State that is no parameter (a queue, a momentum copy) is a buffer or a
    submodule without gradient: the engine saves it, and gives it to all processes at the start. `after_step` has to do
    the same on all processes.

    Attributes of the class:
        name: for ``-method`` and for folders; letters, digits and single underscores.
        title: for people.
        citations: of the papers.
        Settings: a frozen dataclass, the plan's ``pcrl.pretrain.<name>``. `configure` gives fields without a default.
        defaults: of the shared settings, where they differ from `SharedSettings`.
        min_batch_size: samples that a step needs, and why.
        min_samples_of_rank: samples that each of several processes needs.
        terms: labels of the loss's terms in log and pictures, by the name in `StepOutput.terms`.
        terms_caption: what a good training shows in the chart of the terms.
        quantities: that are watched.
        pictures_caption: what the report's pictures show.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    citations: ClassVar[tuple[str, ...]] = ()
    Settings: ClassVar[type] = NoSettings
    defaults: ClassVar[Mapping[str, Any]] = {}
    min_batch_size: ClassVar[tuple[int, str]] = (1, "")
    min_samples_of_rank: ClassVar[int] = 1
    terms: ClassVar[Mapping[str, str]] = {}
    terms_caption: ClassVar[str] = "The loss should fall."
    quantities: ClassVar[tuple[Quantity, ...]] = ()
    pictures_caption: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Refuse a method of which the engine could not make the steps that need the most memory."""
        super().__init_subclass__()
        if cls.draw is not Method.draw and cls.variants is Method.variants:
            raise TypeError(f"{cls.__name__} overrides draw and not variants; say what draw may give in variants, too")
        if "loss" in cls.terms:
            raise TypeError(f"{cls.__name__} has a term called loss, which is the name of the whole; rename the term")

    def __init__(self, network: Any, channels: int, settings: Any) -> None:  # noqa: ARG002, RUF100
        """Take what is trained of the plan's network.

        Args:
            network: of nnU-Net's plan.
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
            UserError: a setting is not known or out of its range.
        """
        return replaced(cls.Settings(), f"pcrl.pretrain.{cls.name}", given), plan.batch_size

    @classmethod
    def facts(cls, settings: Any) -> Mapping[str, str]:
        """Return what the dry run says about the sizes and choices of the settings, by name."""
        return {}

    @classmethod
    def editable(cls, settings: Any) -> dict[str, Any]:
        """Return the settings, as plain values, that a planner writes into a plan for people to edit."""
        return asdict(settings)

    @classmethod
    def fitted(cls, given: Mapping[str, Any], median: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
        """Take over the plan's ``pcrl.pretrain.<name>`` for another dataset.

        Args:
            given: the block; it may have wrong settings.
            median: size of that dataset's median image, voxels.

        Returns:
            The block without the sizes that exceed the image, and the names of these.
        """
        return dict(given), []

    @classmethod
    def ablations(cls, plan: PlanFacts, batch_size: int) -> Mapping[str, Mapping[str, Any]]:
        """Return the rows of the paper's tables by name: settings over the plan's ``pcrl.pretrain``.

        Args:
            plan: of the comparison.
            batch_size: of the method itself.
        """
        return {}

    @classmethod
    def prepare(cls, preparation: Preparation) -> dict[str, Any]:
        """Return plain values and arrays that `views` takes. Runs once, before the training, on the first process."""
        return {}

    @classmethod
    @abstractmethod
    def views(cls, settings: Any, plan: PlanFacts, channels: int, prepared: Mapping[str, Any]) -> Views:
        """Return what makes the samples."""

    def groups(self) -> list[ParameterGroup]:
        """Return what is trained."""
        return [ParameterGroup([p for p in self.parameters() if p.requires_grad])]

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw a step's random choices. They are the same in all processes: `rng` is seeded by (seed, step)."""
        return None

    def variants(self) -> list[Any]:
        """Return drawn choices such that one step each touches all that a training can touch, the dearest last."""
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
        """Update what no gradient updates. `stepped` is False where mixed precision has left the step out."""

    def after_loading(self) -> None:
        """Follow weights that ``-init`` has loaded: a momentum copy that `__init__` made is of the random ones."""

    def pictures(self, batch: Mapping[str, Tensor]) -> list[Picture]:
        """Return what the report shows of a batch; called without gradient and in evaluation mode."""
        return []
