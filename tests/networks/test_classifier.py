import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_dataset import make_plan

from pcrl_nnunet.networks import Classifier


def classifier(num_outputs=3):
    torch.manual_seed(0)
    configuration = PlansManager(make_plan()).get_configuration("3d_fullres")
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        1,
        3,
        deep_supervision=False,
    )
    return Classifier(network, num_outputs).eval()


def test_a_logit_is_linear_in_means_and_maxima_of_the_stages():
    network, image = classifier(), torch.randn(2, 1, 8, 16, 16)
    with torch.no_grad():
        pooled = [p for f in network.encoder(image) for p in (f.mean((2, 3, 4)), f.amax((2, 3, 4)))]
        expected = torch.cat(pooled, 1) @ network.head.weight.T + network.head.bias
        torch.testing.assert_close(network(image), expected)


def test_the_mean_of_an_activation_map_and_the_bias_are_the_logit():
    network, image = classifier(), torch.randn(2, 1, 8, 16, 16)
    with torch.no_grad():
        maps = network.activation_maps(image)
        assert maps.shape == (2, 3, 8, 16, 16)
        torch.testing.assert_close(maps.mean((2, 3, 4)) + network.head.bias, network(image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(7, 13, 15), (4, 9, 9)])
def test_any_size_is_taken(size):
    network, image = classifier(), torch.randn(1, 1, *size)
    with torch.no_grad():
        assert network(image).shape == (1, 3)
        assert network.activation_maps(image).shape == (1, 3, *size)
