"""pcrl_nnunet_register: registration of our trainers and planners with nnU-Net's commands."""

from __future__ import annotations

import sys

from pcrl_nnunet import registration
from pcrl_nnunet.cli import arguments
from pcrl_nnunet.errors import console

DESCRIPTION = """
Let the commands of nnU-Net find the PCRL trainers and planners.

Run this once after you install pcrl_nnunet or nnU-Net.
"""
EXAMPLES = """
  pcrl_nnunet_register           register
  pcrl_nnunet_register --check   show whether nnU-Net finds the trainers
"""


def main() -> None:
    """Run the command without error handling."""
    parser = arguments.parser("pcrl_nnunet_register", DESCRIPTION, EXAMPLES)
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--check", action="store_true", help="only print the state; the exit status is 1 if unregistered"
    )
    group.add_argument(
        "--undo", action="store_true", help="remove the files that this command wrote; do so before you change nnU-Net"
    )
    args = parser.parse_args()
    if args.check:
        print(registration.description())
        sys.exit(0 if registration.is_registered() else 1)
    if args.undo:
        print("\n".join(registration.undo() or ["Nothing to undo: not registered."]))
    else:
        print("\n".join(registration.register() or ["Registered already; nothing to do."]))


def main_entry() -> None:
    """Run the console script."""
    console(main)


if __name__ == "__main__":
    main_entry()
