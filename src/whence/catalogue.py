"""Every method by its public name: one page of explicit tables, with source and cost.

A new method is one file, and one line here; the command line's choices, the table in the docs and the contract
tests all come from these tables. An entry names its class as text, so that reading the names (for `--help`) does not
import torch; the contract tests check every class against its Protocol.
"""

import difflib
import importlib
from dataclasses import dataclass
from typing import Any, TypedDict

from whence.errors import UnknownNameError


@dataclass(frozen=True)
class Entry:
    """One projection or selector."""

    implementation: str
    """`module:Class`."""
    cost: str
    """A projection's for each layer and example, with d = o * i; a selector's for n rows and s targets."""
    source: str
    codec: str = "bfloat16"
    """Of a projection, how its vectors are stored where nobody says otherwise: name in `indexing.codecs.CODECS`."""

    def load(self) -> Any:
        """Import the class."""
        return _load(self.implementation)


@dataclass(frozen=True)
class ScorerEntry:
    """One scorer: what it needs, and how its scores are used by default."""

    implementation: str
    """`module:Class`."""
    cost: str
    """The cost for a corpus and its targets."""
    source: str
    needs_model: bool = False
    """Whether it runs a model; the others read text, or an index' vectors."""
    needs_index: bool = False
    """Whether it reads the vectors of an index; the others take a corpus."""
    needs_run: bool = False
    """Whether it reads a run that can be replayed, in place of an index or a corpus."""
    takes_gradients: bool = False
    """Whether it takes the rows' gradients itself, where it reads neither an index' nor a run."""
    reads_tasks: bool = True
    """Whether its scores depend on the target; else they are the same for every target."""
    draws: bool = False
    """Whether its seed decides the choice; else the seed moves an estimate at most."""
    selector: str = "max"
    """Name in `SELECTORS` of the selector that its source uses."""
    by: str = "task"
    """What a target is: a "task" with all its examples, or each "example"."""

    @property
    def is_signed(self) -> bool:
        """Whether the sign of a score says helpful or harmful, as of gradients."""
        return self.needs_index or self.needs_run or self.takes_gradients

    @property
    def contrasts(self) -> bool:
        """Whether it can compare two answers: it reads gradients, whose difference is taken, or nothing at all."""
        return self.needs_index or self.needs_run or self.draws

    def load(self) -> Any:
        """Import the class."""
        return _load(self.implementation)


def _load(implementation: str) -> Any:
    module, _, name = implementation.partition(":")
    return getattr(importlib.import_module(module), name)


PROJECTIONS: dict[str, Entry] = {
    "two_sided": Entry(
        "whence.gradients.projections.two_sided:TwoSided", "t (i + o) k + t k^2, no gradient formed", "arXiv 2405.13954"
    ),
    "sjlt": Entry("whence.gradients.projections.sjlt:SJLT", "t d + s d", "arXiv 1012.1577"),
    "count_sketch": Entry(
        "whence.gradients.projections.count_sketch:CountSketch", "t d + d", "arXiv 0902.2206", codec="onebit"
    ),
    "tensor_sketch": Entry(
        "whence.gradients.projections.tensor_sketch:TensorSketch",
        "t (i + o) R + t d / R",
        "doi 10.1145/2487575.2487591",
        codec="onebit",
    ),
    "shuffle_sum": Entry("whence.gradients.projections.shuffle_sum:ShuffleSum", "t d + d", "arXiv 2405.11724"),
    "srht": Entry("whence.gradients.projections.srht:SRHT", "t d + 64 d log64 d", "arXiv 1011.1595"),
    "rademacher": Entry("whence.gradients.projections.rademacher:Rademacher", "t d + d k", "arXiv 2402.04333"),
    "identity": Entry("whence.gradients.projections.identity:Identity", "t d", "the gradient itself"),
}

DEFAULT_PROJECTIONS: dict[str, str] = {"sgd": "tensor_sketch", "adam": "count_sketch"}
"""By the optimizer's view of a gradient: what Adam makes of one is no product of two, so that it must be formed."""


def default_projection(view: str) -> str:
    """Name of the projection that is used where nobody says otherwise, under an optimizer's view of gradients."""
    return DEFAULT_PROJECTIONS[view]


_FORWARD = "one forward pass over every row"


class _Order(TypedDict):
    """How rows are ordered where nobody says otherwise."""

    selector: str
    by: str


_TURNS: _Order = {"selector": "round_robin", "by": "example"}
"""One order by gradients fills up with the answer that the task's mean gradient points to (docs/results)."""

SCORERS: dict[str, ScorerEntry] = {
    "less": ScorerEntry(
        "whence.selection.scorers.influence:LESS",
        "one pass over the vectors",
        "arXiv 2402.04333",
        needs_index=True,
        **_TURNS,
    ),
    "influence": ScorerEntry(
        "whence.selection.scorers.influence:Influence",
        "one pass over the vectors",
        "arXiv 2002.08484",
        needs_index=True,
        **_TURNS,
    ),
    "datainf": ScorerEntry(
        "whence.selection.scorers.influence:DataInf",
        "three passes over the vectors",
        "arXiv 2310.00902",
        needs_index=True,
        **_TURNS,
    ),
    "reach": ScorerEntry(
        "whence.selection.scorers.influence:Reach",
        "a pass over the vectors for 64 tokens",
        "arXiv 2405.11724",
        needs_index=True,
        **_TURNS,
    ),
    "trak": ScorerEntry(
        "whence.selection.scorers.second_moment:TRAK",
        "two passes over the vectors, and m^2 k for m rows",
        "arXiv 2303.14186",
        needs_index=True,
        **_TURNS,
    ),
    "trackstar": ScorerEntry(
        "whence.selection.scorers.second_moment:TrackStar",
        "two passes over the vectors, and n m k for m rows",
        "arXiv 2410.17413",
        needs_index=True,
        **_TURNS,
    ),
    "ekfac": ScorerEntry(
        "whence.selection.scorers.ekfac:EKFAC",
        "two passes over some rows, and one over every row for as many targets as 2 GiB hold three times",
        "arXiv 2308.03296",
        needs_model=True,
        takes_gradients=True,
        **_TURNS,
    ),
    "replay": ScorerEntry(
        "whence.selection.scorers.replay:Replay",
        "the training once again, and two to three times more for every target",
        "arXiv 2504.16430",
        needs_run=True,
    ),
    "source": ScorerEntry(
        "whence.selection.scorers.source:SOURCE",
        "a pass over every row, and two over some, for each of three segments of the training",
        "arXiv 2405.12186",
        needs_run=True,
    ),
    "bm25": ScorerEntry("whence.selection.scorers.lexical:BM25", "one pass over the text", "doi 10.1561/1500000019"),
    "dsir": ScorerEntry("whence.selection.scorers.lexical:DSIR", "one pass over the text", "arXiv 2302.03169"),
    "rds": ScorerEntry("whence.selection.scorers.embedding:RDS", _FORWARD, "arXiv 2402.04333", needs_model=True),
    "rds+": ScorerEntry(
        "whence.selection.scorers.embedding:RDSPlus",
        _FORWARD,
        "arXiv 2503.01807",
        needs_model=True,
        selector="round_robin",
        by="example",
    ),
    "density": ScorerEntry(
        "whence.selection.scorers.density:Density",
        "one or two forward passes over every row",
        "arXiv 2402.09668",
        needs_model=True,
        reads_tasks=False,
    ),
    "loss": ScorerEntry(
        "whence.selection.scorers.likelihood:Loss", _FORWARD, "arXiv 2309.04564", needs_model=True, reads_tasks=False
    ),
    "loss_drop": ScorerEntry(
        "whence.selection.scorers.likelihood:LossDrop",
        "one forward pass by either of two models",
        "aclanthology P10-2041",
        needs_model=True,
        reads_tasks=False,
    ),
    "ask_llm": ScorerEntry(
        "whence.selection.scorers.likelihood:AskLLM",
        "one forward pass of a judge over every row",
        "arXiv 2402.09668",
        needs_model=True,
        reads_tasks=False,
    ),
    "random": ScorerEntry(
        "whence.selection.scorers.uniform:Uniform", "s n random numbers", "chance", reads_tasks=False, draws=True
    ),
}

GRADED: dict[str, ScorerEntry] = SCORERS | {
    "cosine": SCORERS["less"],
    "dot": SCORERS["influence"],
    "exact-cosine": ScorerEntry(
        "whence.evaluation.exact_scores:ExactCosine", "a backward pass over every row", "arXiv 2002.08484",
        needs_model=True, takes_gradients=True, **_TURNS,
    ),
    "exact-dot": ScorerEntry(
        "whence.evaluation.exact_scores:ExactDot", "a backward pass over every row", "arXiv 2002.08484",
        needs_model=True, takes_gradients=True, **_TURNS,
    ),
}  # fmt: skip
"""What `whence evaluate` grades: all scorers, two of them under the names of `trace`, and unprojected gradients."""

SELECTORS: dict[str, Entry] = {
    "max": Entry("whence.selection.selectors.ranked:Best", "n s + n log n", "arXiv 2402.04333"),
    "mean": Entry("whence.selection.selectors.ranked:Mean", "n s + n log n", "none needed"),
    "round_robin": Entry("whence.selection.selectors.round_robin:RoundRobin", "s n log n", "arXiv 2503.01807"),
}


def projection_entry(name: str) -> Entry:
    """A projection's entry.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(PROJECTIONS, name, "--projection")


def projection(name: str) -> Any:
    """Class of a projection; call it as `gradients.protocols.MakeProjection`."""
    return projection_entry(name).load()


@dataclass(frozen=True)
class TraceMethod:
    """One way to score examples for a query."""

    about: str
    cosine: bool = False
    """Whether gradients are divided by their norms."""
    from_index: bool = False
    """Whether it reads the index' vectors; else it reads the corpus, which takes as long as indexing it."""
    normalise: bool = False
    """Whether each layer's gradient is divided by its norm."""
    scorer: str | None = None
    """Name in `SCORERS`; None for a method that compares gradients."""
    needs_run: bool = False
    """Whether it reads a run that can be replayed, in place of an index."""
    is_influence: bool = True
    """Whether a score says what training on the row does to the answer; else how alike the two are."""
    is_solved: bool = False
    """Whether the index is asked for a query's vector divided by a curvature, which the scorer's `solved` gives."""
    listed_by: str | None = None
    """Method of the index whose first and last rows alone are scored; None: all rows are."""

    @property
    def has_gradients(self) -> bool:
        """Whether a score is that of two gradients as they are: it has an exact value, and a share of each token."""
        return self.from_index and not self.is_solved

    reranks: bool = False
    """Whether unprojected gradients decide its order, unless told not to."""


TRACE_METHODS: dict[str, TraceMethod] = {
    "cosine": TraceMethod("cosine of gradients, by the index' vectors", cosine=True, from_index=True, reranks=True),
    "dot": TraceMethod(
        "inner product of gradients, by the index' vectors (TracIn, compressed)", from_index=True, reranks=True
    ),
    "rapidin": TraceMethod("RapidIn: dot, on an index of --projection shuffle_sum --normalise layer", from_index=True),
    "reach": TraceMethod(
        "how far an example moved any of the answer's tokens, either way", scorer="reach", is_influence=False
    ),
    "datainf": TraceMethod(
        "inner product under DataInf's curvature, in the index' sketches",
        scorer="datainf",
        from_index=True,
        is_solved=True,
    ),
    "trak": TraceMethod(
        "inner product under the rows' own second moment, in the index' sketches",
        scorer="trak",
        from_index=True,
        is_solved=True,
    ),
    "trackstar": TraceMethod("cosine under the second moment of rows and questions, likewise", scorer="trackstar"),
    "ekfac": TraceMethod(
        "inner product of gradients divided by the loss' curvature",
        scorer="ekfac",
        listed_by="trak",
    ),
    "replay": TraceMethod(
        "effect through every step of a run of train --replayable, in nats", scorer="replay", needs_run=True
    ),
    "source": TraceMethod(
        "effect through a few segments of such a run, each with its curvature", scorer="source", needs_run=True
    ),
    "tracin": TraceMethod("inner product of unprojected gradients, without the index' vectors"),
    "tracin_layer": TraceMethod("the same, each layer divided by its norm", normalise=True),
    "tracin_cosine": TraceMethod("cosine of unprojected gradients", cosine=True),
    "embedding": TraceMethod("cosine of the model's own hidden states", scorer="rds+", is_influence=False),
    "bm25": TraceMethod("words in common", scorer="bm25", is_influence=False),
    "random": TraceMethod("chance", scorer="random", is_influence=False),
}


def default_trace_method(*, has_curvature: bool) -> str:
    """Name of the method that is used where nobody says otherwise."""
    return "ekfac" if has_curvature else "cosine"


def trace_method(name: str) -> TraceMethod:
    """One way to score examples for a query, by its name.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(TRACE_METHODS, name, "--method")


CODECS: dict[str, str] = {
    "float32": "the numbers themselves",
    "bfloat16": "8 bits of exponent, 7 of fraction",
    "float16": "5 bits of exponent, 10 of fraction",
    "int8": "-127 to 127, scaled by the row's largest",
    "int4": "-7 to 7, scaled by the row's largest",
    "onebit": "signs, scaled by the row's mean magnitude",
}
"""How vectors are stored; `indexing.codecs.CODECS` has the codecs."""


def check_codec(name: str) -> None:
    """Refuse the name of no codec.

    Raises:
        UnknownNameError: The message lists those there are.
    """
    _lookup(CODECS, name, "--codec", "codec")


def gradient_methods() -> list[str]:
    """Names of the methods whose scores are of two gradients as they are, by the index' vectors."""
    return [name for name, method in TRACE_METHODS.items() if method.has_gradients]


def index_methods() -> list[str]:
    """Names of the methods that score by the index' vectors."""
    return [name for name, method in TRACE_METHODS.items() if method.from_index]


RECOVER_METHODS: dict[str, str] = {
    "calibrated": "all evidence in one logistic model, fitted on a shadow that was fine-tuned in the same way",
    "nnls": "part in the non-negative sum of unit gradients that matches the weight difference, mean direction removed",
    "matching": "residual matching pursuit",
    "cosine": "SELECT: the greedy that grows the cosine of the summed gradients",
    "row_cosine": "cosine of the row's own gradient at theta_f",
    "ghost": "inner product of the row's own gradient, mean over points",
    "loss_drop": "how far the loss fell",
    "relative_loss_drop": "the same, as a share of the loss under theta_0",
    "p_min": "minus the loss under theta_f",
    "random": "chance",
}
"""How `recover` scores rows."""


def recover_method(name: str) -> str:
    """What a method of `recover` does.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(RECOVER_METHODS, name, "--method")


@dataclass(frozen=True)
class LawEntry:
    """One mixing law."""

    implementation: str
    """`module:Class`."""
    about: str
    cost: str
    """The cost of a fit to n mixtures of K domains, for each evaluation set."""
    source: str

    def load(self) -> Any:
        """Import the class."""
        return _load(self.implementation)


MIXING_LAWS: dict[str, LawEntry] = {
    "exp": LawEntry(
        "whence.mixing.laws.exponential:ExpLaw",
        "c + exp(b + t . r)",
        "4 starts of about 25 steps of n K^2",
        "arXiv 2403.16952",
    ),
    "ridge": LawEntry(
        "whence.mixing.laws.ridge:RidgeLaw",
        "linear in r and ln(r + eps)",
        "n K^2",
        "doi 10.1080/00401706.1970.10488634",
    ),
    "lightgbm": LawEntry(
        "whence.mixing.laws.boosted:BoostedLaw",
        "boosted trees (extra: laws)",
        "hundreds of trees a fold",
        "arXiv 2407.01492",
    ),
}


def law_entry(name: str) -> LawEntry:
    """A mixing law's entry.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(MIXING_LAWS, name, "--law")


def mixing_law(name: str) -> Any:
    """Class of a mixing law; `mixing.protocols.FitMixingLaw` says what it does."""
    return law_entry(name).load()


def scorer(name: str) -> Any:
    """Class of a scorer; call it as `selection.protocols.MakeScorer`.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return scorer_entry(name).load()


def scorer_entry(name: str) -> ScorerEntry:
    """What a scorer needs.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(SCORERS, name, "--method")


def graded_entry(name: str) -> ScorerEntry:
    """What a method that is graded needs.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(GRADED, name, "--methods")


def selector_entry(name: str) -> Entry:
    """A selector's entry.

    Raises:
        UnknownNameError: No such name; the message lists those there are.
    """
    return _lookup(SELECTORS, name, "--selector")


def selector(name: str) -> Any:
    """Class of a selector; call it as `selection.protocols.MakeSelector`."""
    return selector_entry(name).load()


def _lookup(table: dict[str, Any], name: str, flag: str, kind: str = "method") -> Any:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UnknownNameError(f"{flag} {name}: no such {kind}.{hint} There are {', '.join(table)}.")
    return table[name]
