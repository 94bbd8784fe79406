"""Settings of a semi-supervised training."""

from typing import Any

import pytest
from tiny_dataset import make_plan

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.semi_supervised.settings import SemiSettings


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"supervised_share": 0.0}, r"pcrl.semi.supervised_share is 0.0; expected .*: the teacher starts from"),
        ({"supervised_share": 1}, r"pcrl.semi.supervised_share is 1; expected "),
        ({"teacher_momentum": 1.1}, r"pcrl.semi.teacher_momentum is 1.1; expected "),
        ({"teacher_momentum": -0.1}, r"pcrl.semi.teacher_momentum is -0.1; expected "),
        ({"box_share": 1.0}, r"pcrl.semi.box_share is 1.0; expected "),
        ({"pseudo_weight": 0}, r"pcrl.semi.pseudo_weight is 0; expected "),
        ({"seed": -1}, r"pcrl.semi.seed is -1; expected "),
        ({"teacher_momentum": float("nan")}, r"pcrl.semi.teacher_momentum is nan; expected a finite number"),
        ({"pseudo_weight": "much"}, r"pcrl.semi.pseudo_weight is .much.; expected a value like 0.5"),
        ({"leave_out": "case_3"}, r"pcrl.semi.leave_out is .case_3.; expected a list: \[VALUE, \.\.\.\]"),
        ({"leave_out": [["case_3"]]}, r"pcrl.semi.leave_out has the entry \[.case_3.\]; expected names of cases"),
        ({"momentum": 0.9}, r"pcrl.semi.momentum is not a setting; expected one of box_share, leave_out, "),
    ],
)
def test_an_impossible_setting_ends_with_one_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=rf"^[^\n]*{sentence}[^\n]*$"):
        SemiSettings.from_plan(make_plan(semi=given))


def test_the_plan_changes_the_defaults() -> None:
    settings = SemiSettings.from_plan(make_plan(semi={"pseudo_weight": 2, "leave_out": ["case_3"]}))
    assert (settings.pseudo_weight, list(settings.leave_out)) == (2, ["case_3"])
    assert settings.teacher_momentum == SemiSettings().teacher_momentum
    assert SemiSettings.from_plan(make_plan()) == SemiSettings()


@pytest.mark.parametrize(
    ("share", "longest", "epochs", "least_and_largest"),
    [
        (0.4, 0.7, 1000, (400, 700)),
        (0.4, 0.7, 5, (2, 4)),
        (0.4, 1.0, 5, (2, 5)),
        (0.4, 0.0, 5, (2, 2)),
        (0.8, 0.7, 10, (8, 8)),
        (0.01, 0.99, 2, (1, 1)),
        (0.99, 0.99, 2, (1, 1)),
    ],
)
def test_each_phase_has_its_share_of_the_epochs(
    share: float, longest: float, epochs: int, least_and_largest: tuple[int, int]
) -> None:
    settings = SemiSettings(supervised_share=share, longest_supervised_share=longest)
    assert settings.supervised_epochs(epochs) == least_and_largest


def test_two_phases_need_two_epochs() -> None:
    with pytest.raises(UserError, match=r"^pcrl.finetune.epochs is 1; .* two phases: give 2 epochs or more$"):
        SemiSettings().supervised_epochs(1)
