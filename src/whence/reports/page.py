"""Parts of the pages without a script: those of a selection, of a recovery, of an ablation and of a mixing law.

Corpus text is untrusted: whatever comes from a row, a source or a file's name goes through `shown` or `cut`, which
escape it, and the page's policy allows no script and no address at all. The policy forbids inline styles too, so widths
come as attributes of SVG.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

from whence.corpus.layouts import Row, shown_text
from whence.reports.svg import number, shown
from whence.reports.trace_page import content_policy, packaged

LONGEST = 600
"""Characters of a row that are shown."""
STRENGTHS = 10
"""Of a heat map's colours, on either side of none."""


def document(about: str, title: str, body: Iterable[str], *styles: str) -> str:
    """A whole page.

    Args:
        about: What such pages tell, beside the project's name at the top; not escaped yet.
        title: The same.
        body: Sections; empty ones are left out.
        styles: Files of the package beside page.css and page.css.
    """
    style = "".join(packaged(file) for file in ("trace_page.css", "page.css", *styles))
    return Template(packaged("page.html")).substitute(
        policy=content_policy(style),
        about=shown(about),
        title=shown(title),
        style=style,
        body="\n".join(part for part in body if part),
    )


def cut(text: str | None, longest: int = LONGEST) -> str:
    """The same of its beginning, with how much more there is."""
    whole = (text or "").strip()
    if len(whole) <= longest:
        return shown(whole)
    return f'{shown(whole[:longest])}<span class="rest"> … {len(whole) - longest:,} more characters</span>'


def section(title: str, inner: str, more: str = "") -> str:
    """A heading, with `more` beside it, and what stands under it; all of it HTML."""
    return f"<section><h2>{title}{more}</h2>{inner}</section>"


def said(text: str) -> str:
    """A sentence below a picture or a table, as text."""
    return f'<p class="say">{shown(text)}</p>'


def fact_list(pairs: Mapping[str, str]) -> str:
    """Names with their values, as text."""
    return f"<dl>{''.join(f'<dt>{shown(name)}</dt><dd>{shown(value)}</dd>' for name, value in pairs.items())}</dl>"


def table(head: str, rows: Sequence[str]) -> str:
    """One that scrolls sideways where it is too wide."""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


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


# -- heat maps


def heat_head(names: Iterable[str], *first: str) -> str:
    """Names of a heat map's columns, as text; those upright in `first`, the others on end, for they are many."""
    upright = "".join(f"<th>{shown(name)}</th>" for name in first)
    return upright + "".join(f'<th class="end"><span>{shown(name)}</span></th>' for name in names)


def heat_cell(value: float, largest: float, text: str, said: str, *, is_best: bool = False) -> str:
    """A cell in blue below 0 and in orange above, as strong as the square root of the value's share of the largest.

    Args:
        value: What the colour tells.
        largest: Magnitude of full strength.
        text: In the cell.
        said: On hovering.
        is_best: Of its column.
    """
    best = " best" if is_best else ""
    return f'<td class="{_heat(value, largest)}{best}" title="{shown(said)}">{shown(text)}</td>'


def _heat(value: float, largest: float) -> str:
    """Classes of a colour."""
    if not (math.isfinite(value) and largest > 0):
        return "n"
    strength = round(STRENGTHS * math.sqrt(min(1.0, abs(value) / largest)))
    return f"n {'below' if value < 0 else 'above'} s{strength}" if strength else "n"


def ramp(largest: float, unit: str) -> str:
    """What colours of a heat map mean."""
    strengths = [step / STRENGTHS for step in range(-STRENGTHS, STRENGTHS + 1)]
    drawn = "".join(
        f'<rect class="{_heat(strength * abs(strength), 1.0)}" x="{10 * place}" y="0" width="10" height="10"/>'
        for place, strength in enumerate(strengths)
    )
    form = "+.2g" if largest < 10 else "+.3g"
    ends = [number(share * largest, form) for share in (-1.0, -0.25, 0.25, 1.0)]
    names = "".join(
        f'<text x="{x}" y="23" text-anchor="middle">{name}</text>'
        for x, name in zip((5, 55, 155, 205), ends, strict=True)
    )
    middle = '<text x="105" y="23" text-anchor="middle">0</text>'
    said = f"<title>Colours, from {ends[0]} to {ends[-1]} {shown(unit)}</title>"
    size = 'viewBox="-16 0 242 26"'
    return f'<svg class="ramp-of" {size} role="img">{said}{drawn}{names}{middle}</svg>'


def panel(name: str, facts: Iterable[str], drawn: str) -> str:
    """One of small multiples: a name and facts as text, over a picture."""
    told = "".join(f"<span>{shown(fact)}</span>" for fact in facts)
    return f"<figure><figcaption><b>{shown(name)}</b>{told}</figcaption>{drawn}</figure>"


def panels(drawn: Iterable[str]) -> str:
    """Small multiples."""
    return f'<div class="panels">{"".join(drawn)}</div>'


# -- rows of a corpus


def shown_row(row: Row) -> str:
    """Prompt and completion, in different ink."""
    text = shown_text(row)
    if "text" in text:
        return f"<div>{cut(text['text'])}</div>"
    return f'<div class="prompt">{cut(text.get("prompt"))}</div><div>{cut(text.get("completion"))}</div>'


def pick(rank: str, text: str, about: Iterable[str]) -> str:
    """A row of a corpus: its rank, its text, and facts about it at the right; all of it HTML."""
    told = "".join(f"<div>{fact}</div>" for fact in about)
    return f'<div class="pick"><div>{rank}</div><div class="text">{text}</div><div class="about">{told}</div></div>'
