"""The lengths of a comparison that has to end within some hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments import hours
from pcrl_nnunet.experiments.forecast import Cost, Training, Work
from pcrl_nnunet.experiments.hours import KEPT, lengths_for


def work(steps: float = 360.0, start: float = 0.0, case: float = 0.0) -> Work:
    """Return 1000 trainings with a step of a second, 100 hours in all by default."""
    cost = Cost(1.0, start, case)
    trainings = {str(number): Training(str(number), "kind", steps, 10, lambda: cost) for number in range(1000)}
    return Work(0.0, {"kind": cost}, {"kind": trainings})


@pytest.mark.parametrize(("at_a_time", "epochs"), [(1, (24, 100)), (2, (48, 200))])
def test_all_trainings_are_shortened_alike(at_a_time: int, epochs: tuple[int, int]) -> None:
    found = lengths_for(10 / (1 - KEPT), work(), at_a_time, 240, 1000)
    assert (found.pretrain_epochs, found.finetune_epochs) == epochs
    assert found.settings == {"pretrain": {"epochs": epochs[0]}, "finetune": {"epochs": epochs[1]}}
    assert "far from the defaults" in str(found)


def test_enough_hours_leave_the_default_length() -> None:
    found = lengths_for(1000, work(), 1, 240, 1000)
    assert (found.pretrain_epochs, found.finetune_epochs, found.share) == (240, 1000, 1.0)
    assert "far" not in str(found)


def test_too_few_hours_are_refused_with_the_least() -> None:
    with pytest.raises(UserError, match=r"-hours is 0.1, but one epoch of each training needs about 0.5 hours; allow"):
        lengths_for(0.1, work(), 1, 240, 1000)
    assert lengths_for(0.5, work(), 1, 240, 1000).pretrain_epochs == 1


def test_starts_and_predictions_do_not_become_shorter() -> None:
    assert work(start=36.0, case=3.6).other_hours == pytest.approx(20)
    found = lengths_for(70 / (1 - KEPT), work(start=36.0, case=3.6), 1, 240, 1000)
    assert (found.pretrain_epochs, found.finetune_epochs) == (120, 500)
    with pytest.raises(UserError, match=r"needs about 22.7 hours; allow"):
        lengths_for(22, work(start=36.0, case=3.6), 1, 240, 1000)


def test_the_frozen_look_has_no_trainings_with_labels() -> None:
    found = lengths_for(10 / (1 - KEPT), work(), 1, 240, 1, frozen=True)
    assert found.settings == {"pretrain": {"epochs": 24}}
    assert "with labels" not in str(found)


def test_the_lengths_are_kept_for_the_next_call(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert hours.read(folder, 10, False) is None
    found = lengths_for(10, work(), 1, 240, 1000)
    hours.write(folder, found)
    assert hours.read(folder, 10, False) == hours.read(folder, 10, True) == found
    with pytest.raises(UserError, match=r"-hours is 11, but the comparison in .* was begun with 10; give -hours 10"):
        hours.read(folder, 11, False)
    hours.write(folder, lengths_for(10, work(), 1, 240, 1000, frozen=True))
    with pytest.raises(UserError, match=r"was begun with -hours 10 for -frozen, which trains with no labels; give"):
        hours.read(folder, 10, False)
