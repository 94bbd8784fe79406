import pytest
import torch
from method_setups import SETUPS, Setup
from torch import nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.networks import RestoringUNet


@pytest.mark.parametrize("kind", SETUPS)
def test_the_restoring_unet_equals_the_plans_network_except_for_the_output(kind):
    setup = Setup("mae", kind)
    network = setup.network()
    image = torch.randn(2, setup.channels, *setup.plan.patch_size)
    restoring = RestoringUNet(network, setup.channels)
    assert restoring(image).shape == image.shape
    restoring.output = network.decoder.seg_layers[-1]
    assert torch.equal(restoring(image), network(image)[0])
    assert {id(p) for p in restoring.parameters()} == {
        id(p) for name, p in network.named_parameters() if "seg_layers" not in name or f"seg_layers.{1}." in name
    }


def test_a_network_without_nnunets_decoder_is_refused():
    network = Setup("mae", "3D").network()
    network.decoder = nn.Identity()
    with pytest.raises(UserError, match=r"PlainConvUNet has no decoder of nnU-Net's form; .* or another -method"):
        RestoringUNet(network, 1)
