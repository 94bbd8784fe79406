"""pcrl_nnunet_embed: one vector for each case, from the encoder of a checkpoint."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from pcrl_nnunet.cli import arguments

if TYPE_CHECKING:
    import torch

    from pcrl_nnunet.features.table import Embeddings
    from pcrl_nnunet.plans import PlannedConfiguration

DESCRIPTION = """
Write one vector for each case: the features of an encoder.

The cases are the preprocessed cases of the dataset, and the unlabelled scans
that pcrl_nnunet_preprocess has added. A vector has the mean and the maximum
of every channel, for all stages of the encoder. Beside the file lies a picture
of the map of all cases. No label is read.

The file, for numpy.load, has these arrays:
  names        (N,)    names of the cases
  embeddings   (N, D)  vectors, float32
  labelled     (N,)    whether the case belongs to the dataset itself
  stages       (D,)    stage of the encoder, 0 is full resolution
  poolings     (D,)    mean or maximum
"""
EXAMPLES = """
  pcrl_nnunet_embed -d 4 -i checkpoint_final.pth
  pcrl_nnunet_embed -d 4 -c 2d -i openmind.pth -o hippocampus.npz
"""


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser("pcrl_nnunet_embed", DESCRIPTION, EXAMPLES)
    parser.add_argument("-d", required=True, metavar="DATASET", help=arguments.DATASET)
    parser.add_argument(
        "-i",
        required=True,
        metavar="CHECKPOINT",
        help="checkpoint of pcrl_nnunet_pretrain, nnssl or a training of nnU-Net, whose encoder fits the plan",
    )
    parser.add_argument(
        "-o", default="embeddings.npz", metavar="FILE.npz", help="file to write (default: embeddings.npz)"
    )
    parser.add_argument("-c", metavar="CONFIGURATION", help=arguments.CONFIGURATION)
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help=arguments.PLANS)
    parser.add_argument("-device", help=arguments.DEVICE)
    return parser


def main() -> None:
    """Parse, check, compute the vectors, write them, draw their map."""
    args = _parser().parse_args()
    _check(args)
    arguments.load("pcrl_nnunet.features.encoder", "pcrl_nnunet.pretraining.cases")
    from pcrl_nnunet.device import device_named
    from pcrl_nnunet.features.table import FEWEST, picture_beside
    from pcrl_nnunet.plans import load_plan

    device = device_named(args.device)
    found, lost = _embeddings(load_plan(args.d, args.p, args.c), os.path.abspath(args.i), device)
    found.write(args.o)
    print(f"Wrote {args.o}: {len(found.names)} vectors of {found.vectors.shape[1]} numbers")
    if len(found.names) >= FEWEST:
        found.draw(picture_beside(args.o))
        print(f"      {picture_beside(args.o)}")
    if lost:
        sys.exit(1)


def _check(args: argparse.Namespace) -> None:
    """Raise `UserError` for wrong arguments, before torch is imported."""
    from pcrl_nnunet.device import check_device_name
    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.plans import find_plan, refuse_cascade

    check_device_name(args.device)
    arguments.check_file("-i", args.i, "a checkpoint")
    if not args.o.endswith(".npz"):
        raise UserError(f"-o is {args.o}; expected a file that ends with .npz, such as embeddings.npz")
    arguments.check_folder("the folder of -o", os.path.dirname(os.path.abspath(args.o)), "results")
    _, plans, configuration, _ = find_plan(args.d, args.p, args.c)
    refuse_cascade(plans, configuration)


def _embeddings(plan: PlannedConfiguration, path: str, device: torch.device) -> tuple[Embeddings, list[str]]:
    """Return the vectors of all cases, and the names of cases that cannot be read."""
    import numpy as np

    from pcrl_nnunet.errors import UserError
    from pcrl_nnunet.features.embedding import columns, embedding
    from pcrl_nnunet.features.encoder import network_of
    from pcrl_nnunet.features.table import Embeddings
    from pcrl_nnunet.loading.cases import CaseVolume, UnreadableCase
    from pcrl_nnunet.networks import encoder_of
    from pcrl_nnunet.pretraining.cases import PretrainingCases
    from pcrl_nnunet.progress import counted

    cases = PretrainingCases.find(plan.plans, plan.configuration, "all")
    network, _, report = network_of(plan, path)
    if report is not None:
        print(report.summary())
    encoder = encoder_of(network).to(device)
    vectors, names, labelled, lost = [], [], [], []
    own = {case.name for case in cases.labelled}
    for case in counted(cases.used, len(cases.used), "cases have a vector"):
        try:
            vectors.append(embedding(encoder, CaseVolume(case), plan.resolved["patch_size"], device))
        except UnreadableCase as error:
            lost.append(case.name)
            print(f"Left out: {error}")
            continue
        names.append(case.name)
        labelled.append(case.name in own)
    if not vectors:
        raise UserError(f"none of the {len(lost)} cases can be read; preprocess them again")
    checkpoint = os.sep.join(path.split(os.sep)[-3:])
    title = f"{plan.plans['dataset_name']}, {plan.configuration}\n{checkpoint}"
    found = columns(encoder.output_channels)
    return Embeddings(names, np.stack(vectors), np.array(labelled), *found, title), lost


def main_entry() -> None:
    """Run the console script."""
    from pcrl_nnunet.errors import console

    console(main)


if __name__ == "__main__":
    main_entry()
