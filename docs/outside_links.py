"""A Sphinx extension for files of the repository that lie outside docs/.

- A link to such a file works on GitHub unchanged. On the site it becomes a link into the repository. If the setting
  `repository` is empty, it becomes the path of the file in plain text.
- README.md, CONTRIBUTING.md and CHANGELOG.md are pages of the site. Their pages in docs/ hold only a link to the file;
  `show_root_file` puts the file's text in the place of the link.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[1]
ROOT_FILES = {"overview": "README.md", "contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}  # by page
RELATIVE_LINK = re.compile(r"\]\((?!https?:|mailto:|#)")


def show_root_file(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put a file of the repository's root in the place of a page's text, with links as from docs/."""
    if docname in ROOT_FILES:
        file = ROOT / ROOT_FILES[docname]
        app.env.note_dependency(str(file))
        source[0] = RELATIVE_LINK.sub("](../", file.read_text(encoding="utf-8"))


class OutsideLinks(SphinxTransform):
    """Replaces links to files outside docs/."""

    default_priority = 5  # before Sphinx collects downloads

    def apply(self, **kwargs: Any) -> None:
        """Look at every link of a page that MyST took for a file or a page."""
        links = [
            node
            for kind in (addnodes.download_reference, addnodes.pending_xref)
            for node in self.document.findall(kind)
            if node.get("reftype") == "myst"
        ]
        pages = {file: page for page, file in ROOT_FILES.items()}
        for link in links:
            path = self._outside(link)
            if path in pages:
                link["reftarget"] = pages[path]
            elif path is not None:
                link.replace_self(self._to_repository(link, path))

    def _outside(self, link: nodes.Element) -> str | None:
        """Return the path of a linked file in the repository; None: it lies in docs/, or nowhere."""
        if link.get("refdomain") == "doc":  # MyST's name of a page, from docs/
            file = Path(self.env.srcdir, link["reftarget"] + ".md")
        else:
            file = Path(self.env.srcdir, os.path.dirname(self.env.docname), link["reftarget"])
        file = Path(os.path.normpath(file))
        if file.is_relative_to(self.env.srcdir) or not file.is_relative_to(ROOT) or not file.exists():
            return None
        return file.relative_to(ROOT).as_posix()

    def _to_repository(self, link: nodes.Element, path: str) -> nodes.Node:
        if self.config.repository:
            address = f"{self.config.repository.rstrip('/')}/{path}"
            return nodes.reference("", "", *link.children, internal=False, refuri=address)
        shown = link.astext()
        file = nodes.literal("", path)
        return file if path.endswith(shown) else nodes.inline("", "", nodes.Text(f"{shown} ("), file, nodes.Text(")"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.add_config_value("repository", "", "env", str)
    app.connect("source-read", show_root_file)
    app.add_transform(OutsideLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
