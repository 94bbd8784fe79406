"""The network whose features are computed: a plan's network with the weights of a checkpoint."""

from __future__ import annotations

import torch
from torch import nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.networks import accept_any_size, encoder_of
from pcrl_nnunet.networks.of_plan import network_of_plan
from pcrl_nnunet.plans import PlannedConfiguration
from pcrl_nnunet.transfer.foreign import read_encoder
from pcrl_nnunet.transfer.report import TransferReport
from pcrl_nnunet.transfer.shapes import check_architecture
from pcrl_nnunet.transfer.weights import load_encoder, load_trained_decoder, trained_decoder


def network_of(
    plan: PlannedConfiguration, path: str | None, seed: int = 0
) -> tuple[nn.Module, int, TransferReport | None]:
    """Return the plan's network in evaluation mode, its number of channels, and which weights were loaded.

    Args:
        path: any checkpoint that `read_encoder` reads; None: random weights.
        seed: seed of the random weights.

    Raises:
        UserError: the checkpoint cannot be read, or its encoder does not fit the plan.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, channels = network_of_plan(plan.plans, plan.configuration, plan.dataset_json)
    encoder, report = encoder_of(network), None
    if path is not None:
        checkpoint = read_encoder(path)
        try:
            check_architecture(checkpoint, plan.plans, plan.configuration, plan.folder)
            report = load_encoder(network, checkpoint)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if trained_decoder(checkpoint):
            load_trained_decoder(network, checkpoint, report)
    accept_any_size(encoder)  # a case may be smaller than the patch
    return network.eval(), channels, report
