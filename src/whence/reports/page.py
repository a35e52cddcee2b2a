"""Parts of the pages that are whole without a script: of a selection, a recovery, an ablation and a mixing law.

Corpus text is untrusted: whatever comes from a row, a source or a file's name goes through `escaped` or `cut`, which
escape it, and the page's policy allows no address at all and no script but the page's own. The policy forbids inline
styles too, so widths come as attributes of SVG.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from whence.corpus.layouts import Row, shown_text
from whence.reports.svg import escaped

SHARED = ("palette.css", "parts.css")
"""Styles that all reports have, and the explorer's pages too."""
LONGEST = 600
"""Characters of a row that are shown."""
BESIDE, IN_LINE, FEWER = 3, 5, 4
"""Most columns of numbers beside a picture on a telephone; under it in one line; and in each of several lines."""


def document(
    about: str, title: str, body: Iterable[str], *styles: str, script: str | None = None, data: Any = None
) -> str:
    """A whole page.

    Args:
        about: What such pages tell, beside the project's name at the top; not escaped yet.
        title: The same.
        body: Sections; empty ones are left out.
        styles: Files of the package beside those that all reports have.
        script: A file of the package that makes the page more than it is without; it reads `data`.
        data: What it reads, as JSON.
    """
    style = "".join(packaged(file) for file in (*SHARED, "base.css", "report.css", *styles))
    code, scripts = None, ""
    if script is not None:
        code = packaged(script)
        scripts = f'<script type="application/json" id="data">{embedded(data)}</script>\n<script>{code}</script>'
    return Template(packaged("report.html")).substitute(
        policy=content_policy(style, code),
        about=escaped(about),
        title=escaped(title),
        style=style,
        body="\n".join(part for part in body if part),
        scripts=scripts,
    )


def embedded(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


def packaged(name: str) -> str:
    """A text file of the package."""
    return files("whence.reports").joinpath(name).read_text("utf-8")


def content_policy(style: str, script: str | None = None) -> str:
    """No address, no inline handler, and no way from a string to markup (trusted types) even for our own script."""
    allowed = "'none'" if script is None else _hash(script)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def cut(text: str | None, longest: int = LONGEST) -> str:
    """The beginning of a text as HTML, with how much more there is."""
    whole = (text or "").strip()
    if len(whole) <= longest:
        return escaped(whole)
    return f'{escaped(whole[:longest])}<span class="rest"> … {len(whole) - longest:,} more characters</span>'


def section(title: str, inner: str, more: str = "") -> str:
    """A heading, with `more` beside it, and what stands under it; all of it HTML."""
    return f"<section><h2>{title}{more}</h2>{inner}</section>"


def sentence(text: str) -> str:
    """A sentence below a picture or a table, as text."""
    return f'<p class="say">{_unbroken("", text)}</p>'


def fact_list(pairs: Mapping[str, str]) -> str:
    """Names with their values, as text."""
    lines = (f"<dt>{escaped(name)}</dt><dd>{_unbroken(name, value)}</dd>" for name, value in pairs.items())
    return f"<dl>{''.join(lines)}</dl>"


def _unbroken(name: str, value: str) -> str:
    """A fact as text; flags, such as --top, and the other words of a command break at no hyphen."""
    words = ((word, escaped(word)) for word in value.split(" "))
    is_whole = name == "command"
    return " ".join(
        f'<span class="word">{shown}</span>' if is_whole or word.startswith("--") else shown for word, shown in words
    )


def table(head: str, rows: Sequence[str], *, stacks: bool = True) -> str:
    """A table; on a telephone each row's first cell stands over the others, or it scrolls sideways.

    Args:
        head: Cells of its head: a name, perhaps an empty one for a picture, and those of the other columns.
        rows: Its rows.
        stacks: Whether it may stack: not a heat map, whose cells are compared across and down.
    """
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    if not stacks:
        return f'<div class="scroll"><table>{inner}</table></div>'
    has_picture = "<th></th>" in head
    numbers = head.count("<th") - 1 - has_picture
    beside = " beside" if has_picture and numbers <= BESIDE else ""
    in_line = numbers if numbers <= IN_LINE else FEWER
    return f'<div class="scroll stacked{beside} n{in_line}"><table>{inner}</table></div>'


def bars(*shares: float) -> str:
    """The chosen's share of the width over the pool's, or one alone."""
    kinds = ("chosen", "pool")
    drawn = "".join(
        f'<rect class="{kind}" x="0" y="{10 * number}" width="{max(0.3, 100 * share):.2f}" height="7"/>'
        for number, (kind, share) in enumerate(zip(kinds, shares, strict=False))
    )
    return stretched("two" if len(shares) > 1 else "one", 10 * len(shares) - 3, drawn)


def stretched(kind: str, height: int, drawn: str) -> str:
    """A picture 100 units wide, as wide as the cell that it stands in."""
    return f'<svg class="{kind}" viewBox="0 0 100 {height}" preserveAspectRatio="none" aria-hidden="true">{drawn}</svg>'


def axis(width: float, height: float, ticks: Mapping[float, str]) -> str:
    """A line under a histogram, with words at places from 0 to 1 of it."""
    named = "".join(
        f'<text x="{width * place:.0f}" y="{height + 16:.0f}" '
        f'text-anchor="{"start" if place == 0 else "end" if place == 1 else "middle"}">{escape(name)}</text>'
        for place, name in ticks.items()
    )
    return f'<line x1="0" x2="{width:.0f}" y1="{height:.0f}" y2="{height:.0f}"/>{named}'


def panel(name: str, facts: Iterable[str], drawn: str) -> str:
    """One of small multiples: a name and facts as text, over a picture."""
    spans = "".join(f"<span>{escaped(fact)}</span>" for fact in facts)
    return f"<figure><figcaption><b>{escaped(name)}</b>{spans}</figcaption>{drawn}</figure>"


def panels(drawn: Iterable[str]) -> str:
    """Small multiples."""
    return f'<div class="panels">{"".join(drawn)}</div>'


def row_html(row: Row) -> str:
    """Prompt and completion, in different ink."""
    text = shown_text(row)
    if "text" in text:
        return f"<div>{cut(text['text'])}</div>"
    return f'<div class="prompt">{cut(text.get("prompt"))}</div><div>{cut(text.get("completion"))}</div>'


def pick(rank: str, text: str, about: Iterable[str]) -> str:
    """A row of a corpus: its rank, its text, and facts about it at the right; all of it HTML."""
    lines = "".join(f"<div>{fact}</div>" for fact in about)
    return f'<div class="pick"><div>{rank}</div><div class="text">{text}</div><div class="about">{lines}</div></div>'
