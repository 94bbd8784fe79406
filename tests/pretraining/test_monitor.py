import copy
import math
import re

import blosc2
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from tiny_dataset import make_plan
from tiny_pretraining import make_trainer

from pcrl_nnunet.methods import Quantity, StepOutput, quantities
from pcrl_nnunet.methods.pcrlv2 import PCRLv2
from pcrl_nnunet.methods.quantities import MATCHING, RESTORATION, matched_minus_shuffled, restoration_error
from pcrl_nnunet.pretraining.monitor import KEPT_VECTORS, Monitor
from pcrl_nnunet.pretraining.monitor import judge as judge_by


def watched():
    return Monitor(PCRLv2.quantities)


def judge(summary, steps_done):
    return judge_by(summary, steps_done, PCRLv2.quantities)


def output(level, restored, target, v, p):
    """The output of a PCRLv2 step at one drawn level."""
    group = f"level {level}"
    values = {
        RESTORATION.name: {group: restoration_error(restored, target)},
        MATCHING.name: {group: matched_minus_shuffled(p[:, 0], v[:, 1])},
    }
    return StepOutput(torch.zeros(()), {}, values, {group: v.flatten(0, 1)})


def healthy(level=1, size=16):
    target, v = torch.randn(size, 2, 1, 4, 4), torch.randn(size, 1, 32).expand(-1, 2, -1)
    return output(level, 0.5 * target, target, v, v)


def test_a_healthy_training_raises_no_alarm():
    monitor = watched()
    for _ in range(20):
        monitor.update(healthy())
    assert judge(monitor.summary(), steps_done=1000).alarms == ()


def test_dead_restoration_is_named_with_its_level():
    monitor, target, v = watched(), torch.randn(16, 2, 1, 4, 4), torch.randn(16, 1, 32).expand(-1, 2, -1)
    monitor.update(output(2, target.mean((3, 4), keepdim=True).expand_as(target), target, v, v))
    (alarm,) = judge(monitor.summary(), steps_done=1000).alarms
    assert alarm.startswith("restoration of level 2 is dead: its error is 1.00")


@pytest.mark.parametrize("kind", ["constant", "one direction"])
def test_collapse_is_named_with_its_level(kind):
    monitor, target = watched(), torch.randn(16, 2, 1, 4, 4)
    scale = 1.0 if kind == "constant" else torch.randn(16, 2, 1)
    v = torch.ones(16, 2, 32) * scale
    monitor.update(output(3, 0.5 * target, target, v, v))
    (alarm,) = judge(monitor.summary(), steps_done=1000).alarms
    assert alarm.startswith("features of level 3 have collapsed")


def test_features_that_tell_nothing_apart_are_named_with_their_level():
    monitor, target = watched(), torch.randn(16, 2, 1, 4, 4)
    for _ in range(100):  # evenly spread, full rank, unrelated to the sample: BatchNorm applied to noise
        monitor.update(output(2, 0.5 * target, target, torch.randn(64, 2, 32), torch.randn(64, 2, 32)))
    assert judge(monitor.summary(), steps_done=1000).alarms == ()  # too early to tell
    (alarm,) = judge(monitor.summary(), steps_done=5000).alarms
    assert alarm.startswith("features of level 2 do not tell scans apart")


def at(first, second=None):
    return {"level 1": first} if second is None else {"level 1": first, "level 2": second}


GOOD = {
    "restoration_error": at(0.5, 0.4),
    "margin": at(0.3, 0.2),
    "spread": at(0.9, 0.9),
    "rank": at(9.0, 9.0),
}


@pytest.mark.parametrize(
    ("changed", "steps", "state"),
    [
        ({}, 199, "too early"),
        ({}, 200, "learning"),
        ({"restoration_error": at(1.03, 1.07)}, 40, "too early"),
        ({"restoration_error": at(4.07)}, 40, "too early"),
        ({"restoration_error": at(4.07)}, 250, "alarm"),
        ({"restoration_error": at(0.5, 1.07)}, 250, "too early"),
        ({"restoration_error": at(0.5, 1.0)}, 500, "alarm"),
        ({"restoration_error": at(math.nan)}, 500, "alarm"),
        ({"margin": at(0.0)}, 1999, "too early"),
        ({"margin": at(0.0)}, 2000, "alarm"),
        ({"spread": at(0.1, 0.9)}, 499, "too early"),
        ({"rank": at(1.5, 9.0)}, 500, "alarm"),
        ({"restoration_error": {}}, 500, "learning"),
        ({name: {} for name in GOOD}, 500, "too early"),
    ],
)
def test_the_verdict_is_too_early_until_learning_or_an_alarm(changed, steps, state):
    verdict = judge({**GOOD, **changed}, steps)
    assert verdict.state == state
    assert bool(verdict.alarms) == (state == "alarm")
    assert verdict.text.startswith({"too early": "Too early to tell", "learning": "Yes", "alarm": "No: 1 alarm"}[state])


def test_too_early_says_how_many_steps_are_needed():
    assert judge(GOOD, 40).text == "Too early to tell: 40 steps are done, 200 or more are needed."
    dead = {**GOOD, "restoration_error": at(1.03)}
    assert judge(dead, 250).text == "Too early to tell: 250 steps are done, 500 or more are needed."


def test_an_epoch_starts_empty():
    monitor = watched()
    monitor.update(healthy())
    monitor.clear()
    monitor.update(healthy(level=2))
    assert [list(of_group) for of_group in monitor.summary().values() if of_group] == [["level 2"]] * 4
    assert all(math.isfinite(x) for of_group in monitor.summary().values() for x in of_group.values())


def test_groups_are_in_their_natural_order():
    monitor = watched()
    for level in (10, 2, 1):
        monitor.update(healthy(level))
    ordered = ["level 1", "level 2", "level 10"]
    assert [list(of_group) for of_group in monitor.summary().values() if of_group] == [ordered] * 4


def test_a_monitor_resumes_from_its_state():
    torch.manual_seed(0)
    steps, monitor, other = [healthy(1 + number % 2) for number in range(6)], watched(), watched()
    for step in steps[:3]:
        monitor.update(step)
    other.collected = copy.deepcopy(monitor.collected)
    for step in steps[3:]:
        monitor.update(step)
        other.update(step)
    assert other.summary() == monitor.summary()


def test_no_more_vectors_are_kept_than_spread_and_rank_need():
    monitor = watched()
    for _ in range(50):
        monitor.update(healthy(size=64))
    assert sum(len(v) for v in monitor.collected["vectors"]["level 1"]) == KEPT_VECTORS


def test_any_methods_quantities_are_watched():
    share = Quantity("share", "Share", "falls", "A share.", alarm=lambda group, values: (300, f"{group} {values}"))
    length = Quantity("length", "Length", "stays", "A length.", of_vectors=lambda v: v.norm(dim=1).mean())
    monitor = Monitor((share, length))
    for value in (0.2, 0.4):
        values = {"share": {"": torch.tensor(value)}, "not watched": {"": torch.ones(())}}
        monitor.update(StepOutput(torch.zeros(()), values=values, vectors={"": torch.tensor([[3.0, 4.0]])}))
    summary = monitor.summary()
    assert summary == {"share": {"": pytest.approx(0.3)}, "length": {"": 5.0}}
    assert judge_by(summary, 299, (share, length)).state == "too early"
    assert judge_by(summary, 300, (share, length)).alarms == (f" {{'share': {summary['share']['']}, 'length': 5.0}}",)
    assert judge_by({"length": {"": 5.0}}, 300, (length,)).state == "learning"


DEAD, COLLAPSED, UNTOLD = "restoration of level", "have collapsed", "do not tell scans apart"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "weight_decay", "deserved", "not_deserved"),
    [
        ("textures", 1e-4, set(), {DEAD, COLLAPSED}),  # after 303 steps, scans may still look alike
        ("noise", 1e-4, {DEAD, UNTOLD}, set()),  # nothing can be restored, and a scan's crops share nothing
        ("textures", 1.0, {DEAD, COLLAPSED, UNTOLD}, set()),  # absurd: the weights shrink to nothing
    ],
)
def test_logs_of_good_and_bad_trainings_have_the_right_alarms(
    tiny, monkeypatch, kind, weight_decay, deserved, not_deserved
):
    """Real trainings of 303 steps; alarms due after 500 and 2000 steps are made due after 200."""
    torch.set_num_threads(1)
    for grace in ("GRACE_STEPS", "COMPARISON_GRACE_STEPS"):
        monkeypatch.setattr(quantities, grace, 200)
    rng = np.random.default_rng(0)
    for path, sigma in zip(sorted(tiny.data.glob("case_?.b2nd")), (1.5, 2, 2.5, 3), strict=True):
        image = rng.normal(size=(1, 14, 14, 14))
        if kind == "textures":
            image = gaussian_filter(image, (0, sigma, sigma, sigma))
        image = (image - image.mean()) / image.std()
        blosc2.asarray(image.astype(np.float32), urlpath=str(path), mode="w")
    plan = make_plan(pretrain={"pcrlv2": {"views": {"num_local": 0}}, "weight_decay": weight_decay})
    make_trainer(plan=plan, epochs=3, iters_per_epoch=101, batch_size=8, initial_lr=0.1).run_training()
    (log,) = tiny.results.rglob("training_log_*.txt")
    first, *later = re.split(r"epoch \d/3: ", log.read_text())[1:]
    assert "ALARM" not in first  # too early to tell
    alarms = [line for line in "".join(later).splitlines() if "ALARM" in line]
    found = {kind for kind in (DEAD, COLLAPSED, UNTOLD) if any(kind in line for line in alarms)}
    assert deserved <= found
    assert not found & not_deserved
    if deserved:
        assert log.read_text().count("Is it learning? No") == 1
