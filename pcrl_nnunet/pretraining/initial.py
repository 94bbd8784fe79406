"""Starting from another training's encoder (``-init``)."""

from __future__ import annotations

from typing import Any

from torch import nn

from pcrl_nnunet.errors import UserError
from pcrl_nnunet.methods.base import Method
from pcrl_nnunet.plans import PlannedConfiguration
from pcrl_nnunet.transfer.foreign import read_encoder
from pcrl_nnunet.transfer.report import origin
from pcrl_nnunet.transfer.seen import UNKNOWN_CASES
from pcrl_nnunet.transfer.shapes import check_architecture
from pcrl_nnunet.transfer.weights import decoder_levels, load_encoder, load_trained_decoder

KNOWN = ("method", "datasets", "configuration", "fold", "epochs", "cases")


def load_initial(
    path: str, plan_network: nn.Module, method: Method, plan: PlannedConfiguration
) -> tuple[dict[str, Any], list[str]]:
    """Load a checkpoint's trained weights into the plan's network, and the method's own weights if the methods agree.

    Args:
        path: path of the checkpoint.
        plan_network: the plan's network, whose encoder the method trains.
        method: the method on the plan's network.
        plan: the pretraining's plan.

    Returns:
        Facts about the checkpoint, and lines for the log.

    Raises:
        UserError: the encoder does not fit the plan's network.
    """
    content = read_encoder(path)
    try:
        check_architecture(content, plan.plans, plan.configuration, plan.folder)
        report = load_encoder(plan_network, content, allow_partial=True)
    except UserError as error:
        raise UserError(f"-init {path}: {error}") from error
    own, given = method.state_dict(), content.get("method_weights", {})
    fitting = {name: t for name, t in given.items() if name in own and t.shape == own[name].shape}
    # names count modules from the coarsest level: with other stages or methods the same name means another module
    if content["method"] != method.name or decoder_levels(given) != decoder_levels(own):
        fitting = {}
    if content["method"] == method.name:
        load_trained_decoder(plan_network, content, report)
    method.after_loading()
    method.load_state_dict(fitting, strict=False)
    init = {
        "checkpoint": path,
        "encoder_share": report.encoder_share,
        "all_cases_known": content.get("all_cases_known", True),
        **{key: content[key] for key in KNOWN},
    }
    lines = [
        f"Starting from {path}\n  {origin(content, [key for key in KNOWN if key != 'cases'])}\n{report.summary()}\n"
        f"{len(fitting)} of {len(given)} tensors of the method's own weights are taken over"
    ]
    if given and content["method"] != method.name:
        lines.append(
            f"This is a pretraining by {content['method']}, so only its encoder is taken over; a pretraining by "
            f"{method.name} fits as a whole."
        )
    if not init["all_cases_known"]:
        lines.append(UNKNOWN_CASES)
    return init, lines
