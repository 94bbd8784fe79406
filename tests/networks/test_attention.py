"""The attention that is told a transformation, against numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pcrl_nnunet.networks import ChannelAttention, OuterProductAttention

B, C, K = 5, 4, 7


def numbers(module: nn.Module, name: str) -> tuple[np.ndarray, np.ndarray]:
    layer: Any = module.get_submodule(name)
    return layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()


def of_indicator(module: nn.Module, bits: np.ndarray) -> np.ndarray:
    (first, first_bias), (second, second_bias) = (numbers(module, f"of_indicator.{i}") for i in (0, 2))
    assert first.shape == (256, K)
    return np.maximum(bits @ first.T + first_bias, 0) @ second.T + second_bias


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def given(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, C, *(3, 4, 5)[:dim]), torch.randint(0, 2, (B, K)).float()


def test_the_authors_attention_scales_channels_by_the_indicator() -> None:
    feature, indicator = given(3)
    module = ChannelAttention(K, C)
    scale = sigmoid(of_indicator(module, indicator.double().numpy()))
    expected = feature.numpy() * scale[:, :, None, None, None]
    np.testing.assert_allclose(module(feature, indicator).detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dim", "conv_op"), [(2, nn.Conv2d), (3, nn.Conv3d)])
def test_the_papers_attention_scales_channels_by_all_products_of_indicator_and_feature(
    dim: int, conv_op: type[nn.Module]
) -> None:
    feature, indicator = given(dim)
    module = OuterProductAttention(conv_op, K, C)
    weight, bias = numbers(module, "of_products")
    assert weight.shape == (C, C**2)
    pooled = feature.double().numpy().reshape(B, C, -1).mean(2)
    told = of_indicator(module, indicator.double().numpy())
    products = np.einsum("bi,bj->bij", told, pooled).reshape(B, C**2)
    scale = sigmoid(np.maximum(products @ weight.T + bias, 0))
    scaled = torch.from_numpy(feature.double().numpy() * scale.reshape(B, C, *[1] * dim))
    expected = module.conv.double()(scaled).detach()
    module.float()
    torch.testing.assert_close(module(feature, indicator).double(), expected, rtol=1e-4, atol=1e-5)


def test_another_indicator_gives_another_feature() -> None:
    feature, indicator = given(3)
    for module in (ChannelAttention(K, C), OuterProductAttention(nn.Conv3d, K, C)):
        assert not torch.allclose(module(feature, indicator), module(feature, 1 - indicator))
