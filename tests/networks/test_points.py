import numpy as np
import pytest
import torch
from method_setups import Setup
from torch import nn

from pcrl_nnunet.networks import UNet, at_points


def test_features_between_voxels_are_interpolated_linearly():
    feature = torch.arange(4.0)[None, None, :, None].expand(1, 1, 4, 5) * 10
    points = torch.tensor([[[0.0, 1.0], [3.0, 7.0], [5.0, 0.0]]])
    found = at_points(feature, points, (8, 10))  # a stride of 2
    torch.testing.assert_close(found[0, :, 0], torch.tensor([0.0, 15.0, 25.0]))


def test_beyond_the_last_voxel_the_border_is_repeated_and_one_voxel_is_everywhere():
    feature = torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1)
    points = torch.tensor([[[7.0, 0.0], [4.0, 7.0]]])
    torch.testing.assert_close(at_points(feature, points, (8, 8))[0, :, 0], torch.tensor([3.0, 3.0]))


def only_the_centre(network):
    """Make every kernel pass on its central voxel, and make normalisations and nonlinearities do nothing."""
    for module in [*network.modules()]:
        for name, layer in [*module.named_children()]:
            if isinstance(layer, (nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LeakyReLU)):
                setattr(module, name, nn.Identity())
    for layer in network.modules():
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            nn.init.zeros_(layer.weight)  # only the skip connection reaches the decoder
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.modules.conv._ConvNd):
            nn.init.zeros_(layer.weight)
            layer.weight.data[(slice(None), -1, *(k // 2 for k in layer.kernel_size))] = 1
            nn.init.zeros_(layer.bias)


@pytest.mark.parametrize("kind", ["2D", "3D", "four channels, anisotropic"])
def test_voxel_k_of_a_level_is_centred_on_voxel_k_times_stride_of_the_image(kind):
    """The image is its own coordinates, and every kernel passes on its centre: features tell where they lie."""
    setup = Setup("dense", kind)
    unet = UNet(setup.network())
    only_the_centre(unet)
    size = setup.plan.patch_size
    rng = np.random.default_rng(0)
    # the last multiples of the stride of 4 are at least 4 below the size
    points = torch.from_numpy(rng.uniform(0, np.subtract(size, 4), (1, 20, len(size)))).float()
    for axis in range(len(size)):
        ramp = torch.arange(size[axis]).float().reshape(-1, *[1] * (len(size) - 1 - axis)).expand(size)
        image = ramp.expand(1, setup.channels, *size)
        with torch.no_grad():
            levels = unet.features(image.contiguous())
        assert len(levels) == 3
        for level in levels:
            found = at_points(level, points, size)
            torch.testing.assert_close(found, points[:, :, axis, None].expand_as(found), rtol=1e-4, atol=1e-3)
