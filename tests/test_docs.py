"""The site of docs/: it builds without a warning, and its generated pages agree with the code.

tests/test_readme.py follows the links and runs the commands of the same pages.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pcrl_nnunet
from pcrl_nnunet.methods import method_class

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
REPOSITORY = "https://example.org/repository/blob/main"


def build(docs: Path, folder: Path, *options: str) -> Path:
    """Build a site as CONTRIBUTING.md says; warnings are errors."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    command = [sys.executable, "-P"] if sys.version_info >= (3, 11) else [sys.executable]
    command += ["-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", *options, docs, folder]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once."""
    return build(DOCS, tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The script docs/reference.py."""
    spec = importlib.util.spec_from_file_location("reference_of_docs", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_site_has_every_page_and_a_search_box(site: Path) -> None:
    pages = {page.relative_to(DOCS).with_suffix("") for page in DOCS.rglob("*.md") if "_build" not in page.parts}
    assert len(pages) >= 30
    assert [page for page in pages if not (site / page.with_suffix(".html")).is_file()] == []
    assert 'action="search.html"' in (site / "index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_shows_the_readme_with_links_to_its_pages(site: Path) -> None:
    overview = (site / "overview.html").read_text(encoding="utf-8")
    assert 'href="methods/pcrlv2.html"' in overview
    assert 'href="contributing.html"' in overview
    assert "<h2>Does it pay on your data?<" in overview
    assert re.search(r'<img [^>]*src="_images/overview\.png"', overview)
    assert (site / "_images" / "overview.png").stat().st_size > 10_000


@pytest.mark.slow
def test_without_an_address_links_to_code_are_plain_paths(site: Path) -> None:
    page = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    assert re.search(r"<p>File: <code[^>]*><span[^>]*>pcrl_nnunet/methods/mae\.py</span></code></p>", page)


@pytest.mark.slow
def test_with_an_address_links_to_code_lead_into_the_repository(tmp_path: Path) -> None:
    docs, package, made = (tmp_path / name for name in ("docs", "pcrl_nnunet", "site"))
    for folder in (docs, package, made):
        folder.mkdir()
    for file in ("docs/conf.py", "docs/outside_links.py", "pcrl_nnunet/__init__.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    (docs / "index.md").write_text("# Start\n\n[some code](../pcrl_nnunet/__init__.py)\n")
    page = build(docs, made, "-D", f"repository={REPOSITORY}") / "index.html"
    link = rf'<a class="reference external" href="{REPOSITORY}/pcrl_nnunet/__init__\.py">(<span[^>]*>)?some code<'
    assert re.search(link, page.read_text(encoding="utf-8"))


def test_every_page_is_in_the_table_of_contents_once() -> None:
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(encoding="utf-8"), re.M | re.S)
    lines = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    listed = [re.sub(r".*<(.+)>", r"\1", line) for line in lines]
    pages = [page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(page for page in pages if page != "index")


@pytest.mark.parametrize("page", ["commands.md", "settings.md"])
def test_the_reference_is_up_to_date(reference: ModuleType, page: str) -> None:
    written = (DOCS / "reference" / page).read_text(encoding="utf-8")
    assert written == reference.pages()[page], "run python docs/reference.py"


def test_the_citation_has_the_version() -> None:
    (version,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.M)
    assert version == pcrl_nnunet.__version__


def test_the_reference_has_the_commands_of_setup_py(reference: ModuleType) -> None:
    (commands,) = re.findall(r"for command in \(([^)]+)\)", (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert re.findall(r'"(\w+)"', commands) == list(reference.COMMANDS)


@contextmanager
def class_of(file: Path, attributes: str, fields: str) -> Iterator[Any]:
    """Return a dataclass of settings whose docstring and fields have these lines."""
    file.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Some:\n"
        f'    """Some settings.\n\n    Attributes:\n{attributes}    """\n'
        f"{fields}"
    )
    spec = importlib.util.spec_from_file_location("some_settings", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["some_settings"] = module
    try:
        spec.loader.exec_module(module)
        yield module.Some
    finally:
        del sys.modules["some_settings"]


def test_a_setting_without_a_meaning_is_an_error(reference: ModuleType, tmp_path: Path) -> None:
    fields = "    one: int = 1\n    two: int = 2  # beside\n    # above\n    three: int = 3\n    four: int = 4\n"
    with class_of(tmp_path / "some_settings.py", "        one: the first.\n", fields) as some:
        found = some.__dataclass_fields__
        meanings = [reference.meaning(some, found[name]) for name in ("one", "two", "three")]
        assert meanings == ["The first.", "Beside.", "Above."]
        with pytest.raises(LookupError, match=r"Some\.four: add it"):
            reference.meaning(some, found["four"])


def test_a_setting_without_a_source_beside_others_with_one_is_an_error(reference: ModuleType, tmp_path: Path) -> None:
    attributes = "        one: the first. Source: a paper,\n            section 2.\n        two: the second.\n"
    with class_of(tmp_path / "some_settings.py", attributes, "    one: int = 1\n    two: int = 2\n") as some:
        found = some.__dataclass_fields__
        assert reference.meaning(some, found["one"]) == "The first."
        assert reference.source(some, found["one"]) == "a paper, section 2"
        with pytest.raises(LookupError, match=r"Some\.two: name its source"):
            reference.source(some, found["two"])


def test_a_default_that_a_method_changes_has_the_methods_source(reference: ModuleType) -> None:
    _, of_method = reference.settings_page().split("## pcrl.pretrain.simsiam\n")
    (row,) = re.findall(r"^\| `augmentation\.p_swap` .*$", of_method, re.M)
    assert row.endswith("| ours |")


def test_log_report_and_glossary_have_the_same_name_for_a_quantity() -> None:
    glossary = (DOCS / "glossary.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\(#([\w-]+)\) \| [^|]+ \| ([^|]+) \|$", glossary, re.M)
    method = method_class("pcrlv2")
    assert [name for name, _, _ in rows] == [quantity.name for quantity in method.quantities]
    for name, section, good in rows:
        (quantity,) = (each for each in method.quantities if each.name == name)
        section = section.replace("-", " ").capitalize()
        assert quantity.heading in (name.replace("_", " ").capitalize(), section)
        assert good.removeprefix("stay ").removeprefix("fall ").removeprefix("rise ") in quantity.good
        assert f"### {section}\n" in glossary
    for name in method.terms:
        assert f"`{name}`" in glossary
