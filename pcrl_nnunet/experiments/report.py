"""The lines at the end of a comparison: the table, the paths of the pictures, warnings and the verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pcrl_nnunet.classification.shortcuts import SHORTCUTS
from pcrl_nnunet.experiments.arms import CONTROL, PRETRAINED, STOCK
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.layout import Layout
from pcrl_nnunet.experiments.notes import note_on_learning, note_on_stock, remedy_for_learning, shortcut_warning
from pcrl_nnunet.experiments.pictures import draw_pictures
from pcrl_nnunet.experiments.results import collect
from pcrl_nnunet.experiments.side_by_side import notes, side_by_side
from pcrl_nnunet.experiments.table import networks_that_learned, table
from pcrl_nnunet.experiments.verdict import note_on_pretraining, verdict, what_to_use


def report(layout: Layout, runs: Sequence[Run]) -> Iterator[str]:
    """Yield the table, the pictures' paths and the verdicts. The default method's verdict comes last if it exists.

    If no network learned anything, the last line says that instead.
    """
    scores = collect(layout, runs)
    rows = table(scores)
    rows.to_csv(layout.file("table.csv"), index=False)
    yield f"{scores.measure}, points: mean (95 % interval over subsets and patients)"
    yield side_by_side(scores).reset_index().to_string(index=False)
    yield from notes(scores)
    yield f"Differences to {CONTROL}, with their intervals: {layout.file('table.csv')}"
    learned = networks_that_learned(rows, SHORTCUTS)
    yield from draw_pictures(layout, scores, learned)
    on_stock = note_on_stock(layout.comparison)
    on_learning = note_on_learning(scores, learned, remedy_for_learning(layout.comparison), SHORTCUTS)
    yield from filter(None, (shortcut_warning(scores, SHORTCUTS), on_stock, on_learning))
    if not any(learned.values()) and on_learning:
        return
    if on_pretraining := note_on_pretraining(scores, learned):
        yield on_pretraining
    controls = (CONTROL, STOCK) if on_stock is None else (CONTROL,)  # two equal controls: the luckier one would win
    networks = [arm for arm in dict.fromkeys(scores.runs["method"]) if arm not in (CONTROL, *SHORTCUTS)]
    controls_of = {arm: (*controls, *layout.comparison.arms[arm].controls) for arm in networks}
    if to_use := what_to_use(scores, learned, controls_of):
        yield to_use
    for arm in sorted(networks, key=lambda arm: arm == PRETRAINED):
        yield verdict(scores, arm, learned, controls_of[arm])
