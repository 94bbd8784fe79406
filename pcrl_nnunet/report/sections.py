"""The sections of a report that need only the facts."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

import numpy as np

from pcrl_nnunet.loading.cases import Case
from pcrl_nnunet.pretraining.facts import Facts
from pcrl_nnunet.report.html import chart, table, text, value
from pcrl_nnunet.report.progress import terms_by_panel

CASES_LISTED = 200  # for each folder of cases


def heading(facts: Facts, finished: bool) -> str:
    """Return the heading: method, data and progress of the training."""
    request, s, log = facts.request, facts.request.settings, facts.log
    badge = "finished" if finished else "not finished"
    fold = "all cases" if request.fold == "all" else f"fold {request.fold}"
    times = zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=False)
    a_step = [(end - start) / s.iters_per_epoch for start, end in times]
    short = {
        "Epochs": f"{facts.epochs_done} of {s.epochs}",
        "Steps": f"{facts.steps:,} of {s.steps:,}",
        "A step": f"{s.batch_size} samples" + (f", median {np.median(a_step):.2g} s" if a_step else ""),
        "Cases": f"{len(facts.cases):,}",
        "Device": facts.device,
        "Written": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }
    long = {"Versions": ", ".join(f"{name} {version(name)}" for name in ("pcrl_nnunet", "nnunetv2", "torch"))}
    if facts.init:
        long["Started from"] = facts.init["checkpoint"]
    long["Folder"] = facts.folder
    listed = "".join(
        f"<div{' class=long' if name in long else ''}><dt>{name}</dt><dd>{text(fact)}</dd></div>"
        for name, fact in {**short, **long}.items()
    )
    return (
        f'<header><p class="kind">Pretraining by {text(facts.network.title)}, without labels</p>'
        f"<h1>{text(' + '.join(request.cases.datasets))} "
        f'<span class="badge {"done" if finished else "open"}">{badge}</span></h1>'
        f'<p class="of"><span>plan <b>{text(request.plan.plans["plans_name"])}</b></span> '
        f"<span>configuration <b>{text(request.plan.configuration)}</b></span> <span><b>{text(fold)}</b></span></p>"
        f"<dl>{listed}</dl></header>"
    )


def losses(facts: Facts) -> str:
    """Return the charts of the loss's terms and of the learning rate."""

    def of(name: str) -> tuple[range, Sequence[float]]:
        return range(1, len(facts.log[name]) + 1), facts.log[name]

    charts = []
    for panel, labels in (terms_by_panel(facts.network.terms) or {"loss": {"train_losses": "loss"}}).items():
        curves = {label if len(labels) > 1 else "": of(name) for name, label in labels.items()}
        there = {label: curve for label, curve in curves.items() if np.isfinite(curve[1]).any()}
        charts.append(chart(f"Loss: {panel}" if panel != "loss" else "Loss", "", there))
    falls = "A cosine decay to 0 over all steps, as it is when an epoch begins."
    charts.append(chart("Learning rate", falls, {"": of("lrs")}))
    return f'<p>{text(facts.network.terms_caption)}</p><div class="charts">{"".join(charts)}</div>'


def cases(facts: Facts) -> str:
    """Return the cases by folder with their share of the samples, and the cases that were left out."""
    by_folder: dict[str, list[Case]] = defaultdict(list)
    for case in facts.cases:
        by_folder[os.path.dirname(case.path)].append(case)
    weight = sum(case.weight for case in facts.cases)
    rows, lists = [], []
    for folder, of_folder in by_folder.items():
        dataset, data = os.path.split(folder)
        dataset = os.path.basename(dataset)
        rows.append((dataset, data, f"{len(of_folder):,}", f"{sum(case.weight for case in of_folder) / weight:.1%}"))
        lists.append(_names(f"{dataset}, {data}", [case.name for case in of_folder]))
    started = facts.init["cases"] if facts.init else []
    if started:
        lists.append(_names("seen before, by the checkpoint that it started from", [case["name"] for case in started]))
    if facts.init and not facts.init["all_cases_known"]:
        lists.append("<p>The checkpoint that it started from does not list all cases that it has seen.</p>")
    if copies_of := facts.request.cases.copies:
        copies = [f"{copy}, which has the voxels of {case}" for copy, case in copies_of.items()]
        lists.append(_names("left out as copies of validation cases", copies))
    drawn = facts.steps * facts.request.settings.batch_size
    return (
        f"<p>Samples are drawn from {len(facts.cases):,} cases; {drawn:,} samples so far, "
        f"{drawn / len(facts.cases):.3g} of a case on average. {text(facts.request.cases.note_on_fold())}</p>"
        f"{table([['Dataset', ''], ['Folder', ''], ['Cases', ''], ['Share of the samples', '']], rows)}{''.join(lists)}"
    )


def _names(title: str, names: Sequence[str]) -> str:
    shown = "".join(f"<li>{text(name)}</li>" for name in names[:CASES_LISTED])
    more = f"<p>The first {CASES_LISTED} are listed.</p>" if len(names) > CASES_LISTED else ""
    summary = f"<summary>{len(names):,} cases: {text(title)}</summary>"
    return f'<details>{summary}{more}<ul class="cases">{shown}</ul></details>'


def following(lines: Sequence[str]) -> str:
    """Return the commands that come next."""
    parts = []
    for line in lines:
        what, command = line.split(": ", 1)
        words = " ".join(f"<span>{text(word)}</span>" for word in command.split(" "))  # lines break between words
        parts.append(f"<p>{text(what)}</p><pre>{words}</pre>")
    notes = []
    if trains := [line for line in lines if "nnUNetv2_train" in line]:
        if not any("-device" in line for line in trains):
            notes.append("Without a GPU add <code>-device cpu</code>.")
        scratch = "PCRLClassificationScratchTrainer" if "Classification" in trains[0] else "PCRLScratchTrainer"
        notes.append(f"Only the same training with <code>-tr {scratch}</code> tells whether pretraining helped.")
    return "".join(parts) + (f"<p>{' '.join(notes)}</p>" if notes else "")


def settings(given: Mapping[str, Any], unit: str) -> str:
    """Return all settings: a table of shared settings, and a table for each block of the method.

    Args:
        unit: see `plans.unit_of`.
    """
    groups = {"Training": {name: item for name, item in given.items() if not isinstance(item, dict)}}
    for name, block in given.items():
        if isinstance(block, dict):
            groups[name] = {key: item for key, item in block.items() if not isinstance(item, dict)}
            groups |= {f"{name}, {key}": item for key, item in block.items() if isinstance(item, dict)}
    tables = "".join(
        f"<div><h3>{text(title)}</h3>{table([], [(name, value(item)) for name, item in group.items()])}</div>"
        for title, group in groups.items()
    )
    sizes = "Sizes in voxels of the preprocessed images, spacing in mm."
    if unit == "pixels":
        sizes = "Sizes in pixels of the preprocessed images."
    return (
        f"<p>All settings in effect, from the command, the plan's block <code>pcrl.pretrain</code> and defaults. "
        f'{sizes}</p><div class="settings">{tables}</div>'
    )
