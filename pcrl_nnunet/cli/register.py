"""pcrl_nnunet_register: registration of our trainers and planners with nnU-Net's commands."""

from __future__ import annotations

import argparse
import sys

from pcrl_nnunet import registration
from pcrl_nnunet.errors import console


def main() -> None:
    """Run the command without error handling."""
    parser = argparse.ArgumentParser(
        prog="pcrl_nnunet_register",
        description="Let nnU-Net's commands see the PCRL trainers and planners. Needed once after installing "
        "pcrl_nnunet or nnU-Net.",
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true", help="only say what the state is; status 1 if not registered")
    group.add_argument("--undo", action="store_true", help="remove what was written. Do so before changing nnU-Net")
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
