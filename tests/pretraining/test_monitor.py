import copy
import math
import re

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.ndimage import gaussian_filter
from tiny_dataset import make_plan

from pcrl_nnunet.methods import Levels, StepOutput
from pcrl_nnunet.methods.quantities import effective_rank, matched_minus_shuffled, restoration_ratio, sd_ratio
from pcrl_nnunet.pretraining import monitor as monitor_module
from pcrl_nnunet.pretraining.monitor import Monitor, judge
from pcrl_nnunet.pretraining.settings import pretrain_settings


def test_an_even_spread_has_the_sd_of_the_sphere_and_a_constant_none():
    assert sd_ratio(torch.randn(4000, 64)) == pytest.approx(1.0, abs=0.02)
    assert sd_ratio(torch.ones(100, 64)) == pytest.approx(0.0, abs=1e-6)


def test_effective_rank_counts_the_directions_that_are_used():
    directions = torch.linalg.qr(torch.randn(32, 5)).Q
    assert effective_rank(torch.randn(4000, 5) @ directions.T) == pytest.approx(5, abs=0.1)
    assert effective_rank(torch.randn(4000, 1) @ directions[:, :1].T) == pytest.approx(1, abs=0.01)


def test_matched_minus_shuffled_tells_samples_apart():
    v = torch.eye(8)
    assert matched_minus_shuffled(v, v) == pytest.approx(1.0)
    assert matched_minus_shuffled(torch.ones(8, 8), torch.ones(8, 8)) == pytest.approx(0.0, abs=1e-6)


def test_the_mean_of_each_view_and_channel_has_a_restoration_ratio_of_one():
    target = torch.randn(4, 2, 3, 8, 8) * 3 + 5 * torch.randn(4, 2, 3, 1, 1)
    assert restoration_ratio(target.mean((3, 4), keepdim=True).expand_as(target), target) == pytest.approx(1.0)
    assert restoration_ratio(target, target) == 0


def output(level, restored, v, p):
    return StepOutput(torch.zeros(()), {}, Levels(level, level, level), restored, v, p)


def healthy(level=1):
    target = torch.randn(16, 2, 1, 4, 4)
    v = torch.randn(16, 2, 32)
    return output(level, 0.5 * target, v, v), target


def test_a_healthy_training_raises_no_alarm():
    monitor = Monitor()
    for _ in range(20):
        monitor.update(*healthy())
    assert judge(monitor.summary(), steps_done=1000).alarms == ()


def test_dead_restoration_is_named_with_its_level():
    monitor = Monitor()
    good, target = healthy()
    monitor.update(output(2, target.mean((3, 4), keepdim=True).expand_as(target), good.v, good.p), target)
    (alarm,) = judge(monitor.summary(), steps_done=1000).alarms
    assert alarm.startswith("restoration of level 2 is dead: its error is 1.00")


@pytest.mark.parametrize("kind", ["constant", "one direction"])
def test_collapse_is_named_with_its_level(kind):
    monitor = Monitor()
    good, target = healthy()
    scale = 1.0 if kind == "constant" else torch.randn(16, 2, 1)
    v = torch.ones(16, 2, 32) * scale
    monitor.update(output(3, good.restored, v, v), target)
    (alarm,) = judge(monitor.summary(), steps_done=1000).alarms
    assert alarm.startswith("features of level 3 have collapsed")


def test_features_that_tell_nothing_apart_are_named_with_their_level():
    monitor = Monitor()
    good, target = healthy()
    for _ in range(100):  # spread evenly, of full rank, and unrelated to the sample, as BatchNorm makes of noise
        monitor.update(output(2, good.restored, torch.randn(64, 2, 32), torch.randn(64, 2, 32)), target)
    assert judge(monitor.summary(), steps_done=1000).alarms == ()  # too early to tell
    (alarm,) = judge(monitor.summary(), steps_done=5000).alarms
    assert alarm.startswith("features of level 2 do not tell scans apart")


def test_there_is_no_alarm_before_anything_can_be_learnt():
    monitor = Monitor()
    good, target = healthy()
    monitor.update(output(1, torch.zeros_like(target), good.v, good.p), target)
    assert judge(monitor.summary(), steps_done=10).alarms == ()
    assert judge(monitor.summary(), steps_done=1000).alarms != ()


GOOD = {
    "restoration_ratio": {1: 0.5, 2: 0.4},
    "matched_minus_shuffled": {1: 0.3, 2: 0.2},
    "sd_ratio": {1: 0.9, 2: 0.9},
    "effective_rank": {1: 9.0, 2: 9.0},
}


@pytest.mark.parametrize(
    ("changed", "steps", "state"),
    [
        ({}, 199, "too early"),
        ({}, 200, "learning"),
        ({"restoration_ratio": {1: 1.03, 2: 1.07}}, 40, "too early"),
        ({"restoration_ratio": {1: 4.07}}, 40, "too early"),
        ({"restoration_ratio": {1: 4.07}}, 250, "alarm"),
        ({"restoration_ratio": {1: 0.5, 2: 1.07}}, 250, "too early"),
        ({"restoration_ratio": {1: 0.5, 2: 1.0}}, 500, "alarm"),
        ({"restoration_ratio": {1: math.nan}}, 500, "alarm"),
        ({"matched_minus_shuffled": {1: 0.0}}, 1999, "too early"),
        ({"matched_minus_shuffled": {1: 0.0}}, 2000, "alarm"),
        ({"sd_ratio": {1: 0.1}}, 499, "too early"),
        ({"effective_rank": {1: 1.5, 2: 9.0}}, 500, "alarm"),
        ({"restoration_ratio": {}}, 500, "learning"),
        ({name: {} for name in GOOD}, 500, "too early"),
    ],
)
def test_it_is_too_early_to_tell_until_it_learns_or_an_alarm_is_due(changed, steps, state):
    verdict = judge({**GOOD, **changed}, steps)
    assert verdict.state == state
    assert bool(verdict.alarms) == (state == "alarm")
    assert verdict.text.startswith({"too early": "Too early to tell", "learning": "Yes", "alarm": "No: 1 alarm"}[state])


def test_too_early_says_how_many_steps_are_needed():
    assert judge(GOOD, 40).text == "Too early to tell: 40 steps are done, 200 or more are needed."
    dead = {**GOOD, "restoration_ratio": {1: 1.03}}
    assert judge(dead, 250).text == "Too early to tell: 250 steps are done, 500 or more are needed."


def test_an_epoch_starts_empty():
    monitor = Monitor()
    monitor.update(*healthy())
    monitor.clear()
    monitor.update(*healthy(level=2))
    assert all(list(of_level) == [2] for of_level in monitor.summary().values())
    assert all(math.isfinite(x) for of_level in monitor.summary().values() for x in of_level.values())


DEAD, COLLAPSED, UNTOLD = "restoration of level", "have collapsed", "do not tell scans apart"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "weight_decay", "deserved", "not_deserved"),
    [
        ("textures", 1e-4, set(), {DEAD, COLLAPSED}),  # 303 steps may not tell them apart yet
        ("noise", 1e-4, {DEAD, UNTOLD}, set()),  # of which nothing can be restored, nor is one scan's like itself
        ("textures", 1.0, {DEAD, COLLAPSED, UNTOLD}, set()),  # absurd: nothing is left of the weights
    ],
)
def test_a_trainings_log_has_the_alarms_that_it_deserves(tiny, monkeypatch, kind, weight_decay, deserved, not_deserved):
    """Real trainings of 303 steps; alarms that come after 500 and 2000 are let off after 200."""
    from pcrl_nnunet.trainers import PCRLPretrainTrainer

    torch.set_num_threads(1)
    for grace in ("GRACE_STEPS", "COMPARISON_GRACE_STEPS"):
        monkeypatch.setattr(monitor_module, grace, 200)
    rng = np.random.default_rng(0)
    for path, sigma in zip(sorted(tiny.data.glob("case_?.b2nd")), (1.5, 2, 2.5, 3), strict=True):
        image = rng.normal(size=(1, 14, 14, 14))
        if kind == "textures":
            image = gaussian_filter(image, (0, sigma, sigma, sigma))
        image = (image - image.mean()) / image.std()
        blosc2.asarray(image.astype(np.float32), urlpath=str(path), mode="w")
    plan = make_plan(pretrain={"views": {"3d_fullres": {"num_local": 0}}, "weight_decay": weight_decay})
    configuration = PlansManager(plan).get_configuration("3d_fullres").configuration
    given = {"epochs": 3, "iters_per_epoch": 101, "batch_size": 8, "initial_lr": 0.1}
    plans = {
        **copy.deepcopy(plan),
        "continue_training": False,
        "pcrl_settings": pretrain_settings(plan, "3d_fullres", configuration, **given),
    }
    trainer = PCRLPretrainTrainer(plans, "3d_fullres", "all", tiny.dataset_json, torch.device("cpu"))
    trainer.run_training()
    (log,) = tiny.results.rglob("training_log_*.txt")
    first, *later = re.split(r"epoch \d/3: ", log.read_text())[1:]
    assert "ALARM" not in first  # too early to tell
    alarms = [line for line in "".join(later).splitlines() if "ALARM" in line]
    found = {kind for kind in (DEAD, COLLAPSED, UNTOLD) if any(kind in line for line in alarms)}
    assert deserved <= found
    assert not found & not_deserved
    if deserved:
        assert log.read_text().count("Is it learning? No") == 1
