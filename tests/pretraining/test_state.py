"""A training state and the training that resumes from it."""

import pytest

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.pretraining.state import refuse_another

NOW = {
    "settings": {"epochs": 3, "pcrlv2": {"restoration": "single", "views": {"num_local": 6, "min_iou": 0.3}}},
    "plans": {"plans_name": "p"},
    "cases": ["a", "b"],
}


@pytest.mark.parametrize(
    ("what", "value", "named"),
    [
        ("settings", {"epochs": 3, "pcrlv2": {"restoration": "full", "views": {"num_local": 6, "min_iou": 0.1}}},
         r"settings \['pcrlv2.restoration', 'pcrlv2.views.min_iou'\]"),
        ("plans", {"plans_name": "p", "configurations": {}}, r"plans \['configurations'\]"),
        ("cases", ["a", "c"], r"cases \['b', 'c'\]"),
        ("cases", ["b", "a"], r"cases \['their order'\]"),
    ],
)  # fmt: skip
def test_a_state_of_another_training_is_refused_with_the_differences(what, value, named):
    with pytest.raises(UserError, match=rf"the {named} differ from those that x.pth was trained with; continue with"):
        refuse_another({**NOW, what: value}, NOW, "x.pth")


def test_a_state_of_the_same_training_is_accepted_despite_other_plan_settings():
    refuse_another({**NOW, "plans": {"plans_name": "p", "pcrl": {"pretrain": {}}}}, NOW, "x.pth")
