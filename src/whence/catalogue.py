"""Every method by its public name: one page of explicit tables, with source and cost.

Adding a method is its file and its line here; the command line's choices, the table in the docs and the contract
tests all come from these tables. An entry names its class as text, so that reading the names (for `--help`) does not
import torch; the contract tests check every class against its Protocol.
"""

import difflib
import importlib
from dataclasses import dataclass
from typing import Any

from whence.errors import UnknownNameError


@dataclass(frozen=True)
class Entry:
    """One method."""

    target: str
    """`module:Class`."""
    cost: str
    """Of a projection, for each layer and example, with d = o * i; of a scorer, for a corpus and its queries."""
    source: str

    def load(self) -> Any:
        """Import the class."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)


PROJECTIONS: dict[str, Entry] = {
    "two_sided": Entry(
        "whence.projections.two_sided:TwoSided", "t (i + o) k + t k^2, no gradient formed", "arXiv 2405.13954"
    ),
    "sjlt": Entry("whence.projections.sjlt:SJLT", "t d + s d", "arXiv 1012.1577"),
    "count_sketch": Entry("whence.projections.count_sketch:CountSketch", "t d + d", "arXiv 0902.2206"),
    "shuffle_sum": Entry("whence.projections.shuffle_sum:ShuffleSum", "t d + d", "arXiv 2405.11724"),
    "srht": Entry("whence.projections.srht:SRHT", "t d + 64 d log64 d", "arXiv 1011.1595"),
    "rademacher": Entry("whence.projections.rademacher:Rademacher", "t d + d k", "arXiv 2402.04333"),
    "identity": Entry("whence.projections.identity:Identity", "t d", "the gradient itself"),
}

SCORERS: dict[str, Entry] = {
    "bm25": Entry("whence.scorers.lexical:BM25", "one pass over the text", "doi 10.1561/1500000019"),
    "embedding": Entry("whence.scorers.embedding:Embedding", "one forward pass over every row", "arXiv 2503.01807"),
    "random": Entry("whence.scorers.uniform:Uniform", "q n random numbers", "chance"),
}


def projection(name: str) -> Any:
    """Class of a projection; call it as `interfaces.MakeProjection`.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(PROJECTIONS, name, "--projection").load()


@dataclass(frozen=True)
class TraceMethod:
    """One way to score examples for a query."""

    about: str
    cosine: bool = False
    """Gradients are divided by their norms."""
    from_index: bool = False
    """By the index' vectors; else the corpus is read, which takes as long as indexing it."""
    normalise: bool = False
    """Each layer's gradient is divided by its norm."""
    scorer: str | None = None
    """Name in `SCORERS`; None: by gradients."""


TRACE_METHODS: dict[str, TraceMethod] = {
    "cosine": TraceMethod("cosine of the index' vectors", cosine=True, from_index=True),
    "dot": TraceMethod("inner product of the index' vectors (TracIn, compressed)", from_index=True),
    "rapidin": TraceMethod("RapidIn: dot, on an index of --projection shuffle_sum --normalise layer", from_index=True),
    "tracin": TraceMethod("inner product of unprojected gradients, without the index' vectors"),
    "tracin_layer": TraceMethod("the same, each layer divided by its norm", normalise=True),
    "tracin_cosine": TraceMethod("cosine of unprojected gradients", cosine=True),
    "embedding": TraceMethod("cosine of the model's own hidden states", scorer="embedding"),
    "bm25": TraceMethod("words in common", scorer="bm25"),
    "random": TraceMethod("chance", scorer="random"),
}


def trace_method(name: str) -> TraceMethod:
    """A trace's method.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(TRACE_METHODS, name, "--method")


def index_methods() -> list[str]:
    """Names of the methods that score by the index' vectors."""
    return [name for name, method in TRACE_METHODS.items() if method.from_index]


def scorer(name: str) -> Any:
    """Class of a scorer; call it as `interfaces.MakeScorer`.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(SCORERS, name, "--method").load()


def _lookup(table: dict[str, Any], name: str, flag: str) -> Any:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UnknownNameError(f"{flag} {name}: no such method.{hint} There are {', '.join(table)}.")
    return table[name]
