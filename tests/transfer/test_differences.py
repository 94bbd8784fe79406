from typing import Any

import numpy as np
import pytest
import torch
from unets import PLAIN, RESENC, arch_kwargs, build, content_of, plan_with

from pcrl_nnunet.transfer.differences import architecture_differences, data_differences, same_setting


def test_other_strides_are_a_difference_although_every_weight_fits() -> None:
    content = content_of(build())
    kwargs = arch_kwargs(strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]])
    (difference,) = architecture_differences(content, PLAIN, kwargs)
    assert difference.startswith("strides: [[1, 1, 1], [2, 2, 2]")


def test_decoder_settings_and_tuples_for_lists_do_not_count_as_differences() -> None:
    content = content_of(build())
    kwargs = arch_kwargs(n_conv_per_stage_decoder=[3, 3], features_per_stage=(4, 8, 8))
    assert architecture_differences(content, PLAIN, kwargs) == []
    assert architecture_differences(content, RESENC, kwargs) != []


SPELLINGS = [
    ("torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU"),
    (False, [False]),
    (3, [3, 3, 3]),
    ([3, [1, 3, 3]], [[3, 3, 3], (1, 3, 3)]),
    (3, [[3, 3, 3]] * 4),
    (1, 1.0),
    ((1, 2), [1, 2]),
    (1e-5, float(np.float32(1e-5))),
    (torch.tensor([1.0, 2.0]), [1, 2]),
    (None, {}),
    ({"eps": 1e-5, "inplace": True}, {"inplace": [True], "eps": 0.00001}),
    ("ZScoreNormalization", ["ZScoreNormalization"]),
]


OTHERS = [
    ("torch.nn.LeakyReLU", "torch.nn.ReLU"),
    ("torch.nn.Conv2d", "torch.ao.nn.quantized.Conv2d"),
    ("their.LeakyReLU", "torch.nn.LeakyReLU"),
    (False, [False, True]),
    (3, [1, 3, 3]),
    ([1, 3, 3], [[1, 3, 3]] * 3),
    ([3, 3], [3, 3, 3]),
    (1, 1.001),
    (None, False),
    (None, []),
    (3, []),
    ({"eps": 1e-5}, {"eps": 1e-5, "affine": True}),
    ({"eps": 1e-5}, {"eps": 1e-4}),
    (["CTNormalization"], ["ZScoreNormalization"]),
]


@pytest.mark.parametrize(("a", "b"), SPELLINGS)
def test_two_spellings_of_one_setting_are_the_same(a: Any, b: Any) -> None:
    assert same_setting(a, b)
    assert same_setting(b, a)


@pytest.mark.parametrize(("a", "b"), OTHERS)
def test_other_settings_are_a_difference(a: Any, b: Any) -> None:
    assert not same_setting(a, b)
    assert not same_setting(b, a)


def test_network_settings_in_another_spelling_do_not_count_as_differences() -> None:
    content = content_of(build())
    spelled = arch_kwargs(
        kernel_sizes=3, n_conv_per_stage=2, nonlin="torch.nn.modules.activation.LeakyReLU", dropout_op_kwargs={}
    )
    assert architecture_differences(content, PLAIN, spelled) == []
    content["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"] = spelled
    assert architecture_differences(content, PLAIN, arch_kwargs()) == []


def test_nnssls_data_settings_are_compared_or_named_as_missing() -> None:
    stated = {"spacing": [1, 1, 1], "patch_size": [160, 160, 160]}
    content = {
        "plans": None,
        "configuration": "onemmiso",
        "nnssl_adaptation_plan": {"pretrain_plan": {"configurations": {"onemmiso": stated}}},
    }
    plan = plan_with()
    plan["configurations"]["3d_fullres"] |= {"spacing": [1.0, 1.0, 1.0], "patch_size": [32, 32, 32]}
    patch, missing = data_differences(content, plan, "3d_fullres")
    assert patch == "patch_size: [160, 160, 160] in the checkpoint's plan, [32, 32, 32] in this one"
    assert missing == "the checkpoint does not state normalization_schemes, use_mask_for_norm"
