"""Help and refused arguments come before torch is imported: a mistake costs a second, not a minute."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pcrl_nnunet import planners
from pcrl_nnunet.cli import arguments, preprocess

COMMANDS = ("register", "preprocess", "pretrain", "transfer", "classify", "compare")
# Runs a command; its last line says which of the slow packages were imported.
RUN = """
import sys
from pcrl_nnunet.cli.{command} import main_entry
status = 0
try:
    main_entry()
except SystemExit as end:
    status = end.code
print([name for name in ("torch", "nnunetv2.training", "pandas", "SimpleITK") if name in sys.modules], status)
"""


def run(command: str, words: str, folder: Path) -> tuple[str, str]:
    """Return what a command printed, and its last line: the imported packages and the exit status."""
    code = RUN.format(command=command)
    program = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-c", code, *shlex.split(words)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=folder, timeout=60)
    *printed, last = (done.stdout.rstrip() or f"\n{done.stderr}").split("\n")
    return "\n".join(printed), last


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_and_imports_no_torch(command: str, tmp_path: Path) -> None:
    printed, last = run(command, "--help", tmp_path)
    assert last == "[] 0"
    _, examples = printed.split("\n\nexamples:\n")
    assert all(line.startswith(f"  pcrl_nnunet_{command}") for line in examples.splitlines())
    assert max(map(len, printed.splitlines())) <= 100


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("register", "--chek", "2"),
        ("pretrain", "-d Tinny", "the nearest is Dataset999_Tiny"),
        ("pretrain", "-d 999 -c 3d_fulres", "configuration '3d_fulres' is not in nnUNetPlans"),
        ("pretrain", "-d 999 -c 3d_cascade_fullres", "takes the labels of 3d_lowres as input"),
        ("pretrain", "-d 999 -c of_cascade", "takes the labels of 3d_lowres as input"),
        ("pretrain", "-d 999 -p Plan", "Plan.json does not exist"),
        ("pretrain", "-d 999 -method pcrl", "there is no method 'pcrl', the nearest is pcrlv2; expected one of"),
        ("pretrain", "-d 999 -f 9", "fold 9 is not among the folds"),
        ("pretrain", "-d 999 -epochs -3", "-epochs is -3; expected 1 or more"),
        ("pretrain", "-d 999 -epochs three", "2"),
        ("pretrain", "-d 999 -num_gpus 0", "-num_gpus is 0; expected 1 or more"),
        ("pretrain", "-d 999 -device gpu", "-device is 'gpu'; expected cuda, cpu or mps"),
        ("pretrain", "-d 999 -init nowhere.pth", "-init is nowhere.pth, which does not exist"),
        ("pretrain", "-d 999 -name a/b", "-name is 'a/b'; expected letters"),
        ("pretrain", "-d 999 --c --overwrite", "give one of them"),
        ("preprocess", "-d Tinny -i .", "the nearest is Dataset999_Tiny"),
        ("preprocess", "-d 999 -i nowhere", "nowhere, which is not a folder"),
        ("preprocess", "-d 999 -i . -np -1", "-np is -1; expected 1 or more"),
        ("preprocess", "-d 999 -pl Planner", "-pl is 'Planner'; expected PCRLPlanner"),
        ("preprocess", "-d 999 -target 999", "is the dataset of -d itself"),
        ("preprocess", "-d 999 -i . -normalization source", "-normalization needs -target"),
        ("transfer", "-i nowhere.pth -d 999 -name a", "-i is nowhere.pth, which does not exist"),
        ("transfer", "-i nowhere.pth -d 999 -name a/b", "-name is 'a/b'; expected letters"),
        ("classify", "-d 999 -i . -o out.csv -c 2d", "plans.json does not exist; train first"),
        ("compare", "-d Tinny", "the nearest is Dataset999_Tiny"),
        ("compare", "-d 999 -labelled ten", "-labelled has 'ten'; expected numbers of cases"),
        ("compare", "-d 999 -seeds 0", "-seeds is 0; expected 1 or more"),
        ("compare", "-d 999 -settings nowhere.json", "nowhere.json does not exist"),
        ("compare", "-d 999 -methods stock pcrl", "no method 'pcrl', the nearest is pcrlv2; expected some of"),
        ("compare", "-d 999 -methods thumbnail -task segmentation", "there is no method 'thumbnail'; expected"),
        ("compare", "-d 999 -protocol transfer", "-protocol is transfer and -checkpoint None"),
    ],
)
def test_a_wrong_argument_is_refused_without_torch(
    tiny: SimpleNamespace, tmp_path: Path, command: str, words: str, message: str
) -> None:
    plan = json.loads((tiny.folder / "nnUNetPlans.json").read_text())
    plan["configurations"]["of_cascade"] = {"inherits_from": "3d_cascade_fullres"}
    (tiny.folder / "nnUNetPlans.json").write_text(json.dumps(plan))
    _, last = run(command, words, tmp_path)
    assert last.startswith("[] ")
    assert message in last
    assert not tiny.results.exists()


def test_an_unknown_option_is_answered_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    parser = arguments.parser("command", "Does nothing.", "  command")
    parser.add_argument("--dry_run", action="store_true")
    with pytest.raises(SystemExit):
        parser.parse_args(["--dryrun"])
    assert "unrecognized arguments: --dryrun, the nearest is --dry_run" in capsys.readouterr().err


def test_the_names_of_planners_are_known_without_importing_them() -> None:
    assert sorted(preprocess.PLANNERS) == sorted(planners.__all__)
