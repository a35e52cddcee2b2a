"""BM25: which rows share the query's rarer words.

score(query, row) = sum over the query's words w of idf(w) * tf / (tf + k1 (1 - b + b |row| / mean |row|)), with tf
the times that w stands in the row, |row| the row's words, and idf(w) = ln(1 + (n - df + 1/2) / (df + 1/2)) where df
rows of the n have w. That is Lucene's variant, but for the row's length, which is exact here: idf is never negative,
and the constant factor k1 + 1 is left out. A word that stands twice in the query counts twice.

A row's text is its prompt and its completion, a query's likewise. Words are runs of letters, digits and underscores,
case folded; none is stemmed or left out as common. A script that puts no spaces between words has few words here, and
a baseline of words says little about it.

It reads text alone: no model is loaded. Cost: one pass over the corpus for all queries together.

Source: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework, https://doi.org/10.1561/1500000019; the
variant as in Kamphuis et al. 2020, Which BM25 Do You Mean?, https://doi.org/10.1007/978-3-030-45442-5_4.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

import bm25s
import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from whence.answers import shown_text
from whence.corpus import Row
from whence.interfaces import QueryText, View

logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it sets DEBUG, which any root handler would print

WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class BM25:
    """Scores of 0 and above; 0 for a row that shares no word with the query, so also for one without words."""

    seed: int = 0
    """Not used."""
    k1: float = 1.5
    """How far repeating a word goes on counting: 0, not at all."""
    b: float = 0.75
    """How far a long row is marked down: from 0, not at all, to 1, by its full length."""

    def __call__(self, view: View, queries: Sequence[QueryText]) -> Float32[Tensor, "q n"]:
        """Dimensionless sums of inverse document frequencies, in nats."""
        vocabulary: dict[str, int] = {}
        rows = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in words(row_text(row))] for row in view.examples()
        ]
        if not vocabulary:  # the mean length would be 0
            return torch.zeros(len(queries), len(rows))
        table = bm25s.BM25(method="lucene", k1=self.k1, b=self.b)
        table.index((rows, vocabulary), create_empty_token=False, show_progress=False)
        scores = np.zeros((len(queries), len(rows)), dtype=np.float32)
        for number, query in enumerate(queries):
            asked = words(f"{query.prompt} {query.completion}")
            scores[number] = table.get_scores_from_ids([vocabulary[word] for word in asked if word in vocabulary])
        return torch.from_numpy(scores)


def row_text(row: Row) -> str:
    """Text of a corpus row, whatever its layout; empty where nulls stand for text.

    >>> row_text({"prompt": "1 + 1?", "completion": "2"})
    '1 + 1? 2'
    """
    return " ".join(text for text in shown_text(row).values() if text)


def words(text: str) -> list[str]:
    """Words in order, case folded.

    >>> words("Straße 12, don't!")
    ['strasse', '12', 'don', 't']
    """
    return WORD.findall(text.casefold())
