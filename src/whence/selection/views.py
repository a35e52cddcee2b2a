"""What scorers read: an index, or a corpus that has none.

Rows come in the order of the corpus. They are tokenised and cut as the index cut them; without an index, as `index`
would cut them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from whence.corpus.layouts import Row
from whence.corpus.reading import Corpus
from whence.corpus.tokens import Encoded, encode
from whence.errors import SettingError
from whence.indexing.opening import Index
from whence.indexing.vectors import example_vectors
from whence.models.loading import LoadedModel, layer_shape
from whence.selection.protocols import GradientView
from whence.turns import one_at_a_time


@dataclass(frozen=True)
class IndexView(GradientView):
    """A complete index, as scorers read it."""

    index: Index

    @property
    def columns(self) -> Mapping[str, str]:
        """Names that Whence reads, and the corpus' own in their place."""
        return self.index.columns

    @property
    def rows(self) -> int:
        """`n`."""
        return self.index.store.rows

    @property
    def tokens_per_batch(self) -> int:
        """The most tokens of one pass."""
        return self.index.tokens_per_batch

    def ids(self) -> Iterator[str]:
        """The id of every row."""
        for part in range(len(self.index.store.manifest.parts)):
            yield from (row["id"] for row in self.index.store.read_part(part))

    def examples(self) -> Iterator[Row]:
        """Every row."""
        for part in range(len(self.index.store.manifest.parts)):
            for row in self.index.store.read_part(part):
                yield json.loads(row["row"])

    def encoded(self) -> Iterator[Encoded]:
        """The same rows as token ids."""
        longest = self.index.store.manifest.settings["max_tokens"]
        return (encode(row, self.model().tokenizer, longest) for row in self.examples())

    def model(self) -> LoadedModel:
        """The model of the last checkpoint."""
        return self.index.model()

    @property
    def weights(self) -> Float32[Tensor, " c"]:
        """Share of each checkpoint in a score."""
        return torch.tensor(self.index.weights, dtype=torch.float32)

    @property
    def blocks(self) -> Mapping[str, tuple[slice, int]]:
        """Columns and weights of each layer."""
        model = self.index.model()
        projection, layers = self.index.projection(model), self.index.layers(model)
        return {
            name: (projection.columns(name), outputs * inputs)
            for name, (outputs, inputs) in ((name, layer_shape(layer)) for name, layer in layers.items())
        }

    def vectors(self) -> Iterator[tuple[Float32[Tensor, "c n k"], Bool[Tensor, " n"]]]:
        """Decoded vectors, a part of the index at a time."""
        store = self.index.store
        for part in range(len(store.manifest.parts)):
            shards = [store.shard(checkpoint, part) for checkpoint in range(len(store.manifest.checkpoints))]
            decoded = [store.codec.decode(shard.vectors, shard.scale, store.manifest.width) for shard in shards]
            yield torch.stack(decoded), torch.stack([shard.status == 0 for shard in shards]).all(0)

    @one_at_a_time
    def query_vectors(self, queries: Sequence[Encoded]) -> Float32[Tensor, "c q k"]:
        """Gradients of queries under every checkpoint; each checkpoint's model is loaded once."""
        index = self.index
        out = torch.zeros(len(index.weights), len(queries), index.store.manifest.width)
        for checkpoint in reversed(range(len(index.weights))):  # the last one is loaded already
            model = index.model(checkpoint)
            gradients = example_vectors(
                model, index.layers(model), index.projection(model), list(queries), settings=index.settings
            )
            out[checkpoint] = gradients.vectors
        return out

    def norms(self, vectors: Float32[Tensor, "c s k"]) -> Float32[Tensor, "c s"]:
        """L2 norms."""
        return vectors.norm(dim=2)

    def scores(self, vectors: Float32[Tensor, "c s k"], *, cosine: bool) -> Float32[Tensor, "s n"]:
        """Scores of every row."""
        out = torch.empty(vectors.shape[1], self.rows, dtype=torch.float32)
        store = self.index.store
        for first, block in store.scores(vectors, self.weights, cosine=cosine, is_unit_mean=cosine):
            out[:, first : first + block.shape[1]] = block
        return out


def refuse_contrasts(
    view: "IndexView | CorpusView", reason: str, remedy: str = "Index the corpus without that flag."
) -> None:
    """Refuse an index whose rows are contrasts of two answers, where something else than its vectors reads them.

    Args:
        view: What is read.
        reason: What cannot be done with contrasts, as half a sentence.
        remedy: A sentence that says what mends it.

    Raises:
        SettingError: It is one.
    """
    if isinstance(view, IndexView) and view.index.has_contrasts:
        raise SettingError(
            f"{view.index.store.place.root}: its rows are contrasts of two answers (--preferences contrast), and "
            f"{reason}. {remedy}"
        )


@dataclass(frozen=True)
class CorpusView:
    """A corpus without an index. Its rows are read again for each pass."""

    corpus: Corpus
    loaded: LoadedModel | None = None
    """None for scorers of text alone."""
    max_tokens: int | None = None
    tokens_per_batch: int = 4096

    @property
    def rows(self) -> int:
        """`n`."""
        return self._count

    @property
    def columns(self) -> Mapping[str, str]:
        """Names that Whence reads, and the corpus' own in their place."""
        return self.corpus.columns

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self.corpus)

    def ids(self) -> Iterator[str]:
        """The id of every row."""
        return (example.id for example in self.corpus)

    def examples(self) -> Iterator[Row]:
        """Every row."""
        return (example.row for example in self.corpus)

    def encoded(self) -> Iterator[Encoded]:
        """The same rows as token ids."""
        model = self.model()
        longest = min((limit for limit in (self.max_tokens, model.context) if limit), default=None)
        return (encode(row, model.tokenizer, longest) for row in self.examples())

    def model(self) -> LoadedModel:
        """The model that was named.

        Raises:
            SettingError: No model was named.
        """
        if self.loaded is None:
            raise SettingError(f"{self.corpus.name}: this method reads a model, and a corpus has none: add --model")
        return self.loaded
