"""The settings of a pretraining: the plan's defaults, the plan's block, flags."""

import json

import pytest

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.pcrlv2 import PCRLv2
from pcrl_nnunet.plans import PlannedConfiguration
from pcrl_nnunet.pretraining.settings import described, in_present_form, method_of, pretrain_settings

CONFIGURATION = {
    "patch_size": [56, 56, 56],
    "batch_size": 4,
    "spacing": [1.0, 1.0, 1.0],
    "median_image_size_in_voxels": [51, 51, 51],
    "architecture": {"arch_kwargs": {"strides": [[1, 1, 1]] + [[2, 2, 2]] * 4}},
}


def plan(**pretrain):
    return {
        "plans_name": "p",
        "configurations": {"3d_fullres": CONFIGURATION, "3d_lowres": CONFIGURATION, "2d": {}},
        "pcrl": {"pretrain": pretrain},
    }


def settings(name="3d_fullres", flags=None, **pretrain):
    return pretrain_settings(plan(**pretrain), name, CONFIGURATION, **(flags or {}))


def test_flags_override_the_plan_and_the_plan_the_defaults():
    found = settings(
        flags={"epochs": 5, "seed": None}, epochs=7, seed=3, pcrlv2={"views": {"num_local": 2}, "restoration": "full"}
    )
    assert (found.epochs, found.seed, found.iters_per_epoch) == (5, 3, 250)
    assert (found.own.views.num_local, found.own.views.min_iou, found.own.restoration) == (2, 0.3, "full")


def test_a_configurations_block_overrides_the_shared_block_only_there():
    pretrain = {
        "epochs": 9,
        "pcrlv2": {"restoration": "full", "views": {"num_local": 2, "min_iou": 0.2}},
        "3d_lowres": {"epochs": 3, "batch_size": 12, "pcrlv2": {"views": {"num_local": 1}}},
        "2d": {"epochs": 1},
    }
    shared, lowres = settings(**pretrain), settings("3d_lowres", **pretrain)
    assert (shared.epochs, shared.own.views.num_local) == (9, 2)
    assert shared.batch_size > 12
    assert (lowres.epochs, lowres.batch_size) == (3, 12)
    assert (lowres.own.views.num_local, lowres.own.views.min_iou, lowres.own.restoration) == (1, 0.2, "full")


def test_changed_views_change_the_batch_that_fits():
    half, whole = settings(pcrlv2={"views": {"num_local": 0}}), settings()
    assert half.batch_size > whole.batch_size
    assert settings(pcrlv2={"restoration": "full"}).batch_size == whole.batch_size


@pytest.mark.parametrize(
    ("pretrain", "message"),
    [
        ({"epoch": 3}, r"pcrl.pretrain.epoch is not a setting; expected one of .*epochs"),
        ({"epochs": "3"}, r"pcrl.pretrain.epochs is .3.; expected a value like 240"),
        ({"epochs": True}, r"pcrl.pretrain.epochs is true; expected a value like 240"),
        ({"epochs": 0}, r"epochs is 0; expected 1 or more"),
        ({"initial_lr": -1.0}, r"pcrl.pretrain.initial_lr is -1.0; expected a number above 0"),
        ({"initial_lr": float("nan")}, r"pcrl.pretrain.initial_lr is nan; expected a finite number"),
        ({"seed": -1}, r"pcrl.pretrain.seed is -1; expected 0 or more"),
        ({"optimizer": "adam"}, r"pcrl.pretrain.optimizer is 'adam'; expected 'sgd' or 'adamw'"),
        ({"batch_size": 3}, r"batch_size is 3; the comparison heads' .* needs at least 4 samples: raise -batch_size"),
        ({"pcrlv2": [1]}, r"pcrl.pretrain.pcrlv2 is \[1\]; expected a block of settings"),
        ({"own": 3}, r"pcrl.pretrain.own is not a setting; expected one of batch_size, .*, optimizer, seed"),
        ({"own": {}}, r"pcrl.pretrain.own names neither a method"),
        ({"3d_fullres": {"method": "mae"}}, r"3d_fullres.method is 'mae'; a plan has one method for all .* -method"),
        ({"3d_fullres": 3}, r"pcrl.pretrain.3d_fullres is 3; expected a block of settings"),
        (
            {"views": {"num_local": 2}},
            r"pcrl.pretrain.views names neither a method nor .* expected one of pcrlv2, .*",
        ),
        ({"3d_fullres": {"2d": {}}}, r"pcrl.pretrain.2d names neither a method"),
        ({"method": 3}, r"pcrl.pretrain.method is 3; expected one of pcrlv2"),
        ({"method": "pcrl"}, r"no method 'pcrl', the nearest is pcrlv2; expected .*: give it with -method NAME"),
    ],
)
def test_a_wrong_shared_setting_is_named(pretrain, message):
    with pytest.raises(UserError, match=message):
        settings(**pretrain)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"restoration": "half"}, r"pcrlv2.restoration is 'half'; expected 'single' or 'full'"),
        ({"comparison": "all"}, r"pcrlv2.comparison is 'all'; expected 'pairwise' or 'cross_scale' or 'dense'"),
        (
            {"comparison": "dense", "views": {"num_local": 6}},
            r"pcrlv2.views.num_local is 6; a dense comparison has no local views: set 0",
        ),
        (
            {"comparison": "dense", "views": {"global_input_size": [22, 24, 24]}},
            r"global_input_size is \(22, 24, 24\); expected multiples of the network's total stride",
        ),
        ({"comparison_weight": 0}, r"pcrl.pretrain.pcrlv2.comparison_weight is 0; expected a number above 0"),
        ({"levels": [[None, None]]}, r"pcrl.pretrain.pcrlv2.levels has \[None, None\]; expected pairs of the level"),
        ({"noise": 1}, r"pcrl.pretrain.pcrlv2.noise is not a setting; expected one of .*restoration"),
        ({"augmentation": {"noise": 1}}, r"pcrl.pretrain.pcrlv2.augmentation.noise is not a setting"),
        ({"augmentation": None}, r"pcrl.pretrain.pcrlv2.augmentation is None; expected a block of settings"),
        ({"augmentation": {"scale": 1.5}}, r"augmentation.scale is 1.5; expected 0 or more, below 1$"),
        ({"augmentation": {"p_flip": 2}}, r"augmentation.p_flip is 2; expected a number from 0 to 1$"),
        ({"views": [1]}, r"pcrl.pretrain.pcrlv2.views is \[1\]; expected a block of settings"),
        ({"views": {"local_input_size": [4, 4]}}, r"views.local_input_size is \[4, 4\]; expected 3 positive"),
        ({"views": {"global_crop_sizes": [8, 8, 8]}}, r"views.global_crop_sizes is \[8, 8, 8\]; expected sizes of 3"),
        ({"views": {"global_input_size": ["a", 8, 8]}}, r"global_input_size is \['a', 8, 8\]; expected 3 positive"),
        ({"views": {"local_input_size": [4, 4, 4]}}, r"leaves 1 voxel at the bottleneck"),
        ({"views": {"pairs_per_read": 2}}, r"pcrl.pretrain.pcrlv2.views.pairs_per_read is not a setting"),
    ],
)
def test_a_wrong_setting_of_the_method_is_named(own, message):
    with pytest.raises(UserError, match=message):
        settings(pcrlv2=own)


def test_the_methods_flag_precedes_plan_and_default():
    assert method_of({}) is method_of({}, "pcrlv2") is method_of(plan(method="pcrlv2")) is PCRLv2
    with pytest.raises(UserError, match="there is no method 'of_the_flag'"):
        settings(flags={"method": "of_the_flag"}, method="of_the_plan")


def test_the_plan_is_not_changed():
    given = plan(pcrlv2={"views": {"num_local": 2}}, epochs=3, **{"3d_fullres": {"pcrlv2": {"levels": [[1, 1]]}}})
    before = repr(given)
    pretrain_settings(given, "3d_fullres", CONFIGURATION, epochs=1)
    assert repr(given) == before


@pytest.mark.parametrize(("given", "rate"), [({}, 0.03), ({"optimizer": "adamw"}, 1e-3), ({"initial_lr": 0.5}, 0.5)])
def test_the_rate_follows_from_the_method_and_the_optimizer(given, rate):
    assert settings(**given).initial_lr == rate


def test_a_methods_default_optimizer_has_its_rate(monkeypatch):
    monkeypatch.setattr(PCRLv2, "defaults", {"optimizer": "adamw"})
    assert settings().initial_lr == 1e-3


def test_a_changed_setting_is_described_by_its_name_in_the_plan():
    given = plan(pcrlv2={"comparison_weight": 0.1})
    planned = PlannedConfiguration("folder", given, "3d_fullres", CONFIGURATION, {})
    lines = described(pretrain_settings(given, "3d_fullres", CONFIGURATION), planned).splitlines()
    assert lines[1] == "Settings: pcrlv2.comparison_weight 0.1 (default 1.0)"


def test_settings_are_plain_values_in_the_form_of_the_plans_block():
    found = settings(pcrlv2={"augmentation": {"p_flip": 0.0}, "levels": [[2, None]]}, epochs=3)
    written = json.loads(json.dumps(found.as_dict()))
    assert written["pcrlv2"]["augmentation"]["p_flip"] == 0.0
    assert settings(**written) == found


def test_settings_of_version_0_1_0_take_the_present_form():
    now = settings(epochs=3, pcrlv2={"views": {"num_local": 2}}).as_dict()
    own = dict(now["pcrlv2"])
    shared = {name: value for name, value in now.items() if name not in ("method", "pcrlv2")}
    then = {**shared, **own, "views": {**own["views"], "pairs_per_read": 1}, "probe_every": 0}
    assert in_present_form(then) == now
    assert in_present_form(now) == now
