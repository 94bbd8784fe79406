"""Warnings against reading too much into a table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pcrl_nnunet.experiments.arms import CONTROL, STOCK
from pcrl_nnunet.experiments.comparison import Comparison
from pcrl_nnunet.experiments.scores import LEARNED, Scores, labelled_cases

LONG_ENOUGH = 5000  # iterations with labels: nnU-Net's optimiser may predict background alone for the first 600


def note_on_stock(comparison: Comparison) -> str | None:
    """Say that nnU-Net's schedule equals the control's if the epochs are too few for a warm-up.

    A single warm-up epoch already has the full rate. None if the schedules differ; in a classification their rates do.
    """
    if STOCK not in comparison.arms or comparison.label_table is not None:
        return None
    control, stock = (comparison.finetune_settings(name) for name in (CONTROL, STOCK))
    if control.warmup_epochs > 1 or replace(control, warmup_share=stock.warmup_share) != stock:
        return None
    return (
        f"{STOCK} equals {CONTROL} here: {control.warmup_share:.0%} of {control.epochs} epochs leave no "
        f"warm-up epoch, so the two differ only by chance"
    )


def note_on_learning(
    scores: Scores, learned: Mapping[int, Sequence[str]], remedy: str, shortcuts: Iterable[str] = ()
) -> str | None:
    """Name the networks that learned nothing and say what to do; None if all learned something.

    Args:
        learned: see `networks_that_learned`.
        remedy: see `remedy_for_learning`.
        shortcuts: arms without a network.
    """
    networks, told = scores.runs[~scores.runs["method"].isin(list(shortcuts))], []
    by_luck = False  # the mean over too few cases is above chance
    for labelled in sorted(learned):
        means = networks[networks["labelled"] == labelled].groupby("method", sort=False)["points"].mean()
        failed = means[~means.index.isin(learned[labelled])]
        number = labelled_cases(labelled)
        if not learned[labelled]:
            luck = bool(means.max() >= scores.chance + LEARNED)
            by_luck |= luck
            kind = "is surely better than chance" if luck else "learned anything"
            told.append(f"with {number} no network {kind} (the best, {means.idxmax()}: {means.max():.1f})")
        elif len(failed):
            listed = ", ".join(f"{arm}: {points:.1f}" for arm, points in failed.items())
            told.append(f"with {number} some networks learned nothing ({listed})")
    if not told:
        return None
    start = "There is no verdict: " if by_luck else "Nothing was learned, and there is no verdict: "
    start = "" if any(learned.values()) else start
    chance = f"without a look at the images a prediction reaches up to {scores.chance:.1f} {scores.measure}"
    told[0] = told[0] if start else told[0][0].upper() + told[0][1:]
    return f"{start}{'; '.join(told)}; {chance}. {remedy}"


def remedy_for_learning(comparison: Comparison) -> str:
    """Name the settings that lengthen the trainings with labels, and the place to give them."""
    now = comparison.finetune_settings(CONTROL)
    wanted = max(4 * now.epochs, -(-LONG_ENOUGH // now.iters_per_epoch))
    finetune = {**comparison.settings.get("finetune", {}), "epochs": wanted}
    example = json.dumps({**comparison.settings, "finetune": finetune})
    more = "" if comparison.label_table is None else "; more scored cases may also tell a small effect from chance"
    return (
        f"The trainings with labels are {now.epochs} x {now.iters_per_epoch} iterations (finetune.epochs, "
        f"finetune.iters_per_epoch): lengthen them with a file for -settings such as {example}, and with another "
        f"folder for -o{more}"
    )


def shortcut_warning(scores: Scores, shortcuts: Iterable[str]) -> str | None:
    """Name the shortcuts that are as good as the best network, which then may have learned nothing else."""
    names, told = set(shortcuts), []
    for labelled in sorted(scores.runs["labelled"].unique()):
        means = scores.runs[scores.runs["labelled"] == labelled].groupby("method")["points"].mean()
        short, networks = means[means.index.isin(names)], means[~means.index.isin(names)]
        if len(short) and len(networks) and short.max() >= networks.max():
            told.append(
                f"with {labelled_cases(labelled)}, {short.idxmax()} reaches {short.max():.1f}, {networks.idxmax()} "
                f"{networks.max():.1f}"
            )
    if not told:
        return None
    return f"A shortcut is as good as the best network: {'; '.join(told)}."
