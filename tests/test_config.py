import pytest

from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.errors import UserError


def test_finetuning_takes_the_plans_part_and_names_a_wrong_key():
    assert FinetuneSettings.from_plan({"pcrl": {"finetune": {"epochs": 9}}}).epochs == 9
    assert FinetuneSettings.from_plan({}, {"epochs": 4}).epochs == 4
    with pytest.raises(UserError, match=r"pcrl.finetune.lr is not a setting; expected one of .*initial_lr"):
        FinetuneSettings.from_plan({"pcrl": {"finetune": {"lr": 1.0}}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder_lr_factor": -1}, r"encoder_lr_factor is -1; expected .* \(a factor of 0 freezes the encoder\)"),
        ({"frozen_epochs": -1}, r"frozen_epochs is -1; expected 0 or more, and fewer than the 9 epochs"),
        (
            {"frozen_epochs": 9},
            r"frozen_epochs is 9; .* 9 epochs: to freeze .* all of them, set encoder_lr_factor to 0",
        ),
        ({"frozen_epochs": 0.5}, r"frozen_epochs is 0.5; expected a value like 0"),
        ({"layer_lr_decay": 0}, r"layer_lr_decay is 0; expected a number above 0, up to 1 .* encoder_lr_factor to 0"),
        ({"layer_lr_decay": 1.1}, r"layer_lr_decay is 1.1; expected a number above 0, up to 1"),
    ],
)
def test_a_wrong_choice_of_what_finetuning_moves_is_named(given, message):
    with pytest.raises(UserError, match=message):
        FinetuneSettings.from_plan({"pcrl": {"finetune": {"epochs": 9, **given}}})


def test_all_choices_of_what_finetuning_moves_may_be_taken_at_their_limits():
    FinetuneSettings(epochs=9, encoder_lr_factor=0.0, frozen_epochs=8, layer_lr_decay=1.0)
