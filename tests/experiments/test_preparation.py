"""The folder of a comparison."""

import json
import re
from pathlib import Path

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.comparison import Run
from pcrl_nnunet.experiments.preparation import plans_of, prepare, preview_in

RUNS = [Run(arm, labelled, seed) for arm in ("scratch", "pcrlv2") for labelled in (2, 3) for seed in (0, 1)]


def test_folds_keep_their_numbers_when_runs_are_added(layout):
    first, second = layout(), layout()
    prepare(first, RUNS[:1])
    Path(first.output(RUNS[0])).mkdir(parents=True)
    prepare(second, RUNS[1:])
    third = layout()
    prepare(third, RUNS)
    assert third.fold(RUNS[0]) == first.fold(RUNS[0])
    assert third.fold(RUNS[3]) == second.fold(RUNS[3])


def test_other_settings_are_refused_once_something_was_trained(layout):
    prepare(layout(settings={"finetune": {"epochs": 3}}), RUNS)
    this = layout()
    prepare(this, RUNS)  # nothing had been
    for run in RUNS:
        Path(this.output(run)).mkdir(parents=True)
    with pytest.raises(UserError, match=r"another settings.finetune.epochs \(1, now 7\); give another folder"):
        prepare(layout(settings={"finetune": {"epochs": 7}}), RUNS)
    with pytest.raises(UserError, match=r"holds a comparison with another protocol \(\"all\", now \"semi\"\)"):
        prepare(layout("semi"), RUNS)


@pytest.mark.parametrize("protocol", ["all", "semi"])
def test_other_settings_are_refused_for_new_runs_too(layout, protocol):
    """One table has one budget, whichever numbers of labels and methods were added by which call."""
    own, same = {"mine": {"pretrain": None, "finetune": {"epochs": 3}}}, {"finetune": {"iters_per_epoch": 4}}
    begun = layout(protocol, methods=["mine"], own=own, settings=same)
    prepare(begun, [Run("scratch", 2, 0), Run("mine", 2, 0)])
    Path(begun.output(Run("mine", 2, 0))).mkdir(parents=True)

    def go_on(own, settings):
        runs = [Run("scratch", 3, 1), *(Run(name, 3, 1) for name in own)]
        prepare(layout(protocol, methods=list(own), own=own, settings=settings), runs)

    with pytest.raises(UserError, match=r"settings.finetune.iters_per_epoch \(4, now 5\); .* same settings to go on"):
        go_on(own, {"finetune": {"iters_per_epoch": 5}})
    with pytest.raises(UserError, match=r"another settings.pretrain.epochs \(null, now 5\)"):
        go_on({}, {**same, "pretrain": {"epochs": 5}})
    other = {"mine": {"pretrain": None, "finetune": {"epochs": 6}}}
    for _ in range(2):  # also after a call that did not name it
        with pytest.raises(UserError, match=r"another method mine.finetune.epochs \(3, now 6\); .* another name"):
            go_on(other, same)
        go_on({}, same)
    go_on(own, same)


def test_the_fine_tuning_plan_names_the_pretraining_of_its_seed(layout):
    this = layout()
    prepare(this, RUNS)
    run = Run("pcrlv2", 2, 1)
    plan = plans_of(this, run)[this.plans_name(run)]
    assert plan["pcrl"]["checkpoint"] == this.pretrained(run)
    assert plans_of(this, run)[this.pretraining_plans_name(run)]["pcrl"]["pretrain"]["seed"] == 1
    assert "checkpoint" not in plans_of(this, RUNS[0])[this.plans_name(RUNS[0])]["pcrl"]


def test_the_first_stage_of_a_cascade_is_trained_without_the_second(tiny, layout):
    this = layout(configuration="3d_lowres")
    prepare(this, RUNS[:1])
    plan = json.loads((Path(this.data_folder) / f"{this.plans_name(RUNS[0])}.json").read_text())
    assert not PlansManager(plan).get_configuration("3d_lowres").next_stage_names


def test_a_preview_changes_nothing_in_a_comparison_that_has_begun(tmp_path, layout):
    begun = layout()
    prepare(begun, RUNS)
    Path(begun.output(RUNS[0])).mkdir(parents=True)
    Path(begun.evaluation(RUNS[0])).parent.mkdir()
    Path(begun.evaluation(RUNS[0])).write_text("{}")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = layout(methods=["mine"], own={"mine": {"finetune": {"epochs": 7}}}.items())
    (tmp_path / "preview").mkdir()
    preview_in(other, str(tmp_path / "preview"))
    runs = [*RUNS[:2], Run("mine", 2, 0)]
    prepare(other, runs)
    assert [other.is_done(run) for run in runs] == [True, False, False]
    assert other.pretrained(runs[-1]).startswith(begun.results)
    plan = tmp_path / "preview/nnUNet_preprocessed/Dataset999_Tiny" / f"{other.plans_name(runs[-1])}.json"
    assert json.loads(plan.read_text())["pcrl"]["finetune"]["epochs"] == 7
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    semi = layout("semi")
    (tmp_path / "second").mkdir()
    preview_in(semi, str(tmp_path / "second"))
    with pytest.raises(UserError, match=rf"^{re.escape(str(tmp_path / 'out'))} holds .* another protocol"):
        prepare(semi, RUNS)  # it names the user's folder, not that of the preview


def test_pretrainings_are_kept_when_the_scored_part_changes(layout):
    on_validation, on_test = layout(scored="val"), layout()
    runs = [*RUNS, Run("pseudo_labels", 2, 0)]  # their data hold the scored cases
    prepare(on_validation, runs)
    for run in runs:
        Path(on_validation.output(run)).mkdir(parents=True)
    prepare(on_test, runs)
    assert on_test.pretrained(RUNS[-1]) == on_validation.pretrained(RUNS[-1])
    assert on_test.output(RUNS[-1]) != on_validation.output(RUNS[-1])
    assert on_test.file("results.csv") != on_validation.file("results.csv")


@pytest.mark.parametrize(("first", "then"), [("val", "test"), ("test", "val")])
def test_a_network_trained_with_the_other_part_scored_is_found(layout, first, then):
    runs = [RUNS[0], Run("mine", 2, 0)]
    own = {"mine": {"pretrain": None, "pseudo_labels": True, "finetune": {"initial_lr": 0.5}}}
    earlier = layout(methods=["mine"], own=own, scored=first)
    this = layout(methods=["mine"], own=own, scored=then)
    prepare(earlier, runs)
    for run in runs:
        Path(earlier.evaluation(run)).parent.mkdir(parents=True)
        Path(earlier.network(run)).write_bytes(b"")
    prepare(this, runs)
    for run in runs:
        assert this.trained_before(run) is None  # not known to have come to its end
        Path(earlier.evaluation(run)).write_text("{}")
        assert this.trained_before(run) == earlier.network(run)
        assert this.trained_before(Run(run.arm, 3, 0)) is None
    assert this.trained_before(runs[1]) is not None
    own["mine"]["finetune"]["initial_lr"] = 0.25
    with pytest.raises(UserError, match=r"another method mine.finetune.initial_lr \(0.5, now 0.25\)"):
        prepare(layout(methods=["mine"], own=own, scored=then), runs)
