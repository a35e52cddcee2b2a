"""What a person should know of a selection: sources, lengths, nearness to the task, overlap with other methods.

Everything here is computed from a finished `Chosen`, on request: reports draw it, and choosing does not need it. A
share, a lift or an overlap says how far a choice differs from the corpus or from another choice, not whether it is
good: only a training can say that (`evaluation.selection`).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from whence.errors import SettingError
from whence.selection.pipeline import Chosen, select
from whence.selection.scorers.lexical import kl_reduction
from whence.selection.views import CorpusView, IndexView


def composition(chosen: Chosen) -> list[dict[str, Any]]:
    """Rows and tokens of each source in the corpus and in the selection, and how far it is over-represented.

    `lift` is its share of the selection over its share of the corpus, in rows: 1 for a fair draw.
    """
    candidates, selected = chosen.candidates, set(chosen.selection.rows)
    all_rows, all_tokens, rows, tokens = Counter(), Counter(), Counter(), Counter()
    for number, source in enumerate(candidates.sources):
        length = int(candidates.tokens[number])
        all_rows[source] += 1
        all_tokens[source] += length
        if number in selected:
            rows[source] += 1
            tokens[source] += length
    total, chosen_rows = sum(all_rows.values()), len(selected)
    return [
        {
            "source": source,
            "pool_rows": count,
            "rows": rows[source],
            "share": rows[source] / chosen_rows,
            "lift": rows[source] / chosen_rows / (count / total),
            "pool_tokens": all_tokens[source],
            "tokens": tokens[source],
        }
        for source, count in sorted(all_rows.items(), key=lambda item: (-rows[item[0]], -item[1]))
    ]


def lengths(chosen: Chosen) -> dict[str, float]:
    """Median tokens of all rows that can be chosen, and of the chosen rows."""
    rankable = chosen.candidates.rankable()
    tokens = chosen.candidates.tokens.double()
    return {
        "pool_median_tokens": float(tokens[rankable].median()),
        "median_tokens": float(tokens[chosen.selection.rows].median()),
    }


def nearness(chosen: Chosen) -> float | None:
    """How much nearer the chosen rows' n-grams are to the tasks' than the corpus': see `lexical.kl_reduction`, in nats.

    None where the tasks, or the rows, have no word. It takes one pass over the corpus' text.
    """
    texts = chosen.candidates.texts
    try:
        return kl_reduction([texts[row] for row in chosen.selection.rows], chosen.asked, texts)
    except SettingError:
        return None


def method_overlaps(
    chosen: Chosen, view: IndexView | CorpusView, tasks: Any, methods: Sequence[str], **settings: Any
) -> dict[str, float]:
    """Overlap of a selection with other methods' selections under the same budget; see `overlap`."""
    rows_by_method = {name: select(view, tasks, method=name, **settings).selection.rows for name in methods}
    return {name: overlap(chosen.selection.rows, rows) for name, rows in rows_by_method.items()}


def overlap(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of the smaller selection's rows that the other selection has too.

    >>> overlap([1, 2, 3, 4], [4, 3, 9])
    0.6666666666666666
    """
    return len({*first} & {*second}) / max(1, min(len({*first}), len({*second})))
