"""The examples of a report: a few cases, their views, and a method's pictures of them.

K: examples, C: channels, G: size of a view.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from torch import nn

from pcrl_nnunet.loading.cases import CaseVolume
from pcrl_nnunet.loading.loader import ViewLoader
from pcrl_nnunet.loading.samples import Sample
from pcrl_nnunet.methods.base import Picture
from pcrl_nnunet.plans import PlannedConfiguration, channel_labels, unit_of
from pcrl_nnunet.pretraining.facts import Facts
from pcrl_nnunet.report.html import data_uri, number, text
from pcrl_nnunet.report.pictures import flips, slice_png, views_of_a_case

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class Example:
    """A case, one sample of it, and the picture of the sample's views (a data: URI)."""

    name: str
    channels: list[str]
    sample: Sample
    first: str  # the first view, which the method's pictures show
    aspect: float  # width over height of the first view's middle slice, in mm
    views: str


def examples_of(loader: ViewLoader, plan: PlannedConfiguration) -> list[Example]:
    """Return the examples of a training, which are always the same."""
    return list(_examples(loader, plan))


def _examples(loader: ViewLoader, plan: PlannedConfiguration) -> Iterator[Example]:
    for case, rng in loader.examples(NUM_EXAMPLES):
        volume, file = CaseVolume(case), BytesIO()
        shown = loader.views.show(case, volume, rng)
        channels = channel_labels(case.name, plan.dataset_json, volume.shape[0])
        named = case.full_name(plan.plans["dataset_name"])
        views_of_a_case(named, volume, shown, loader.views.spacing, unit_of(plan.plans), channels, file)
        box = shown.views[0].box if shown.views else None
        shape = next(iter(shown.views[0].images.values())).shape if box is None else box.shape
        height, width = (n * mm for n, mm in zip(shape[-2:], loader.views.spacing[-2:], strict=True))
        first = ", ".join(
            f"{view.title}, {flips(view.flipped)}" for view in shown.views[:1] if view.flipped is not None
        )
        yield Example(case.name, channels, shown.sample, first, width / height, data_uri(file.getvalue()))


def pictures_of(facts: Facts, examples: Sequence[Example]) -> list[Picture]:
    """Return the method's pictures of the examples, on the CPU. The network stays unchanged."""
    batch = {
        name: torch.from_numpy(np.stack([example.sample[name] for example in examples])).to(facts.device)
        for name in examples[0].sample
    }
    with _evaluating(facts.network):
        made = facts.network.pictures(batch)
    return [
        Picture(
            picture.title,
            picture.images.float().cpu(),
            picture.caption,
            None if picture.errors is None else picture.errors.float().cpu(),
        )
        for picture in made
    ]


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients: running statistics stay, and nothing is drawn at random."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def strip(example: Example, index: int, pictures: Sequence[Picture], channel: int) -> str:
    """Show one channel of an example's pictures side by side, in the grey scale of the second picture.

    Args:
        index: index of the example.
        pictures: pictures of all examples; the second picture is the target, if there is one.
    """
    scale = pictures[min(1, len(pictures) - 1)].images[index, channel].numpy()
    low, high = np.percentile(scale, (0.5, 99.5))
    several = len(example.channels) > 1
    end = f", {example.channels[channel]}" if several else ""
    shown = []
    for picture in pictures:
        caption = picture.caption
        if picture.errors is not None:
            caption = f"error {number(float(picture.errors[index, channel]))}"
        png = slice_png(picture.images[index].numpy(), channel, low, high)
        what = text(f"{example.name}, {picture.title}{end}")
        shown.append(
            f'<div><img style="aspect-ratio:{example.aspect:.4g}" alt="{what}" '
            f'src="{data_uri(png)}"><b>{text(picture.title)}</b><br>{text(caption)}</div>'
        )
    name = f"<p>{text(example.channels[channel])}</p>" if several else ""
    return f'{name}<div class="strip" style="--n:{len(pictures)}">{"".join(shown)}</div>'
