"""pcrl_nnunet_pretrain: self-supervised pretraining on nnU-Net's preprocessed data, without labels."""

from __future__ import annotations

import argparse
import io
import os
from contextlib import ExitStack, redirect_stdout
from typing import Any

from pcrl_nnunet.cli import arguments
from pcrl_nnunet.method_names import DEFAULT

SETTINGS = ("method", "epochs", "iters_per_epoch", "batch_size", "seed")  # settings with a flag
DESCRIPTION = """
Pretrain the network of an nnU-Net plan without labels.

The command learns from the preprocessed cases of the dataset, and from the
scans that pcrl_nnunet_preprocess has added. Afterwards, fine-tune with
nnUNetv2_train ... -tr PCRLFinetuneTrainer.
"""
EXAMPLES = """
  pcrl_nnunet_pretrain -d 4                     pretrain on dataset 4
  pcrl_nnunet_pretrain -d 4 -c 2d -method mae   another configuration and method
  pcrl_nnunet_pretrain -d 4 -f 0                leave out the validation cases of fold 0
  pcrl_nnunet_pretrain -d 4 --dry_run           show sizes, memory, hours and views only
  pcrl_nnunet_pretrain -d 4 --c                 continue after an interruption
"""


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("pcrl_nnunet_pretrain", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "-d",
        required=True,
        nargs="+",
        metavar="DATASET",
        help="name or ID of the dataset. With several, the network learns from all and follows the plan of the first. "
        "Prepare the others with pcrl_nnunet_preprocess -target FIRST",
    )
    parser.add_argument("-method", metavar="NAME", help=f"method of pretraining (default: the plan's, or {DEFAULT})")
    parser.add_argument("-c", metavar="CONFIGURATION", help=arguments.CONFIGURATION)
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help=arguments.PLANS)
    parser.add_argument(
        "-target",
        metavar="DATASET",
        help="pretrain for the network of this dataset, on data that pcrl_nnunet_preprocess -target has made; -p then "
        "names a plan of this dataset",
    )
    parser.add_argument(
        "-f",
        metavar="FOLD",
        default="all",
        help="leave out the validation cases of this fold, and all copies of them (default: all, which leaves out no "
        "case)",
    )
    parser.add_argument("-device", help=arguments.DEVICE)
    parser.add_argument(
        "-num_gpus",
        type=int,
        default=1,
        metavar="N",
        help="number of GPUs of this machine that share each batch; with -device cpu, the number of processes "
        "(default: 1). On several machines, use torchrun ... --no_python pcrl_nnunet_pretrain ...",
    )
    parser.add_argument("-epochs", type=int, metavar="N", help="number of epochs (default: the plan's, or 240)")
    parser.add_argument(
        "-iters_per_epoch", type=int, metavar="N", help="number of steps in an epoch (default: the plan's, or 250)"
    )
    parser.add_argument(
        "-batch_size",
        type=int,
        metavar="N",
        help="number of samples in a step, on all GPUs together (default: as many as fit the plan's voxel budget)",
    )
    parser.add_argument("-seed", type=int, metavar="N", help="seed of all random choices (default: the plan's, or 0)")
    _add_how_to_start(parser)
    return parser


def _add_how_to_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-init",
        metavar="CHECKPOINT",
        help="start from the encoder of this checkpoint, written by this command, by nnssl or by nnU-Net's training",
    )
    parser.add_argument(
        "-name",
        metavar="NAME",
        help="keep this pretraining beside others: the command writes the plan PLANS_NAME, a copy of PLANS that uses "
        "the same preprocessed data. Fine-tune with -p PLANS_NAME",
    )
    parser.add_argument(
        "--c",
        action="store_true",
        dest="continue_training",
        help="continue an interrupted pretraining; start one if there is none",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew in place of an earlier pretraining; its files move to the folder old_1",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="do not train: print sizes, memory and hours, and draw views of a few cases into a folder here",
    )


def main() -> None:
    """Parse, check, pretrain."""
    args = _parser().parse_args()
    _check(args)
    # torch reads it on import. Threads that spin while they wait make a step several times slower on a CPU whose cores
    # other processes need, above all the loading processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments.load("pcrl_nnunet.trainers.pretrain")
    _pretrain(args)


def _check(args: argparse.Namespace) -> None:
    """Raise `UserError` for wrong arguments, before torch is imported."""
    from pcrl_nnunet.device import check_device_name
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.loading.splits import check_fold, fold_named
    from pcrl_nnunet.method_names import check_name
    from pcrl_nnunet.named_plans import check_name as check_name_of_plan
    from pcrl_nnunet.plans import dataset_folder, find_plan, folder_of, refuse_cascade
    from pcrl_nnunet.target_plans import existing_plan

    if args.continue_training and args.overwrite:
        raise UserError("--c goes on with a pretraining and --overwrite starts anew in its place; give one of them")
    arguments.check_numbers(args, epochs=1, iters_per_epoch=1, batch_size=1, seed=0, num_gpus=1)
    check_device_name(args.device)
    fold = fold_named(args.f)
    if args.method is not None:
        check_name(args.method)
    if args.name is not None:
        check_name_of_plan(args.name)
    plans_name = args.p if args.target is None else existing_plan(args.d[0], args.target, args.p)
    _, plans, configuration, _ = find_plan(args.d[0], plans_name, args.c)
    refuse_cascade(plans, configuration)
    for other in args.d[1:]:
        existing_plan(other, args.target or args.d[0], args.p)
    if isinstance(fold, int):
        check_fold(dataset_folder(args.target or args.d[0]), fold)
    arguments.check_file("-init", args.init, "a checkpoint")
    if not args.dry_run:
        folder_of("nnUNet_results")
    to = f" for {args.target}" if args.target else ""
    print(f"Pretraining on {plans['dataset_name']}{to}, plan {plans['plans_name']}, configuration {configuration}")


def _pretrain(args: argparse.Namespace) -> None:
    """Pretrain, or start the processes that do. Each process runs this function."""
    from pcrl_nnunet import weights_and_biases
    from pcrl_nnunet.device import device_named
    from pcrl_nnunet.loading.splits import fold_named
    from pcrl_nnunet.named_plans import named_plan, refuse_outdated
    from pcrl_nnunet.plans import load_plan
    from pcrl_nnunet.pretraining import distributed, processes, request
    from pcrl_nnunet.pretraining.memory import keep_freed_memory
    from pcrl_nnunet.target_plans import existing_plan

    plans_name = args.p if args.target is None else existing_plan(args.d[0], args.target, args.p)
    plan = load_plan(args.d[0], plans_name, args.c)
    refuse_outdated(plan.plans, plan.configuration, plan.folder)
    others = request.other_datasets(args.d, args.target, args.p, plan)
    if args.name is not None:
        plan = named_plan(plan, args.name)
    fold = fold_named(args.f)
    device = device_named(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    if args.init is not None:
        request.check_initial(plan, args.init)
    starts_processes = processes.to_start(args.num_gpus, device)
    if args.dry_run:
        _dry_run(_request(args, plan, fold, others), device, args.num_gpus)
        return
    weights_and_biases.check()
    _register()
    if starts_processes:
        args.device = device.type  # printed once
        processes.start(_pretrain, args, args.num_gpus)
        return
    with distributed.process_group(device) as of_rank:
        asked = _request(args, plan, fold, others)
        if asked.init is not None:
            request.refuse_initial_that_has_seen(asked.init, asked.cases)
        _run(asked, of_rank)


def _request(args: argparse.Namespace, plan: Any, fold: int | str, others: Any) -> Any:
    """Return the requested pretraining, with its cases and the settings in effect."""
    from dataclasses import replace

    from pcrl_nnunet.pretraining.request import Request
    from pcrl_nnunet.progress import doing

    with doing("Finding the cases"):
        request = Request.of_plan(plan, fold, others, **{name: getattr(args, name) for name in SETTINGS})
    init = None if args.init is None else os.path.abspath(args.init)
    return replace(request, init=init, continues=args.continue_training, overwrite=args.overwrite)


def _register() -> None:
    """Register our trainers with nnU-Net, once on each machine: every machine has its own nnU-Net."""
    from pcrl_nnunet import registration
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.pretraining import distributed

    first_here = not distributed.launched() or os.environ["LOCAL_RANK"] == "0"
    if first_here and not registration.is_registered():
        try:
            for line in registration.register():
                print(line)
        except UserError as error:  # only fine-tuning needs the registration
            print(f"Warning: {error}")


def _run(request: Any, device: Any) -> None:
    """Pretrain, unless the first rank refuses. No rank builds a trainer before the first rank knows the start."""
    from pcrl_nnunet.methods.registry import method_class
    from pcrl_nnunet.pretraining import distributed
    from pcrl_nnunet.pretraining.start import starting
    from pcrl_nnunet.trainers.pretrain import pretrain_trainer

    least = method_class(request.settings.method).min_samples_of_rank
    distributed.part_of(request.settings.batch_size, least)  # raises if there are too many processes
    with ExitStack() as held:
        start = distributed.of_first_rank(lambda: held.enter_context(starting(request)))
        if start.finished:
            print(f"This pretraining is finished: {start.finished}")
            return
        trainer = pretrain_trainer(request, device)
        start.log = trainer.log_file
        for line in start.lines:
            trainer.print_to_log_file(line)
        if start.state is not None:
            trainer.load_checkpoint(start.state)
            start.state = None  # frees memory
            trainer.print_to_log_file(f"Continuing after step {trainer.step}")
            if request.init:
                began = "random weights" if trainer.init is None else trainer.init["checkpoint"]
                trainer.print_to_log_file(f"-init has no effect: this training began from {began}, and goes on")
        trainer.run_training()


def _dry_run(request: Any, device: Any, number: int) -> None:
    """Print sizes, estimated and measured memory, and hours, and draw views. -init and --c make no difference."""
    from pcrl_nnunet.pretraining.dry_run import described, draw_views, measured
    from pcrl_nnunet.progress import doing
    from pcrl_nnunet.report.pictures import views_of_a_case
    from pcrl_nnunet.trainers.pretrain import pretrain_trainer

    plans, configuration = request.plan.plans, request.plan.configuration
    names = (plans["dataset_name"], plans["plans_name"], configuration)
    pictures = os.path.abspath(f"pcrl_views_{'_'.join(names)}")
    print(request.cases)
    # nnU-Net's trainer prints a page
    with doing("Drawing views, and measuring the steps"), redirect_stdout(io.StringIO()):
        found = measured(
            lambda: pretrain_trainer(request.anew(), device),
            device,
            lambda loader: draw_views(loader, request.plan, pictures, views_of_a_case),
            number,
        )
    print(f"\nDry run of {configuration}, {plans['plans_name']}, {plans['dataset_name']}")
    for line in described(found, device, number):
        print(line)
    print(f"  pictures of views     {pictures}")


def main_entry() -> None:
    """Run the console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
