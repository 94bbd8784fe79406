"""report.html of a pretraining: one file that shows the training, its data and its course."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from time import monotonic
from traceback import extract_tb
from typing import Any

from pcrl_nnunet.files import write_text
from pcrl_nnunet.methods.quantities import Quantity
from pcrl_nnunet.plans import unit_of
from pcrl_nnunet.pretraining.facts import Facts
from pcrl_nnunet.pretraining.monitor import Summary, judge
from pcrl_nnunet.report import sections
from pcrl_nnunet.report.examples import Example, examples_of, pictures_of, strip
from pcrl_nnunet.report.html import chart, number, page, table, text

NAME = "report.html"
WORTH = 100  # wait this many times the last report's duration before the next: at most 1 % of the training
ALARMS_LISTED = 50
_COLOURS = {"learning": "good", "too early": "open", "alarm": "bad"}  # CSS classes


class Report:
    """The report of a pretraining: collects the monitor's values of every epoch and writes report.html.

    Attributes:
        epochs: plain values for the training state: each epoch's number and the monitor's summary.
    """

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []
        self._examples: list[Example] = []  # the same examples throughout a training
        self._background: str | None = None  # likewise
        self._last: float | None = None  # time of the last report
        self._took = 0.0  # seconds that it took

    def add(self, epoch: int, summary: Summary) -> None:
        """Store the monitor's values at the end of an epoch; the first epoch is 1."""
        self.epochs.append({"epoch": epoch, "monitor": dict(summary)})

    def is_due(self) -> bool:
        """Tell whether a report now costs little time: the first report, or one long after the last."""
        return self._last is None or monotonic() - self._last >= WORTH * self._took

    def write(self, facts: Facts, following: Sequence[str], finished: bool) -> None:
        """Write the file. An error becomes a warning in the log, because a report must not end the training.

        The network and all random generators stay unchanged.

        Args:
            following: "What to do: COMMAND" for each command that comes next.
            finished: whether the training is finished.
        """
        start, path = monotonic(), os.path.join(facts.folder, NAME)
        try:
            write_text(path, self._page(facts, following, finished))
        except Exception as error:
            facts.say(f"WARNING: {path} could not be written ({_said(error)}); the training goes on")
        self._last = monotonic()
        self._took = self._last - start

    def _page(self, facts: Facts, following: Sequence[str], finished: bool) -> str:
        parts: tuple[tuple[str, Callable[[], str]], ...] = (
            ("Is it learning?", lambda: self._learning(facts)),
            ("Training", lambda: sections.losses(facts)),
            ("What the network does", lambda: self._pictures(facts)),
            ("What it sees", lambda: self._views(facts)),
            ("Cases", lambda: sections.cases(facts)),
            ("What comes next", lambda: sections.following(following)),
            (
                "Settings",
                lambda: sections.settings(facts.request.settings.as_dict(), unit_of(facts.request.plan.plans)),
            ),
        )
        body = [sections.heading(facts, finished)]
        for title, make in parts:
            try:
                content = make()
            except Exception as error:  # keep the other sections
                facts.say(f"WARNING: the report lacks its section '{title}' ({_said(error)}); the training goes on")
                content = f'<p class="alarm">This section could not be made ({text(_said(error))}).</p>'
            if content:
                body.append(f"<section>\n<h2>{text(title)}</h2>\n{content}\n</section>")
        return page(f"{' + '.join(facts.request.cases.datasets)}: pretraining", "\n".join(body))

    def _learning(self, facts: Facts) -> str:
        if not self.epochs:
            return "<p>The first epoch has not ended yet.</p>"
        last, quantities = self.epochs[-1], facts.network.quantities
        verdict = judge(last["monitor"], last["epoch"] * facts.request.settings.iters_per_epoch, quantities)
        alarms = "".join(f'<p class="alarm"><b>Alarm:</b> {text(said)}</p>' for said in verdict.alarms)
        groups = list(dict.fromkeys(group for values in last["monitor"].values() for group in values))
        groups.sort(key=lambda group: (len(group), group))
        if not groups:
            return "<p>This method has nothing that the monitor looks at.</p>"
        # some settings of a method lack a quantity
        known = [quantity for quantity in quantities if last["monitor"].get(quantity.name)]
        values = table(
            [["", ""], *([quantity.heading, quantity.good] for quantity in known)],
            [
                [group, *(number(last["monitor"][quantity.name].get(group)) for quantity in known)]
                for group in groups
            ],
        )  # fmt: skip
        return (
            f'<p class="{_COLOURS[verdict.state]}">{text(verdict.text)}</p>{alarms}'
            f"<p>Epoch {last['epoch']}, means over its steps.</p>{values}"
            f'<div class="charts">{"".join(map(self._chart, quantities))}</div>{self._earlier(facts)}'
        )

    def _chart(self, quantity: Quantity) -> str:
        curves: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
        for of_epoch in self.epochs:
            for group, measured in of_epoch["monitor"].get(quantity.name, {}).items():
                curves[group][0].append(of_epoch["epoch"])
                curves[group][1].append(measured)
        ordered = {group: curves[group] for group in sorted(curves, key=lambda group: (len(group), group))}
        return chart(quantity.heading, quantity.caption, ordered, quantity.lower, quantity.line)

    def _earlier(self, facts: Facts) -> str:
        """List the alarms of all epochs but the last."""
        steps, quantities = facts.request.settings.iters_per_epoch, facts.network.quantities
        epochs = [(e["epoch"], judge(e["monitor"], e["epoch"] * steps, quantities)) for e in self.epochs[:-1]]
        found = [(epoch, alarm) for epoch, verdict in epochs for alarm in verdict.alarms]
        if not found:
            return ""
        shown = found[-ALARMS_LISTED:]
        cut = f", the last {len(shown)} of them" if len(shown) < len(found) else ""
        return (
            f"<details><summary>{len(found)} alarms in earlier epochs{cut}</summary>"
            f"{table([['Epoch', ''], ['Alarm', '']], shown)}</details>"
        )

    def _pictures(self, facts: Facts) -> str:
        examples = self._examples_of(facts)
        pictures = pictures_of(facts, examples)
        if not pictures:
            return "<p>This training has no pictures of what the network does.</p>"
        figures = []
        for index, example in enumerate(examples):
            strips = "".join(strip(example, index, pictures, channel) for channel in range(len(example.channels)))
            figures.append(
                f'<figure><figcaption><b class="name">{text(example.name)}</b>{text(example.first)}</figcaption>'
                f"{strips}</figure>"
            )
        what = "The middle slice is shown" if pictures[0].images.ndim == 5 else "The whole view is shown"
        scale = ", a row for each channel, each row in one grey scale" if len(examples[0].channels) > 1 else ""
        errors = (
            " <i>Error</i> is over the variance of the target: 1 means that nothing is restored."
            if any(picture.errors is not None for picture in pictures)
            else ""
        )
        return (
            f"<p>{text(facts.network.pictures_caption)} {what}{scale}.{errors} A single image may be far from "
            f"the mean that the curves show.</p>{''.join(figures)}"
        )

    def _views(self, facts: Facts) -> str:
        figures = "".join(
            f'<figure><img class="views" alt="Views of {text(example.name)}" src="{example.views}"></figure>'
            for example in self._examples_of(facts)
        )
        if self._background is None:
            self._background = facts.loader.background_line()
        background = f"<p>Background: {text(self._background)}.</p>" if self._background else ""
        return (
            f"<p>The views of a few cases: their places, and their content before and after augmentation. Check that "
            f"the boxes hold the parts of the body that matter, and that you can still recognise these parts in the "
            f"larger views. Each channel has its own rows: a structure lies at the same place in all channels. "
            f"Views are flipped at random: 'flip' names the axes. Training draws new views in every step.</p>"
            f"{background}{figures}"
        )

    def _examples_of(self, facts: Facts) -> list[Example]:
        self._examples = self._examples or examples_of(facts.loader, facts.request.plan)
        return self._examples


def _said(error: Exception) -> str:
    """Return an error's type, text and origin."""
    where = extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error}, in {os.path.basename(where.filename)}, line {where.lineno}"
