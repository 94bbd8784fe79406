"""Building blocks of HTML. All text is escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from pcrl_nnunet.report.pictures import chart_svg


def page(title: str, body: str) -> str:
    """Return a whole page that works offline. Its template and style are files of this package."""
    here = files("pcrl_nnunet.report")
    form, style = (here.joinpath(name).read_text(encoding="utf-8") for name in ("page.html", "style.css"))
    return Template(form).substitute(title=text(title), style=style, body=body)


def chart(
    title: str,
    caption: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    lower: float | None = None,
    line: float | None = None,
) -> str:
    if not curves:
        return ""
    return (
        f"<figure><figcaption><b>{text(title)}</b> {text(caption)}</figcaption>"
        f"{chart_svg(curves, lower, line)}</figure>"
    )


def table(head: Sequence[Sequence[str]], rows: Iterable[Sequence[object]]) -> str:
    """Return a table with escaped cells. The second line of a column's head is smaller."""
    cells = "".join(f"<th>{text(name)}<small>{text(small)}</small></th>" for name, small in head)
    body = "".join(f"<tr>{''.join(f'<td>{text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    above = f"<thead><tr>{cells}</tr></thead>" if cells else ""
    return f'<div class="wide"><table>{above}<tbody>{body}</tbody></table></div>'


def value(given: Any) -> str:
    """Return a setting in readable form."""
    if isinstance(given, (tuple, list)):
        nested = any(isinstance(item, (tuple, list)) for item in given)
        return (", " if nested else "x").join(map(value, given)) or "none given"
    if isinstance(given, bool):
        return "yes" if given else "no"
    return f"{given:.4g}" if isinstance(given, float) else str(given)


def number(value: float | None) -> str:
    if value is None:
        return "none"
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{round(value, digits) + 0.0:.{digits}f}"  # + 0.0: no -0.000


def text(anything: object) -> str:
    return escape(str(anything))


def data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{b64encode(png).decode()}"
