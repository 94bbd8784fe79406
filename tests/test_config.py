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
        ({"seg_layers_only_epochs": 9}, r"seg_layers_only_epochs is 9; expected .* fewer than the 9 epochs$"),
        ({"layer_lr_decay": 0}, r"layer_lr_decay is 0; expected a number above 0, up to 1 .* encoder_lr_factor to 0"),
        ({"layer_lr_decay": 1.1}, r"layer_lr_decay is 1.1; expected a number above 0, up to 1"),
    ],
)
def test_a_wrong_choice_of_trained_parts_is_named(given, message):
    with pytest.raises(UserError, match=message):
        FinetuneSettings.from_plan({"pcrl": {"finetune": {"epochs": 9, **given}}})


@pytest.mark.parametrize(
    ("given", "rate", "deep_supervision", "weight_decay"),
    [
        ({}, 1e-2, True, 3e-5),
        ({"recipe": "pretrained"}, 1e-3, False, 3e-5),  # the recipe of nnU-Net's main branch
        ({"optimizer": "adamw"}, 1e-3, True, 1e-2),
        ({"recipe": "pretrained", "optimizer": "adamw"}, 1e-4, False, 1e-2),
        ({"recipe": "pretrained", "initial_lr": 0.5, "deep_supervision": True}, 0.5, True, 3e-5),
        ({"optimizer": "adamw", "initial_lr": 0.5, "weight_decay": 0.25}, 0.5, True, 0.25),
    ],
)
def test_recipe_and_optimizer_are_defaults_that_the_plan_may_change(given, rate, deep_supervision, weight_decay):
    made = FinetuneSettings.from_plan({"pcrl": {"finetune": given}})
    assert (made.initial_lr, made.deep_supervision, made.weight_decay) == (rate, deep_supervision, weight_decay)
    assert made.warmup_share == 0.05  # 50 of 1000 epochs


def test_a_recipe_overrides_a_trainers_own_default():
    for recipe, rate in (("nnunet", 0.25), ("pretrained", 1e-3)):
        plan = {"pcrl": {"finetune": {"recipe": recipe}}}
        assert FinetuneSettings.from_plan(plan, {"initial_lr": 0.25}).initial_lr == rate
    with pytest.raises(UserError, match=r"pcrl.finetune.recipe is 'mae'; expected 'nnunet' or 'pretrained'"):
        FinetuneSettings.from_plan({"pcrl": {"finetune": {"recipe": "mae"}}})


def test_all_choices_of_trained_parts_are_valid_at_their_limits():
    FinetuneSettings(epochs=9, encoder_lr_factor=0.0, frozen_epochs=8, layer_lr_decay=1.0)
