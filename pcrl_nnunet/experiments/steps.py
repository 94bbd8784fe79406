"""The processes of a comparison: one pretraining, training, prediction of pseudo-labels, or shortcut each.

    python -m pcrl_nnunet.experiments.steps pretrain|train|pseudo_label|shortcut ...

A step ends with the command that started it. On Linux this holds however the command ends; elsewhere only if the
command is stopped in order. The step ends in order, so that its data loading processes end, too.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
from types import FrameType

SECONDS_TO_END = 5  # before SIGTERM is repeated
PR_SET_PDEATHSIG = 1  # a constant of Linux's prctl


def end_with_parent() -> None:
    """Make this process end in order on SIGTERM, which on Linux also comes when the parent process ends."""
    signal.signal(signal.SIGTERM, _end)
    if os.name == "posix":
        signal.signal(signal.SIGALRM, _end)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(number: int, frame: FrameType | None) -> None:
    if os.name == "posix":
        if number == signal.SIGALRM:  # Python forgets signals while it forks: loading processes may have lost SIGTERM
            for child in multiprocessing.active_children():
                child.kill()
        signal.alarm(SECONDS_TO_END)  # Python drops exceptions raised while it forks the loading processes
    sys.exit(128 + signal.SIGTERM)


def pretrain(arguments: list[str]) -> None:
    """Become pcrl_nnunet_pretrain, which handles SIGTERM itself."""
    os.execv(sys.executable, [sys.executable, "-m", "pcrl_nnunet.cli.pretrain", *arguments])


def train(args: argparse.Namespace) -> None:
    """Train with nnU-Net, and score the network. nnU-Net's own command would take all cores for each run."""
    import torch
    from nnunetv2.run.run_training import run_training

    if args.trained and not os.path.exists(args.network):  # nnU-Net continues with the scoring
        print(f"Trained before, as {args.trained}; only scored now", flush=True)  # noqa: T201 (into the log of the step)
        _take_over(args.trained, args.network)
    run_training(
        args.dataset,
        args.configuration,
        args.fold,
        args.trainer,
        args.plans,
        continue_training=True,
        device=torch.device(args.device),
    )


def _take_over(trained: str, network: str) -> None:
    """Copy a trained network and the record of its initialisation into the folder of another fold."""
    from pcrl_nnunet.files import remove_drafts, whole

    folder = os.path.dirname(network)
    os.makedirs(folder, exist_ok=True)
    remove_drafts(folder)
    transferred = os.path.join(os.path.dirname(trained), "transfer.json")
    if os.path.isfile(transferred):
        shutil.copy(transferred, folder)
    with whole(network) as draft:
        shutil.copyfile(trained, draft)


def pseudo_label(args: argparse.Namespace) -> None:
    """Predict the labels of a description's cases with a trained network."""
    import torch

    from pcrl_nnunet.experiments.pseudo_labels import PseudoLabels

    PseudoLabels.load(args.description).write(args.model, int(args.fold), torch.device(args.device))


def shortcut(args: argparse.Namespace) -> None:
    """Classify by a shortcut."""
    from pcrl_nnunet.classification.shortcuts import write
    from pcrl_nnunet.plans import load_plan

    write(args.name, load_plan(args.dataset, args.plans, args.configuration), int(args.fold), args.folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pcrl_nnunet.experiments.steps", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    for step, names in (
        (train, ("dataset", "configuration", "fold", "trainer", "plans", "network")),
        (pseudo_label, ("description", "model", "fold")),
        (shortcut, ("name", "dataset", "configuration", "fold", "plans", "folder")),
    ):
        of_step = steps.add_parser(step.__name__)
        of_step.set_defaults(run=step)
        of_step.add_argument("-threads", type=int, required=True, help="of torch on a CPU")
        of_step.add_argument("-device", default="cpu")
        for name in names:
            of_step.add_argument(name)
    steps.choices["train"].add_argument("-trained", help="network of the same training, which is only scored then")
    return parser


def main(arguments: list[str]) -> None:
    """Run a step that ends with its parent."""
    end_with_parent()
    if arguments[:1] == ["pretrain"]:
        pretrain(arguments[1:])
        return
    args = _parser().parse_args(arguments)
    import torch

    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main(sys.argv[1:])
