"""pcrl_nnunet_transfer: transfer of a pretrained encoder to another plan's network."""

from __future__ import annotations

import argparse
import os
from typing import Any

from pcrl_nnunet.cli import arguments

DESCRIPTION = """
Fit a pretrained encoder to the network of another plan.

The other network may have other input channels, more or fewer stages, or
other kernel sizes. The command writes three files:
  - the plan PLANS_NAME, a copy of PLANS that uses the same preprocessed data
  - the fitted checkpoint, where nnUNetv2_train ... -tr PCRLFinetuneTrainer
    -p PLANS_NAME finds it
  - transfer.csv beside the checkpoint, which lists every tensor
"""
EXAMPLES = """
  pcrl_nnunet_transfer -i checkpoint_final.pth -d 42 -name luna
  pcrl_nnunet_transfer -i openmind.pth -d 42 -c 3d_fullres -p nnUNetResEncUNetLPlans -name openmind
"""


def _parser() -> argparse.ArgumentParser:
    from pcrl_nnunet.config import INPUT_CHANNELS

    parser = arguments.parser("pcrl_nnunet_transfer", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "-i",
        required=True,
        metavar="CHECKPOINT",
        help="pretrained checkpoint, written by pcrl_nnunet_pretrain, by nnssl (such as OpenMind's) or by nnU-Net's "
        "training",
    )
    parser.add_argument("-d", required=True, metavar="DATASET", help="name or ID of the dataset to fine-tune on")
    parser.add_argument(
        "-name", required=True, metavar="NAME", help="name of the experiment; the new plan is called PLANS_NAME"
    )
    parser.add_argument("-c", metavar="CONFIGURATION", help=arguments.CONFIGURATION)
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help=arguments.PLANS)
    parser.add_argument(
        "-input_channels",
        choices=INPUT_CHANNELS,
        help="way to fit the first convolution to another number of channels: repeat and divide the weights (default: "
        "the plan's, or repeat), take the first channels, or take the mean of all",
    )
    return parser


def main() -> None:
    """Parse, check, fit, write, report."""
    args = _parser().parse_args()
    _check(args)
    arguments.load("pcrl_nnunet.transfer.fit", "pcrl_nnunet.ingest.maskless")
    from pcrl_nnunet.config import FinetuneSettings
    from pcrl_nnunet.plans import folder_of, load_plan
    from pcrl_nnunet.transfer.fit import TABLE, fit, write

    plan = load_plan(args.d, args.p, args.c)
    input_channels = args.input_channels or FinetuneSettings.from_plan(plan.plans).input_channels
    source = os.path.abspath(args.i)
    fitted = fit(source, plan, args.name, input_channels, folder_of("nnUNet_results"))
    write(fitted)

    print("\n".join(["", source, fitted.report.summary(notes=False), *fitted.notes]))
    not_as_is = [row for row in fitted.report.rows() if row[1] != "loaded" and row[0].startswith("encoder.")]
    width = max((len(name) for name, *_ in not_as_is), default=0)
    for name, what, elements, how in not_as_is:
        print(f"  {name:{width}}  {what:8} {elements:12,}  {how}".rstrip())
    target = fitted.checkpoint_file
    print(f"\nWrote {fitted.plan_file}\n      {target}")
    print(f"      {os.path.join(os.path.dirname(target), TABLE)}, which lists every tensor")
    _print_commands(plan, fitted.plan["plans_name"], target)


def _check(args: argparse.Namespace) -> None:
    """Raise `UserError` for wrong arguments, before torch is imported."""
    from pcrl_nnunet.named_plans import check_name
    from pcrl_nnunet.plans import find_plan, folder_of, refuse_cascade

    check_name(args.name)
    folder_of("nnUNet_results")
    _, plans, configuration, _ = find_plan(args.d, args.p, args.c)
    refuse_cascade(plans, configuration)
    arguments.check_file("-i", args.i, "a checkpoint")


def _print_commands(plan: Any, plans_name: str, checkpoint: str) -> None:
    """Print shell commands that train fold 0 with our trainer and with nnU-Net's."""
    import torch

    from pcrl_nnunet.commands import train_command
    from pcrl_nnunet.ingest.maskless import trainer_for

    trainer = trainer_for(plan.plans, plan.dataset_json)
    train = plan.plans["dataset_name"], plan.configuration, 0, "cuda" if torch.cuda.is_available() else "cpu"
    ours = train_command(*train, p=plans_name, tr=trainer or "PCRLClassificationTrainer")
    print(f"Fine-tune fold 0, and the other folds alike, with: {ours}")
    if trainer == "PCRLFinetuneTrainer":
        print(f"Or with nnU-Net alone: {train_command(*train, p=plans_name, pretrained_weights=checkpoint)}")


def main_entry() -> None:
    """Run the console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
