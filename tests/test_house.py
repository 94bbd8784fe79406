"""The architecture of the package: imports point one way. No file holds a conflict marker."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # each may import from its own layer and later layers
    {"cli"},
    {"trainers", "planners"},
    {"experiments", "report"},
    {"pretraining"},
    {"finetuning", "semi_supervised", "features"},
    {"transfer", "ingest", "classification"},
    {"methods"},
    {"views", "networks", "losses", "loading"},
    {"checkpoint", "named_plans", "output_folder", "registration", "target_plans"},
    {"plans", "config", "weights_and_biases"},
    {"settings", "files", "lock", "device", "progress", "method_names", "figure_style"},
    {"errors", "commands"},
]


def modules():
    for folder in ("pcrl_nnunet", "trainers", "planners"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / ("pcrl_nnunet" if folder == "pcrl_nnunet" else ".")).with_suffix("").parts
            if parts[0] not in ("__init__", "ext_trainer"):
                yield pytest.param(parts[0], path, id="/".join(parts))


def layer(name):
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"{name} has no place in the house: add it to LAYERS"
    return found[0]


@pytest.mark.parametrize(("name", "path"), modules())
def test_imports_point_one_way(name, path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pcrl_nnunet":
            parts = node.module.split(".")
            imported |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            imported |= {a.name.split(".")[1] for a in node.names if a.name.startswith("pcrl_nnunet.")}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):  # constant names count
            given = [a.value for a in node.args if isinstance(a, ast.Constant)]
            imported |= {name.split(".")[1] for name in given if name.startswith("pcrl_nnunet.")}
    wrong = {other for other in imported - {"__version__"} if layer(other) < layer(name)}
    assert not wrong


def test_every_test_named_in_the_list_of_faults_exists() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    file = ""
    named = re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", text)
    assert len(named) > 20
    for given, test in named:
        file = given or file
        if file and (given or test):
            assert not test or f"\ndef {test}(" in (ROOT / file).read_text(encoding="utf-8"), (file, test)


def text_files() -> list[Path]:
    """Return the files that git tracks, or in a tree without git all Python and Markdown files."""
    if (ROOT / ".git").exists():
        command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
        return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]
    found = [path for ending in ("py", "md") for path in ROOT.rglob(f"*.{ending}")]
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def test_no_file_holds_a_conflict_marker() -> None:
    markers = tuple(f"{sign * 7} ".encode() for sign in "<>")
    files = text_files()
    assert Path(__file__) in files
    found = [str(path) for path in files if any(line.startswith(markers) for line in path.read_bytes().splitlines())]
    assert found == []
