"""pcrl_nnunet_pretrain: PCRLv2 on nnU-Net's preprocessed data, without labels."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from time import time
from typing import Any

NUM_PICTURES = 3
SETTINGS = ("epochs", "iters_per_epoch", "batch_size", "seed", "probe_every")  # that have a flag
DESCRIPTION = """Pretrain the encoder of an nnU-Net plan's network without labels (PCRLv2), on the preprocessed cases of
the dataset and on those that pcrl_nnunet_preprocess added. Then: nnUNetv2_train ... -tr PCRLFinetuneTrainer."""


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
    parser.add_argument("-batch_size", type=int, help="pairs a step (default: what fits the plan's voxel budget)")
    parser.add_argument("-seed", type=int, help="default: 0, or the plan's")
    parser.add_argument(
        "-probe_every",
        type=int,
        metavar="EPOCHS",
        help="see every so many epochs how well a linear classifier tells the dataset's labels apart by the features "
        "(default: 0, never, or the plan's); labels are used for that alone",
    )
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
    args = _parser().parse_args()
    _pretrain(args)


def _pretrain(args: argparse.Namespace) -> None:
    # Read when torch is imported. Threads that spin while they wait make a step several times slower on a CPU where
    # something else, the loading processes above all, wants the same cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from pcrl_nnunet import weights_and_biases
    from pcrl_nnunet.device import device_named
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.ingest.target import existing_plan
    from pcrl_nnunet.named_plans import named_plan, refuse_outdated
    from pcrl_nnunet.plans import load_plan, refuse_cascade
    from pcrl_nnunet.pretraining import distributed  # after the parser, so that --help is quick
    from pcrl_nnunet.pretraining.memory import keep_freed_memory
    from pcrl_nnunet.pretraining.start import Request

    if args.continue_training and args.overwrite:
        raise UserError("--c goes on with a pretraining and --overwrite starts anew in its place; give one of them")
    plans_name = args.p if args.target is None else existing_plan(args.d[0], args.target, args.p)
    plan = load_plan(args.d[0], plans_name, args.c)
    refuse_cascade(plan)
    refuse_outdated(plan.plans, plan.configuration, plan.folder)
    others = _others(args, plan)
    if args.name is not None:
        plan = named_plan(plan, args.name)
    if not os.environ.get("nnUNet_results") and not args.dry_run:
        raise UserError("the variable nnUNet_results is not set; set it to the folder where trainings are to be kept")
    fold = _fold(args.f)
    device = device_named(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    overrides = {name: getattr(args, name) for name in SETTINGS}
    if args.init is not None:
        _check_init(plan, args.init)
    spawns = _spawns(args.num_gpus, device)
    if args.dry_run:
        _dry_run(plan, fold, device, overrides, others, args.num_gpus)
        return
    weights_and_biases.check()
    _register()
    if spawns:
        args.device = device.type  # said once
        _on_several(args)
        return
    init = None if args.init is None else os.path.abspath(args.init)
    with distributed.process_group(device) as of_rank:
        settings, data = _settings_and_data(plan, fold, overrides, others)
        if init is not None:
            _refuse_init_that_has_seen(init, data, fold)
        _run(Request(plan, fold, settings, data, init, args.continue_training, args.overwrite), of_rank)


def _register() -> None:
    """Let nnU-Net find our trainers, by the first process of each machine: every machine has an nnU-Net of its own."""
    from pcrl_nnunet.cli import register
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.pretraining import distributed

    first_here = not distributed.launched() or os.environ["LOCAL_RANK"] == "0"
    if first_here and not register.is_registered():
        try:
            for line in register.register():
                print(line)
        except UserError as error:  # pretraining needs no registration, fine-tuning does
            print(f"Warning: {error}")


def _settings_and_data(
    plan: Any, fold: int | str, overrides: dict[str, Any], others: dict[str, tuple[str, str, str]] | None
) -> tuple[Any, Any]:
    """The settings in effect, and the cases."""
    from pcrl_nnunet.config import pretrain_settings
    from pcrl_nnunet.pretraining.cases import PretrainingData

    settings = pretrain_settings(plan.plans, plan.configuration, plan.resolved, **overrides)
    return settings, PretrainingData.find(plan.plans, plan.configuration, fold, others or {})


def _spawns(number: int, device: Any) -> bool:
    """Whether the training is to be shared by that many processes which this one has to start.

    Raises:
        UserError: there are not so many GPUs, or torchrun has started the processes.
    """
    import torch

    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.pretraining import distributed

    if number < 1:
        raise UserError(f"-num_gpus is {number}; expected 1 or more")
    if distributed.launched():
        if number > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
            raise UserError(f"-num_gpus {number} was given to a process of torchrun, which starts them: leave it out")
        return False
    if number > 1 and device.type == "mps":
        raise UserError(f"-num_gpus is {number}, and -device mps has one; leave it out")
    if device.type == "cuda" and number > torch.cuda.device_count():
        raise UserError(
            f"-num_gpus is {number}, and torch finds {torch.cuda.device_count()}; give that number or fewer"
        )
    return number > 1


def _on_several(args: argparse.Namespace) -> None:
    """The same command in processes of this machine; what a user has to know of their errors is said once."""
    import signal

    import torch
    from nnunetv2.run.run_training import find_free_network_port

    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.pretraining.distributed import cores

    # they read it when they import torch
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // args.num_gpus)))
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
        "WORLD_SIZE": str(args.num_gpus),
    }
    errors = torch.multiprocessing.get_context("spawn").SimpleQueue()
    ranks = torch.multiprocessing.spawn(_rank, (args, variables, errors), args.num_gpus, join=False)
    before = signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in ranks.processes])
    try:
        while not ranks.join(grace_period=5):
            pass
    except (torch.multiprocessing.ProcessExitedException, torch.multiprocessing.ProcessRaisedException) as error:
        if not errors.empty():  # of the first that failed; others then fail for want of it
            raise UserError(errors.get()) from None
        if isinstance(error, torch.multiprocessing.ProcessRaisedException):
            raise
        raise UserError(
            f"{error} (see above for what it said); the training has ended, and its state of the last epoch is kept: "
            f"continue with --c"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _rank(number: int, args: argparse.Namespace, variables: dict[str, str], errors: Any) -> None:
    """What each of the processes does."""
    from pcrl_nnunet.errors import UserError

    os.environ |= {**variables, "RANK": str(number), "LOCAL_RANK": str(number)}
    try:
        _pretrain(args)
    except UserError as error:
        errors.put(str(error))
        sys.exit(1)


def _others(args: argparse.Namespace, plan: Any) -> dict[str, tuple[str, str, str]]:
    """Folder, data identifier and hash of the plan of the datasets after the first, by name.

    Raises:
        UserError: one of them is not prepared for the first's (or -target's) plan, or has other channels.
    """
    from pcrl_nnunet.checkpoint import plans_hash
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.ingest.target import existing_plan, preprocess_command
    from pcrl_nnunet.plans import load_plan

    found: dict[str, tuple[str, str, str]] = {}
    for dataset in args.d[1:]:
        name = existing_plan(dataset, args.target or args.d[0], args.p)
        other = load_plan(dataset, name, plan.configuration)
        channels, own = (len(p.dataset_json["channel_names"]) for p in (other, plan))
        if channels != own:
            raise UserError(
                f"{other.plans['dataset_name']} has {channels} channels and {plan.plans['dataset_name']} {own}; take "
                f"datasets with the same number, or pretrain on each alone"
            )
        spacings = other.resolved["spacing"], plan.resolved["spacing"]
        if spacings[0] != spacings[1] or other.plans["transpose_forward"] != plan.plans["transpose_forward"]:
            raise UserError(
                f"{other.plans['dataset_name']} was preprocessed with a spacing of {spacings[0]}, axes "
                f"{other.plans['transpose_forward']}, and {plan.plans['plans_name']} of {plan.plans['dataset_name']} "
                f"now has {spacings[1]}, axes {plan.plans['transpose_forward']}; preprocess it again: "
                f"{preprocess_command(dataset, args.target or args.d[0], args.p)}"
            )
        if other.plans["dataset_name"] in (plan.plans["dataset_name"], *found):
            raise UserError(f"-d has {other.plans['dataset_name']} more than once; give every dataset once")
        found[other.plans["dataset_name"]] = (
            other.folder,
            other.resolved["data_identifier"],
            plans_hash(other.plans),
        )
    return found


def _check_init(plan: Any, path: str) -> None:
    """Raises `UserError` for a checkpoint that could not be started from, before anything is touched."""
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.transfer.foreign import read_encoder
    from pcrl_nnunet.transfer.shapes import check_architecture

    try:
        check_architecture(read_encoder(path), plan.plans, plan.configuration, plan.folder)
    except UserError as error:
        raise UserError(f"-init {path}: {error}") from error


def _refuse_init_that_has_seen(path: str, data: Any, fold: int | str) -> None:
    """Raises `UserError` for an encoder that has seen the cases which this pretraining leaves out."""
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.transfer.foreign import read_encoder
    from pcrl_nnunet.transfer.seen import cases_seen

    dataset = data.found.target or data.found.dataset
    seen = cases_seen(read_encoder(path), dataset, data.found.held_out_cases)
    if seen:
        raise UserError(
            f"-init {path} has seen validation cases of fold {fold}, which -f leaves out: {', '.join(seen[:5])}; "
            f"take a checkpoint that was pretrained with -f {fold}, or leave -f out"
        )


def _run(request: Any, device: Any) -> None:
    """Pretrain, unless the first rank refuses: no rank builds a trainer before the first one knows how to start."""
    from pcrl_nnunet.pretraining import distributed
    from pcrl_nnunet.pretraining.start import starting

    distributed.part_of(request.settings.batch_size)  # or says that the processes are too many
    with ExitStack() as held:
        start = distributed.of_first_rank(lambda: held.enter_context(starting(request)))
        if start.finished:
            print(f"This pretraining is finished: {start.finished}")
            return
        trainer = _trainer(
            request.plan, request.fold, device, request.settings, request.data, request.continues, request.init
        )
        start.log = trainer.log_file
        for line in start.lines:
            trainer.print_to_log_file(line)
        if start.state is not None:
            state, start.state = start.state, None  # it need not stay in memory
            _load(trainer, state)
            del state
        trainer.run_training()


def _load(trainer: Any, state: dict[str, Any]) -> None:
    """Go on from a training state."""
    trainer.load_checkpoint(state)
    trainer.print_to_log_file(f"Continuing after step {trainer.step}")
    if trainer.init_path:
        trainer.print_to_log_file(f"-init is left out: this training goes on from its own state, {trainer.init}")


def _trainer(
    plan: Any,
    fold: int | str,
    device: Any,
    settings: Any,
    data: Any,
    continues: bool = False,
    init: str | None = None,
) -> Any:
    from pcrl_nnunet.trainers.pretrain import PCRLPretrainTrainer

    plans = {
        **deepcopy(plan.plans),
        "continue_training": continues,
        "pcrl_settings": settings,
        "pcrl_init": init,
        "pcrl_data": data,
    }
    return PCRLPretrainTrainer(plans, plan.configuration, fold, plan.dataset_json, device)


def _fold(text: str) -> int | str:
    from pcrl_nnunet.errors import UserError

    if text != "all" and not (text.isascii() and text.isdecimal()):
        raise UserError(f"-f is '{text}'; expected the number of a fold, or all")
    return text if text == "all" else int(text)


@dataclass(frozen=True)
class Measurement:
    """A few real steps of a pretraining."""

    trainer: Any
    loader: Any
    pairs: int  # of one process
    estimated_bytes: float  # peak of the network
    peak_bytes: float  # on the GPU, or of the process
    loading: float  # seconds a batch takes one worker
    seconds_a_step: float


def measured(
    plan: Any,
    fold: int | str,
    device: Any,
    overrides: dict[str, Any],
    pictures: str | None = None,
    others: dict[str, tuple[str, str, str]] | None = None,
    processes: int = 1,
) -> Measurement:
    """One step a level on the device, in a results folder that is thrown away.

    Args:
        pictures: folder for the views of a few cases.
        others: as `_others` finds them.
        processes: that share a batch. The part of one is measured, without what they exchange.
    """
    import torch
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    from pcrl_nnunet.files import in_place_of_earlier
    from pcrl_nnunet.loading.loader import ViewLoader, make_loader
    from pcrl_nnunet.pretraining.distributed import largest_part
    from pcrl_nnunet.pretraining.memory import estimated_peak
    from pcrl_nnunet.views import kernels

    with tempfile.TemporaryDirectory() as folder:
        os.environ["nnUNet_results"] = folder
        os.environ["nnUNet_wandb_enabled"] = "0"  # this is no run to be listed
        trainer = _trainer(plan, fold, device, *_settings_and_data(plan, fold, overrides, others))
        trainer.initialize()
        settings, by_depth = trainer.settings, trainer.network.all_levels()
        pairs, workers = largest_part(settings.batch_size, processes), get_allowed_n_proc_DA()
        estimate = estimated_peak(trainer.network, settings, trainer.num_input_channels, pairs)
        source = (trainer.cases, settings.views, settings.augmentation, pairs, settings.seed)
        loader = ViewLoader(*source)
        kernels.compile_all()  # once a training, not once a batch
        start = time()
        next(loader)
        loading = time() - start
        if pictures is not None:
            with in_place_of_earlier(pictures):
                _draw_views(loader, trainer.dataset_json, pictures)
        trainer.dataloader_train = make_loader(*source, num_workers=workers, pin_memory=device.type == "cuda")
        try:
            # one step a level, the deepest first: it needs the most memory, and warms up
            trainer.train_step(next(trainer.dataloader_train), 0, by_depth[-1])
            seconds = []
            for levels in by_depth:
                start = time()
                trainer.train_step(next(trainer.dataloader_train), 0, levels)
                seconds.append(time() - start)
        finally:
            trainer.dataloader_train.close()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_of_process()
    # the queues of the workers were full: in the long run a step takes no less than its batch
    # (without workers the batch was made within the step)
    a_step = max(sum(seconds) / len(seconds), loading / max(1, workers))
    return Measurement(trainer, loader, pairs, estimate, peak, loading, a_step)


def _dry_run(
    plan: Any,
    fold: int | str,
    device: Any,
    overrides: dict[str, Any],
    others: dict[str, tuple[str, str, str]],
    processes: int,
) -> None:
    """Sizes, estimated and measured memory and hours, and pictures of views."""
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    names = (plan.plans["dataset_name"], plan.plans["plans_name"], plan.configuration)
    pictures = os.path.abspath(f"pcrl_views_{'_'.join(names)}")
    found = measured(plan, fold, device, overrides, pictures, others, processes)
    settings, network = found.trainer.settings, found.trainer.network
    views, steps = settings.views, settings.epochs * settings.iters_per_epoch
    print(f"\nDry run of {plan.configuration}, {plan.plans['plans_name']}, {plan.plans['dataset_name']}")
    print(f"  cases                 {len(found.trainer.cases)}")
    print(f"  global crops          {', '.join(_x(size) for size in views.global_crop_sizes)} voxels")
    print(f"  global input          {_x(views.global_input_size)} voxels")
    print(f"  local crops           {', '.join(_x(size) for size in views.local_crop_sizes)} voxels")
    print(f"  local input           {_x(views.local_input_size)} voxels, {views.num_local} a pair")
    print(f"  spacing               {' x '.join(f'{s:g}' for s in views.spacing)} mm")
    print(f"  background            {found.loader.background_line()}")
    print(f"  batch                 {settings.batch_size} pairs")
    if processes > 1:
        print(f"  processes             {processes}; memory and time are of one of them, with {found.pairs} of these")
        print("                        pairs, without the exchange of gradients")
    print(f"  levels                {len(network.all_levels())}, restoration: {settings.restoration}")
    print(f"  length                {settings.epochs} epochs of {settings.iters_per_epoch} steps")
    where = f"on {device}" if device.type == "cuda" else "for the process"
    print(f"  peak memory           {found.estimated_bytes / 2**30:.2f} GB estimated for the network in float32")
    print(f"                        {found.peak_bytes / 2**30:.2f} GB measured {where}")
    loading = f"{found.loading:.2f} s, with {get_allowed_n_proc_DA()} loading processes)"
    print(f"  time                  {found.seconds_a_step:.2f} s a step on {device} (mean of one step a level;")
    print(f"                        one batch of views takes {loading}")
    print(f"                        {found.seconds_a_step * steps / 3600:.1f} hours in all")
    print(f"  pictures of views     {pictures}")


def _draw_views(loader: Any, dataset_json: dict[str, Any], folder: str) -> None:
    """One picture a case, for a few cases, evenly from first to last."""
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.loading.cases import CaseVolume
    from pcrl_nnunet.plans import channel_labels
    from pcrl_nnunet.report.pictures import views_of_a_case

    for case, sample, before in loader.examples(NUM_PICTURES):
        path = os.path.join(folder, f"{case.name.replace('/', '_')}.png")
        try:
            os.makedirs(folder, exist_ok=True)
            channels = channel_labels(case.name, dataset_json, sample["input"].shape[1])
            views_of_a_case(case.name, CaseVolume(case), sample, before, loader.views.spacing, channels, path)
        except OSError as error:
            raise UserError(
                f"the picture {path} cannot be written ({error.strerror}); run this in a folder that you may write to"
            ) from error


def _peak_of_process() -> float:
    """Bytes; not a number where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _x(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def main_entry() -> None:
    """The console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
