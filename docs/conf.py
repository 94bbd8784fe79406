"""Settings of Sphinx, which makes a site of the pages in this folder: `sphinx-build docs docs/_build`."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))  # for outside_links

project = "pcrl_nnunet"
author = "The pcrl_nnunet maintainers"
# read, as a build of the site does not need the package and its torch
INIT = (DOCS.parent / "pcrl_nnunet" / "__init__.py").read_text(encoding="utf-8")
release = version = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]

extensions = ["myst_parser", "outside_links"]
repository = (
    ""  # address of the repository's files, such as https://github.com/OWNER/NAME/blob/main; none is public yet
)
exclude_patterns = ["_build", "examples"]

myst_heading_anchors = 4  # links to sections are GitHub's
smartquotes = False  # they would turn the flag --c into a dash and c

html_theme = "furo"
html_title = f"pcrl_nnunet {release}"
html_copy_source = False
html_show_copyright = False
