"""Draw docs/pictures/overview.png, the picture at the top of the README: views, a learning curve and a restoration.

    python scripts/readme_picture.py

All panels show one real pretraining, which this script does in a temporary folder: 24 phantoms of `phantom.py`, the
configuration 2d of nnU-Net's plan with three stages and a quarter of the width, PCRLv2. This takes about ten minutes on
two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from phantom import write_dataset

from pcrl_nnunet.figure_style import DPI, WIDTH, grey_scale, own_style

DATASET, CASES, SIZE, SPACING = 901, 24, (128, 128, 12), (1.0, 1.0, 3.0)
EXAMPLE = 0  # number of the case that is shown
GLOBAL, LOCAL = ("#0072b2", "#d55e00"), "#009e73"
# flips of a slice by their axes, in words
FLIPS = {(): "", (0,): ", flipped top to bottom", (1,): ", flipped left to right", (0, 1): ", rotated by 180 degrees"}

Image = NDArray[np.float32]


@dataclass(frozen=True)
class Shown:
    """The content of the picture.

    Attributes:
        image: the slice of a case from which the sample is drawn.
        flipped: the axes along which the first global view is flipped.
        boxes: names of the crops, and their lower corners and sizes in the slice.
        restoration: input, output and target of the sample's first global view, by name.
        error: error of the whole view's output, as a share of the target's variance.
        curve: restoration error / variance of each epoch.
        steps: number of steps of an epoch.
    """

    image: Image
    flipped: tuple[int, ...]
    boxes: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]
    restoration: dict[str, Image]
    error: float
    curve: Sequence[float]
    steps: int


def prepare(folder: Path, quick: bool) -> None:
    """Write, plan and preprocess the phantoms, and set a small network and a short training in the plan."""
    raw = write_dataset(folder / "nnUNet_raw", DATASET, "organ", CASES, 0, 0, SIZE, SPACING, 0, 2)
    code = (
        "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as f; f()"
    )
    arguments = ["-d", str(DATASET), "-c", "2d", "-np", "2", "-npfp", "2"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    path = folder / "nnUNet_preprocessed" / raw.name / "nnUNetPlans.json"
    plan = json.loads(path.read_text(encoding="utf-8"))
    network = plan["configurations"]["2d"]["architecture"]["arch_kwargs"]
    stages = network["n_stages"] = 3  # as in demo.sh: a small network that learns within minutes
    for name in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
        network[name] = network[name][:stages]
    network["n_conv_per_stage_decoder"] = network["n_conv_per_stage_decoder"][: stages - 1]
    network["features_per_stage"] = [width // 4 for width in network["features_per_stage"]]
    epochs, steps = (2, 2) if quick else (40, 25)
    plan["pcrl"] = {
        "pretrain": {
            "epochs": epochs, "iters_per_epoch": steps, "batch_size": 8, "optimizer": "adamw", "initial_lr": 3e-3,
            "pcrlv2": {"comparison_weight": 0.1},
        }
    }  # fmt: skip
    path.write_text(json.dumps(plan, indent=4), encoding="utf-8")


def pretrain() -> Any:
    """Do the pretraining on the CPU and return its trainer."""
    import torch

    from pcrl_nnunet.plans import load_plan
    from pcrl_nnunet.pretraining.request import Request
    from pcrl_nnunet.trainers.pretrain import pretrain_trainer

    trainer = pretrain_trainer(
        Request.of_plan(load_plan(str(DATASET), "nnUNetPlans", "2d"), "all"), torch.device("cpu")
    )
    trainer.run_training()
    return trainer


def shown_of(trainer: Any) -> Shown:
    """Draw a sample of a case, and let the pretrained network restore it."""
    import torch

    from pcrl_nnunet.loading.cases import CaseVolume

    facts = trainer.facts()
    case, rng = list(facts.loader.examples(3))[EXAMPLE]
    volume = CaseVolume(case)
    sample = facts.loader.views.show(case, volume, rng)
    index = (slice(None), *(slice(i, i + 1) for i in sample.slice), slice(None), slice(None))
    trainer.network.eval()
    with torch.no_grad():
        batch = {name: torch.from_numpy(array[None]) for name, array in sample.sample.items()}
        pictures = trainer.network.pictures(batch)
    by_title = {picture.title: picture.images[0, 0].numpy() for picture in pictures}
    output = pictures[-1]  # the last level has full resolution
    return Shown(
        volume[index][0].squeeze(0) if sample.slice else volume[index][0],
        tuple(sample.views[0].flipped),
        [(view.title, view.box.lower, view.box.shape) for view in sample.views],
        {"input": by_title["input"], "output": output.images[0, 0].numpy(), "target": by_title["target"]},
        float(output.errors[0, 0]),
        list(facts.log["restoration_error"]),
        trainer.num_iterations_per_epoch,
    )


def draw(shown: Shown, path: Path) -> None:
    """Draw the three panels: views, learning curve, restoration."""
    with own_style():
        figure = Figure(figsize=(WIDTH, 5.1), layout="constrained")
        above, restoration = figure.subfigures(2, 1, squeeze=False, height_ratios=(3, 2.3))[:, 0]
        views, curve = above.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.1))[0]
        for part, title in (
            (views, "1. Crops of a scan without labels"),
            (curve, "2. Pretraining: the error falls"),
            (restoration, f'3. The network restores the crop "global 1"{FLIPS[shown.flipped]}'),
        ):
            part.suptitle(title, fontsize=10.5, fontweight="bold")
        _draw_views(views.subplots(), shown)
        _draw_restoration(list(restoration.subplots(1, 3)), shown)
        _draw_curve(curve.subplots(), shown)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})


def _draw_views(axis: Axes, shown: Shown) -> None:
    axis.imshow(shown.image, **grey_scale(shown.image))
    for number, (title, lower, size) in enumerate(shown.boxes):
        local = title.startswith("local")
        colour, width = (LOCAL, 1.5) if local else (GLOBAL[number], 2.5)
        label = "_" if title not in ("global 1", "global 2", "local 1") else "local" if local else title
        axis.add_patch(Rectangle((lower[1], lower[0]), size[1], size[0], fill=False, label=label, ec=colour, lw=width))
    axis.set(xticks=[], yticks=[])
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, frameon=False, columnspacing=0.8, fontsize=9)


def _draw_restoration(axes: Sequence[Axes], shown: Shown) -> None:
    grey = grey_scale(shown.restoration["target"])
    for axis, (name, image) in zip(axes, shown.restoration.items(), strict=True):
        axis.imshow(image, **grey)
        axis.set_title(name)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True)


def _draw_curve(axis: Axes, shown: Shown) -> None:
    axis.plot(range(1, len(shown.curve) + 1), shown.curve, color=GLOBAL[0], lw=2)
    axis.axhline(1, color="grey", ls=":", lw=1)
    axis.text(len(shown.curve), 1.02, "nothing restored", ha="right", va="bottom", color="grey", fontsize=9)
    axis.set(xlabel=f"epoch of {shown.steps} steps", ylim=(0, max(1.15, 1.05 * max(shown.curve))))
    axis.set_title("Restoration error", fontsize=9.5)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
    axis.grid()


def main() -> None:
    """Pretrain on phantoms and draw the picture."""
    default = Path(__file__).parents[1] / "docs" / "pictures" / "overview.png"
    parser = argparse.ArgumentParser(
        description="Draw the picture of the README from a pretraining on phantoms.",
        epilog="example:\n  python scripts/readme_picture.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", type=Path, default=default, metavar="PNG", help="the picture (default: the README's)")
    parser.add_argument("--quick", action="store_true", help="only 4 steps: for tests of this script")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):  # before nnU-Net is imported
            os.environ[name] = str(Path(folder) / name)
            Path(os.environ[name]).mkdir()
        os.environ.setdefault("nnUNet_n_proc_DA", "1")
        os.environ["nnUNet_compile"] = "f"
        prepare(Path(folder), args.quick)
        shown = shown_of(pretrain())
    args.o.parent.mkdir(exist_ok=True)
    draw(shown, args.o)
    print(
        f"{args.o}: after {len(shown.curve) * shown.steps} steps the restoration error is {shown.curve[-1]:.2f} of the "
        f"variance; {shown.error:.2f} in the crop that is shown"
    )


if __name__ == "__main__":
    main()
