"""A trace as one HTML file that can be sent to a colleague: it loads nothing, sends nothing and needs no server.

The trace travels as JSON in a `<script type="application/json">`, which browsers do not run; `trace_example.js`
and `trace_page.js`, joined, make the document from it with text nodes only. Corpus text is untrusted, so there are
three walls: `<`, `>` and `&` never stand in the JSON; the script has no way from text to markup; and a
Content-Security-Policy allows the one script and the one style of this file, by their hashes, and no address at all.

Token matrices are most of a large report. Each row travels as int16 in units of its largest entry, in base64: 2.7
bytes a number in place of the 10 of JSON, wrong by 1 part in 65,000 of that entry at most.
"""

import base64
import html
import math
from string import Template
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from whence.catalogue import TRACE_METHODS
from whence.corpus.layouts import shown_text
from whence.reports.page import SHARED, content_policy, embedded, packaged
from whence.reports.text import encodable, visible
from whence.reports.trace_tables import reranking_words, scored_words
from whence.tracing.results import AND_NOT, Hit, Null, TokenMatrix, Trace

STEPS = 32767
"""int16 values on each side of 0."""


def trace_page(trace: Trace) -> str:
    """A trace as a self-contained HTML document, to be written as UTF-8.

    The part after `#` in the address chooses what is shown first: `#q=1&t=3` is the second query with the fourth of
    its `Answer.query_tokens` pinned.

    Args:
        trace: What to show. Text in it is shown as text, whatever it holds; lone surrogates become U+FFFD.
    """
    style = "".join(map(packaged, (*SHARED, "base.css")))
    script = packaged("trace_example.js") + packaged("trace_page.js")
    prompt = trace.answers[0].prompt if trace.answers else ""
    return Template(packaged("trace_page.html")).substitute(
        policy=content_policy(style, script),
        title=html.escape(f"Whence: {' '.join(_visible(prompt[:200]).split())[:80]}"),
        style=style,
        script=script,
        data=embedded(_trace(trace)),
    )


def _trace(trace: Trace) -> dict[str, Any]:
    method = TRACE_METHODS.get(trace.method)
    method_text = trace.method if method is None else f"{trace.method}: {method.about}"
    facts = {"method": method_text, "examples ranked": scored_words(trace)}
    if trace.needed_z is not None:
        among = sorted({f"{level:.2f}" for level in trace.levels}, key=float)
        shown = among[0] if len(among) == 1 else f"{among[0]} to {among[-1]}, by a query's length"
        facts["z of meaningless completions"] = f"{shown}: 19 of 20 stay below"
    return {
        "isCosine": method is not None and method.cosine,
        "isInfluence": method is None or method.is_influence,
        "notes": [_visible(note) for note in trace.notes],
        "settings": [[_visible(name), _visible(value)] for name, value in (facts | trace.settings).items()],
        "queries": [_query(trace, number) for number in range(len(trace.answers))],
    }


def _query(trace: Trace, number: int) -> dict[str, Any]:
    answer = trace.answers[number]
    return {
        "prompt": _visible(answer.prompt),
        "generated": answer.is_generated,
        "tokens": _tokens(answer.tokens, answer.probabilities, answer.asked or [True] * len(answer.tokens)),
        "contrast": _tokens(
            answer.contrast_tokens, answer.contrast_probabilities, [True] * len(answer.contrast_tokens)
        ),
        "ending": None if answer.ending is None else _visible(answer.ending),
        "certainty": f"{answer.certainty.removesuffix('.')}.".replace(">=", "≥"),
        "verdict": _visible(trace.verdicts[number]) if number < len(trace.verdicts) else None,
        "overlap": _overlap(trace, number),
        "helpful": [_hit(hit, trace.levels) for hit in trace.of(number)],
        "opposing": [_hit(hit, trace.levels) for hit in trace.of(number, opposing=True)],
    }


def _overlap(trace: Trace, number: int) -> str | None:
    is_known = number < len(trace.overlaps) and math.isfinite(trace.overlaps[number])
    # A page's reader may have no command line, and a phone would break the flag after its hyphens.
    return reranking_words(trace, number).replace("--shortlist", "short list") if is_known else None


def _tokens(texts: list[str], probabilities: list[float], asked: list[bool]) -> list[dict[str, Any]]:
    return [
        {"text": _visible(text), "p": _number(p), "asked": is_asked}
        for text, p, is_asked in zip(texts, probabilities, asked, strict=True)
    ]


def _hit(hit: Hit, levels: list[float]) -> dict[str, Any]:
    by_token = None if hit.tokens is not None else hit.by_token  # a matrix brings its own, of the exact score
    shown = {
        "rank": hit.rank,
        "id": _visible(hit.id),
        "source": None if hit.source is None else _visible(hit.source),
        "score": _number(hit.score),
        "exact": _number(hit.exact),
        "ranked": _number(hit.rank_score),
        "isExact": hit.exact_rank_score is not None,
        "margin": _number(hit.margin),
        "null": None if hit.null is None else _null(hit.null, levels[hit.query] if levels else None),
        "shares": None if by_token is None else [_number(share) for share in by_token],
        "tokens": None if hit.tokens is None else _matrix(hit.tokens),
    }
    return shown | _text(hit)


def _text(hit: Hit) -> dict[str, Any]:
    """What the tokens do not show: all of the row, or with `loss`, which has no prompt tokens, its prompt."""
    row = {name: _visible(text or "") for name, text in shown_text(hit.row).items()}
    if hit.tokens is None:
        rejected = "" if hit.rejected is None else _visible(f"{AND_NOT}{hit.rejected}")
        return {"prompt": row.get("prompt", ""), "completion": row.get("completion", row.get("text", "")) + rejected}
    return {"prompt": row.get("prompt", "") if hit.tokens.basis == "loss" else "", "completion": ""}


def _null(null: Null, level: float | None) -> dict[str, Any]:
    return {
        "scores": [_number(score, digits=4) for score in null.scores if math.isfinite(score)],
        "mean": _number(null.mean),
        "z": _number(null.z),
        "needed": _number(level),
        "percentile": _number(null.percentile),
        "generic": null.generic,
        "own": _number(null.score),
    }


def _matrix(tokens: TokenMatrix) -> dict[str, Any]:
    matrix = torch.nan_to_num(tokens.matrix.detach().cpu(), nan=0.0, posinf=0.0, neginf=0.0)
    peaks, steps = _packed(matrix)
    sums = matrix.double().sum(0)
    return {
        "basis": tokens.basis,
        "train": [_visible(text) for text in tokens.shown_train()],
        "supervised": "".join("1" if is_supervised else "0" for is_supervised in tokens.supervised),
        "shares": [_number(share) for share in tokens.matrix.double().sum(1).tolist()],
        "peaks": peaks,
        "sumPeak": _number(sums.abs().max().item()) if sums.numel() else 0.0,
        "striking": int(sums.abs().argmax()) if sums.numel() else 0,
        "steps": steps,
    }


def _packed(matrix: Float32[Tensor, "u s"]) -> tuple[list[float], str]:
    """Largest magnitude of each row, and the entries in 1 / STEPS of it as little-endian int16 in base64."""
    if not matrix.numel():
        return [0.0] * len(matrix), ""
    peaks = matrix.double().abs().amax(1)  # shape (u,)
    units = torch.where(peaks > 0, peaks, 1.0) / STEPS
    steps = (matrix.double() / units[:, None]).round().to(torch.int16)
    return peaks.tolist(), base64.b64encode(steps.numpy().astype("<i2").tobytes()).decode()


def _number(value: float | None, digits: int = 7) -> float | None:
    """A number short enough for a file, or None where JSON has no such number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def _visible(text: str) -> str:
    return visible(encodable(text))
