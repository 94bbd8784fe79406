"""Draw docs/pictures/copy_paste.png: how semi-supervised training pastes patches into each other.

    python scripts/copy_paste_picture.py

Two phantoms of `phantom.py` stand for a labelled and an unlabelled patch. The second phantom's own labels stand for the
teacher's labels. Boxes and pasting are the training's own.
"""

from __future__ import annotations

import options  # isort: skip  # first: it answers --help without torch

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from phantom import make_case
from phantom_kinds import KINDS

from pcrl_nnunet.figure_style import DPI, WIDTH, grey_scale, own_style
from pcrl_nnunet.finetuning import mixing
from pcrl_nnunet.semi_supervised.settings import SemiSettings

SIZE, SPACING = (96, 96, 12), (1.4, 1.4, 3.0)
SEEDS = 3, 8
LABELLED, TEACHERS = "#0072b2", "#d55e00"


def patches() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a slice of each of two phantoms, and their labels: (2, 1, Y, X) each."""
    images, labels = [], []
    for seed in SEEDS:
        (volume,), label, _ = make_case(replace(KINDS["organ"], size=SIZE, spacing=SPACING), (seed,), vary_size=False)
        index = int((label > 0).sum((1, 2)).argmax())
        image = volume[index].astype(np.float32)
        images.append((image - image.mean()) / image.std())
        labels.append(label[index])
    return torch.from_numpy(np.stack(images)[:, None]), torch.from_numpy(np.stack(labels)[:, None].astype(np.int16))


@own_style()
def draw(path: Path) -> None:
    """Draw the patches, and the two mixtures that a step trains on."""
    (labelled, unlabelled), (truth, pseudo) = (part.split(1) for part in patches())
    rng = np.random.default_rng(2)
    box = mixing.random_boxes(rng, 1, labelled.shape[2:], SemiSettings().box_share)
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots(1, 4)
    panels = {
        "labelled patch": torch.ones_like(box),
        "unlabelled patch": torch.zeros_like(box),
        "mixed:\nunlabelled in the box": mixing.labelled_parts(box, 1),
        "mixed:\nlabelled in the box": mixing.labelled_parts(box, 0),
    }
    rows, columns = (np.flatnonzero(box[0, 0].numpy().any(axis)) for axis in (1, 0))
    for number, (axis, (title, part)) in enumerate(zip(axes, panels.items(), strict=True)):
        image = mixing.paste(labelled, unlabelled, part)[0, 0].numpy()
        axis.imshow(image, **grey_scale(image))
        for labels, where, colour in ((truth, part, LABELLED), (pseudo, ~part, TEACHERS)):
            mask: NDArray[np.bool_] = ((labels > 0) & where)[0, 0].numpy()
            if mask.any():
                axis.contourf(mask, levels=[0.5, 1.5], colors=[colour], alpha=0.5)
        if number > 1:
            corner, size = (columns[0] - 0.5, rows[0] - 0.5), (len(columns), len(rows))
            axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linestyle="--"))
        axis.set(title=title, xticks=[], yticks=[])
    legend = [Patch(color=LABELLED, label="labels"), Patch(color=TEACHERS, label="teacher's labels, half the weight")]
    figure.legend(handles=legend, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=DPI, format="png")


def main() -> None:
    """Draw the picture into docs/pictures, or into another file."""
    draw(options.copy_paste_picture().parse_args().o)


if __name__ == "__main__":
    main()
