"""The report of the cheap look: two files, a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
from matplotlib.figure import Figure

from pcrl_nnunet.experiments.frozen import RANDOM, FrozenLook
from pcrl_nnunet.experiments.scores import AurocScores, DiceScores, Scores, labelled_cases
from pcrl_nnunet.experiments.side_by_side import notes, side_by_side
from pcrl_nnunet.figure_style import DPI, WIDTH, heading, own_style
from pcrl_nnunet.files import whole


def report(frozen: FrozenLook) -> Iterator[str]:
    """Write frozen.csv, information.csv and frozen.png, and yield the table and its explanation."""
    layout, runs, answers = frozen.layout, frozen.kept("run"), frozen.kept("information")
    patients = layout.comparison.cases.patients
    scores: Scores
    if layout.comparison.label_table is None:
        runs = runs.astype({"dice": float})
        scores, rows, measure = DiceScores(runs, patients), runs, "dice"
    else:
        scores = AurocScores(runs, patients)
        rows, measure = scores.of_labels.assign(case="all"), "auroc"
    answers = answers.assign(chance=1 / answers["classes"])
    files = {
        "frozen.csv": rows[["method", "labelled", "seed", "case", "label", measure]],
        "information.csv": answers[["method", "seed", "task", "classes", "chance", "accuracy", "crops"]],
    }
    for name, content in files.items():
        with whole(layout.file(name)) as draft:
            content.to_csv(draft, index=False)
    yield f"{scores.measure} of light heads on frozen features, points: mean (95 % interval)"
    yield from table(scores, answers)
    picture = layout.file("frozen.png")
    with whole(picture) as draft:
        draw(scores, answers, f"{layout.comparison.dataset}, {layout.comparison.plan.configuration}", draft)
    yield f"Files: {', '.join(layout.file(name) for name in files)}"
    yield f"Picture: {picture}"


def table(scores: Scores, answers: pd.DataFrame) -> Iterator[str]:
    """Yield the table and which methods are surely the best.

    Rows are methods. Columns are numbers of labelled cases, then the shares of right answers, in %.
    """
    rows = side_by_side(scores)
    for task, own in answers.groupby("task", sort=False):
        means = 100 * own.groupby("method")["accuracy"].mean()
        chance = 100 * own["chance"].iloc[0]
        rows[f"{task}, % (chance {chance:.1f})"] = [
            f"{means[name]:.1f}" if name in means else "" for name in rows.index
        ]
    yield rows.reset_index().to_string(index=False)
    yield from notes(scores)


@own_style()
def draw(scores: Scores, answers: pd.DataFrame, title: str, path: str) -> None:
    """Draw every subset's point and each method's mean: a panel for each number of labelled cases and each question."""
    methods = list(dict.fromkeys(scores.runs["method"]))
    colours = {name: "0.4" if name == RANDOM else f"C{number % 10}" for number, name in enumerate(methods)}
    panels: list[tuple[str, pd.DataFrame, float | None]] = []
    for number, own in scores.runs.groupby("labelled"):
        name = f"{scores.measure} with {labelled_cases(int(str(number)))}, points"
        panels.append((name, own.rename(columns={"points": "value"}), None))
    for task, own in answers.groupby("task", sort=False):
        what = {"turn": "the turn of a crop", "place": "the place of a neighbouring crop"}[str(task)]
        by_luck = 100 * float(own["chance"].iloc[0])
        panels.append((f"right answers on {what}, %", own.assign(value=100 * own["accuracy"]), by_luck))
    figure = Figure(figsize=(WIDTH, 0.9 + (0.75 + 0.27 * len(methods)) * len(panels)), layout="constrained")
    heading(figure, f"{title}\nLight heads on frozen features\npoint: a subset; line: mean; dotted: chance")
    for axis, (name, values, chance) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        shown = [method for method in methods if (values["method"] == method).any()]  # shortcuts answer no question
        for row, method in enumerate(shown):
            own = values.loc[values["method"] == method, "value"]
            axis.plot(own, [row] * len(own), "o", ms=5, alpha=0.6, color=colours[method])
            axis.plot([own.mean()], [row], "|", ms=16, mew=2, color=colours[method])
        if chance is not None:
            axis.axvline(chance, color="grey", linestyle=":")
        axis.set_yticks(range(len(shown)), shown)
        axis.set_ylim(len(shown) - 0.5, -0.5)
        axis.set_xlabel(name)
        axis.grid(axis="x")
    figure.savefig(path, dpi=DPI)
