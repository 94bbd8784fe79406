"""Arms, their settings and ablations."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import make_plan

from pcrl_nnunet import trainers
from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.experiments.arm_names import arm_names, check_arm_names
from pcrl_nnunet.experiments.arms import Arm, built_in_arms, choose_arms
from pcrl_nnunet.experiments.settings import with_settings
from pcrl_nnunet.method_names import BUILT_IN
from pcrl_nnunet.methods import names
from pcrl_nnunet.methods.pcrlv2 import PCRLv2
from pcrl_nnunet.plans import PlanFacts, resolve
from pcrl_nnunet.pretraining.settings import pretrain_settings
from pcrl_nnunet.semi_supervised.settings import SemiSettings


def facts(plan):
    return PlanFacts.of("3d_fullres", resolve(plan, "3d_fullres"))


def test_unknown_arms_and_settings_are_named():
    known = built_in_arms(facts(make_plan()), "pcrlv2", 8)
    with pytest.raises(UserError, match=r"no method 'best'; expected some of scratch, stock, pseudo_labels, .* mine"):
        choose_arms(["best"], {"mine": {}}, known)
    with pytest.raises(UserError, match=r"method mine is .* expected a block with some of pretrain, finetune"):
        choose_arms(["mine"], {"mine": {"rate": 1}}, known)
    with pytest.raises(UserError, match=r"method mine has pseudo_labels and pretrains; it can do only one"):
        choose_arms(["mine"], {"mine": {"pseudo_labels": True}}, known)
    with pytest.raises(UserError, match=r"method mine has the controls \['best'\]; expected some of scratch, stock"):
        choose_arms(["mine"], {"mine": {"controls": ["scratch", "best"]}}, known)
    for both in ({"pcrlv2": {"restoration": "full"}}, None):
        with pytest.raises(
            UserError, match=r"method mine takes the pretraining of pcrlv2 and also has pretrain .* no effect"
        ):
            choose_arms(["mine"], {"mine": {"pretraining": "pcrlv2", "pretrain": both}}, known)
    assert list(choose_arms(["mine"], {"mine": {"pretraining": "pcrlv2"}}, known)) == ["scratch", "mine", "pcrlv2"]


def test_every_method_and_the_control_have_an_arm_with_recipe_pretrained():
    known = built_in_arms(facts(make_plan()), "pcrlv2", 8)
    for name in names():
        arm = known[f"{name}_pretrained"]
        assert known[name] == Arm({"method": name})
        assert (arm.pretraining, arm.controls) == (name, ["scratch_pretrained"])
        assert arm.finetune == known["scratch_pretrained"].finetune
    chosen = ["scratch", "mae_pretrained", "scratch_pretrained", "mae"]
    assert list(choose_arms(["mae_pretrained"], {}, known)) == chosen
    other = {"initial_lr": 0.5, "optimizer": "adamw", "deep_supervision": True}  # settings for all arms
    plan = {"pcrl": {"finetune": {**other, **arm.finetune}}}
    of_recipe = FinetuneSettings.from_plan({"pcrl": {"finetune": {"recipe": "pretrained"}}})
    assert FinetuneSettings.from_plan(plan) == of_recipe
    classifying = built_in_arms(facts(make_plan()), "pcrlv2", 8, SimpleNamespace(point=None))
    assert "mae" in classifying
    assert not [name for name in classifying if name.endswith("_pretrained")]  # such arms would differ by chance alone


@pytest.mark.parametrize("method", [*BUILT_IN])
@pytest.mark.parametrize(("task", "table"), [("segmentation", None), ("classification", SimpleNamespace(point=(1,)))])
def test_the_names_of_arms_are_known_without_importing_the_arms(method, task, table):
    known = arm_names(method, task)
    assert sorted(known) == sorted(built_in_arms(facts(make_plan((4, 4, 4, 4, 4))), method, 8, table))
    assert {*known} <= {*arm_names(method)}


def test_wrong_names_are_refused_before_the_arms_are_imported():
    check_arm_names(["mine", "mae", "one_level"], ["mine"], {}, {}, None)
    check_arm_names(["mine"], [], {"pretrain": {"method": 3}}, {}, None)  # `pretrain_settings` refuses this method
    of_mae = {"pcrl": {"pretrain": {"method": "mae"}}}
    with pytest.raises(UserError, match=r"^there is no method 'own'; expected some of scratch, .* mine$"):
        check_arm_names(["own"], ["mine"], {}, of_mae, None)
    with pytest.raises(
        UserError, match=r"^'one_level' is an ablation of pcrlv2, .*; set method to \"pcrlv2\" in pcrl.pr"
    ):
        check_arm_names(["one_level"], [], {}, of_mae, None)
    with pytest.raises(UserError, match=r"^there is no method 'pcrl', the nearest is pcrlv2; expected one of pcrlv2"):
        check_arm_names([], [], {"pretrain": {"method": "pcrl"}}, of_mae, None)


SEMI_ARMS = {"semi", "semi_scratch", "scratch_longer", "scratch_pasted"}


def test_only_segmentations_have_semi_supervised_arms():
    plan = facts(make_plan())
    known = built_in_arms(plan, "pcrlv2", 8)
    assert known.keys() >= SEMI_ARMS
    semi, from_scratch, longer = known["semi"], known["semi_scratch"], known["scratch_longer"]
    assert (semi.semi, semi.pretraining, semi.pretrain) == ({}, "pcrlv2", {})
    assert (from_scratch.semi, from_scratch.pretrain) == ({}, None)
    assert longer == Arm(None, epochs_factor=1 + 0.6 * 0.9)  # 60 % of the steps take 90 % longer
    pasted = FinetuneSettings.from_plan({}, trainers.PCRLSemiSupervisedScratchTrainer.defaults).pasted_share
    assert known["scratch_pasted"] == replace(longer, finetune={"pasted_share": pasted})
    chosen = ["scratch", "semi", "scratch_longer", "scratch_pasted", "pcrlv2"]
    assert list(choose_arms(["semi"], {}, known)) == chosen
    long_second_phase = built_in_arms(plan, "pcrlv2", 8, semi=SemiSettings(supervised_share=0.1))
    assert long_second_phase["scratch_longer"].epochs_factor == 1 + 0.9 * 0.9
    classifying = built_in_arms(plan, "pcrlv2", 8, SimpleNamespace(point=None))
    assert not classifying.keys() & SEMI_ARMS
    with pytest.raises(UserError, match=r"^method mine has .*semi.*, which this task cannot have; take it out$"):
        choose_arms(["mine"], {"mine": {"semi": {}}}, classifying)


def test_impossible_semi_supervised_arms_end_with_one_sentence():
    known = built_in_arms(facts(make_plan()), "pcrlv2", 8)
    for own, sentence in (
        ({"pretrain": None, "pseudo_labels": True, "semi": {}}, r"has pseudo_labels and semi; it can do only one"),
        ({"pretrain": None, "epochs_factor": 0}, r"has epochs_factor 0; expected a number above 0"),
        ({"pretrain": None, "epochs_factor": "2"}, r"has epochs_factor '2'; expected a number above 0"),
    ):
        with pytest.raises(UserError, match=rf"^method mine {sentence}"):
            choose_arms(["mine"], {"mine": own}, known)


# PCRLv2, TPAMI 2023, Tables 1 to 3: levels that are restored from and compared in a decoder of 5, and local views.
TABLES = {
    "skip_connections": ([(i, i) for i in range(1, 6)], 6),
    "cross_scale": ([(i, i) for i in range(1, 6)], 6),
    "restoration_only": ([(5, None)], 0),
    "comparison_only": ([(None, 0)], 0),
    "one_level": ([(5, 0)], 0),
    "three_levels": ([(1, 1), (3, 3), (5, 5)], 0),
    "all_levels": ([(i, i) for i in range(1, 6)], 0),
    "multi_crop": ([(i, i) for i in range(1, 6)], 6),
    "pcrlv2": ([(i, i) for i in range(1, 6)], 6),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_ablations_match_the_papers_tables(name):
    plan = make_plan(features=(4, 4, 4, 8, 8, 8))
    plan["configurations"]["3d_fullres"]["patch_size"] = [64, 64, 64]
    plan["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = [90.0, 90.0, 90.0]
    arm = built_in_arms(facts(plan), "pcrlv2", 8)[name]
    plan["pcrl"]["pretrain"] = dict(arm.pretrain)
    configuration = PlansManager(plan).get_configuration("3d_fullres")
    settings = pretrain_settings(plan, "3d_fullres", configuration.configuration)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        3,
    )
    pretraining = PCRLv2(network, 1, settings.own)
    levels, num_local = TABLES[name]
    drawn = [pretraining.draw(np.random.default_rng((0, step))) for step in range(60)]
    assert {(d.restoration, d.comparison) for d in drawn} == set(levels)
    assert settings.own.views.num_local == num_local
    if name not in ("pcrlv2", "skip_connections", "cross_scale"):
        assert settings.batch_size == 8  # even if more samples fit
    assert any(d.comparison != d.comparison_of_second for d in drawn) == (name == "cross_scale")
    assert pretraining.decoder.skip_connections == (name == "skip_connections")
    assert (settings.own.views.crops == "multi_crop") == (name == "multi_crop")


def test_an_arms_settings_win_over_settings_for_all():
    of_plan = {"epochs": 1, "pcrlv2": {"restoration": "full"}, "3d_fullres": {"pcrlv2": {"views": {"num_local": 2}}}}
    plan = make_plan(pretrain=of_plan, checkpoint="x")
    given = {"pretrain": {"epochs": 2, "seed": 3, "3d_fullres": {"pcrlv2": {"views": {"min_iou": 0.5}}}}}
    merged = with_settings(plan, given, vars(Arm(pretrain={"epochs": 4})))["pcrl"]
    assert merged["pretrain"] == {
        "epochs": 4,
        "seed": 3,
        "pcrlv2": {"restoration": "full"},
        "3d_fullres": {"pcrlv2": {"views": {"num_local": 2, "min_iou": 0.5}}},
    }
    assert "checkpoint" not in merged
    assert plan["pcrl"]["pretrain"]["epochs"] == 1


def test_a_setting_for_all_configurations_wins_over_the_plans_for_one():
    plan = make_plan(pretrain={"3d_fullres": {"batch_size": 8, "pcrlv2": {"views": {"num_local": 2}}}})
    given = {"pretrain": {"batch_size": 16, "pcrlv2": {"views": {"num_local": 4}}}}
    settings = pretrain_settings(with_settings(plan, given), "3d_fullres", resolve(plan, "3d_fullres"))
    assert (settings.batch_size, settings.own.views.num_local) == (16, 4)
