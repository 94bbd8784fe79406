"""The options of the scripts that import torch.

These scripts import this module before all others. So `--help` is answered at once, not after the seconds that the
import of torch takes.
"""

from __future__ import annotations

import ast
import sys
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

LITS_LABELS = ("liver", "liver_tumour")
UNCERTAIN = ("ignore", "0", "1")
PARTS_OF_BENCHMARK = ("steps", "memory", "methods", "growth", "reading", "gpu")


def _described(script: str) -> ArgumentParser:
    """Return a parser that shows the script's docstring, which has examples."""
    source = Path(__file__).with_name(f"{script}.py").read_text(encoding="utf-8")
    return ArgumentParser(
        prog=f"{script}.py",
        description=ast.get_docstring(ast.parse(source)),
        formatter_class=RawDescriptionHelpFormatter,
    )


def _convert(
    script: str, folder: str, number: int, memory: str = ", each with one scan in memory, up to 5 GB"
) -> ArgumentParser:
    parser = _described(script)
    parser.add_argument("-i", required=True, type=Path, metavar=folder, help="the folder that was downloaded")
    parser.add_argument("-d", required=True, type=int, metavar="ID", help=f"dataset ID for nnU-Net, such as {number}")
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="where the dataset's folder goes (default: $nnUNet_raw)"
    )
    parser.add_argument("-np", type=int, metavar="N", help=f"processes{memory} (default: at most 8)")
    return parser


def convert_lits() -> ArgumentParser:
    """Return the parser of convert_lits.py."""
    parser = _convert("convert_lits", "LITS_FOLDER", 17)
    parser.add_argument("-labels", choices=LITS_LABELS, default="liver_tumour", help="default: liver_tumour")
    parser.add_argument("-crop_to_liver", action="store_true", help="only for the papers' protocol: it uses the truth")
    return parser


def convert_luna16() -> ArgumentParser:
    """Return the parser of convert_luna16.py."""
    return _convert("convert_luna16", "LUNA_FOLDER", 16)


def _convert_xrays(script: str, folder: str, number: int) -> ArgumentParser:
    parser = _convert(script, folder, number, memory="")
    parser.add_argument(
        "-size", type=int, default=256, metavar="PIXELS", help="short side; smaller images keep theirs (default: 256)"
    )
    parser.add_argument("-partial", action="store_true", help="convert the images that are there, though some are not")
    return parser


def convert_nih_chestxray() -> ArgumentParser:
    """Return the parser of convert_nih_chestxray.py."""
    return _convert_xrays("convert_nih_chestxray", "NIH_FOLDER", 61)


def convert_chexpert() -> ArgumentParser:
    """Return the parser of convert_chexpert.py."""
    parser = _convert_xrays("convert_chexpert", "CHEXPERT_FOLDER", 62)
    parser.add_argument(
        "-uncertain", choices=UNCERTAIN, default="ignore", help="what the uncertain labels become (default: ignore)"
    )
    parser.add_argument("-lateral", action="store_true", help="take the lateral images, too")
    return parser


def benchmark_chest_xrays() -> ArgumentParser:
    """Return the parser of benchmark_chest_xrays.py."""
    parser = _described("benchmark_chest_xrays")
    parser.add_argument("-i", type=Path, metavar="FOLDER", help="folder with PNG images to enlarge (default: noise)")
    parser.add_argument("-images", type=int, default=200, metavar="N", help="images (default: 200)")
    parser.add_argument("-rounds", type=int, default=3, metavar="N", help="rounds of both ways (default: 3)")
    return parser


def learning() -> ArgumentParser:
    """Return the parser of learning.py."""
    parser = _described("learning")
    parser.add_argument("-d", required=True, metavar="DATASET", help="name or ID of the dataset")
    parser.add_argument("-c", default="3d_fullres", metavar="CONFIGURATION", help="configuration (default: 3d_fullres)")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="name of the plan (default: nnUNetPlans)")
    parser.add_argument(
        "-f", type=int, default=0, metavar="FOLD", help="fold whose validation cases are left out (default: 0)"
    )
    parser.add_argument("-methods", nargs="+", metavar="NAME", help="methods (default: all that fit the plan)")
    parser.add_argument("-steps", type=int, default=300, metavar="N", help="steps of each method (default: 300)")
    parser.add_argument("-batch_size", type=int, metavar="N", help="samples in a step (default: the method's own)")
    parser.add_argument("-optimizer", choices=("sgd", "adamw"), help="default: the method's own")
    parser.add_argument("-initial_lr", type=float, metavar="RATE", help="learning rate (default: the method's own)")
    parser.add_argument("-device", default="cpu", help="cuda, cpu or mps (default: cpu)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    return parser


def benchmark_step() -> ArgumentParser:
    """Return the parser of benchmark_step.py."""
    parser = _described("benchmark_step")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs; the numbers say nothing")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS_OF_BENCHMARK,
        default=PARTS_OF_BENCHMARK,
        metavar="PART",
        help="default: all",
    )
    parser.add_argument("--measure", help=SUPPRESS)  # for the script's own processes
    return parser


def benchmark_views() -> ArgumentParser:
    """Return the parser of benchmark_views.py."""
    parser = _described("benchmark_views")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the ratios to this file")
    return parser


def benchmark_images() -> ArgumentParser:
    """Return the parser of benchmark_images.py."""
    parser = _described("benchmark_images")
    parser.add_argument("--images", type=int, default=100_000, metavar="N", help="number of images (default: 100000)")
    parser.add_argument("-o", type=Path, metavar="FOLDER", help="where the images go for a while (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to this file")
    return parser


def copy_paste_picture() -> ArgumentParser:
    """Return the parser of copy_paste_picture.py."""
    parser = _described("copy_paste_picture")
    default = Path(__file__).parents[1] / "docs" / "pictures" / "copy_paste.png"
    parser.add_argument("-o", type=Path, default=default, metavar="FILE", help="default: docs/pictures/copy_paste.png")
    return parser


PARSERS = {
    parser.__name__: parser
    for parser in (
        *(convert_lits, convert_luna16, convert_nih_chestxray, convert_chexpert, learning, copy_paste_picture),
        *(benchmark_images, benchmark_chest_xrays, benchmark_step, benchmark_views),
    )
}

if {"-h", "--help"} & {*sys.argv[1:]} and Path(sys.argv[0]).stem in PARSERS:
    PARSERS[Path(sys.argv[0]).stem]().parse_args(["--help"])
