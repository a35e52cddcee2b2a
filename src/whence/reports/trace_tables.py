"""A trace in the terminal: every answer with the model's certainty, the examples behind it, and what the numbers say.

Corpus text is untrusted: it is shown as text, never read as markup, and its control characters are made visible.
"""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whence.reports.text import visible
from whence.tracing.results import SURE, Answer, Hit, TokenMatrix, Trace

UNSURE = 0.1
"""Probability of a token below which it is shown as a guess; from `SURE` it is shown as sure."""

COLOURED = 3
"""Examples shown token by token in the terminal."""

WINDOW = 90
"""Their training tokens shown, around the one of most influence."""


def trace_tables(trace: Trace, *, most: int = 20) -> RenderableType:
    """Every answer with the model's certainty, and the examples behind it.

    Args:
        trace: What to show.
        most: Queries shown at most.
    """
    parts: list[RenderableType] = [Text(visible(note), "yellow") for note in trace.notes]
    for number, answer in enumerate(trace.answers[:most]):
        parts += [answer_text(answer), _hits_table(trace, number), *_words(trace, number)]
        parts += [_coloured(hit) for hit in trace.of(number)[:COLOURED] if hit.tokens is not None]
        parts.append(Text(""))
    if len(trace.answers) > most:
        parts.append(Text(f"... and {len(trace.answers) - most} more queries; write them all with -o FILE", "dim"))
    return Group(*parts)


def _words(trace: Trace, query: int) -> list[RenderableType]:
    """What the numbers say, in sentences."""
    lines: list[RenderableType] = []
    if trace.verdicts:
        lines.append(Text(trace.verdicts[query], "yellow" if trace.verdicts[query].startswith("Nothing") else "green"))
    if trace.overlaps:
        lines.append(Text(f"Of the index' best, {trace.overlaps[query]:.0%} are among the exact best.", "dim"))
    if any(hit.null is not None and hit.null.generic for hit in trace.of(query)):
        lines.append(
            Text("* generic: this example scores high whatever is asked; --specific corrects for that.", "dim")
        )
    return lines


def _coloured(hit: Hit) -> Text:
    """A training example around its token of most influence, helpful tokens in blue, opposing ones in orange."""
    tokens: TokenMatrix = hit.tokens  # type: ignore[assignment]
    influence = tokens.matrix.sum(0).tolist()
    most = max((abs(value) for value in influence), default=0.0)
    centre = max(range(len(influence)), key=lambda place: abs(influence[place]), default=0)
    first = max(0, min(centre - WINDOW // 2, len(influence) - WINDOW))
    text = Text().append(f"{hit.rank:>4}  ", "bold")
    for place in range(first, min(first + WINDOW, len(influence))):
        text.append(visible(tokens.train[place]).replace("\n", "\u23ce"), _shade(influence[place], most))
    return text


def _shade(value: float, most: float) -> str:
    """Style of a token: none, faint, clear or strong, by its share of the largest influence."""
    share = abs(value) / most if most else 0.0
    if share < 0.15:
        return "dim"
    hues = ("#9ecae1", "#4292c6", "#2171b5") if value > 0 else ("#fdd0a2", "#fd8d3c", "#d94801")
    hue = hues[0 if share < 0.4 else 1 if share < 0.75 else 2]
    return hue if share < 0.4 else f"bold {'black' if share < 0.75 else 'white'} on {hue}"


def answer_text(answer: Answer) -> Text:
    """The prompt, the completion with each token coloured by its probability, and a word on certainty."""
    text = Text()
    text.append("prompt      ", "bold").append(visible(answer.prompt) + "\n")
    text.append("model said  " if answer.is_generated else "completion  ", "bold")
    is_asked = answer.asked or [True] * len(answer.tokens)
    _append_tokens(text, answer.tokens, answer.probabilities, is_asked)
    if answer.ending is not None and answer.ending != f"ended by {answer.tokens[-1]}":  # else it stands there
        text.append("\n").append("ending      ", "bold").append(visible(answer.ending))
    if answer.contrast is not None:
        text.append("\n").append("and not     ", "bold")
        count = len(answer.contrast_tokens)
        _append_tokens(text, answer.contrast_tokens, answer.contrast_probabilities, [True] * count)
    text.append("\n").append("how sure    ", "bold").append(answer.certainty).append("\n")
    return text


def _append_tokens(text: Text, tokens: list[str], probabilities: list[float], is_asked: list[bool]) -> None:
    """Tokens coloured by the model's probability; what a span leaves out is dim."""
    for token, probability, in_span in zip(tokens, probabilities, is_asked, strict=True):
        style = "green" if probability >= SURE else "red" if probability < UNSURE else "yellow"
        text.append(visible(token), style if in_span else "dim")


def _hits_table(trace: Trace, query: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    helpful, opposing = trace.of(query), trace.of(query, opposing=True)
    has_exact = any(hit.exact is not None for hit in helpful)
    has_null = any(hit.null is not None for hit in helpful)
    table.add_column("rank", justify="right")
    table.add_column("score", justify="right")
    if has_exact:
        table.add_column("exact", justify="right")
    if has_null:
        table.add_column("z", justify="right")
    table.add_column("id", overflow="fold", max_width=32, style="cyan")
    table.add_column("training example", ratio=1)
    form = "+.4g" if trace.method in ("dot", "tracin") else "+.3f"
    for hits in (helpful, opposing):
        for hit in hits:
            table.add_row(*_cells(hit, form, has_exact, has_null))
        if hits is helpful and opposing:
            table.add_section()
    against = (
        "oppose the answer" if any(hit.score < 0 for hit in opposing) else "are the lowest; none opposes the answer"
    )
    table.caption = f"{trace.method} over {trace.rows:,} examples; negative ranks {against}"
    table.caption_justify = "left"
    return table


def _cells(hit: Hit, form: str, has_exact: bool, has_null: bool) -> list[RenderableType]:
    cells: list[RenderableType] = [str(hit.rank), _signed(hit.score, form)]
    if has_exact:
        cells.append(_signed(hit.exact, form) if hit.exact is not None else "")
    if has_null:
        null = hit.null
        cells.append("" if null is None else f"{null.z:+.1f}{'*' if null.generic else ' '}")
    row = hit.as_row()
    text = Text(overflow="ellipsis", no_wrap=True)
    if "text" in row:
        text.append(_one_line(row["text"]))
    else:
        text.append(_one_line(row["prompt"]) + " ", "dim").append(_one_line(row["completion"]))
    return [*cells, Text(visible(hit.id)), text]


def _signed(value: float, form: str) -> Text:
    return Text(f"{value:{form}}", "green" if value > 0 else "red")


def _one_line(value: Any) -> str:
    return " ".join(visible(str(value if value is not None else ""))[:400].split())
