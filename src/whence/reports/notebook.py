"""What a notebook shows of a result: the parts of its page that are read first, as HTML within a page of another.

A fragment has no script, no picture and no address, and its style names nothing but its own parts; ink and paper are
the notebook's. Corpus text is untrusted: it goes through `cut` and `escaped`. Few rows of few characters are shown, for
a notebook keeps them: under 100 kB in all.
"""

from collections.abc import Iterable, Mapping, Sequence

from whence.ablation.pipeline import Ablation
from whence.corpus.layouts import Row, shown_text
from whence.counts import number_of
from whence.recovery.pipeline import Recovered
from whence.reports.ablate_tables import ablate_answer
from whence.reports.page import cut, escaped, packaged
from whence.reports.recover_tables import recover_answer
from whence.reports.select_tables import select_answer
from whence.reports.svg import number
from whence.reports.trace_tables import trace_answer
from whence.selection.description import composition
from whence.selection.pipeline import Chosen
from whence.tracing.results import Hit, Trace

QUERIES, HITS, OPPOSING = 5, 5, 3
"""Queries of a trace, and of each the examples on either side."""
ROWS, SOURCES, MIXTURES, SETS = 10, 12, 12, 8
"""Lines of the other tables."""
LONGEST = 240
"""Characters of a text."""


def trace_fragment(trace: Trace) -> str:
    """Every answer, how sure the model is of it, and the examples on either side."""
    parts = [_trace_query(trace, query) for query in range(min(QUERIES, len(trace.answers)))]
    more = [_more(len(trace.answers) - QUERIES, "answer", "to_pandas() has the examples of all")]
    return _fragment(trace_answer(trace), trace.notes, [*parts, *more])


def _trace_query(trace: Trace, query: int) -> str:
    answer = trace.answers[query]
    lines = [f'<p class="query soft">{cut(answer.prompt, LONGEST)}</p><p>{cut(answer.completion, LONGEST)}</p>']
    lines += [_soft(answer.certainty), *([_line(trace.verdicts[query])] if query < len(trace.verdicts) else [])]
    hits = [*trace.of(query)[:HITS], *trace.of(query, opposing=True)[:OPPOSING]]
    has_exact, has_z = (any(getattr(hit, name) is not None for hit in hits) for name in ("exact", "null"))
    is_exact = any(hit.exact_rank_score is not None for hit in hits)
    names = ("exact", "compressed") if is_exact else ("score", "exact")  # what ranks comes first
    numbers = ["rank", *(names if has_exact else names[:1]), *(["z"] if has_z else [])]
    rows = [_hit_cells(hit, has_exact=has_exact, has_z=has_z) for hit in hits]
    return "".join(lines) + (_table({"id": "id", "training example": "text"}, rows, numbers) if rows else "")


def _hit_cells(hit: Hit, *, has_exact: bool, has_z: bool) -> list[str]:
    scores = (hit.score, hit.exact) if hit.exact_rank_score is None else (hit.exact, hit.score)
    shown = scores if has_exact else scores[:1]
    cells = [f"{hit.rank}"]
    cells += ["" if each is None else number(each, "+.3f" if abs(each) <= 1 else "+.4g") for each in shown]
    if hit.margin is not None:
        cells[1] += f" \u00b1 {number(hit.margin, '.2g')}"
    if has_z:
        cells.append("" if hit.null is None else number(hit.null.z, "+.1f"))
    rejected = "" if hit.rejected is None else f' <span class="soft">and not</span> {cut(hit.rejected, LONGEST)}'
    return [*cells, cut(hit.id, 80), _text(hit.row) + rejected]


def select_fragment(chosen: Chosen) -> str:
    """Where the rows come from, and the first of them."""
    lines = composition(chosen)
    sources = [
        [escaped(line["source"] or "-"), f"{line['rows']:,}", f"{line['share']:.1%}", number(line["lift"], ".2f")]
        for line in lines[:SOURCES]
    ]
    rows = [
        [f"{place + 1}", number(chosen.selection.scores[place], ".4g"), _text(row)]
        for place, row in enumerate(chosen.rows[:ROWS])
    ]
    parts = [
        _table({"source": "text"}, sources, after=("rows", "share", "times the pool's")),
        _more(len(lines) - SOURCES, "source", ""),
        _table({"chosen row": "text"}, rows, ("rank", "score")),
        _more(len(chosen.rows) - ROWS, "row", "to_pandas() has them all"),
    ]
    return _fragment(select_answer(chosen, {}), chosen.selection.notes, parts)


def recover_fragment(recovery: Recovered) -> str:
    """The mixture of sources, and the first rows."""
    lines = sorted(recovery.mixture, key=lambda line: -line["share"])
    sources = [
        [escaped(str(line["source"])), number(100 * line["share"], ".0f") + "%",
         f"{number(100 * line['low'], '.0f')} to {number(100 * line['high'], '.0f')}%"]
        for line in lines[:SOURCES]
    ]  # fmt: skip
    score = "probability" if recovery.learned is not None else "score"
    rows = [
        [f"{place + 1}", number(row["whence_score"], ".3g"), number(row["whence_p"], ".2g"), _text(row)]
        for place, row in enumerate(recovery.rows[:ROWS])
    ]
    parts = [
        _table({"trained on, by source": "text"}, sources, after=("share", "95%")) if sources else "",
        _more(len(lines) - SOURCES, "source", ""),
        _table({"row": "text"}, rows, ("rank", score, "p")) if rows else "",
        _more(len(recovery.rows) - ROWS, "row", "to_pandas() has them all"),
    ]
    return _fragment(recover_answer(recovery), recovery.notes, parts)


def ablate_fragment(ablation: Ablation) -> str:
    """Losses of the best mixtures on every evaluation set, and of the parent."""
    if not ablation.cells:
        return _fragment("No mixture was read.", ablation.notes, [])
    order, best = list(ablation.gained()), ablation.best()
    sets = list(best)[:SETS]
    cells = {(cell.mixture, cell.set): cell for cell in ablation.cells}
    rows = [
        [cut(mixture, 120), *(_loss(cells[mixture, name].merged, is_best=best[name] == mixture) for name in sets)]
        for mixture in order[:MIXTURES]
    ]
    rows.append(["the parent", *(number(cells[order[0], name].parent, ".3f") for name in sets)])
    parts = [
        _table({"mixture": "text"}, rows, after=[cut(name, 40) for name in sets]),
        _soft("Losses of averages, in nats a token; the best of each set is bold."),
        _more(len(order) - MIXTURES, "mixture", "to_pandas() has them all"),
        _more(len(best) - SETS, "evaluation set", "to_pandas() has them all"),
    ]
    return _fragment(ablate_answer(ablation), ablation.notes, parts)


def _loss(value: float, *, is_best: bool) -> str:
    text = number(value, ".3f")
    return f'<span class="best">{text}</span>' if is_best else text


def _fragment(answer: str, notes: Iterable[str], parts: Iterable[str]) -> str:
    lines = [_line(answer), *(f'<p class="note">{cut(note)}</p>' for note in notes), *parts]
    return f'<div class="whence-result"><style>{packaged("notebook.css")}</style>{"".join(lines)}</div>'


def _line(text: str) -> str:
    return f"<p>{cut(text)}</p>"


def _soft(text: str) -> str:
    return f'<p class="soft">{cut(text)}</p>'


def _more(count: int, thing: str, where: str) -> str:
    if count <= 0:
        return ""
    return _soft(f"{number_of(count, f'more {thing}')}{f'; {where}' if where else ''}.")


def _table(
    texts: Mapping[str, str], rows: Iterable[Sequence[str]], before: Sequence[str] = (), after: Sequence[str] = ()
) -> str:
    """A table of cells of HTML: columns of text, with their kinds, and those of numbers before and after them.

    It has a class, for sites such as MkDocs Material's restyle every table that has none.
    """
    kinds = [*("n" for _ in before), *texts.values(), *("n" for _ in after)]
    names = zip(kinds, (*before, *texts, *after), strict=True)
    top = "".join(f"<th class={kind}>{name}</th>" for kind, name in names)
    lines = ("".join(f"<td class={kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="plain"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(row: Row) -> str:
    """Prompt and completion, in different ink."""
    text = shown_text(row)
    if "text" in text:
        return cut(text["text"], LONGEST)
    return f'<span class="soft">{cut(text.get("prompt"), LONGEST)}</span> {cut(text.get("completion"), LONGEST)}'
