"""Write the reference of commands and of settings, from the parsers and the dataclasses themselves.

    python docs/reference.py

Writes docs/reference/commands.md and docs/reference/settings.md. Run it after a change of a flag or a setting, with the
changed package installed; tests/test_docs.py fails where they are not up to date.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest.mock import patch

from pcrl_nnunet.config import ClassifySettings, FinetuneSettings
from pcrl_nnunet.method_names import BUILT_IN, DEFAULT
from pcrl_nnunet.pretraining.settings import PretrainSettings, pretrain_settings
from pcrl_nnunet.semi_supervised.settings import SemiSettings
from pcrl_nnunet.settings import within

FOLDER = Path(__file__).parent / "reference"
COMMANDS = ("register", "preprocess", "pretrain", "transfer", "classify", "compare", "embed")
NOT_EDITED = "<!-- Written by docs/reference.py. Do not edit. -->"
# The plan of the examples. It resembles the plan that nnU-Net makes for LiTS.
CONFIGURATION: dict[str, Any] = {
    "patch_size": [128, 128, 128],
    "batch_size": 2,
    "median_image_size_in_voxels": [482, 512, 512],
    "spacing": [1.0, 0.77, 0.77],
    "architecture": {"arch_kwargs": {"strides": [[1, 1, 1], *([[2, 2, 2]] * 5)]}},
}


def pages() -> dict[str, str]:
    """Return the text of each generated page by its name."""
    return {"commands.md": commands_page(), "settings.md": settings_page()}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Commands


class _Parsed(Exception):
    """Ends a command where it would parse."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser that a command makes when it starts."""
    found: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        found.append(parser)
        raise _Parsed

    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            import_module(f"pcrl_nnunet.cli.{command}").main()
        except _Parsed:
            return found[0]
    raise RuntimeError(f"pcrl_nnunet_{command} parsed no arguments")


def commands_page() -> str:
    """Return the page of all commands."""
    parsers = [parser_of(command) for command in COMMANDS]
    listed = "\n".join(f"- [{parser.prog}](#{parser.prog})" for parser in parsers)
    intro = (
        "All commands and their options, in the words of their `--help`. An option with `...` takes several values.\n"
        "Fine-tuning has no command of its own: use nnU-Net's `nnUNetv2_train ... -tr PCRLFinetuneTrainer`."
    )
    return "\n\n".join([NOT_EDITED, "# Commands", intro, listed, *map(_command, parsers)]) + "\n"


def _command(parser: argparse.ArgumentParser) -> str:
    rows = [_option(parser, action) for action in parser._actions if action.dest != "help"]
    parts = [
        f"## {parser.prog}",
        _prose(textwrap.dedent(parser.description or "").strip()),
        table(["Option", "Meaning"], rows),
    ]
    if parser.epilog:
        parts.append(f"```text\n{textwrap.dedent(parser.epilog).strip()}\n```")
    return "\n\n".join(parts)


def _option(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str]:
    values = "" if action.nargs == 0 else str(action.metavar or action.dest.upper())
    if action.choices is not None:
        values = "|".join(map(str, action.choices))
    name = " ".join(filter(None, [", ".join(action.option_strings), values, "..." if action.nargs == "+" else ""]))
    meaning = _prose(parser._get_formatter()._expand_help(action))
    return f"`{name}`", f"{meaning} (required)" if action.required else meaning


def _prose(text: str) -> str:
    """Return a text of --help as Markdown: options and commands in the type of code, other signs as they are."""
    text = re.sub(r"([*<>\[\]#])|(?<!\w)_|_(?!\w)", lambda found: f"\\{found[0]}", text)
    return re.sub(r"(?<![\w\\/-])(--?[A-Za-z]\w*|(?:pcrl_nnunet|nnUNetv2)_\w+)(?![\w-])", r"`\1`", text)


# Settings


def settings_page() -> str:
    """Return the page of all settings."""
    of_method = {name: _pretraining(name) for name in BUILT_IN}
    patch_size, median = (
        "x".join(map(str, CONFIGURATION[name])) for name in ("patch_size", "median_image_size_in_voxels")
    )
    intro = (
        "All settings of a plan's `pcrl` block, with the names and defaults of the code.\n"
        "[Change settings](../settings.md) says how to set them. Sizes are in voxels of the preprocessed image.\n"
        "If a value has a unit, the meaning names the unit. The source says where the default comes from: a paper,\n"
        "the code of its authors, nnU-Net, or us (ours).\n\n"
        "Defaults marked with * follow from the plan. The values here belong to a plan like nnU-Net's for LiTS:\n"
        f"patch {patch_size}, batch {CONFIGURATION['batch_size']}, {len(_strides())} stages with a total stride of "
        f"{2 ** (len(_strides()) - 1)}, median image {median}.\n"
        "`pcrl_nnunet_pretrain --dry_run` shows the values for your plan."
    )
    sections = [
        ("pcrl.pretrain", _shared(of_method)),
        *((f"pcrl.pretrain.{name}", _own(settings)) for name, settings in of_method.items()),
        *((f"pcrl.{name}", _block(settings)) for name, settings in _OTHERS.items()),
    ]
    listed = "\n".join(f"- [`{title}`](#{title.replace('.', '')})" for title, _ in sections)
    return "\n\n".join([NOT_EDITED, "# Settings", intro, listed, *_headed(sections)]) + "\n"


_OTHERS = {"finetune": FinetuneSettings(), "semi": SemiSettings(), "classify": ClassifySettings()}
_HEAD = ("Setting", "Default", "Allowed", "Meaning", "Source")


def _headed(sections: Sequence[tuple[str, str]]) -> list[str]:
    return [f"## {title}\n\n{content}" for title, content in sections]


def _strides() -> list[Any]:
    return CONFIGURATION["architecture"]["arch_kwargs"]["strides"]


def _pretraining(method: str) -> PretrainSettings:
    plan = {"configurations": {"3d_fullres": CONFIGURATION}, "pcrl": {"pretrain": {"method": method}}}
    return pretrain_settings(plan, "3d_fullres", CONFIGURATION)


def _shared(of_method: Mapping[str, PretrainSettings]) -> str:
    """Return the settings that all methods share, and the defaults of each method where they are the method's."""
    rows, by_method = [], []
    for field in _fields(PretrainSettings):
        values = [getattr(settings, field.name) for settings in of_method.values()]
        default = shown(DEFAULT if field.name == "method" else field.default)
        if field.name != "method" and any(value != field.default for value in values):
            by_method.append(field.name)
            default = "by method"
        words = allowed(PretrainSettings, field), meaning(PretrainSettings, field), source(PretrainSettings, field)
        rows.append((f"`{field.name}`", default, *words))
    own = [
        (f"`{name}`", *(shown(getattr(settings, setting)) + "*" * (setting == "batch_size") for setting in by_method))
        for name, settings in of_method.items()
    ]
    return "\n\n".join(
        [
            described(PretrainSettings),
            _link(PretrainSettings),
            table(_HEAD, rows),
            "Defaults by method:",
            table(["Method", *(f"`{setting}`" for setting in by_method)], own),
        ]
    )


def _own(settings: PretrainSettings) -> str:
    inner = {field.name: getattr(settings.own, field.name) for field in _fields(type(settings.own))}
    blocks = [
        f"- `{name}`: {_line(described(type(value)))} {_link(type(value))}"
        for name, value in inner.items()
        if is_dataclass(value)
    ]
    return _block(settings.own, "\n".join(["", "", *blocks]))


def _line(text: str) -> str:
    return " ".join(text.split())


def _link(kind: type) -> str:
    file = f"{kind.__module__.replace('.', '/')}.py"
    return f"File: [{file}](../../{file})"


def _block(settings: Any, blocks: str = "") -> str:
    rows, head = list(_rows(settings)), _HEAD
    if not any(row[-1] for row in rows):
        rows, head = [row[:-1] for row in rows], _HEAD[:-1]
    kind = type(settings)
    return f"{described(kind)}{blocks}\n\n{_link(kind)}\n\n{table(head, rows)}"


def _rows(settings: Any, prefix: str = "", around: str = "") -> Iterator[tuple[str, ...]]:
    """Return a row for each setting. Settings of a block within the block have the name of that block before theirs.

    Args:
        around: the source of values in which a method's block differs from the block's own defaults.
    """
    kind = type(settings)
    for field in _fields(kind):
        value, name = getattr(settings, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from _rows(value, f"{name}.", _attributes(kind).get(field.name, ("", ""))[1])
            continue
        follows_plan = field.default is MISSING and field.default_factory is MISSING
        is_own = follows_plan or value == field.default
        words = allowed(kind, field), meaning(kind, field), source(kind, field) if is_own else around
        yield f"`{name}`", shown(value) + "*" * follows_plan, *words


def _fields(kind: type) -> list[Field[Any]]:
    return [field for field in fields(kind) if field.metadata.get("in_block", True)]


def shown(value: Any) -> str:
    """Return a default as it is written in a plan."""
    if isinstance(value, float):
        return f"`{value:.3g}`"
    return f"`{json.dumps(value)}`"


def allowed(kind: type, field: Field[Any]) -> str:
    """Return the values that a setting takes: choices, bounds, or its type."""
    hint = get_type_hints(kind)[field.name]
    if get_origin(hint) is Literal:
        return " or ".join(shown(choice) for choice in get_args(hint))
    if hint is bool:
        return "`true` or `false`"
    bounds = within(field.metadata.get("bounds", {}))
    noun = {int: "a whole number", float: "a number", str: "a name"}.get(hint, "a list")
    if not bounds:
        return noun
    return bounds if bounds.startswith("a number") else f"{noun}, {bounds}"


def described(kind: type) -> str:
    """Return a dataclass's docstring without its list of attributes, as Markdown."""
    return _markdown(inspect.getdoc(kind) or "").split("\nAttributes:")[0].strip()


def meaning(kind: type, field: Field[Any]) -> str:
    """Return what a setting means: by its class's docstring, else by the comment beside or above it.

    Raises:
        LookupError: neither says it.
    """
    for owner in kind.__mro__:
        if field.name in inspect.get_annotations(owner):
            found, _ = _attributes(owner).get(field.name) or (_comments(owner).get(field.name), "")
            if found:
                return found[0].upper() + found[1:].rstrip(".") + "."
            break
    raise LookupError(f"{kind.__name__}.{field.name}: add it to the docstring's Attributes, or a comment beside it")


def source(kind: type, field: Field[Any]) -> str:
    """Return where a default comes from: the end of its attribute in the docstring, after "Source:".

    Raises:
        LookupError: other attributes of the class have a source, this one has not.
    """
    for owner in kind.__mro__:
        if field.name in inspect.get_annotations(owner):
            attributes = _attributes(owner)
            _, found = attributes.get(field.name, ("", ""))
            if not found and any(other for _, other in attributes.values()):
                raise LookupError(f"{kind.__name__}.{field.name}: name its source at the end of the docstring's line")
            return found
    raise AssertionError(f"{kind.__name__} has no {field.name}")


def _attributes(kind: type) -> dict[str, tuple[str, str]]:
    """Return meaning and source of each attribute that the class's docstring lists."""
    _, _, listed = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found = re.findall(r"^    (\w+): (.+(?:\n     +.+)*)", listed, re.MULTILINE)
    parts = {name: _markdown(" ".join(text.split())).partition(" Source: ") for name, text in found}
    return {name: (text, source.rstrip(".")) for name, (text, _, source) in parts.items()}


def _comments(kind: type) -> dict[str, str]:
    """Return the comments of a dataclass's fields, on their last line or on the line above."""
    source = textwrap.dedent(inspect.getsource(kind))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.start[1])
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    found = {}
    for statement in getattr(definition, "body", []):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            lines = (statement.end_lineno or statement.lineno, statement.lineno)
            beside = next((comments[line][0] for line in lines if line in comments), None)
            above, column = comments.get(statement.lineno - 1, (None, 0))
            is_alone = column == statement.col_offset
            if text := beside or (above if is_alone else None):
                found[statement.target.id] = _markdown(text)
    return found


def _markdown(text: str) -> str:
    """Return a docstring's text as Markdown: its code has other marks."""
    return re.sub(r"`+([^`]+)`+", r"`\1`", text)


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
