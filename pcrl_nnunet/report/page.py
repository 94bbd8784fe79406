"""report.html beside a pretraining: one file that needs no network and shows what was trained on what, and how it went.

K examples, C channels, G global input size.
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.metadata import version
from io import BytesIO
from time import monotonic
from traceback import extract_tb
from typing import Any

import numpy as np
import torch
from torch import nn

from pcrl_nnunet.experiments.probe import ALL_STAGES
from pcrl_nnunet.files import write_text
from pcrl_nnunet.loading.cases import Case, CaseVolume
from pcrl_nnunet.loading.loader import ViewLoader
from pcrl_nnunet.methods import Levels
from pcrl_nnunet.plans import channel_labels
from pcrl_nnunet.pretraining.monitor import COLLAPSED_RANK, COLLAPSED_SD, Summary, judge, restoration_ratio
from pcrl_nnunet.report.pictures import chart_svg, slice_png, views_of_a_case

NAME = "report.html"
WORTH = 100  # a report while it trains: when this many times as long has passed as the last one took, so 1 % at most
NUM_EXAMPLES = 3
CASES_LISTED = 200  # a folder of cases
ALARMS_LISTED = 50

# (name of the monitor's, heading, what a good training shows, lower end of the axis, dotted line, caption)
_WATCHED: tuple[tuple[str, str, str, float | None, float, str], ...] = (
    (
        "restoration_ratio",
        "Restoration error / variance",
        "falls well below 1",
        0,
        1,
        "1 (dotted): nothing of the image is restored, a constant picture reaches as much. It should fall well below.",
    ),
    (
        "matched_minus_shuffled",
        "Matched minus shuffled cosine",
        "rises above 0",
        None,
        0,
        "0 (dotted): not told apart, two views of one scan look no more alike to the network than views of two scans. "
        "It should rise above; where all scans show the same small organ that takes thousands of steps.",
    ),
    (
        "sd_ratio",
        "Spread of the features",
        "near 1",
        0,
        COLLAPSED_SD,
        "1: spread evenly over all directions. Below the dotted line they have collapsed: all views look the same.",
    ),
    (
        "effective_rank",
        "Effective rank of the features",
        "well above 2",
        0,
        COLLAPSED_RANK,
        "How many directions the features make use of. Below the dotted line they have collapsed.",
    ),
)
_COLOURS = {"learning": "good", "too early": "open", "alarm": "bad"}  # classes of the style
_LOSSES = {
    "restoration": "restoration",
    "comparison_global": "comparison, global",
    "comparison_local": "comparison, local",
}


@dataclass(frozen=True)
class _Example:
    """A case's views, of which the first global one is shown restored."""

    name: str
    channels: list[str]
    input: np.ndarray  # (2, C, *G)
    target: np.ndarray  # (2, C, *G)
    aspect: float  # width over height of the first view's middle slice, in mm
    views: str  # picture of all views, a data: URI


class Report:
    """Remembers the monitor's values of every epoch, and writes report.html.

    Attributes:
        epochs: plain values for the training state: the number of each epoch and the monitor's summary.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self._examples: list[_Example] = []  # the same ones throughout a training
        self._background = ""  # as are the shares of background
        self._last: float | None = None  # when the last one was written, and
        self._took = 0.0  # how long that took, s

    def add(self, epoch: int, summary: Summary) -> None:
        """Remember the monitor's values at the end of an epoch; the first epoch is 1."""
        self.epochs.append({"epoch": epoch, "monitor": dict(summary)})

    def is_due(self) -> bool:
        """Whether writing one now costs little: the first, or `WORTH` times as long has passed as the last one took."""
        return self._last is None or monotonic() - self._last >= WORTH * self._took

    def write(self, trainer: Any, following: Sequence[str], finished: bool) -> None:
        """Write the file. What goes wrong is a warning in the log: a report must not cost the training.

        Neither the network nor any random generator is changed.

        Args:
            trainer: a `PCRLPretrainTrainer`, after `initialize`.
            following: "What to do: COMMAND" for each command that comes next.
            finished: whether the training is.
        """
        start, path = monotonic(), os.path.join(trainer.output_folder, NAME)
        try:
            write_text(path, self._page(trainer, following, finished))
        except Exception as error:
            trainer.print_to_log_file(f"WARNING: {path} could not be written ({_said(error)}); the training goes on")
        self._last = monotonic()
        self._took = self._last - start

    def _page(self, trainer: Any, following: Sequence[str], finished: bool) -> str:
        sections: tuple[tuple[str, Callable[[], str]], ...] = (
            ("Is it learning?", lambda: self._learning(trainer.num_iterations_per_epoch)),
            ("Training", lambda: _losses(trainer)),
            ("What it restores", lambda: self._restorations(trainer)),
            ("What it sees", lambda: self._views(trainer)),
            ("Cases", lambda: _cases(trainer)),
            ("What comes next", lambda: _following(trainer, following)),
            ("Settings", lambda: _settings(trainer.settings.as_dict())),
        )
        parts = [_heading(trainer, finished)]
        for title, make in sections:
            try:
                content = make()
            except Exception as error:  # the others are worth having
                trainer.print_to_log_file(
                    f"WARNING: the report lacks its section '{title}' ({_said(error)}); the training goes on"
                )
                content = f'<p class="alarm">This section could not be made ({_text(_said(error))}).</p>'
            parts.append(f"<section>\n<h2>{_text(title)}</h2>\n{content}\n</section>")
        title = f"{' + '.join(trainer.datasets)}: pretraining"
        return _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(parts))

    def _learning(self, steps_an_epoch: int) -> str:
        if not self.epochs:
            return "<p>The first epoch has not ended yet.</p>"
        last = self.epochs[-1]
        verdict = judge(last["monitor"], last["epoch"] * steps_an_epoch)
        alarms = "".join(f'<p class="alarm"><b>Alarm:</b> {_text(text)}</p>' for text in verdict.alarms)
        levels = sorted({level for values in last["monitor"].values() for level in values})
        if not levels:
            return "<p>This method has nothing that the monitor looks at.</p>"
        table = _table(
            [["Level", ""], *([heading, good] for _, heading, good, *_ in _WATCHED)],
            [
                [level, *(_number(last["monitor"][name].get(level)) for name, *_ in _WATCHED)]
                for level in levels
            ],
        )  # fmt: skip
        return (
            f'<p class="{_COLOURS[verdict.state]}">{_text(verdict.text)}</p>{alarms}'
            f"<p>Epoch {last['epoch']}, means over its steps. A step draws one level of the decoder: 1 is the coarsest "
            f"with an image, the last one has full resolution.</p>{table}"
            f'<div class="charts">{"".join(self._chart(*watched) for watched in _WATCHED)}</div>'
            f"{self._earlier(steps_an_epoch)}"
        )

    def _chart(self, name: str, heading: str, good: str, lower: float | None, line: float, caption: str) -> str:
        curves: dict[int, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for of_epoch in self.epochs:
            for level, value in of_epoch["monitor"][name].items():
                curves[level][0].append(of_epoch["epoch"])
                curves[level][1].append(value)
        return _chart(heading, caption, {f"level {level}": curves[level] for level in sorted(curves)}, lower, line)

    def _earlier(self, steps_an_epoch: int) -> str:
        """Alarms of the epochs before the last."""
        epochs = [(e["epoch"], judge(e["monitor"], e["epoch"] * steps_an_epoch)) for e in self.epochs[:-1]]
        found = [(epoch, alarm) for epoch, verdict in epochs for alarm in verdict.alarms]
        if not found:
            return ""
        shown = found[-ALARMS_LISTED:]
        cut = f", the last {len(shown)} of them" if len(shown) < len(found) else ""
        return (
            f"<details><summary>{len(found)} alarms in earlier epochs{cut}</summary>"
            f"{_table([['Epoch', ''], ['Alarm', '']], shown)}</details>"
        )

    def _restorations(self, trainer: Any) -> str:
        network = _plain(trainer.network)
        levels = sorted({drawn.restoration for drawn in network.all_levels()} - {None})
        if not levels:
            return "<p>This training restores no images.</p>"
        examples = self._examples_of(trainer)
        target = torch.from_numpy(np.stack([example.target for example in examples]))  # (K, 2, C, *G)
        images = torch.from_numpy(np.stack([example.input for example in examples]))
        restored = restore(network, images, target, levels, trainer.device)
        figures = []
        for k, example in enumerate(examples):
            of_example = {level: image[k, 0].numpy() for level, image in restored.items()}
            strips = "".join(_strip(example, of_example, channel) for channel in range(target.shape[2]))
            figures.append(
                f'<figure><figcaption><b class="name">{_text(example.name)}</b></figcaption>{strips}</figure>'
            )
        what = "The middle slice" if target.ndim == 6 else "The whole"
        scale = "a row for each channel, which has" if target.shape[2] > 1 else "in"
        return (
            f"<p>{what} of a global view, {scale} the same grey scale throughout: what the network gets "
            f"(augmented, with blocks swapped), what it should restore, and what it restores at each level. Finer "
            f"levels should show finer structures. <i>Error</i> is over the variance of the target: 1 means that "
            f"nothing is restored. The network is evaluated here, so the numbers differ from those while it trains, "
            f"most in the first epochs.</p>{''.join(figures)}"
        )

    def _views(self, trainer: Any) -> str:
        figures = "".join(
            f'<figure><div class="wide"><img alt="Views of {_text(example.name)}" src="{example.views}"></div></figure>'
            for example in self._examples_of(trainer)
        )
        return (
            f"<p>Where the views of a few cases lie, and what they show before and after augmentation. Look whether "
            f"the boxes hold the parts of the body that matter, and whether one can still recognise these in the two "
            f"global views. Each channel has its own rows: a structure lies at the same place in all channels. "
            f"Training draws new views in every step. On a narrow screen the pictures can be moved sideways.</p>"
            f"<p>Background: {_text(self._background_of(trainer))}.</p>{figures}"
        )

    def _background_of(self, trainer: Any) -> str:
        self._background = self._background or _loader(trainer).background_line()
        return self._background

    def _examples_of(self, trainer: Any) -> list[_Example]:
        if not self._examples:
            loader = _loader(trainer)
            found = loader.examples(NUM_EXAMPLES)
            self._examples = [_example(loader, trainer.dataset_json, *example) for example in found]
        return self._examples


def _loader(trainer: Any) -> ViewLoader:
    s = trainer.settings
    return ViewLoader(trainer.cases, s.views, s.augmentation, s.batch_size, s.seed)


def _example(
    loader: ViewLoader,
    dataset_json: Mapping[str, Any],
    case: Case,
    sample: Mapping[str, Any],
    before: Sequence[np.ndarray],
) -> _Example:
    file = BytesIO()
    channels = channel_labels(case.name, dataset_json, sample["input"].shape[1])
    views_of_a_case(case.name, CaseVolume(case), sample, before, loader.views.spacing, channels, file)
    height, width = (n * s for n, s in zip(sample["boxes"].pair[0].shape[-2:], loader.views.spacing[-2:], strict=True))
    picture = _data_uri(file.getvalue())
    return _Example(case.name, channels, sample["input"], sample["target"], width / height, picture)


def _strip(example: _Example, restored: Mapping[int, np.ndarray], channel: int) -> str:
    """Show one channel of an example's first view: input, target, and what each level restores, (C, *G)."""
    target = example.target[0]
    low, high = np.percentile(target[channel], (0.5, 99.5))
    shown = {"input": example.input[0], "target": target}
    errors = {"input": "what the network gets", "target": "what it should restore"}
    of_channel = torch.from_numpy(target[channel])[None, None, None]
    for level, image in restored.items():
        shown[f"level {level}"] = image
        error = restoration_ratio(torch.from_numpy(image[channel])[None, None, None], of_channel)
        errors[f"level {level}"] = f"error {_number(float(error))}"
    several = len(example.channels) > 1
    name = f"<p>{_text(example.channels[channel])}</p>" if several else ""
    end = f", {example.channels[channel]}" if several else ""
    pictures = "".join(
        f'<div><img style="aspect-ratio:{example.aspect:.4g}" alt="{_text(f"{example.name}, {kind}{end}")}" '
        f'src="{_data_uri(slice_png(image, channel, low, high))}"><b>{kind}</b><br>{errors[kind]}</div>'
        for kind, image in shown.items()
    )
    return f'{name}<div class="strip" style="--n:{len(shown)}">{pictures}</div>'


def restore(
    network: nn.Module, images: torch.Tensor, target: torch.Tensor, levels: Iterable[int], device: torch.device
) -> dict[int, torch.Tensor]:
    """What the network restores of global views at each level (K, 2, C, *G), on the CPU; it is left as it was.

    Args:
        images, target: (K, 2, C, *G).
    """
    batch = {"input": images.to(device), "target": target.to(device)}
    with _evaluating(network):
        return {level: network(batch, Levels(level, None, None)).restored.float().cpu() for level in levels}


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients: running statistics stay, and nothing is drawn."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _plain(network: Any) -> Any:
    """The method itself: forward of a wrapper would wait for other ranks, or compile."""
    network = getattr(network, "module", network)  # of DistributedDataParallel
    return getattr(network, "_orig_mod", network)  # of torch.compile


def _said(error: Exception) -> str:
    """Its type, its text and where it came from."""
    where = extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}, in {os.path.basename(where.filename)}, line {where.lineno}"


# ---------------------------------------------------------------------------------------------------------------- html


def _heading(trainer: Any, finished: bool) -> str:
    plan, value = trainer.plans_manager.plans, trainer.logger.get_value
    total = trainer.num_epochs * trainer.num_iterations_per_epoch
    badge = "finished" if finished else "not finished"
    fold = "all cases" if trainer.fold == "all" else f"fold {trainer.fold}"
    times = zip(value("epoch_start_timestamps", None), value("epoch_end_timestamps", None), strict=False)
    a_step = [(end - start) / trainer.num_iterations_per_epoch for start, end in times]
    facts = {
        "Epochs": f"{trainer.current_epoch} of {trainer.num_epochs}",
        "Steps": f"{trainer.step:,} of {total:,}",
        "A step": f"{trainer.settings.batch_size} pairs" + (f", {np.median(a_step):.2g} s" if a_step else ""),
        "Cases": f"{len(trainer.cases):,}",
        "Device": trainer.device,
        "Written": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }
    long = {"Versions": ", ".join(f"{name} {version(name)}" for name in ("pcrl_nnunet", "nnunetv2", "torch"))}
    if trainer.init:
        long["Started from"] = trainer.init["checkpoint"]
    long["Folder"] = trainer.output_folder
    listed = "".join(
        f"<div{' class=long' if name in long else ''}><dt>{name}</dt><dd>{_text(fact)}</dd></div>"
        for name, fact in {**facts, **long}.items()
    )
    return (
        f'<header><p class="kind">Pretraining by {type(_plain(trainer.network)).__name__}, without labels</p>'
        f'<h1>{_text(" + ".join(trainer.datasets))} <span class="badge {"done" if finished else "open"}">{badge}</span>'
        f'</h1><p class="of"><span>plan <b>{_text(plan["plans_name"])}</b></span> '
        f"<span>configuration <b>{_text(trainer.configuration_name)}</b></span> <span><b>{_text(fold)}</b></span></p>"
        f"<dl>{listed}</dl></header>"
    )


def _losses(trainer: Any) -> str:
    def of(name: str) -> tuple[range, list[float]]:
        values = trainer.logger.get_value(name, None)
        return range(1, len(values) + 1), values

    losses = {label: of(name) for name, label in _LOSSES.items()}
    there = {label: curve for label, curve in losses.items() if np.isfinite(curve[1]).any()}
    caption = (
        "Restoration should fall, and the comparison as well, towards -1. A comparison near -1 alone is no proof: "
        "features that are the same for all images reach it, too; see above."
    )
    charts = (
        _chart("Losses", caption, there),
        _chart("Learning rate", "A cosine decay to 0 over all steps, as it is when an epoch begins.", {"": of("lrs")}),
        _probe(trainer.probed),
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def _probe(probed: Mapping[int, Mapping[str, float]]) -> str:
    """The chart of a probe's values by epochs done; nothing without any."""
    caption = (
        "Are the segmentation's labels told apart by the frozen encoder's features? AUROC on cases that the classifier "
        "has not seen; 0.5 is chance. Epoch 0 is the encoder before the first step: it should rise above that."
    )
    names = list(dict.fromkeys(name for values in probed.values() for name in values))
    curves: dict[str, tuple[list[float], list[float]]] = {
        "all stages" if name == ALL_STAGES else name.removeprefix("probe_").replace("_", " "): (
            [epoch for epoch, values in probed.items() if name in values],
            [values[name] for values in probed.values() if name in values],
        )
        for name in names
    }
    return _chart("Linear probe", caption, curves)


def _chart(
    title: str,
    caption: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    lower: float | None = None,
    line: float | None = None,
) -> str:
    if not curves:
        return ""
    return (
        f"<figure><figcaption><b>{_text(title)}</b> {_text(caption)}</figcaption>"
        f"{chart_svg(curves, lower, line)}</figure>"
    )


def _cases(trainer: Any) -> str:
    by_folder: dict[str, list[Case]] = defaultdict(list)
    for case in trainer.cases:
        by_folder[os.path.dirname(case.path)].append(case)
    weight = sum(case.weight for case in trainer.cases)
    rows, lists = [], []
    for folder, cases in by_folder.items():
        dataset, data = os.path.split(folder)
        dataset = os.path.basename(dataset)
        rows.append((dataset, data, f"{len(cases):,}", f"{sum(case.weight for case in cases) / weight:.1%}"))
        lists.append(_names(f"{dataset}, {data}", [case.name for case in cases]))
    started = trainer.init["cases"] if trainer.init else []
    if started:
        lists.append(_names("seen before, by the checkpoint that it started from", [case["name"] for case in started]))
    if trainer.init and not trainer.init["all_cases_known"]:
        lists.append("<p>The checkpoint that it started from does not list all cases that it has seen.</p>")
    if trainer.copies_left_out:
        copies = [f"{copy}, which has the voxels of {case}" for copy, case in trainer.copies_left_out.items()]
        lists.append(_names("left out as copies of validation cases", copies))
    drawn = trainer.step * trainer.settings.batch_size
    return (
        f"<p>Pairs of views are drawn from {len(trainer.cases):,} cases; {drawn:,} pairs so far, "
        f"{drawn / len(trainer.cases):.3g} of a case on average. {_text(trainer.note_on_fold)}</p>"
        f"{_table([['Dataset', ''], ['Folder', ''], ['Cases', ''], ['Share of the pairs', '']], rows)}{''.join(lists)}"
    )


def _names(title: str, names: Sequence[str]) -> str:
    shown = "".join(f"<li>{_text(name)}</li>" for name in names[:CASES_LISTED])
    more = f"<p>The first {CASES_LISTED} are listed.</p>" if len(names) > CASES_LISTED else ""
    summary = f"<summary>{len(names):,} cases: {_text(title)}</summary>"
    return f'<details>{summary}{more}<ul class="cases">{shown}</ul></details>'


def _following(trainer: Any, following: Sequence[str]) -> str:
    parts = []
    for line in following:
        what, command = line.split(": ", 1)
        words = " ".join(f"<span>{_text(word)}</span>" for word in command.split(" "))  # lines break between them
        parts.append(f"<p>{_text(what)}</p><pre>{words}</pre>")
    notes = []
    if trains := [line for line in following if "nnUNetv2_train" in line]:
        if not any("-device" in line for line in trains):
            notes.append("Without a GPU add <code>-device cpu</code>.")
        control = trainer.control_of_next_training()
        notes.append(f"Only the same training with <code>-tr {_text(control)}</code> tells whether it helped.")
    return "".join(parts) + (f"<p>{' '.join(notes)}</p>" if notes else "")


def _settings(settings: Mapping[str, Any]) -> str:
    groups = {"Training": {name: value for name, value in settings.items() if not isinstance(value, dict)}}
    groups |= {name.capitalize(): value for name, value in settings.items() if isinstance(value, dict)}
    tables = "".join(
        f"<div><h3>{_text(title)}</h3>"
        f"{_table([], [(name, _value(name, value)) for name, value in group.items()])}</div>"
        for title, group in groups.items()
    )
    return (
        f"<p>All that was in effect, by the command, the plan's block <code>pcrl.pretrain</code> and default. Sizes in "
        f'voxels of the preprocessed images, spacing in mm.</p><div class="settings">{tables}</div>'
    )


def _value(name: str, value: Any) -> str:
    """A setting for people to read."""
    if name == "levels":
        return ", ".join(f"restore {r}, compare {c}" for r, c in value) or "all"
    if isinstance(value, (tuple, list)):
        nested = any(isinstance(item, (tuple, list)) for item in value)
        return (", " if nested else "x").join(_value("", item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[Sequence[str]], rows: Iterable[Sequence[object]]) -> str:
    """Cells are escaped; of a column's head the second line is smaller."""
    cells = "".join(f"<th>{_text(name)}<small>{_text(small)}</small></th>" for name, small in head)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    above = f"<thead><tr>{cells}</tr></thead>" if cells else ""
    return f'<div class="wide"><table>{above}<tbody>{body}</tbody></table></div>'


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no -0.000


def _text(anything: object) -> str:
    return escape(str(anything))


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
_STYLE = """
:root { --page: #fff; --ink: #1d232a; --soft: #5a6570; --line: #dde2e7; --card: #f4f6f8; --accent: #2767a8;
  --good: #1d7a46; --bad: #b3261e; --bad-card: #fdecea }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e3e8ed; --soft: #9ba6b1; --line: #2e363f;
  --card: #1c2229; --accent: #86b9f0; --good: #6cc592; --bad: #f2948c; --bad-card: #3a1e1c } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  overflow-wrap: anywhere }
main { max-width: 74rem; margin: 0 auto; padding: clamp(1rem, 4vw, 3rem) clamp(1rem, 4vw, 2.5rem) 4rem }
h1 { font-size: clamp(1.5rem, 4.5vw, 2.3rem); line-height: 1.2; margin: .1rem 0 .5rem; letter-spacing: -.01em }
h2 { font-size: 1.35rem; margin: 0 0 .6rem; padding-top: 1.6rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: .6rem 0 .2rem }
section { margin-top: 2.4rem }
p { margin: .5rem 0 1rem; max-width: 46rem }
small, figcaption, dt, .of, .kind, summary { color: var(--soft) }
.kind { margin: 0; font-size: .9rem }
.of span + span::before { content: "\\b7"; margin-right: .5em }
.of b, figcaption b { color: var(--ink) }
.badge { display: inline-block; vertical-align: .25em; font-size: .8rem; font-weight: 600; letter-spacing: 0;
  padding: .1rem .6rem; border-radius: 1rem; border: 1px solid; white-space: nowrap }
.done, .good { color: var(--good) }
.open { color: var(--accent) }
.bad { color: var(--bad) }
.alarm { color: var(--bad); background: var(--bad-card); padding: .6rem .9rem; border-radius: .5rem }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .9rem 1.5rem;
  background: var(--card); border-radius: .7rem; padding: 1rem 1.2rem; margin: 1.2rem 0 0 }
.long { grid-column: 1 / -1 }
dt { font-size: .8rem }
dd { margin: 0 }
figure { margin: 0 0 1.6rem }
figcaption { font-size: .9rem; line-height: 1.45; margin-bottom: .5rem; max-width: 46rem }
figcaption b { display: block; font-size: 1rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 2.5rem;
  margin-top: 1.5rem }
.charts figure { display: flex; flex-direction: column; justify-content: space-between }
svg { display: block; width: 100%; height: auto }
svg text { font-family: inherit !important }
.strip { display: grid; gap: .7rem; max-width: calc(var(--n) * 14rem); font-size: .82rem; line-height: 1.35;
  grid-template-columns: repeat(auto-fill, minmax(max(6.2rem, calc(100% / var(--n) - .7rem)), 1fr)) }
.strip img { display: block; width: 100%; border-radius: .35rem; margin-bottom: .3rem; image-rendering: pixelated;
  background: #000 }
.wide { overflow-x: auto }
.wide img { display: block; width: 100%; min-width: 48rem; background: #fff; border-radius: .5rem }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th { text-align: left; vertical-align: top; line-height: 1.3 }
th small { display: block; font-weight: normal }
th, td { padding: .35rem 1.6rem .35rem 0; border-bottom: 1px solid var(--line); overflow-wrap: normal }
@media (max-width: 36rem) { th, td { padding-right: .7rem } table { font-size: .85rem } }
.settings { display: grid; gap: 1rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)) }
.settings table { width: 100% }
.settings td { vertical-align: top; padding-right: .8rem; overflow-wrap: anywhere }
.settings td:first-child { color: var(--soft); width: 45% }
pre { background: var(--card); border-radius: .5rem; padding: .8rem 1rem; font-size: .88rem; white-space: pre-wrap }
pre span { display: inline-block; max-width: 100% }
details { margin: .8rem 0 }
summary { cursor: pointer }
.cases { columns: 14rem; font-size: .85rem; padding-left: 1.2rem; margin: .5rem 0 }
@media print { details { display: none } }
"""
