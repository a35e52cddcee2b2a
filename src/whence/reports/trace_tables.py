"""A trace in the terminal: every answer with the model's certainty, the examples behind it, and what the numbers say.

Corpus text is untrusted: it is shown as text, never read as markup, and its control characters are made visible.
"""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from whence.counts import number_of
from whence.reports.tables import unbroken
from whence.reports.text import visible
from whence.tracing.results import SURE, Answer, Hit, TokenMatrix, Trace

UNSURE = 0.1
"""Probability of a token below which it is shown as a guess; from `SURE` it is shown as sure."""

COLOURED = 3
"""Examples shown token by token in the terminal."""

MANY = 0.5
"""Share of the index' best among the exact best below which a longer short list is advised."""

SURE_ENOUGH = 0.5
"""Probability of a short list to hold the exact best below which a longer one is advised."""

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
        parts += [answer_text(answer), _hits_table(trace, number), *_words(trace, number), *_legend(trace, number)]
        parts += [_coloured(hit) for hit in trace.of(number)[:COLOURED] if hit.tokens is not None]
        parts.append(Text(""))
    if len(trace.answers) > most:
        parts.append(
            Text(
                f"... and {number_of(len(trace.answers) - most, 'more query', 'more queries')}; write them all "
                "with -o FILE",
                "dim",
            )
        )
    if evidence := trace.settings.get("evidence"):
        parts.append(unbroken(evidence, "dim"))
    if trace.curvature_time:
        parts.append(Text(trace.curvature_time, "dim"))
    return Group(*parts)


def trace_answer(trace: Trace) -> str:
    """Which example stands behind the answer, and whether that is more than chance, in a sentence."""
    count = len(trace.answers)
    best = [next(iter(trace.of(number)), None) for number in range(count)]
    if count > 1:
        above = sum(stands_out(trace, number) for number in range(count))
        if not trace.levels:
            return f"{count} answers were traced; nothing here says how high chance reaches."
        return f"{above} of {count} answers {'has' if above == 1 else 'have'} an example that stands above chance."
    if not count or best[0] is None:
        return "No example can be ranked."
    first = f"{visible(best[0].id)} ranks first"
    if trace.method in NATS and best[0].score > 0:
        more = f"would be about {best[0].score:.2g} higher"
        if trace.answers[0].contrast is not None:
            return f"{first}: without it this answer's loss less the other's, in nats a token, {more}."
        loss = math.log(trace.answers[0].perplexity)
        return f"{first}: without it this answer's loss, {loss:.3f} nats a token, {more}."
    if not trace.levels:
        return f"{first}; nothing here says how high chance reaches."
    top = best_z(trace, 0) or 0.0
    if stands_out(trace, 0):
        return f"{first}; z is {top:.1f} at most, where chance reaches {trace.levels[0]:.1f}: more than chance."
    return f"Nothing here is more than chance: z is {top:.1f} at most, and chance reaches {trace.levels[0]:.1f}."


def stands_out(trace: Trace, query: int) -> bool:
    """Whether an example of a query stands above chance."""
    best = best_z(trace, query)
    return best is not None and best > trace.levels[query]


def best_z(trace: Trace, query: int) -> float | None:
    """The z that the verdict is of; of a trace that does not say, the best of the examples."""
    if trace.best_z:
        return trace.best_z[query]
    return max((hit.null.z for hit in trace.of(query) if hit.null is not None), default=None)


def _words(trace: Trace, query: int) -> list[RenderableType]:
    """What the numbers say, in sentences."""
    lines: list[RenderableType] = []
    if trace.verdicts:
        lines.append(Text(trace.verdicts[query], "yellow" if trace.verdicts[query].startswith("Nothing") else "green"))
    if trace.overlaps:
        lines.append(Text(reranking_words(trace, query), "dim"))
    if words := stability_words(trace, query):
        lines.append(Text(words, "dim"))
    if any(hit.null is not None and hit.null.generic for hit in trace.of(query)):
        lines.append(
            Text("* scores high for any question (generic), and says little about this one; see --specific.", "dim")
        )
    return lines


def stability_words(trace: Trace, query: int) -> str:
    """How many of the examples shown would be shown again, in a sentence; empty where nothing is known."""
    if query >= len(trace.stabilities):
        return ""
    stability, count = trace.stabilities[query], len(trace.of(query))
    words = []
    if any(hit.margin is not None for hit in trace.of(query)):
        words.append("The exact score lies within \u00b1 of what is shown, 19 of 20 times.")
    if stability.exact is not None and stability.sketch is not None:
        words.append(
            f"Of these {count} about {count * stability.exact:.1f} are among the exact first {count}; an index of "
            f"another seed would show {count * stability.sketch:.1f} of them."
        )
    if stability.checkpoints is not None:
        words.append(f"With other checkpoints of the run about {count * stability.checkpoints:.1f} of {count} stand.")
    return " ".join(words)


def reranking_words(trace: Trace, query: int) -> str:
    """How deep a query was re-ranked, how sure that is to suffice, and how much of the exact ranking the index has."""
    overlap = f"Of the index' best, {trace.overlaps[query]:.0%} are among the exact best."
    if query >= len(trace.rerankings):  # of an older Whence
        return overlap
    depth = trace.rerankings[query]
    words = f"Exact gradients ordered the index' first {depth.helpful} and last {depth.opposing}"
    if depth.sure is None or depth.sure_opposing is None:
        words = f"{words}. {overlap}"
        if trace.overlaps[query] >= MANY:
            return words
        return f"{words} {LOSES}"
    first, last = (len(trace.of(query, opposing=side)) for side in (False, True))
    words += f": these hold the exact first {first} with a probability of {percent(depth.sure)},"
    return f"{words} the exact last {last} with {percent(depth.sure_opposing)}. {overlap}"


WITHOUT_UNIT = ("dot", "tracin", "ekfac", "datainf", "trak", "source")
"""Methods whose scores may be of any size."""
NATS = ("replay",)
"""Methods whose scores are nats a token, and to be believed as such."""
LOSES = "Compression loses much here: a longer --shortlist finds more of them, a wider index loses less."


def percent(share: float) -> str:
    """A probability as a percentage that does not promise what it cannot.

    >>> percent(0.994), percent(0.9999), percent(0.0)
    ('99%', 'over 99%', 'under 1%')
    """
    return "over 99%" if share > 0.995 else "under 1%" if share < 0.005 else f"{share:.0%}"


def is_shallow(trace: Trace, query: int) -> bool:
    """Whether a longer short list would find more of the exact best."""
    if not trace.rerankings:
        return False
    depth = trace.rerankings[query]
    reached = depth.helpful + depth.opposing >= trace.rows
    return not reached and (trace.overlaps[query] < MANY if depth.sure is None else depth.sure < SURE_ENOUGH)


LEGEND = (("#2171b5", "helps"), ("#d94801", "opposes"))


def _legend(trace: Trace, query: int) -> list[Text]:
    """What the colours of training tokens mean, and their unit."""
    matrices = [hit.tokens for hit in trace.of(query)[:COLOURED] if hit.tokens is not None]
    if not matrices:
        return []
    of = "position of its gradient" if matrices[0].basis == "position" else "its own loss"
    most = max((float(tokens.matrix.sum(0).abs().max()) for tokens in matrices if tokens.matrix.numel()), default=0.0)
    text = Text("Training tokens, by ", "dim").append(of, "dim").append(": ", "dim")
    for hue, word in LEGEND:
        text.append(f" {word} ", f"bold white on {hue}").append(" ")
    text.append(
        f"the answer; stronger colour, more of the example's exact score (its largest token has {most:.2g} at most); "
        "dim ones have little.",
        "dim",
    )
    return [text]


def _coloured(hit: Hit) -> Text:
    """A training example around its token of most influence, helpful tokens in blue, opposing ones in orange."""
    tokens: TokenMatrix = hit.tokens  # type: ignore[assignment]
    influence = tokens.matrix.sum(0).tolist()
    most = max((abs(value) for value in influence), default=0.0)
    centre = max(range(len(influence)), key=lambda place: abs(influence[place]), default=0)
    first = max(0, min(centre - WINDOW // 2, len(influence) - WINDOW))
    text, texts = Text().append(f"{hit.rank:>4}  ", "bold"), tokens.shown_train()
    for place in range(first, min(first + WINDOW, len(influence))):
        text.append(visible(texts[place]).replace("\n", "\u23ce"), _shade(influence[place], most))
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
    is_exact = any(hit.exact_rank_score is not None for hit in helpful)
    names = ("exact", "compressed") if is_exact else ("score", "exact")  # what ranks comes first
    has_margin = any(hit.margin is not None for hit in helpful)
    for number, name in enumerate(names if has_exact else names[:1]):
        table.add_column(name, justify="right")
        if number == 0 and has_margin:
            table.add_column("\u00b1", justify="right")
    if has_null:
        table.add_column("z", justify="right")
    table.add_column("id", overflow="fold", max_width=32, style="cyan")
    table.add_column("training example", ratio=1)
    form = "+.4g" if trace.method in WITHOUT_UNIT else "+.2e" if trace.method in NATS else "+.3f"
    for hits in (helpful, opposing):
        for hit in hits:
            table.add_row(*_cells(hit, form, has_exact, has_null, has_margin))
        if hits is helpful and opposing:
            table.add_section()
    opposed = [hit.rank_score < 0 for hit in opposing]
    against = "oppose the answer" if all(opposed) else "are the lowest; those below 0 oppose the answer"
    if not any(opposed):
        against = "are the lowest; none opposes the answer"
    by = ", ranked by exact scores" if is_exact else ""
    unit = ", nats a token that leaving a row out adds to the loss" if trace.method in NATS else ""
    table.caption = f"{trace.method} over {scored_words(trace)}{by}{unit}; negative ranks {against}"
    table.caption_justify = "left"
    return table


def scored_words(trace: Trace) -> str:
    """How many examples were scored, and of how many.

    >>> scored_words(Trace([], [], "ekfac", 10_000, listed=200)), scored_words(Trace([], [], "cosine", 1))
    ('400 of 10,000 examples', '1 example')
    """
    if trace.listed is not None and 2 * trace.listed < trace.rows:
        return f"{2 * trace.listed:,} of {number_of(trace.rows, 'example')}"
    return number_of(trace.rows, "example")


def _cells(hit: Hit, form: str, has_exact: bool, has_null: bool, has_margin: bool) -> list[RenderableType]:
    scores = [hit.score, hit.exact] if hit.exact_rank_score is None else [hit.exact, hit.score]
    cells: list[RenderableType] = [str(hit.rank)]
    cells += ["" if score is None else _signed(score, form) for score in (scores if has_exact else scores[:1])]
    if has_margin:
        cells.insert(2, "" if hit.margin is None else Text(f"{hit.margin:{form.lstrip('+')}}", "dim"))
    if has_null:
        null = hit.null
        cells.append("" if null is None else f"{null.z:+.1f}{'*' if null.generic else ' '}")
    row = hit.as_row()
    text = Text(overflow="ellipsis", no_wrap=True)
    if "text" in row:
        text.append(_one_line(row["text"]))
    else:
        text.append(_one_line(row["prompt"]) + " ", "dim").append(_one_line(row["completion"]))
    if hit.rejected is not None:
        text.append(" and not ", "dim").append(_one_line(hit.rejected))
    return [*cells, Text(visible(hit.id)), text]


def _signed(value: float, form: str) -> Text:
    return Text(f"{value:{form}}", "green" if value > 0 else "red")


def _one_line(value: Any) -> str:
    return " ".join(visible(str(value if value is not None else ""))[:400].split())
