"""pcrl_nnunet_transfer: a pretrained encoder for the network of another plan."""

from __future__ import annotations

import argparse
import csv
import json
import os
from copy import deepcopy
from typing import Any

DESCRIPTION = """Fit a pretrained encoder to a plan's network: other input channels, more or fewer stages, other kernel
sizes. Writes the plan PLANS_NAME, the same as PLANS with the same preprocessed data, and the fitted checkpoint where
nnUNetv2_train ... -tr PCRLFinetuneTrainer -p PLANS_NAME looks for it, with a table of every tensor (transfer.csv)
beside it. CHECKPOINT is one of pcrl_nnunet_pretrain, of nnssl (the OpenMind models), or of a training of nnU-Net."""
TABLE = "transfer.csv"
HEADER = ("tensor", "what", "elements", "how")


def _parser() -> argparse.ArgumentParser:
    from pcrl_nnunet.config import INPUT_CHANNELS

    parser = argparse.ArgumentParser(prog="pcrl_nnunet_transfer", description=DESCRIPTION)
    parser.add_argument("-i", required=True, metavar="CHECKPOINT", help="the pretrained checkpoint")
    parser.add_argument("-d", required=True, metavar="DATASET", help="name or ID of the dataset to fine-tune on")
    parser.add_argument("-name", required=True, metavar="NAME", help="of the experiment: the plan becomes PLANS_NAME")
    parser.add_argument("-c", metavar="CONFIGURATION", help="default: 3d_fullres, else the only one of the plan")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    parser.add_argument(
        "-input_channels",
        choices=INPUT_CHANNELS,
        help="where their number differs: repeat and divide (default), the first ones, or the mean of all",
    )
    return parser


def main() -> None:
    """Parse, fit, write, report."""
    args = _parser().parse_args()
    from pcrl_nnunet import checkpoint as checkpoint_file
    from pcrl_nnunet.config import FinetuneSettings
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.ingest.maskless import trainer_for
    from pcrl_nnunet.plans import load_plan
    from pcrl_nnunet.pretraining.request import refuse_cascade
    from pcrl_nnunet.transfer import weights as transfer

    if not args.name.replace("-", "").replace("_", "").isalnum() or not args.name.isascii():
        raise UserError(f"-name is '{args.name}'; expected letters, digits, - and _: it becomes part of folders' names")
    if not os.environ.get("nnUNet_results"):
        raise UserError("the variable nnUNet_results is not set; set it to the folder where trainings are to be kept")
    plan = load_plan(args.d, args.p, args.c)
    refuse_cascade(plan)
    settings = FinetuneSettings.from_plan(plan.plans)
    input_channels = args.input_channels or settings.input_channels
    source = os.path.abspath(args.i)
    checkpoint = checkpoint_file.read_encoder(source)
    network, channels = _network(plan)
    try:
        transfer.check_architecture(checkpoint, plan.plans, plan.configuration, plan.folder)
        report = transfer.load_encoder(network, checkpoint, allow_partial=True, input_channels=input_channels)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error

    new_plan = _new_plan(plan.plans, f"{args.p}_{args.name}", source, report.encoder_share < 1)
    plan_file = os.path.join(plan.folder, f"{new_plan['plans_name']}.json")
    dataset = plan.plans["dataset_name"]
    results = os.path.join(os.environ["nnUNet_results"], dataset)
    target = transfer.candidates(results, new_plan["plans_name"], plan.configuration, "all")[0]
    fitted = _fitted(checkpoint, source, network, channels, plan, new_plan, report)
    _refuse_others(plan_file, new_plan, target, fitted)
    _write(plan_file, new_plan, target, fitted, report.rows())

    _print_report(source, checkpoint, plan, report)
    print(f"\nWrote {plan_file}\n      {target}\n      {os.path.join(os.path.dirname(target), TABLE)}")
    trainer = trainer_for(plan.plans, plan.dataset_json)
    ours, stock = _commands(dataset, plan.configuration, new_plan["plans_name"], target, trainer)
    print(f"Fine-tune it, here fold 0 (other folds alike), with: {ours}")
    if trainer == "PCRLFinetuneTrainer":
        print(f"or with nnU-Net alone: {stock}")


def _print_report(source: str, checkpoint: dict[str, Any], plan: Any, report: Any) -> None:
    """Print a line for every tensor, the totals, and how the checkpoint's network and data differ from the plan's."""
    from pcrl_nnunet.transfer import weights as transfer

    width = max(len(name) for name, *_ in report.rows())
    for name, what, elements, how in report.rows():
        print(f"{name:{width}}  {what:8} {elements:12,}  {how}".rstrip())
    print(f"\n{source}\n{report.summary(notes=False)}")
    architecture = plan.resolved["architecture"]
    differences = {
        "another network": transfer.architecture_differences(
            checkpoint, architecture["network_class_name"], architecture["arch_kwargs"]
        ),
        "other data": transfer.data_differences(checkpoint, plan.plans, plan.configuration),
    }
    for of, listed in differences.items():
        for difference in listed:
            print(f"Note, pretrained on {of}: {difference}")


def _commands(
    dataset: str, configuration: str, plans_name: str, checkpoint: str, trainer: str | None
) -> tuple[str, str]:
    """Return the lines that train fold 0 with our trainer and with nnU-Net's, to be pasted into a shell."""
    import torch

    from pcrl_nnunet.commands import command, device_option

    train = ("nnUNetv2_train", dataset, configuration, 0)
    device = device_option("cuda" if torch.cuda.is_available() else "cpu")
    ours = command(*train, p=plans_name, tr=trainer or "PCRLClassificationTrainer", device=device)
    return ours, command(*train, p=plans_name, pretrained_weights=checkpoint, device=device)


def _network(plan: Any) -> tuple[Any, int]:
    """The plan's network with random weights, always the same ones, and its number of input channels."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(deepcopy(plan.plans))
    configuration = manager.get_configuration(plan.configuration)
    channels = determine_num_input_channels(manager, configuration, plan.dataset_json)
    torch.manual_seed(0)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        channels,
        manager.get_label_manager(plan.dataset_json).num_segmentation_heads,
        deep_supervision=True,
    )
    return network, channels


def _new_plan(plans: dict[str, Any], name: str, source: str, partial: bool) -> dict[str, Any]:
    """The same plan under another name; where the encoder is not covered in full, fine-tuning is told to accept it."""
    from pcrl_nnunet.transfer.weights import FITTED_KEY

    return {**deepcopy(plans), "plans_name": name, FITTED_KEY: source, "pcrl": _settings(plans, partial)}


def _settings(plans: dict[str, Any], partial: bool) -> dict[str, Any]:
    block = {key: value for key, value in deepcopy(plans).get("pcrl", {}).items() if key != "checkpoint"}
    return {**block, "finetune": {**block.get("finetune", {}), **({"allow_partial_encoder": True} if partial else {})}}


def _fitted(
    checkpoint: dict[str, Any],
    source: str,
    network: Any,
    channels: int,
    plan: Any,
    new_plan: dict[str, Any],
    report: Any,
) -> dict[str, Any]:
    """The checkpoint with the network of the plan in it; where it came from, and what it saw, stay."""
    from pcrl_nnunet import checkpoint as checkpoint_file

    state = network.state_dict()
    adaptation_plan = checkpoint_file.nnssl_adaptation_plan(
        new_plan, plan.configuration, plan.resolved, tuple(plan.resolved["patch_size"]), channels, network
    )
    if stated := checkpoint["nnssl_adaptation_plan"].get("pretrain_plan"):
        adaptation_plan["pretrain_plan"] = stated  # of the data that it has seen
    pretrained = {state[name].untyped_storage()._cdata for name in (*report.loaded, *report.adapted)}
    return {
        **checkpoint,
        "format": checkpoint_file.FORMAT,
        "network_weights": state,
        "random_keys": [n for n, tensor in state.items() if tensor.untyped_storage()._cdata not in pretrained],
        "num_input_channels": channels,
        "encoder_hash": checkpoint_file.encoder_hash(network.encoder),
        "architecture_kwargs": plan.resolved["architecture"]["arch_kwargs"],
        "nnssl_adaptation_plan": adaptation_plan,
        "adapted": {"checkpoint": source, "encoder_share": report.encoder_share, "notes": report.notes},
    }


def _refuse_others(plan_file: str, plan: dict[str, Any], target: str, fitted: dict[str, Any]) -> None:
    """Raises `UserError` where files of the same names hold anything else: an experiment is not replaced."""
    from pcrl_nnunet import checkpoint as checkpoint_file
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.plans import read_json
    from pcrl_nnunet.settings import without_settings
    from pcrl_nnunet.transfer.weights import FITTED_KEY

    if os.path.isfile(plan_file):
        there = read_json(plan_file, "remove it and run this again")
        given = {**json.loads(json.dumps(plan)), FITTED_KEY: there.get(FITTED_KEY)}  # the checkpoint is looked at below
        if without_settings(there) != without_settings(given):
            raise UserError(f"{plan_file} exists and is another plan; give another -name, or remove it")
        plan["pcrl"] = _settings(there, plan["pcrl"]["finetune"].get("allow_partial_encoder", False))  # as edited
    if os.path.isfile(target) and checkpoint_file.read(target)["encoder_hash"] != fitted["encoder_hash"]:
        raise UserError(f"{target} exists and holds another encoder; give another -name, or remove it")


def _write(
    plan_file: str, plan: dict[str, Any], target: str, fitted: dict[str, Any], rows: list[tuple[str, str, int, str]]
) -> None:
    """Write the plan last: where the plan is, everything is. An error leaves nothing that was not there before."""
    from pcrl_nnunet import checkpoint as checkpoint_file
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.files import new_folder, whole

    folder = os.path.dirname(target)
    try:
        with new_folder(folder), whole(plan_file) as plan_draft, whole(os.path.join(folder, TABLE)) as table_draft:
            with open(plan_draft, "w", encoding="utf-8") as file:  # fails before anything is in place
                json.dump(plan, file, indent=4)
            with open(table_draft, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([HEADER, *rows])
            checkpoint_file.write(target, fitted, go_on="run this again")
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be written ({error.strerror}), so no plan and no checkpoint were written; "
            f"make room or the folder writable, and run this again"
        ) from error


def main_entry() -> None:
    """The console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
