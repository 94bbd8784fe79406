"""pcrl_nnunet_pretrain: self-supervised pretraining on nnU-Net's preprocessed data, without labels."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

SETTINGS = ("method", "epochs", "iters_per_epoch", "batch_size", "seed")  # settings with a flag
DESCRIPTION = """Pretrain an nnU-Net plan's network without labels, on the preprocessed cases of the dataset and on
those that pcrl_nnunet_preprocess added. Then: nnUNetv2_train ... -tr PCRLFinetuneTrainer."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pcrl_nnunet_pretrain", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument(
        "-d",
        required=True,
        nargs="+",
        metavar="DATASET",
        help="dataset name or ID; further ones are pretrained on, too, for the network of the first: as "
        "pcrl_nnunet_preprocess -target has prepared them for it",
    )
    parser.add_argument("-method", metavar="NAME", help="what is learned (default: pcrlv2, or the plan's)")
    parser.add_argument("-c", metavar="CONFIGURATION", help="default: 3d_fullres, else the only one of the plan")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    parser.add_argument(
        "-target",
        metavar="DATASET",
        help="pretrain for a network of this dataset, with what pcrl_nnunet_preprocess -target has made; -p is of its "
        "plan then",
    )
    parser.add_argument(
        "-f",
        metavar="FOLD",
        default="all",
        help="leave out this fold's validation cases and all copies of them (default: all: none)",
    )
    parser.add_argument("-device", help="cuda, cpu or mps (default: a GPU if present, else the CPU)")
    parser.add_argument(
        "-num_gpus",
        type=int,
        default=1,
        metavar="N",
        help="share each batch among so many GPUs of this machine, or processes with -device cpu (default: 1); several "
        "machines: torchrun ... --no_python pcrl_nnunet_pretrain ...",
    )
    parser.add_argument("-epochs", type=int, help="default: 240, or the plan's")
    parser.add_argument("-iters_per_epoch", type=int, help="steps an epoch (default: 250, or the plan's)")
    parser.add_argument("-batch_size", type=int, help="samples a step (default: what fits the plan's voxel budget)")
    parser.add_argument("-seed", type=int, help="default: 0, or the plan's")
    _add_how_to_start(parser)
    return parser


def _add_how_to_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-init", metavar="CHECKPOINT", help="start from its encoder: one of ours, of nnssl, or of a training of nnU-Net"
    )
    parser.add_argument(
        "-name",
        metavar="NAME",
        help="a pretraining beside others: writes the plan PLANS_NAME, the same as PLANS with the same preprocessed "
        "data; fine-tune with -p PLANS_NAME",
    )
    parser.add_argument(
        "--c",
        action="store_true",
        dest="continue_training",
        help="continue an interrupted one; start where there is none",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="start anew in the place of a finished or interrupted one, whose files are kept in a folder old_1",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="print sizes, memory and hours, and draw the views of a few cases into a folder here; train nothing",
    )


def main() -> None:
    """Parse, check, pretrain."""
    _pretrain(_parser().parse_args())


def _pretrain(args: argparse.Namespace) -> None:
    # torch reads it on import. Threads that spin while they wait make a step several times slower on a CPU whose cores
    # other processes need, above all the loading processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pcrl_nnunet import weights_and_biases  # after the parser, to keep --help quick
    from pcrl_nnunet.device import device_named
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.ingest.target import existing_plan
    from pcrl_nnunet.named_plans import named_plan, refuse_outdated
    from pcrl_nnunet.plans import folder_of, load_plan, refuse_cascade
    from pcrl_nnunet.pretraining import distributed, processes, request
    from pcrl_nnunet.pretraining.memory import keep_freed_memory

    if args.continue_training and args.overwrite:
        raise UserError("--c goes on with a pretraining and --overwrite starts anew in its place; give one of them")
    plans_name = args.p if args.target is None else existing_plan(args.d[0], args.target, args.p)
    plan = load_plan(args.d[0], plans_name, args.c)
    refuse_cascade(plan)
    refuse_outdated(plan.plans, plan.configuration, plan.folder)
    others = request.other_datasets(args.d, args.target, args.p, plan)
    if args.name is not None:
        plan = named_plan(plan, args.name)
    if not args.dry_run:
        folder_of("nnUNet_results")
    fold = request.fold_named(args.f)
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
                trainer.print_to_log_file(
                    f"-init is left out: this training goes on from its own state, {trainer.init}"
                )
        trainer.run_training()


def _dry_run(request: Any, device: Any, number: int) -> None:
    """Print sizes, estimated and measured memory, and hours, and draw views. -init and --c make no difference."""
    from pcrl_nnunet.pretraining.dry_run import described, draw_views, measured
    from pcrl_nnunet.report.pictures import views_of_a_case
    from pcrl_nnunet.trainers.pretrain import pretrain_trainer

    plans, configuration = request.plan.plans, request.plan.configuration
    names = (plans["dataset_name"], plans["plans_name"], configuration)
    pictures = os.path.abspath(f"pcrl_views_{'_'.join(names)}")
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
