"""Parts of the pages without a script: those of a selection and of a recovery.

Corpus text is untrusted: whatever comes from a row, a source or a file's name goes through `shown` or `cut`, which
escape it, and the page's policy allows no script and no address at all. The policy forbids inline styles too, so widths
come as attributes of SVG.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

from whence.answers import shown_text
from whence.corpus import Row
from whence.page import content_policy, packaged
from whence.report import visible

LONGEST = 600
"""Characters of a row that are shown."""


def document(name: str, title: str, body: Iterable[str], *styles: str) -> str:
    """A whole page.

    Args:
        name: Of its template in the package.
        title: Not escaped yet.
        body: Sections; empty ones are left out.
        styles: Files of the package beside page.css and page_parts.css.
    """
    style = "".join(packaged(file) for file in ("page.css", "page_parts.css", *styles))
    return Template(packaged(name)).substitute(
        policy=content_policy(style), title=shown(title), style=style, body="\n".join(part for part in body if part)
    )


def shown(text: str) -> str:
    """Text as HTML that shows it: escaped, its control characters visible, lone surrogates replaced."""
    return escape(visible(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")))


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
