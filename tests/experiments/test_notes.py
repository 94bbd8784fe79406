"""Notes on the length of the trainings and on a control that equals another arm."""

import json
import re
from dataclasses import replace

import pytest
import torch

from pcrl_nnunet.experiments.notes import note_on_stock, remedy_for_learning
from pcrl_nnunet.finetuning.schedule import WarmupPolyLR


def test_the_remedy_for_short_trainings_is_a_file_of_settings(layout):
    this = layout(settings={"pretrain": {"epochs": 3}, "finetune": {"epochs": 2, "iters_per_epoch": 5}})
    said = remedy_for_learning(this.comparison)
    assert "are 2 x 5 iterations (finetune.epochs, finetune.iters_per_epoch)" in said
    assert "-settings" in said
    assert "another folder for -o" in said
    example = json.loads(re.search(r"\{.*\}", said)[0])
    assert example == {"pretrain": {"epochs": 3}, "finetune": {"epochs": 1000, "iters_per_epoch": 5}}
    longer = layout(settings={"finetune": {"epochs": 5000, "iters_per_epoch": 50}})
    assert '"epochs": 20000' in remedy_for_learning(longer.comparison)


@pytest.mark.parametrize(("epochs", "the_same"), [(10, True), (39, True), (40, False)])
def test_stock_equals_scratch_without_a_warm_up_epoch(layout, epochs, the_same):
    made = layout(settings={"finetune": {"epochs": epochs}}, methods=("stock",))
    note = note_on_stock(made.comparison)
    assert (note is not None) == the_same
    assert note is None or f"5% of {epochs} epochs leave no warm-up epoch" in note

    def first_rate(arm):
        settings = made.comparison.finetune_settings(arm)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], settings.initial_lr)
        WarmupPolyLR(optimizer, settings.initial_lr, settings.epochs, settings.warmup_epochs)
        return optimizer.param_groups[0]["lr"]

    assert (first_rate("scratch") == first_rate("stock")) == the_same


def test_stock_with_another_rate_or_task_differs_from_scratch(layout):
    few = {"epochs": 10}
    slower = layout(settings={"finetune": {**few, "initial_lr": 0.001}}, methods=("stock",))
    assert note_on_stock(slower.comparison) is None
    assert note_on_stock(layout(settings={"finetune": few}).comparison) is None
    made = layout(settings={"finetune": few}, methods=("stock",))
    assert note_on_stock(made.comparison) is not None
    classifies = replace(made.comparison, label_table=object())  # for a classification the plan states no rate
    assert note_on_stock(classifies) is None
