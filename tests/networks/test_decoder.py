import math

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.networks import ComparisonHead, Decoder, RestorationHead, encoder_of

ANISOTROPIC = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2)]


def network(strides, channels=1, residual=False):
    dim = len(strides[0])
    n = len(strides)
    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dim == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    kernels = [tuple(3 if s > 1 or i > 1 else 1 for s in stride) for i, stride in enumerate(strides)]
    cls = ResidualEncoderUNet if residual else PlainConvUNet
    return cls(
        channels, n, [4, 8, 16, 16, 16, 16][:n], conv, kernels, strides, 1, 2, 1, True, norm,
        {"eps": 1e-5, "affine": True}, None, None, nn.LeakyReLU, {"inplace": True},
    )  # fmt: skip


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("strides", "size"),
    [(ANISOTROPIC, (4, 16, 16)), ([(1, 1)] + [(2, 2)] * 3, (16, 24)), ([(1, 1, 1)] + [(2, 2, 2)] * 5, (32, 64, 32))],
)
def test_levels_go_from_coarse_to_full_resolution_by_the_stages_own_strides(strides, size, residual):
    encoder = encoder_of(network(strides, residual=residual))
    decoder = Decoder(encoder)
    assert decoder.num_levels == len(strides) - 1
    stages = encoder(torch.randn(2, 1, *size))
    features = decoder(stages, decoder.num_levels)
    assert [f.shape for f in features] == [s.shape for s in stages[::-1]]
    assert features[-1].shape[2:] == size


def test_decoder_keeps_encoder_sizes_not_divisible_by_the_stride():
    encoder = encoder_of(network(ANISOTROPIC))
    decoder = Decoder(encoder)
    features = decoder(encoder(torch.randn(2, 1, 3, 9, 11)), decoder.num_levels)
    assert features[-1].shape[2:] == (3, 9, 11)


def test_levels_above_the_drawn_one_are_not_computed():
    encoder = encoder_of(network(ANISOTROPIC))
    decoder = Decoder(encoder)
    called = []
    for i, block in enumerate(decoder.blocks):
        block.register_forward_hook(lambda *_, i=i: called.append(i))
    assert len(decoder(encoder(torch.randn(2, 1, 4, 16, 16)), 2)) == 3
    assert called == [0, 1]


def test_nothing_but_the_bottleneck_reaches_the_decoder():
    encoder = encoder_of(network(ANISOTROPIC))
    decoder = Decoder(encoder)
    stages = [s.detach().requires_grad_() for s in encoder(torch.randn(2, 1, 4, 16, 16))]
    decoder(stages, decoder.num_levels)[-1].sum().backward()
    assert [s.grad is not None for s in stages] == [False, False, False, True]


def test_a_network_without_stages_is_refused():
    with pytest.raises(UserError, match=r"network Linear has no encoder .* choose a plan .* with -p"):
        encoder_of(nn.Linear(2, 2))


@pytest.mark.parametrize(("conv", "space"), [(nn.Conv2d, (6, 4)), (nn.Conv3d, (3, 5, 4))])
def test_restoration_fills_the_targets_space_in_all_image_channels(conv, space):
    head = RestorationHead(conv, 8, 4, [3] * len(space))
    size = tuple(2 * s for s in space)
    assert head(torch.randn(2, 8, *space), size).shape == (2, 4, *size)


def test_restoration_is_linear_at_its_end_and_can_be_negative():
    out = RestorationHead(nn.Conv3d, 8, 1, [3, 3, 3])(torch.randn(4, 8, 3, 3, 3), (3, 3, 3))
    assert out.min() < 0 < out.max()


def test_v_is_normalised_over_the_batch_and_p_has_its_width():
    feature = torch.randn(64, 8, 3, 3) * 5 + 2
    v, p = ComparisonHead(8)(feature)
    assert p.shape == v.shape == (64, 8)
    pooled = feature.mean((2, 3))
    expected = (pooled - pooled.mean(0)) / (pooled.var(0, correction=0) + 1e-5).sqrt()
    assert torch.allclose(v, expected, atol=1e-4)


def test_comparison_is_float32_under_autocast():
    head = ComparisonHead(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        v, p = head(torch.randn(4, 8, 3, 3).bfloat16())
    assert (v.dtype, p.dtype) == (torch.float32, torch.float32)


def test_the_predictor_doubles_the_width_between():
    shapes = [tuple(layer.weight.shape) for layer in ComparisonHead(8).predictor if isinstance(layer, nn.Linear)]
    assert shapes == [(16, 8), (8, 16)]
    assert math.prod(shapes[0]) == 128
