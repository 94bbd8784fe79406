import math

import numpy as np
import pytest

from pcrl_nnunet.config import FinetuneSettings
from pcrl_nnunet.errors import UserError
from pcrl_nnunet.pretraining.settings import PretrainSettings, pretrain_settings
from pcrl_nnunet.views.boxes import sample_view_boxes
from pcrl_nnunet.views.configure import check_views, configure_views
from pcrl_nnunet.views.settings import Augmentation, ViewSettings

# name: patch, batch, strides, median image; the first four as nnU-Net planned real datasets
PLANS = {
    "hippocampus": ((40, 56, 40), 7, [(1, 1, 1)] + [(2, 2, 2)] * 3, (36, 50, 35)),
    "nodules": ((56, 56, 56), 4, [(1, 1, 1)] + [(2, 2, 2)] * 4, (51, 51, 51)),
    "liver MR": ((40, 224, 192), 2, [(1, 1, 1)] + [(1, 2, 2)] * 2 + [(2, 2, 2)] * 3, (36, 262, 262)),
    "hippocampus 2d": ((56, 40), 281, [(1, 1)] + [(2, 2)] * 3, (50, 35)),
    "128 cubed": ((128, 128, 128), 2, [(1, 1, 1)] + [(2, 2, 2)] * 5, (482, 512, 512)),
    # as nnU-Net's default and ResEncL planners plan the shapes and spacings of MSD colon, prostate and lung, and AMOS
    "colon": ((56, 192, 192), 2, [(1, 1, 1), (1, 2, 2), (1, 2, 2)] + [(2, 2, 2)] * 3, (150, 512, 512)),
    "prostate": ((20, 320, 256), 2, [(1, 1, 1)] + [(1, 2, 2)] * 4 + [(2, 2, 2)] * 2, (20, 320, 319)),
    "lung, large": ((112, 256, 256), 2, [(1, 1, 1)] + [(1, 2, 2)] * 2 + [(2, 2, 2)] * 4, (252, 512, 512)),
    "AMOS, large": ((48, 320, 256), 2, [(1, 1, 1)] + [(1, 2, 2)] * 3 + [(2, 2, 2)] * 3, (90, 600, 600)),
    "prostate 2d": ((320, 320), 32, [(1, 1)] + [(2, 2)] * 6, (320, 319)),
    "thin": ((5, 64, 64), 4, [(1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2)], (1, 90, 90)),
}


def views_of(name):
    patch, batch, strides, median = PLANS[name]
    views, pairs = configure_views(patch, batch, strides, median, (1.0,) * len(patch))
    return views, pairs, np.prod(strides, axis=0)


@pytest.mark.parametrize("name", PLANS)
def test_views_fit_the_plan(name):
    views, pairs, total = views_of(name)
    patch, batch, strides, median = PLANS[name]
    check_views(views, strides)
    assert pairs >= 8
    if name != "thin":
        assert views.voxels_per_pair * pairs <= math.prod(patch) * batch
    assert not np.any(np.array(views.global_input_size) % total)
    for crop in views.global_crop_sizes:
        assert all(c <= max(1, math.floor(m)) for c, m in zip(crop, median, strict=True))
    for local in views.local_crop_sizes:
        assert all(c <= g for crop in views.global_crop_sizes for c, g in zip(local, crop, strict=True))


@pytest.mark.parametrize("name", PLANS)
def test_three_voxels_remain_at_the_bottleneck_of_every_view(name):
    views, _, total = views_of(name)
    for size in (views.global_input_size, views.local_input_size):
        assert np.prod(np.ceil(np.array(size) / total)) > 2


@pytest.mark.parametrize("name", PLANS)
def test_crops_exceed_the_input_by_the_papers_ratios(name):
    views, _, _ = views_of(name)
    ratios = np.max(views.global_crop_sizes, axis=0) / views.global_input_size
    limits = [1.75] * len(ratios) if len(ratios) == 2 else [3, 1.75, 1.75]
    assert np.all(ratios <= limits)
    assert np.all(np.array(views.local_input_size) / np.min(views.local_crop_sizes, axis=0) <= 2)


@pytest.mark.parametrize("name", ["colon", "prostate", "AMOS, large", "128 cubed"])
def test_inputs_keep_about_the_shape_of_the_patch_in_the_plane(name):
    views, _, _ = views_of(name)
    shares = np.array(views.global_input_size)[1:] / PLANS[name][0][1:]
    assert shares.max() <= 1.5 * shares.min()


def test_a_plan_of_the_papers_budget_gives_the_papers_sizes():
    views, _, _ = views_of("128 cubed")
    assert views.global_input_size == (32, 64, 64)
    assert views.global_crop_sizes[0] == (32, 64, 64)
    assert views.global_crop_sizes[-1] == (96, 112, 112)


@pytest.mark.parametrize("name", ["hippocampus", "nodules", "liver MR", "hippocampus 2d"])
def test_half_of_the_pairs_differ_where_volumes_are_hardly_larger_than_the_patch(name):
    views, _, _ = views_of(name)
    volume = tuple(int(m) for m in PLANS[name][3])
    rng = np.random.default_rng(0)
    ious = [a.iou(b) for a, b in (sample_view_boxes(volume, views, rng).pair for _ in range(400))]
    assert min(ious) >= views.min_iou
    assert np.mean(np.array(ious) < 0.8) >= 0.5


def test_views_shrink_before_the_batch_does():
    small, pairs, _ = views_of("128 cubed")
    patch, _, strides, median = PLANS["128 cubed"]
    large, more_pairs = configure_views(patch, 16, strides, median, (1.0,) * 3)
    assert pairs >= 8
    assert more_pairs >= 8
    assert math.prod(large.global_input_size) > math.prod(small.global_input_size)


def test_a_view_of_few_voxels_at_the_bottleneck_is_refused():
    views = ViewSettings(((8, 8),), ((8, 8),), (16, 16), (8, 8), (1.0, 1.0))
    with pytest.raises(UserError, match=r"views.local_input_size \(8, 8\) leaves 1 voxel .* raise it above"):
        check_views(views, [(1, 1), (2, 2), (2, 2), (2, 2)])


def test_a_batch_under_four_pairs_is_refused():
    with pytest.raises(UserError, match=r"batch_size is 3; .* at least 4 pairs: raise -batch_size"):
        PretrainSettings(views_of("nodules")[0], batch_size=3)


def plan_and_configuration(**pcrl):
    patch, batch, strides, median = PLANS["nodules"]
    configuration = {
        "patch_size": list(patch),
        "batch_size": batch,
        "spacing": [1.0, 1.0, 1.0],
        "median_image_size_in_voxels": list(median),
        "architecture": {"arch_kwargs": {"strides": [list(s) for s in strides]}},
    }
    return {"plans_name": "p", "configurations": {"3d_fullres": configuration, "2d": {}}, "pcrl": pcrl}, configuration


def test_flags_override_the_plan_and_the_plan_the_defaults():
    plan, configuration = plan_and_configuration(
        pretrain={"epochs": 7, "seed": 3, "views": {"3d_fullres": {"num_local": 2}, "2d": {"num_local": 9}}}
    )
    settings = pretrain_settings(plan, "3d_fullres", configuration, epochs=5, seed=None)
    assert (settings.epochs, settings.seed, settings.iters_per_epoch) == (5, 3, 250)
    assert settings.views.num_local == 2


@pytest.mark.parametrize(
    ("pretrain", "message"),
    [
        ({"epoch": 3}, r"pcrl.pretrain.epoch is not a setting; expected one of .*epochs"),
        ({"epochs": "3"}, r"pcrl.pretrain.epochs is '3'; expected a value like 240"),
        ({"epochs": True}, r"pcrl.pretrain.epochs is True; expected a value like 240"),
        ({"restoration": "half"}, r"restoration is 'half'; expected 'single' or 'full'"),
        ({"augmentation": {"noise": 1}}, r"pcrl.pretrain.augmentation.noise is not a setting"),
        ({"views": {"3d_fullres": {"local_input_size": [4, 4]}}}, r"local_input_size is \[4, 4\]; expected 3 positive"),
        (
            {"views": {"3d_fullres": {"global_crop_sizes": [8, 8, 8]}}},
            r"global_crop_sizes is \[8, 8, 8\]; expected",
        ),
        (
            {"views": {"3d_fullres": {"global_input_size": ["a", 8, 8]}}},
            r"global_input_size is \['a', 8, 8\]; exp",
        ),
        ({"views": {"num_local": 2}}, r"views.num_local is for no configuration of the plan; expected one of 3d_full"),
        ({"views": [1]}, r"pcrl.pretrain.views is \[1\]; expected a block of settings"),
        ({"augmentation": None}, r"pcrl.pretrain.augmentation is None; expected a block of settings"),
        ({"augmentation": {"scale": 1.5}}, r"pcrl.pretrain.augmentation.scale is 1.5; it is out of its range"),
        ({"augmentation": {"p_flip": 2}}, r"pcrl.pretrain.augmentation.p_flip is 2; it is out of its range"),
        ({"initial_lr": -1.0}, r"initial_lr -1.0, .*: expected a rate above 0"),
        ({"comparison_weight": 0}, r"pcrl.pretrain.comparison_weight is 0; expected a number above 0"),
        ({"seed": -1}, r"seed -1: expected a rate above 0, .* and no negative number"),
        ({"batch_size": 2}, r"batch_size is 2; .* at least 4"),
    ],
)
def test_a_wrong_setting_in_the_plan_is_named(pretrain, message):
    plan, configuration = plan_and_configuration(pretrain=pretrain)
    with pytest.raises(UserError, match=message):
        pretrain_settings(plan, "3d_fullres", configuration)


def test_the_plan_is_not_changed():
    plan, configuration = plan_and_configuration(pretrain={"views": {"3d_fullres": {"num_local": 2}}, "epochs": 3})
    before = repr(plan)
    pretrain_settings(plan, "3d_fullres", configuration, epochs=1)
    assert repr(plan) == before


def test_finetuning_takes_the_plans_part_and_names_a_wrong_key():
    assert FinetuneSettings.from_plan({"pcrl": {"finetune": {"epochs": 9}}}).epochs == 9
    assert FinetuneSettings.from_plan({}, {"epochs": 4}).epochs == 4
    with pytest.raises(UserError, match=r"pcrl.finetune.lr is not a setting; expected one of .*initial_lr"):
        FinetuneSettings.from_plan({"pcrl": {"finetune": {"lr": 1.0}}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"encoder_lr_factor": -1}, r"encoder_lr_factor -1; expected .* \(a factor of 0 freezes the encoder\)"),
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


def test_settings_are_plain_values_for_the_checkpoint():
    settings = PretrainSettings(views_of("nodules")[0], batch_size=8, augmentation=Augmentation(p_flip=0.0)).as_dict()
    assert settings["augmentation"]["p_flip"] == 0.0
    assert settings["views"]["num_local"] == 6


@pytest.mark.parametrize(("given", "rate"), [({}, 0.03), ({"optimizer": "adamw"}, 1e-3), ({"initial_lr": 0.5}, 0.5)])
def test_the_rate_follows_from_the_optimizer(given, rate):
    plan, configuration = plan_and_configuration(pretrain=given)
    assert pretrain_settings(plan, "3d_fullres", configuration).initial_lr == rate
