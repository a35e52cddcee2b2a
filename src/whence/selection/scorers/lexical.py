"""Scores from words: BM25 finds rows that share a target's rarer words, DSIR rows that read like it.

BM25: score(query, row) = sum over the query's words w of idf(w) * tf / (tf + k1 (1 - b + b |row| / mean |row|)), with
tf the times that w occurs in the row, |row| the row's words, and idf(w) = ln(1 + (n - df + 1/2) / (df + 1/2)) where df
rows of the n have w. This is Lucene's variant, except that the row's length is exact here: idf is never negative, and
the constant factor k1 + 1 is left out. A word that occurs twice in the query counts twice. Words are runs of letters,
digits and underscores, case folded; none is stemmed or left out as common. Where a script puts no spaces between words
(Chinese, Japanese, Thai, Lao, Khmer, Burmese), each of its characters is a word.
Source: Robertson and Zaragoza 2009, The Probabilistic Relevance Framework, https://doi.org/10.1561/1500000019; the
variant as in Kamphuis et al. 2020, Which BM25 Do You Mean?, https://doi.org/10.1007/978-3-030-45442-5_4.

DSIR: score(target, row) = mean over the row's n-grams of log p_target - log p_raw, so the log of the row's importance
weight for each n-gram, under two bags of words and pairs of words, hashed to 10,000 buckets: p_raw of all rows,
p_target half of all the target's queries together and half p_raw, 1e-8 added to either. Runs of other signs are words
too, and all are in lower case.

The released code takes the sum, and a p_target of the queries alone: `length_normalised=false` and `backoff=0`. Then
each n-gram that a short target lacks costs about ten nats, and rows of few n-grams win whatever they say: for a task of
gsm8k none of 80 rows was gsm8k's, where 78 are by default, and Chinese rows, whose sentences were one word each, came
before German ones for a German task. Other differences: rows from 10 words on have a score, not from 100 (which would
leave out most instructions); the hash is CRC-32, which halves the time, and `hash="sha256"` gives theirs bit by bit;
the noise that it adds to sums, to sample without replacement, is a selector's temperature of 1.
Source: Xie et al. 2023, Data Selection for Language Models via Importance Resampling, https://arxiv.org/abs/2302.03169.

The text of a row or a query is its prompt and its completion. Only text is read: no model is loaded. Cost: one pass
over the corpus for all targets together; DSIR keeps counts in memory, about 12 bytes for each different n-gram of a
row.
"""

import hashlib
import itertools
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import bm25s
import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from whence.corpus.layouts import row_text
from whence.errors import SettingError
from whence.selection.protocols import QueryText, Target, View

logging.getLogger("bm25s").setLevel(logging.WARNING)  # importing it sets DEBUG, which any root handler would print

UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Characters of scripts without spaces between words."""
WORD = re.compile(rf"(?=\w)[{UNSPACED}]|[^\W{UNSPACED}]+")
WORD_OR_SIGNS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]+")
"""What NLTK's WordPunctTokenizer finds, which DSIR's released code uses, but for the scripts above."""

HASHES: dict[str, Callable[[bytes], int]] = {
    "crc32": zlib.crc32,
    "sha256": lambda gram: int(hashlib.sha256(gram).hexdigest(), 16),
}
SMALLEST = 1e-8
"""Added to every probability before its logarithm, as DSIR's released code does."""


@dataclass(frozen=True, kw_only=True)
class BM25:
    """Scores of 0 and above; 0 for a row that shares no word with a target, so also for one without words."""

    seed: int = 0
    """Not used."""
    k1: float = 1.5
    """How much repetitions of a word count; at 0 not at all."""
    b: float = 0.75
    """How much a long row is marked down: from 0, not at all, to 1, by its full length."""

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Sums of inverse document frequencies, in nats; a target has the mean over its queries."""
        vocabulary: dict[str, int] = {}
        rows = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in words(row_text(row))] for row in view.examples()
        ]
        scores = np.zeros((len(targets), len(rows)), dtype=np.float32)
        if not vocabulary:  # the mean length would be 0
            return torch.from_numpy(scores)
        table = bm25s.BM25(method="lucene", k1=self.k1, b=self.b)
        table.index((rows, vocabulary), create_empty_token=False, show_progress=False)
        for total, target in zip(scores, targets, strict=True):
            for query in target.queries:
                query_words = [vocabulary[word] for word in words(_query_text(query)) if word in vocabulary]
                total += table.get_scores_from_ids(query_words) / len(target.queries)
        return torch.from_numpy(scores)


@dataclass(frozen=True, kw_only=True)
class DSIR:
    """Log importance weights; -inf for a row of fewer words than `least_words`, and for one without any."""

    seed: int = 0
    """Not used."""
    buckets: int = 10_000
    hash: str = "crc32"
    """Name in `HASHES`."""
    least_words: int = 10
    """Words and runs of signs that a row needs; 100 in the released code."""
    length_normalised: bool = True
    """Divide by the row's number of n-grams, for nats an n-gram; the released code does not."""
    backoff: float = 0.5
    """Share of all rows' distribution in the target's, so that an n-gram that the target lacks costs little; 0 in the
    released code."""
    pseudo_count: float = 0.0
    """Added to each of the target's buckets; 0 in the released code."""

    def __post_init__(self):
        if self.hash not in HASHES:
            raise SettingError(f"hash {self.hash!r} of dsir: choose one of {', '.join(HASHES)}")
        if self.buckets < 1 or self.pseudo_count < 0:
            raise SettingError(
                f"buckets {self.buckets} and pseudo_count {self.pseudo_count} of dsir: at least 1 and 0 are expected"
            )
        if not 0 <= self.backoff < 1:
            raise SettingError(f"backoff {self.backoff} of dsir: a share from 0 and below 1 is expected")

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores in nats; a target's queries make one distribution.

        Raises:
            SettingError: A target has no word.
        """
        counts, lengths = self._gram_counts(row_text(row) for row in view.examples())
        raw = _probabilities(counts.sum(0), 0.0)
        differences = np.stack(
            [self._target_log_probabilities(target, raw) - np.log(raw + SMALLEST) for target in targets], axis=1
        )  # [buckets, s]
        weights = counts @ differences  # [n, s]
        if self.length_normalised:
            weights /= np.maximum(counts.sum(1), 1)[:, None]
        weights[lengths < max(self.least_words, 1)] = -np.inf
        return torch.from_numpy(np.ascontiguousarray(weights.T, dtype=np.float32))

    def _target_log_probabilities(self, target: Target, raw: np.ndarray) -> np.ndarray:
        counts = self._gram_counts(_query_text(query) for query in target.queries)[0].sum(0)
        if not counts.sum():
            raise SettingError(f"target {target.name!r} has no word for dsir to compare rows with; give other examples")
        own = _probabilities(counts, self.pseudo_count)
        return np.log((1 - self.backoff) * own + self.backoff * raw + SMALLEST)

    def _gram_counts(self, texts: Iterable[str]) -> tuple[Any, np.ndarray]:
        return _gram_counts(texts, self.buckets, self.hash)


def kl_reduction(
    selected: Iterable[str], target: Iterable[str], raw: Iterable[str], *, buckets: int = 10_000, hash: str = "crc32"
) -> float:
    """How much nearer the target's n-grams are to the selected texts' than to the raw texts', in nats.

    KL(target || raw) - KL(target || selected), from the probabilities of hashed n-grams as DSIR counts them, 1e-8 added
    to each. Above 0 the selection reads more like the target than the raw texts do.

    Raises:
        SettingError: One of the three has no word.

    Source: Xie et al. 2023, https://arxiv.org/abs/2302.03169, section 5.
    """
    probabilities = []
    for name, texts in (("target", target), ("raw texts", raw), ("selection", selected)):
        counts = _gram_counts(texts, buckets, hash)[0].sum(0)
        if not counts.sum():
            raise SettingError(f"the {name} of a KL reduction: there is no word in it")
        probabilities.append(_probabilities(counts, 0.0))
    of_target, before, after = probabilities
    return float((of_target * (np.log(after + SMALLEST) - np.log(before + SMALLEST))).sum())


def words(text: str) -> list[str]:
    """BM25's words in order, case folded.

    >>> words("Straße 12, don't!")
    ['strasse', '12', 'don', 't']
    >>> words("GPT 很好")
    ['gpt', '很', '好']
    """
    return WORD.findall(text.casefold())


def grams(text: str) -> tuple[list[str], int]:
    """DSIR's n-grams, single words and then pairs, and the number of words.

    >>> grams("Don't go!")
    (['don', "'", 't', 'go', '!', "don '", "' t", 't go', 'go !'], 5)
    """
    single = WORD_OR_SIGNS.findall(text.lower())
    pairs = [f"{first} {second}" for first, second in itertools.pairwise(single)]
    return single + pairs, len(single)


def _query_text(query: QueryText) -> str:
    return f"{query.prompt} {query.completion}"


def _gram_counts(texts: Iterable[str], buckets: int, name: str) -> tuple[Any, np.ndarray]:
    """How often each bucket occurs in each text, as a sparse [n, buckets], and each text's number of words."""
    from scipy.sparse import csr_array

    hash_of = HASHES[name]
    buckets_by_text, ends, lengths = [np.zeros(0, dtype=np.int32)], [0], []
    for text in texts:
        text_grams, length = grams(text)
        hashed = [hash_of(gram.encode("utf-8", "surrogatepass")) % buckets for gram in text_grams]
        buckets_by_text.append(np.array(hashed, dtype=np.int32))
        ends.append(ends[-1] + len(hashed))
        lengths.append(length)
    columns = np.concatenate(buckets_by_text)
    counts = csr_array((np.ones(len(columns)), columns, np.array(ends)), shape=(len(lengths), buckets))
    counts.sum_duplicates()
    return counts, np.array(lengths)


def _probabilities(counts: np.ndarray, pseudo_count: float) -> np.ndarray:
    """Probability of each bucket; all are 0 where nothing was counted."""
    counts = counts + pseudo_count
    return counts / max(counts.sum(), 1)


def gram_divergence(
    target: Iterable[str], sources: Mapping[str, Iterable[str]], *, buckets: int = 10_000, hash: str = "crc32"
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of hashed n-grams as DSIR counts them: the target's [buckets], the sources' [sources, buckets].

    `mixture_divergence` takes both, for KL(target || sum of w_s source_s) of a mixture w.
    """
    of_target = _probabilities(_gram_counts(target, buckets, hash)[0].sum(0), 0.0)
    return of_target, np.stack(
        [_probabilities(_gram_counts(texts, buckets, hash)[0].sum(0), 0.0) for texts in sources.values()]
    )


def mixture_divergence(target: np.ndarray, sources: np.ndarray, weights: Sequence[float]) -> float:
    """KL(target || mixture) in nats, 1e-8 added to each bucket; smaller is nearer to the target."""
    mixture = np.asarray(weights) @ sources
    return float((target * (np.log(target + SMALLEST) - np.log(mixture + SMALLEST))).sum())
