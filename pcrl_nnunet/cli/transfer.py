"""pcrl_nnunet_transfer: transfer of a pretrained encoder to another plan's network."""

from __future__ import annotations

import argparse
import os
from typing import Any

DESCRIPTION = """Fit a pretrained encoder to a plan's network: other input channels, more or fewer stages, other kernel
sizes. Writes the plan PLANS_NAME, the same as PLANS with the same preprocessed data, and the fitted checkpoint where
nnUNetv2_train ... -tr PCRLFinetuneTrainer -p PLANS_NAME looks for it, with a table of every tensor (transfer.csv)
beside it. CHECKPOINT is one of pcrl_nnunet_pretrain, of nnssl (the OpenMind models), or of a training of nnU-Net."""


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
        help="if their number differs: repeat and divide (default), the first ones, or the mean of all",
    )
    return parser


def main() -> None:
    """Parse, fit, write, report."""
    args = _parser().parse_args()
    from pcrl_nnunet.config import FinetuneSettings
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.plans import folder_of, load_plan, refuse_cascade
    from pcrl_nnunet.transfer.fit import TABLE, fit, write

    if not args.name.replace("-", "").replace("_", "").isalnum() or not args.name.isascii():
        raise UserError(f"-name is '{args.name}'; expected letters, digits, - and _: it becomes part of folders' names")
    results = folder_of("nnUNet_results")
    plan = load_plan(args.d, args.p, args.c)
    refuse_cascade(plan)
    input_channels = args.input_channels or FinetuneSettings.from_plan(plan.plans).input_channels
    source = os.path.abspath(args.i)
    fitted = fit(source, plan, args.name, input_channels, results)
    write(fitted)

    width = max(len(name) for name, *_ in fitted.report.rows())
    for name, what, elements, how in fitted.report.rows():
        print(f"{name:{width}}  {what:8} {elements:12,}  {how}".rstrip())
    print("\n".join(["", source, fitted.report.summary(notes=False), *fitted.notes]))
    target = fitted.checkpoint_file
    print(f"\nWrote {fitted.plan_file}\n      {target}\n      {os.path.join(os.path.dirname(target), TABLE)}")
    _print_commands(plan, fitted.plan["plans_name"], target)


def _print_commands(plan: Any, plans_name: str, checkpoint: str) -> None:
    """Print shell commands that train fold 0 with our trainer and with nnU-Net's."""
    import torch

    from pcrl_nnunet.commands import train_command
    from pcrl_nnunet.ingest.maskless import trainer_for

    trainer = trainer_for(plan.plans, plan.dataset_json)
    train = plan.plans["dataset_name"], plan.configuration, 0, "cuda" if torch.cuda.is_available() else "cpu"
    ours = train_command(*train, p=plans_name, tr=trainer or "PCRLClassificationTrainer")
    print(f"Fine-tune it, here fold 0 (other folds alike), with: {ours}")
    if trainer == "PCRLFinetuneTrainer":
        print(f"or with nnU-Net alone: {train_command(*train, p=plans_name, pretrained_weights=checkpoint)}")


def main_entry() -> None:
    """Run the console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
