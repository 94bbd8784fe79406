"""Package definition; tool settings are in pyproject.toml."""

import re
import tempfile
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
README = HERE / "README.md"
# The version has one home, pcrl_nnunet/__init__.py, which cannot be imported here: a build has no torch.
INIT = (HERE / "pcrl_nnunet" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]

# `trainers/` and `planners/` lie at the top of the repository, but install inside our package: top-level packages of
# such common names would collide with others.
INSIDE = ("trainers", "planners")

# A build folder in the repository would be used again by the next build, with modules that no longer exist.
BUILD_FOLDER = tempfile.TemporaryDirectory(prefix="pcrl_nnunet_build_")

# These build the site of docs/. The theme furo is light (1 MB of Python) and has a search box, all pages at the side of
# each page, and a layout for phones.
SITE = ["sphinx", "myst-parser", "furo"]

setup(
    name="pcrl_nnunet",
    version=VERSION,
    description="Self-supervised pretraining of nnU-Net v2 networks (PCRLv2 and others), inside nnU-Net",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    project_urls={
        "nnU-Net": "https://github.com/MIC-DKFZ/nnUNet",
        "PCRLv2": "https://arxiv.org/abs/2301.00772",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Healthcare Industry",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
        "Typing :: Typed",
    ],
    keywords=["nnU-Net", "self-supervised learning", "semi-supervised learning", "medical image segmentation"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["pcrl_nnunet", "pcrl_nnunet.*"]),
        *(f"pcrl_nnunet.{name}" for name in INSIDE),
        *(f"pcrl_nnunet.{name}.{sub}" for name in INSIDE for sub in find_packages(name)),
    ],
    package_dir={f"pcrl_nnunet.{name}": name for name in INSIDE},
    # ext_trainer is a folder for nnUNet_extTrainer, not a package of ours.
    package_data={"pcrl_nnunet": ["ext_trainer/*.py", "py.typed"], "pcrl_nnunet.report": ["page.html", "style.css"]},
    install_requires=[
        "nnunetv2>=2.8",
        "torch",  # no pin: users get the newest, with its matching torchvision
        "batchgenerators",
        "acvl-utils",
        "dynamic-network-architectures",
        "numpy",
        "SimpleITK",
        # The following come with nnU-Net; they are named because we import them ourselves.
        "blosc2",  # reads boxes of preprocessed cases
        "scipy",  # Gaussian filters
        "scikit-learn",  # AUROC, splits by patient, logistic regressions
        "scikit-image",  # Otsu's threshold
        "matplotlib",  # figures
        "tqdm",  # progress bars
        "pandas",  # tables of a comparison
        "nibabel",  # the orientation of images, as nnU-Net reads it
        # These do not come with nnU-Net.
        "pydicom",  # headers of DICOM: position, slope and kind of every frame, which SimpleITK does not give
        # numba compiles the inner loops of the views, which are then several times as fast as with torch or scipy. It
        # supports a new Python some months late; until then scipy computes the same.
        "numba; python_version < '3.15'",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "torchio", "monai", *SITE],
        "docs": SITE,
        "benchmark": ["torchio", "monai"],  # scripts/benchmark_views.py compares with them
    },
    options={"build": {"build_base": BUILD_FOLDER.name}},
    entry_points={
        "console_scripts": [
            f"pcrl_nnunet_{command} = pcrl_nnunet.cli.{command}:main_entry"
            for command in ("register", "preprocess", "pretrain", "transfer", "classify", "compare", "embed")
        ]
    },
)
