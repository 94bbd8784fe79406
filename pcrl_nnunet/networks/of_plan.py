"""The network of a plan."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager


def network_of_plan(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> tuple[Any, int]:
    """Return the network of a plan's configuration, with random weights, and its number of input channels."""
    manager = PlansManager(deepcopy(plans))
    this = manager.get_configuration(configuration)
    channels = determine_num_input_channels(manager, this, dataset_json)
    network = get_network_from_plans(
        this.network_arch_class_name,
        this.network_arch_init_kwargs,
        this.network_arch_init_kwargs_req_import,
        channels,
        manager.get_label_manager(dataset_json).num_segmentation_heads,
        deep_supervision=True,
    )
    return network, channels
