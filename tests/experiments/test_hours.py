"""The lengths of a comparison that has to end within some hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments import hours
from pcrl_nnunet.experiments.hours import KEPT, lengths_for


@pytest.mark.parametrize(("at_a_time", "epochs"), [(1, (24, 100)), (2, (48, 200))])
def test_all_trainings_are_shortened_alike(at_a_time: int, epochs: tuple[int, int]) -> None:
    found = lengths_for(10 / (1 - KEPT), 100.0, at_a_time, 240, 1000)
    assert (found.pretrain_epochs, found.finetune_epochs) == epochs
    assert found.settings == {"pretrain": {"epochs": epochs[0]}, "finetune": {"epochs": epochs[1]}}
    assert "far from the defaults" in str(found)


def test_enough_hours_leave_the_default_length() -> None:
    found = lengths_for(1000, 100.0, 1, 240, 1000)
    assert (found.pretrain_epochs, found.finetune_epochs, found.share) == (240, 1000, 1.0)
    assert "far" not in str(found)


def test_too_few_hours_are_refused_with_the_least() -> None:
    with pytest.raises(UserError, match=r"-hours is 0.1, but one epoch of each training needs about 0.5 hours; allow"):
        lengths_for(0.1, 100.0, 1, 240, 1000)
    assert lengths_for(0.5, 100.0, 1, 240, 1000).pretrain_epochs == 1


def test_the_lengths_are_kept_for_the_next_call(tmp_path: Path) -> None:
    assert hours.read(str(tmp_path)) is None
    found = lengths_for(10, 100.0, 1, 240, 1000)
    hours.write(str(tmp_path), found)
    assert hours.read(str(tmp_path)) == found
