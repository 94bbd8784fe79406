"""The sizes of views derived from plans."""

import math

import numpy as np
import pytest
from box_sets import iou

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.views.boxes import sample_view_boxes
from pcrl_nnunet.views.configure import check_views, configure_views
from pcrl_nnunet.views.settings import ViewSettings

# name: patch, batch, strides, median image; the first four are nnU-Net's plans for real datasets
PLANS = {
    "hippocampus": ((40, 56, 40), 7, [(1, 1, 1)] + [(2, 2, 2)] * 3, (36, 50, 35)),
    "nodules": ((56, 56, 56), 4, [(1, 1, 1)] + [(2, 2, 2)] * 4, (51, 51, 51)),
    "liver MR": ((40, 224, 192), 2, [(1, 1, 1)] + [(1, 2, 2)] * 2 + [(2, 2, 2)] * 3, (36, 262, 262)),
    "hippocampus 2d": ((56, 40), 281, [(1, 1)] + [(2, 2)] * 3, (50, 35)),
    "128 cubed": ((128, 128, 128), 2, [(1, 1, 1)] + [(2, 2, 2)] * 5, (482, 512, 512)),
    # plans of nnU-Net's default and ResEncL planners for the shapes and spacings of MSD colon, prostate, lung and AMOS
    "colon": ((56, 192, 192), 2, [(1, 1, 1), (1, 2, 2), (1, 2, 2)] + [(2, 2, 2)] * 3, (150, 512, 512)),
    "prostate": ((20, 320, 256), 2, [(1, 1, 1)] + [(1, 2, 2)] * 4 + [(2, 2, 2)] * 2, (20, 320, 319)),
    "lung, large": ((112, 256, 256), 2, [(1, 1, 1)] + [(1, 2, 2)] * 2 + [(2, 2, 2)] * 4, (252, 512, 512)),
    "AMOS, large": ((48, 320, 256), 2, [(1, 1, 1)] + [(1, 2, 2)] * 3 + [(2, 2, 2)] * 3, (90, 600, 600)),
    "prostate 2d": ((320, 320), 32, [(1, 1)] + [(2, 2)] * 6, (320, 319)),
    "thin": ((5, 64, 64), 4, [(1, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2)], (1, 90, 90)),
}


def views_of(name):
    patch, batch, strides, median = PLANS[name]
    views, samples = configure_views(patch, batch, strides, median, (1.0,) * len(patch))
    return views, samples, np.prod(strides, axis=0)


@pytest.mark.parametrize("name", PLANS)
def test_views_fit_the_plan(name):
    views, samples, total = views_of(name)
    patch, batch, strides, median = PLANS[name]
    check_views(views, strides)
    assert samples >= 8
    if name != "thin":
        assert views.voxels_per_sample * samples <= math.prod(patch) * batch
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
def test_half_of_the_pairs_differ_in_volumes_hardly_larger_than_the_patch(name):
    views, _, _ = views_of(name)
    volume = tuple(int(m) for m in PLANS[name][3])
    rng = np.random.default_rng(0)
    ious = [iou(a, b) for a, b in (sample_view_boxes(volume, views, rng).pair for _ in range(400))]
    assert min(ious) >= views.min_iou
    assert np.mean(np.array(ious) < 0.8) >= 0.5


def test_views_shrink_before_the_batch_does():
    small, samples, _ = views_of("128 cubed")
    patch, _, strides, median = PLANS["128 cubed"]
    large, more_samples = configure_views(patch, 16, strides, median, (1.0,) * 3)
    assert samples >= 8
    assert more_samples >= 8
    assert math.prod(large.global_input_size) > math.prod(small.global_input_size)


def test_a_view_of_few_voxels_at_the_bottleneck_is_refused():
    views = ViewSettings(((8, 8),), ((8, 8),), (16, 16), (8, 8), (1.0, 1.0))
    with pytest.raises(UserError, match=r"views.local_input_size \(8, 8\) leaves 1 voxel .* raise it above"):
        check_views(views, [(1, 1), (2, 2), (2, 2), (2, 2)])
