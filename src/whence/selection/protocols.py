"""The Protocols that methods implement, and the settings that decide what vector an example becomes.

One alphabet in shapes: `b` batch, `t` tokens, `i` a layer's input, `o` its output, `k` sketch width, `n` training
examples, `q` queries, `s` targets, `c` checkpoints, `l` layers, `v` vocabulary.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Float32
from torch import Tensor

from whence.corpus.reading import Row
from whence.corpus.tokens import Encoded
from whence.errors import SettingError
from whence.models.loading import LoadedModel

VIEWS = ("sgd", "adam")
ADAM_MODES = ("torch", "less")

Shapes = Mapping[str, tuple[int, int]]
"""`(o, i)` of every traced layer by name, in the model's own order."""


@runtime_checkable
class Projection(Protocol):
    """A linear map from a model's gradient to `k` numbers, made of one map a layer.

    The whole gradient's sketch is the sum over layers of `columns(layer)` filled with the layer's block: projections
    that concatenate give every layer its own columns, projections that add give every layer all of them. For each
    seed it is the same map on any device, worker and batch size, and over seeds its inner products are unbiased:
    E <sketch(x), sketch(y)> = <x, y>.
    """

    width: int
    """`k`, the numbers a row."""
    forms_gradient: bool
    """Whether `__call__` forms all examples' gradients [b o i]: then it gets so few at a time as memory bears."""

    def columns(self, layer: str) -> slice:
        """Where in a row the layer's block goes."""
        ...

    def __call__(self, a: Float[Tensor, "b t i"], g: Float[Tensor, "b t o"], *, layer: str) -> Float[Tensor, "b k"]:
        """Sketch of `sum over t of g_t a_t^T`, as fp32; padded positions have g = 0.

        `a` and `g` are fp32, or both of a model's own 16-bit type on a GPU: `numerics.product` sums those in fp32.
        """
        ...

    def flat(self, gradient: Float[Tensor, "b o i"], *, layer: str) -> Float[Tensor, "b k"]:
        """The same of a gradient that is formed already: what an optimizer makes of one is no product of two."""
        ...


class MakeProjection(Protocol):
    """What the catalogue lists: the layers' shapes, a width (None for the method's own) and a seed."""

    def __call__(self, shapes: Shapes, *, width: int | None = None, seed: int = 0) -> Projection: ...


@dataclass(frozen=True, kw_only=True)
class GradientSpace:
    """All that decides what vector an example becomes. A query is scored only in the space of its index."""

    layers: str | None = None
    """Patterns of layer names; None for the default choice of `LoadedModel.layers`."""
    reduction: str = "mean"
    """Over an example's supervised tokens: "mean", as a Trainer's loss of one row, or "sum"."""
    normalise: str = "none"
    """"layer" divides each layer's gradient by its norm, as RapidIn does; a score then weighs all layers alike."""
    view: str = "sgd"
    """The optimizer's view of a training example: "sgd" takes its gradient as it is, "adam" as Adam with the
    checkpoint's moments would (see `adam`). Queries are plain gradients under both."""
    adam_mode: str = "torch"
    """Of the view adam: "torch", the step that AdamW really takes, or "less", as LESS' released code has it."""
    projection: str | None = None
    """Name in `catalogue.PROJECTIONS`; None: `two_sided`, or `count_sketch` where the view needs the whole gradient."""
    width: int | None = None
    """Of the projection: a side of `two_sided` (16 gives 16 x 16 a layer), the total of the others; None: its own."""
    seed: int = 0
    shuffle_rounds: int | None = None
    """RapidIn's lambda, of the projection `shuffle_sum`: rounds of two shuffles each; None for its own 20."""

    def __post_init__(self):
        if self.shuffle_rounds is not None and self.projection != "shuffle_sum":
            raise SettingError(f"--shuffle-rounds {self.shuffle_rounds}: it belongs to --projection shuffle_sum alone")
        if self.shuffle_rounds is not None and self.shuffle_rounds < 1:
            raise SettingError(f"--shuffle-rounds {self.shuffle_rounds}: a positive number is expected")
        if self.reduction not in ("mean", "sum"):
            raise SettingError(f"--reduction {self.reduction}: choose mean or sum")
        if self.normalise not in ("none", "layer"):
            raise SettingError(f"--normalise {self.normalise}: choose none or layer")
        if self.view not in VIEWS:
            more = "; frozen-v is a view of `whence select`, on an index of --view sgd"
            raise SettingError(
                f"--view {self.view}: choose one of {', '.join(VIEWS)}{more if self.view == 'frozen-v' else ''}"
            )
        if self.adam_mode not in ADAM_MODES:
            raise SettingError(f"--adam-mode {self.adam_mode}: choose one of {', '.join(ADAM_MODES)}")
        if self.width is not None and self.width < 1:
            raise SettingError(f"--width {self.width}: a positive number is expected")

    @property
    def sketch(self) -> str:
        """Name of the projection."""
        if self.projection is not None:
            return self.projection
        return "count_sketch" if self.view == "adam" else "two_sided"

    def as_json(self) -> dict[str, Any]:
        """The fields by name, for a manifest.

        `normalise` is left out where it is "none", `adam_mode` where the view is another, and `shuffle_rounds` where it
        is not set, as in an index that was built before there was a choice.
        """
        unused = {"normalise"} if self.normalise == "none" else set()
        unused |= {"adam_mode"} if self.view != "adam" else set()
        unused |= {"shuffle_rounds"} if self.shuffle_rounds is None else set()
        return {name: value for name, value in asdict(self).items() if name not in unused} | {"projection": self.sketch}


@dataclass(frozen=True)
class QueryText:
    """A query as a scorer reads it: as text and as token ids."""

    prompt: str
    completion: str
    encoded: Encoded
    """Prompt and completion, laid out like a row of the corpus; the completion is supervised."""


@dataclass(frozen=True)
class Target:
    """What scores are for: queries that are asked together, such as the examples of one task."""

    name: str
    queries: Sequence[QueryText]

    def __post_init__(self):
        if not self.queries:
            raise SettingError(f"target {self.name!r} has no query; a target needs at least one example")


@runtime_checkable
class View(Protocol):
    """What a scorer reads of an indexed corpus. Rows always come in the index's own order."""

    @property
    def rows(self) -> int:
        """`n`."""
        ...

    @property
    def tokens_per_batch(self) -> int:
        """Most tokens of one forward pass, padding included."""
        ...

    def examples(self) -> Iterator[Row]:
        """Every corpus row, also those that are never ranked."""
        ...

    def encoded(self) -> Iterator[Encoded]:
        """The same rows as token ids, cut as the index cut them."""
        ...

    def model(self) -> LoadedModel:
        """The model of the last checkpoint."""
        ...


@runtime_checkable
class GradientView(View, Protocol):
    """A view of an indexed corpus that shows its vectors too."""

    @property
    def weights(self) -> Float32[Tensor, " c"]:
        """Share of each checkpoint in a score; they sum to 1."""
        ...

    @property
    def blocks(self) -> Mapping[str, tuple[slice, int]]:
        """Of every traced layer: its columns in a vector, and the weights that it has. Layers may share columns."""
        ...

    def vectors(self) -> Iterator[tuple[Float32[Tensor, "c n k"], Bool[Tensor, " n"]]]:
        """Every row's vectors, some rows at a time, and whether a row can be ranked; those that cannot are zeros."""
        ...

    def query_vectors(self, queries: Sequence[Encoded]) -> Float32[Tensor, "c q k"]:
        """Plain gradients of queries, whatever the rows' view is; not finite where a query has none."""
        ...

    def norms(self, vectors: Float32[Tensor, "c s k"]) -> Float32[Tensor, "c s"]:
        """Of query vectors, or of means of them: what a cosine divides its query's side by."""
        ...

    def scores(self, vectors: Float32[Tensor, "c s k"], *, cosine: bool) -> Float32[Tensor, "s n"]:
        """Inner products with every row, summed over checkpoints by their weights; -inf where a row cannot be ranked.

        With `cosine` the row's side is divided by its norm. The other side is taken as it is.
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    """A score of every training example for every target, from whatever a `View` shows.

    A score says how much an example should help with a target: larger is more helpful, always. Its unit is the
    scorer's own, so scores of different scorers compare by rank alone. A row that has no score (no tokens, states
    that are not finite) is given -inf and must not be ranked; NaN is never returned.

    A scorer that compares rows with a query at a time gives a target the mean over those of its queries that have a
    finite score. A target that nothing can be compared with is refused by name: skipping it would answer another
    question than the one that was asked.
    """

    def __call__(self, view: View, targets: Sequence[Target]) -> Float32[Tensor, "s n"]:
        """Scores, on the CPU: a row for each target, a column for each row of the corpus."""
        ...


class MakeScorer(Protocol):
    """What the catalogue lists. A scorer without randomness takes a seed too, and does not use it."""

    def __call__(self, *, seed: int = 0) -> Scorer: ...


class Pick(NamedTuple):
    """A row that a selector would take next."""

    row: int
    score: float
    """What it is ranked by, before any noise."""
    target: int | None
    """The target that it is taken for; None where no single one is."""


@runtime_checkable
class Selector(Protocol):
    """An order over rows, from scores. What may be taken, and how much, is for `selectors.choice` to say.

    A row comes at most once, and one without a finite score (NaN, either infinity) never: a score that is not finite
    counts for nothing, neither for its row nor against another. Equal scores go by the lower row number.
    """

    def __call__(self, scores: Float32[Tensor, "s n"]) -> Generator[Pick, bool, None]:
        """Rows, best first. Send back whether a pick was taken: a target that was refused one may go on to its next."""
        ...


class MakeSelector(Protocol):
    """What the catalogue lists."""

    def __call__(self, *, temperature: float = 0.0, seed: int = 0) -> Selector:
        """Take the best rows at temperature 0, else draw them without replacement; see `selectors.sampling`."""
        ...
