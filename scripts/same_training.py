"""Show that two installed versions of this package train alike: views, losses and weights, bit for bit.

Each version trains the same plan with `pcrl_nnunet_pretrain` on one CPU thread, from the same seed. The script compares
the inputs and outputs of every step::

    python scripts/same_training.py OLD/bin/python NEW/bin/python -d 4 -c 2d

The arguments after the two interpreters go to `pcrl_nnunet_pretrain`. nnU-Net's three variables have to be set; results
go into a temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 50


def record(path: str, arguments: list[str]) -> None:
    """Pretrain with this interpreter's version, and write the inputs and outputs of every step."""
    import numpy as np
    import torch

    from pcrl_nnunet.cli import pretrain
    from pcrl_nnunet.trainers.pretrain import PCRLPretrainTrainer

    torch.set_num_threads(1)
    steps: list[dict[str, Any]] = []
    train_step = PCRLPretrainTrainer.train_step

    def recorded(self: Any, batch: dict[str, Any], step: int, *more: Any) -> dict[str, float]:
        views = {
            name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
            for name, array in sorted(batch.items())
            if name != "cases"
        }
        losses = train_step(self, batch, step, *more)
        gradient = torch.cat([p.grad.flatten() for p in self.network.encoder.parameters() if p.grad is not None])
        steps.append({"views": views, "losses": losses, "gradient": float(gradient.double().norm())})
        return losses

    PCRLPretrainTrainer.train_step = recorded  # type: ignore[assignment, method-assign]
    sys.argv = ["pcrl_nnunet_pretrain", *arguments]
    pretrain.main()
    found = next(Path(os.environ["nnUNet_results"]).rglob("checkpoint_final.pth"))
    content = torch.load(found, map_location="cpu", weights_only=True)
    Path(path).write_text(json.dumps({"steps": steps, "encoder": content["encoder_hash"]}), encoding="utf-8")


def recorded_by(python: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Record a version in its own process and results folder."""
    folder.mkdir()
    output = folder / "recorded.json"
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "nnUNet_n_proc_DA", "NUMBA_NUM_THREADS")}
    environment = {**os.environ, **threads, "nnUNet_results": str(folder), "nnUNet_compile": "f"}
    command = [python, "-P", str(Path(__file__).resolve()), "--record", str(output), *arguments]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


def compared(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return what is equal, and the relative differences of the first step's loss and gradient."""
    pairs = list(zip(old["steps"], new["steps"], strict=True))
    first = pairs[0]
    return {
        "steps": len(pairs),
        "views bit-equal": all(a["views"] == b["views"] for a, b in pairs),
        "losses bit-equal": all(a["losses"] == b["losses"] for a, b in pairs),
        "encoder bit-equal": old["encoder"] == new["encoder"],
        "first loss, relative difference": abs(first[1]["losses"]["loss"] / first[0]["losses"]["loss"] - 1),
        "first gradient, relative difference": abs(first[1]["gradient"] / first[0]["gradient"] - 1),
    }


def main() -> None:
    """Record both versions and print the comparison; status 1 unless views, losses and encoder are bit-equal."""
    if sys.argv[1:2] == ["--record"]:
        record(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description="Compare the trainings of two installed versions of pcrl_nnunet.",
        epilog="example:\n  python scripts/same_training.py OLD/bin/python NEW/bin/python -d 4 -c 2d",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", help="Python interpreter of the one version")
    parser.add_argument("new", help="and of the other")
    args, more = parser.parse_known_args()
    arguments = ["-device", "cpu", "-epochs", "1", "-iters_per_epoch", str(STEPS), *more]
    with tempfile.TemporaryDirectory() as folder:
        found = [recorded_by(p, Path(folder) / name, arguments) for p, name in ((args.old, "old"), (args.new, "new"))]
    result = compared(*found)
    for name, value in result.items():
        print(f"{name}: {value}")
    sys.exit(0 if all(value for name, value in result.items() if name.endswith("bit-equal")) else 1)


if __name__ == "__main__":
    main()
