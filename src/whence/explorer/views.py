"""From numbers to what a page shows: ranked rows with their null, verdicts, token matrices, overlaps.

Texts are cut at `MOST_SHOWN` characters; a page asks for a whole row by its number.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from whence import catalogue
from whence.corpus.layouts import shown_text
from whence.errors import SettingError
from whence.explorer.answers import LEVEL_TOP, OF_TOKENS, Answered, ExploredIndex, Stretch
from whence.explorer.corpus_rows import Filters
from whence.explorer.ranking import Ranked, ranked
from whence.explorer.requests import MOST_CHARACTERS, MOST_NEW_TOKENS, MOST_TOP
from whence.tracing.answer_tokens import about
from whence.tracing.levels import Shape, cost, verdict
from whence.tracing.matrices import TokenShares, shares_by_row
from whence.tracing.nulls import nulls
from whence.tracing.pipeline import ignored_parts
from whence.tracing.queries import query_vectors
from whence.tracing.results import Null

MOST_SHOWN = 20_000
MOST_WHOLE = 1_000_000
BINS = 10
AT_ONCE = 2
"""Rows whose matrices are computed together, so that the first ones come early."""
LABELS = {
    "cosine": "Gradient cosine",
    "dot": "Gradient inner product",
    "trak": "TRAK",
    "datainf": "DataInf",
    "ekfac": "EK-FAC",
    "replay": "Replay",
    "source": "SOURCE",
    "tracin_cosine": "Exact cosine",
    "tracin": "Exact inner product",
    "embedding": "Embedding",
    "bm25": "BM25",
    "random": "Random",
}
"""Methods that a page offers, by their names in `catalogue.TRACE_METHODS`."""
ALL_ROWS, SLOW = ("ekfac", "tracin", "tracin_cosine", "embedding"), "a pass over all rows, as long as indexing them"
LONG = {
    "replay": "the training once more and back for each question and stretch, about twice as long as it took",
    "source": "three passes over the rows, and six over some",
}
EXAMPLES = 4


# -- a session


def session(explored: Sequence[ExploredIndex], version: str) -> dict[str, Any]:
    """What a page shows before anything is asked."""
    limits = {"prompt_chars": MOST_CHARACTERS, "max_new_tokens": MOST_NEW_TOKENS, "top": MOST_TOP}
    return {"version": version, "indexes": [_index(each) for each in explored], "limits": limits}


def _index(explored: ExploredIndex) -> dict[str, Any]:
    index, rows = explored.index, explored.rows
    manifest, space = index.store.manifest, index.space
    return {
        "id": explored.number,
        "name": explored.name,
        "model": manifest.checkpoints[-1]["path"],
        "rows": len(rows),
        "rankable": len(index.store.rankable()),
        "layout": index.layout,
        "is_chat": index.layout in ("instruction", "messages"),
        "projection": f"{space.sketch}, {manifest.width:,} numbers in {manifest.codec}",
        "context": explored.context,
        "sources": [{"value": value, "rows": count} for value, count in rows.source_counts()],
        "columns": [
            {"name": name, "values": [{"value": value, "rows": count} for value, count in counts]}
            for name, counts in rows.column_counts().items()
        ],
        "methods": [_method(explored, name, label) for name, label in LABELS.items()],
        "examples": _examples(explored),
    }


def _method(explored: ExploredIndex, name: str, label: str) -> dict[str, Any]:
    method, is_ready = catalogue.trace_method(name), True
    note = method.about
    if name == "ekfac" and name not in explored.options:
        is_ready = False
        note = f"Measure it once: whence curvature {explored.name} -o DIR. "
        note += f"Then: whence explore {explored.name} --curvature DIR"
    elif method.needs_run and explored.run is None:
        is_ready = False
        note = f"Go back through the training: whence explore {explored.name} --run RUN"
    elif method.needs_run:
        note = f"{note}: {LONG[name]}"
    elif name in ALL_ROWS:
        note = f"{note}: {SLOW}"
    return {
        "name": name,
        "label": label,
        "of_tokens": name in OF_TOKENS,
        "ignores": ignored_parts(name),
        "is_ready": is_ready,
        "note": note,
    }


def _examples(explored: ExploredIndex) -> list[str]:
    """Prompts to begin with: of rows far apart in the corpus."""
    rows = explored.rows
    places = sorted({round(place * (len(rows) - 1) / (EXAMPLES - 1)) for place in range(EXAMPLES)}) if len(rows) else []
    texts = [str(shown_text(rows.shown(place)).get("prompt") or rows.text(place)[:80]) for place in places]
    return [text for text in dict.fromkeys(texts) if 0 < len(text) <= 300]


# -- rows


def parts(explored: ExploredIndex, number: int, most: int = MOST_SHOWN) -> tuple[list[dict[str, str]], bool]:
    """Texts of a row with their roles, and whether they were cut."""
    rows, index = explored.rows, explored.index
    texts = dict(shown_text(rows.shown(number)))
    if (rejected := index.rejected_answer(rows.stored(number))) is not None:
        texts["rejected"] = rejected
    out, left = [], most
    for role, text in texts.items():
        shown = str(text)[:left]
        left -= len(shown)
        out.append({"role": role, "text": shown})
    return out, sum(len(str(text)) for text in texts.values()) > most


def row_json(explored: ExploredIndex, number: int, most: int = MOST_SHOWN) -> dict[str, Any]:
    """A row, without what a ranking says of it."""
    rows = explored.rows
    shown, is_cut = parts(explored, number, most)
    return {"row": number, "id": rows.ids[number], "source": rows.sources[number],
            "columns": rows.values(number), "parts": shown, "cut": is_cut}  # fmt: skip


def whole_row(explored: ExploredIndex, number: int) -> dict[str, Any]:
    """A row with all of its text.

    Raises:
        SettingError: There is no such row.
    """
    if not 0 <= number < len(explored.rows):
        raise SettingError(f"no row {number}; the index has rows 0 to {len(explored.rows) - 1}")
    return row_json(explored, number, MOST_WHOLE)


def search(explored: ExploredIndex, filters: Filters, limit: int, offset: int) -> dict[str, Any]:
    """Rows that pass filters, in the order of the corpus."""
    start = time.perf_counter()
    numbers = explored.rows.passing(filters).nonzero()[:, 0].tolist()
    shown = [
        row_json(explored, number) | {"rank": rank}
        for rank, number in enumerate(numbers[offset : offset + limit], start=offset + 1)
    ]
    return {"matching": len(numbers), "rows": shown, "took": _since(start)}


# -- rankings


def ranking(
    answered: Answered,
    stretch: Stretch,
    scores: Float32[Tensor, " n"],
    *,
    method: str,
    top: int,
    fold: bool,
    filters: Filters,
) -> dict[str, Any]:
    """Both ends of a ranking, with each row's null and the verdict where chance is known."""
    start = time.perf_counter()
    explored = answered.explored
    passes = explored.rows.passing(filters)
    groups = explored.rows.groups if fold else None
    helpful, opposing = (ranked(scores, passes, groups, top, opposing=side) for side in (False, True))
    level = answered.level(method, stretch, measures=False)
    shown = [ranked_rows(answered, stretch, side, method, sign) for side, sign in ((helpful, 1), (opposing, -1))]
    best = max((row["z"] for row in shown[0][:LEVEL_TOP] if row["z"] is not None), default=None)
    return {
        "answer": answered.id,
        "method": method,
        "matching": int((passes & scores.isfinite()).sum()),
        "helpful": shown[0],
        "opposing": shown[1],
        "level": None if level is None else level_json(answered, stretch, level),
        "verdict": None if level is None else verdict(best, level),
        "stands_out": None if level is None else best is not None and best > level,
        "notes": answered.notes.get((method, stretch), []),
        "took": _since(start),
    }


def level_json(answered: Answered, stretch: Stretch, level: float) -> dict[str, Any]:
    """What chance reaches, in words."""
    shape = Shape.of(about(answered.query, stretch), answered.explored.context)
    return {"z": level, "words": f"19 in 20 of {cost([shape])} stay below z {level:.1f}"}


def ranked_rows(answered: Answered, stretch: Stretch, side: Ranked, method: str, sign: int) -> list[dict[str, Any]]:
    """Rows of one end as a page shows them."""
    placed = _nulls(answered, stretch, side, method)
    out = []
    for rank, (number, score, copies, null) in enumerate(
        zip(side.rows, side.scores, side.copies, placed, strict=True), start=1
    ):
        row = row_json(answered.explored, number)
        more = {"rank": sign * rank, "score": score, "copies": copies, "z": None, "generic": False, "null": None}
        out.append(row | more | ({} if null is None else _null_json(null)))
    return out


def _nulls(answered: Answered, stretch: Stretch, side: Ranked, method: str) -> Sequence[Null | None]:
    if method not in OF_TOKENS:
        return [None] * len(side.rows)
    cosine = method == "cosine"
    controls = answered.explored.controls(cosine=cosine)
    if controls is None:
        return [None] * len(side.rows)
    norms = None if cosine else answered.query_norms(stretch)
    return nulls(answered.explored.index, controls, side.rows, side.scores, cosine=cosine, norms=norms)


def _null_json(null: Null) -> dict[str, Any]:
    """A row's place among its scores for control queries, with their histogram."""
    values = torch.tensor(null.scores, dtype=torch.float64)
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(values, BINS, low, high) if high > low else torch.zeros(BINS)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    histogram = {"mean": null.mean, "deviation": float(values.std()), "edges": edges.tolist(),
                 "counts": [int(count) for count in counts.tolist()], "of": len(null.scores),
                 "below": round(null.percentile / 100 * len(null.scores))}  # fmt: skip
    return {"z": null.z if math.isfinite(null.z) else None, "generic": null.generic, "null": histogram}


# -- tokens and methods


def matrices(
    answered: Answered, stretch: Stretch, rows: Sequence[int], *, cosine: bool = True
) -> Iterator[dict[str, Any]]:
    """Exact scores of rows, split over their tokens and over the answer's, a few rows at a time.

    Raises:
        SettingError: The index holds something else than gradients, or there is no such row.
    """
    index = answered.explored.index
    if index.space.view != "sgd":
        raise SettingError(
            f"tokens are coloured by gradients as they are, and {answered.explored.name} holds what an optimizer makes "
            f"of them (--view {index.space.view})"
        )
    if unknown := [row for row in rows if not 0 <= row < index.store.rows]:
        raise SettingError(f"no row {unknown[0]}; the index has rows 0 to {index.store.rows - 1}")
    query = about(answered.query, stretch)
    vectors = query_vectors(index, [query.sequences])[:, 0]
    for first in range(0, len(rows), AT_ONCE):
        encoded = answered.explored.encoded(rows[first : first + AT_ONCE])
        shares = TokenShares(index, query, vectors, encoded, objective="loss", cosine=cosine, basis="position")
        (by_row,) = shares_by_row(index, [shares])
        for row, (_, matrix) in by_row.items():
            columns = zip(matrix.train, matrix.matrix.sum(0).tolist(), matrix.supervised, strict=True)
            yield {
                "row": row,
                "exact": float(matrix.matrix.sum()),
                "train": [
                    {"text": text, "share": share, "supervised": is_target} for text, share, is_target in columns
                ],
                "query": matrix.matrix.sum(1).tolist(),
            }


def overlaps(tops: dict[str, list[int]]) -> list[dict[str, Any]]:
    """How many of their first rows any two methods share."""
    names = list(tops)
    return [
        {
            "a": one,
            "b": other,
            "shared": len({*tops[one]} & {*tops[other]}),
            "of": min(len(tops[one]), len(tops[other])),
        }
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    ]


# -- verbatim pieces


def pieces(answered: Answered) -> dict[str, Any]:
    """Pieces of an answer that stand word for word in the corpus."""
    start = time.perf_counter()
    explored, answer = answered.explored, answered.query.answer
    found = explored.verbatim().pieces(answer.completion)
    ends = _ends(answer.tokens, answer.completion)
    covered = torch.zeros(len(answer.completion), dtype=torch.bool)
    spans = []
    for piece in found:
        covered[piece.start : piece.end] = True
        held = [place for place, (first, end) in enumerate(ends) if first < piece.end and end > piece.start]
        spans.append({
            "from": piece.start, "to": piece.end, "text": answer.completion[piece.start : piece.end],
            "tokens": [held[0], held[-1] + 1] if held else None, "count": piece.count,
            "rows": [{"row": row, "id": explored.rows.ids[row]} for row in piece.rows],
        })  # fmt: skip
    words = (
        f"{int(covered.sum())} of {len(covered)} characters stand word for word in the corpus, in pieces of 12 "
        "characters or more"
        if spans
        else "No piece of 12 characters or more stands word for word in the corpus"
    )
    return {"spans": spans, "took": _since(start), "words": f"{words}."}


def _ends(tokens: Sequence[str], completion: str) -> list[tuple[int, int]]:
    """Characters of a completion that each of its tokens holds, from and to; none where tokens say something else."""
    place = -"".join(tokens).find(completion)
    if place > 0:
        return []
    out = []
    for token in tokens:
        out.append((place, place + len(token)))
        place += len(token)
    return out


def _since(start: float) -> float:
    """Milliseconds since a time of `perf_counter`."""
    return round(1000 * (time.perf_counter() - start), 2)
